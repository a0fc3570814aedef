"""What `which_probe` asks, of language models: KL on which text? For sweeps that measured several (`--probes`)."""

from rlrazor.analysis.forecast import PROBE
from rlrazor.experiments.language.config import PROBES
from rlrazor.experiments.language.methods import METHODS
from rlrazor.report.measures import label_of
from rlrazor.report.study import Kind, Section, Study
from rlrazor.studies.engine import KL, section_of
from rlrazor.studies.which_probe import ProbeColumns, examined, figure, finding, tables

NAME = "text-probes"
FURTHER = tuple(f"kl_forward_on_{name}" for name in PROBES)
MEASURES = {
    KL: "the new task’s prompts",
    **{column: label_of(column).removeprefix("KL on ") for column in (PROBE, *FURTHER)},
}
DRAWN = (KL, "kl_forward_on_self", "kl_forward_on_prior")


def applies(study: Study) -> bool:
    """Whether the sweep measured KL on further inputs: a sequence, and digits, have columns of such names unasked."""
    return bool(dict(study.description.get("config", {})).get("probes"))


def protects(method: str) -> bool:
    """Whether a method holds the policy to what it could do: by a penalty, or by old examples."""
    plain, _, penalty = method.partition("+")
    return bool(penalty) or (plain in METHODS and METHODS[plain].protection is not None)


def section(study: Study) -> Section:
    """The laws of the probes side by side."""
    probes = ProbeColumns(_measured(study), DRAWN, protects)
    found = examined(study, probes)
    held, free = (
        ", ".join(study.label(method) for method in study.methods if protects(method) == is_held) or "none"
        for is_held in (True, False)
    )
    numbers = {"held": held, "free": free, "probe": str(study.description.get("probe", ""))}
    shown = figure(study, found, probes)
    return section_of(study, NAME, finding(found), shown, tables(study, found), numbers=numbers)


def _measured(study: Study) -> dict[str, str]:
    """The probes; without the generic one where that is among the others."""
    points = study.points
    others = [points[name] for name in FURTHER if name in points.columns]
    is_twice = PROBE in points.columns and any(points[PROBE].equals(other, check_names=False) for other in others)
    return {column: name for column, name in MEASURES.items() if not (is_twice and column == PROBE)}


KIND = Kind(section, applies)
