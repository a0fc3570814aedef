"""What drift measures are called, what they are measured on, and what the paper's Table 1 says of them."""

from collections.abc import Mapping
from dataclasses import dataclass

NEW, PRIOR, PROBE, WEIGHTS = "new-task inputs", "prior-task inputs", "unrelated inputs", "weights"
GENERIC = "unlabelled generic prompts"
GROUPS = (NEW, PRIOR, PROBE, WEIGHTS, GENERIC)

LABELS = {  # other measures are called by their column
    "kl_forward": "forward KL",
    "kl_reverse": "reverse KL",
    "kl_correct": "KL on the base’s correct completions",
    "kl_optimal": "KL from the KL-minimal solution",
    "kl_probe": "KL on a generic probe",
    "kl_forward_on_paragraphs": "KL on built-in paragraphs",
    "kl_forward_on_self": "KL on the base’s own texts",
    "kl_forward_on_prior": "KL on the prior tasks’ inputs",
    "kl_forward_on_unlike": "KL on text unlike the prior tasks",
}

_TELLING = ("kl_correct", "kl_optimal", "kl_probe", "kl_forward_on_")  # names that say themselves what of

# What the page fits its laws to, with intervals. A sweep may hold dozens more: see `sections.predictors`.
MAIN_MEASURES = ("kl_forward", "kl_reverse", "total_variation")

SIMILARITIES = ("cka", "cknna", "weight_sparsity")  # 1 for a policy that has not moved

# Table 1 of arXiv:2509.04259: R2 of a quadratic, and its ±.
PAPER: Mapping[str, tuple[float, float]] = {
    "kl_forward": (0.96, 0.01),
    "kl_reverse": (0.93, 0.01),
    "total_variation": (0.80, 0.01),
    "output_l2": (0.56, 0.02),
    "weight_l1": (0.34, 0.02),
    "weight_fisher_l2": (0.58, 0.02),
    "weight_spectral": (0.58, 0.02),
    "activation_l1": (0.52, 0.02),
    "activation_l2": (0.55, 0.02),
}

_OF_INPUTS = {
    "kl_forward": LABELS["kl_forward"],
    "kl_reverse": LABELS["kl_reverse"],
    "kl_forward_per_episode": "forward KL of an episode",
    "kl_reverse_per_episode": "reverse KL of an episode",
    "total_variation": "total variation",
    "output_l2": "output L2",
    "jensen_shannon": "Jensen-Shannon",
    "hellinger": "Hellinger",
    "wasserstein_1": "1-Wasserstein",
    "activation_l1": "activation L1",
    "activation_l2": "activation L2",
    "cka": "1 − CKA",
    "cknna": "1 − CKNNA",
}
_OF_WEIGHTS = {
    "weight_l1": "weight L1",
    "weight_l2": "weight L2",
    "weight_fisher_l2": "weight Fisher L2",
    "weight_spectral": "weight spectral norm",
    "weight_sparsity": "1 − sparsity of the update",
    "weight_rank": "rank of the update",
}
# Of language models, by column: KL per token is that per completion divided by the completion's length.
_OF_COMPLETIONS = {
    **dict.fromkeys(("kl_correct", "kl_optimal"), NEW),
    **{f"kl_{name}_per_token": NEW for name in ("forward", "reverse", "correct")},
    **{
        f"kl_{name}{per}": group
        for per in ("", "_per_token")
        for name, group in (
            *(("probe", GENERIC), ("on_paragraphs", GENERIC), ("on_self", GENERIC)),
            *(("on_prior", PRIOR), ("on_unlike", PROBE)),
        )
    },
}


@dataclass(frozen=True)
class Measure:
    """A drift measure: its column, its name for people, and what it is measured on, one of `GROUPS`."""

    column: str
    label: str
    group: str

    @property
    def full_name(self) -> str:
        """The name and, unless it says so itself or is the weights', the inputs."""
        tells = self.group == WEIGHTS or self.column.startswith(_TELLING)
        return self.label if tells else f"{self.label} on {self.group}"


def label_of(column: str) -> str:
    """A drift measure's name for people."""
    stem = column.removesuffix("_per_token")
    return LABELS.get(stem, stem.replace("_", " ")) + (" per token" if stem != column else "")


MEASURES: Mapping[str, Measure] = {
    one.column: one
    for one in (
        *(
            Measure(f"{column}{suffix}", label, group)
            for suffix, group in (("", NEW), ("_on_prior", PRIOR), ("_on_probe", PROBE))
            for column, label in _OF_INPUTS.items()
        ),
        *(Measure(column, label_of(column), group) for column, group in _OF_COMPLETIONS.items()),
        *(Measure(column, label, WEIGHTS) for column, label in _OF_WEIGHTS.items()),
    )
}
"""By column."""
