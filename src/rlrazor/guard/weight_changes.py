"""Where in the weights two models differ, layer by layer; they are read a tensor at a time."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlrazor import drift
from rlrazor.errors import RazorError

_AROUND_TEXT = ("model", "language_model", "text_model")
_BESIDE_TEXT = re.compile(r"(?:^|[._])(visual|vision|vit|audio|image|video|speech|vpm|apm)\w*\.")


@dataclass(frozen=True)
class WeightChange:
    """The change of some weights: L2 norms of the change and of what they were, and the share exactly as before."""

    name: str
    parameters: int
    l2: float
    norm: float
    unchanged: float

    @property
    def relative(self) -> float:
        """The change as a share of what they were."""
        return self.l2 / self.norm if self.norm else 0.0


def changes(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], names: tuple[str, str]
) -> tuple[list[WeightChange], list[str]]:
    """A row per layer, and per weight outside of them, in the order of the model; and notes of what has no pair.

    `names`: what the two models are called. Raises RazorError where they do not belong together, and for weights that
    are not finite.
    """
    paired = _paired(list(base), list(tuned))
    if not paired:
        raise RazorError(f"{names[1]} and {names[0]} have no weight in common: one is not tuned from the other.")
    alone = [name for name in base if name not in paired]
    alone += sorted(set(tuned) - set(paired.values()))
    notes = []
    if alone:
        notes.append(
            f"{len(alone)} weights are in one of the two only, such as {alone[0]} (a head that is tied, say): they are "
            "not among the changes."
        )
    layers: dict[str, list[WeightChange]] = {}
    unmerged: list[str] = []
    for name in sorted(paired, key=_natural):
        try:
            before, after = base[name], tuned[paired[name]]
        except RazorError as error:
            unmerged.append(str(error))
            continue
        if before.shape != after.shape:
            raise RazorError(
                f"{name} has shape {tuple(after.shape)} in {names[1]} and {tuple(before.shape)} in {names[0]}: "
                "one is not tuned from the other."
            )
        if any(one.is_floating_point() and one.itemsize == 1 for one in (before, after)):
            unmerged.append(f"{name} is quantised (FP8), and its bits are no numbers without their scale.")
            continue
        after = after.to(before.device)
        if not after.isfinite().all():
            raise RazorError(f"The weights of {names[1]} are damaged: {name} is NaN or infinite in places.")
        measured = drift.measure_weights({name: before}, {name: after}, spectra=False)
        norm = float(before.double().norm())
        layers.setdefault(_layer(name), []).append(
            WeightChange(
                name,
                before.numel(),
                measured["weight_l2"],
                norm,
                measured["weight_sparsity"],
            )
        )
    if unmerged:
        notes.append(f"{len(unmerged)} weights are not among the changes. {unmerged[0]}")
    return [total(layer, parts) for layer, parts in layers.items()], notes


def _paired(base: Sequence[str], tuned: Sequence[str]) -> dict[str, str]:
    """Which weight of the one is which of the other: by name, or by what follows a prefix such as `transformer.`.

    A base may have been saved as the bare transformer, without the prefix that a model with an LM head gives it; a
    model that reads images may have been tuned and saved as the text model in it.
    """
    there = set(tuned)
    shared = {name: name for name in base if name in there}
    if len(shared) < min(len(there), len(base)) / 2:
        ours, theirs = _by_text_name(base), _by_text_name(tuned)
        shared |= {ours[text]: theirs[text] for text in ours if text in theirs}
    if shared:
        return shared
    prefixed = {name: rest for name in tuned if (rest := name.partition(".")[2]) in set(base)}
    if prefixed:
        return {rest: name for name, rest in prefixed.items()}
    return {name: rest for name in base if (rest := name.partition(".")[2]) in there}


def _by_text_name(names: Sequence[str]) -> dict[str, str]:
    """Names by what is left without the parts that say which model a language model is in; those left once only."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(".".join(part for part in name.split(".") if part not in _AROUND_TEXT), []).append(name)
    return {text: alike[0] for text, alike in found.items() if len(alike) == 1}


def total(name: str, parts: Sequence[WeightChange]) -> WeightChange:
    """All of them as one; of none, no numbers."""
    if not parts:
        return WeightChange(name, 0, math.nan, math.nan, math.nan)
    size = sum(part.parameters for part in parts)
    unchanged = sum(part.unchanged * part.parameters for part in parts) / size
    l2, norm = (math.hypot(*values) for values in zip(*((part.l2, part.norm) for part in parts), strict=True))
    return WeightChange(name, size, l2, norm, unchanged)


def _layer(name: str) -> str:
    found = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", name)
    beside = _BESIDE_TEXT.search(name[: found.start(1)]) if found else None
    if found and beside:
        return f"{beside[1]} layer {found[1]}"
    return f"layer {found[1]}" if found else name.removesuffix(".weight").removeprefix("model.")


def _natural(name: str) -> list[Any]:
    """Layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
