"""The studies: each answers one question with a small grid of runs of its own, in one file that holds all of it.

`studies/NAME.py` has a `STUDY`: which runs it asks for (`grids`) and the section of the report that they become
(`section`). `studies/NAME.md` is its text. How to write one is told in `rlrazor.studies.engine`; then it needs a line
in `STUDIES` below, and its place in `PAGE`. Modules are imported when they are asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from rlrazor.errors import RazorError

if TYPE_CHECKING:
    from rlrazor.report.study import Kinds, Section, Study
    from rlrazor.studies.grids import Grid


class Definition(Protocol):
    """A study, as the runner and the report take it: a module's `STUDY`."""

    @property
    def grids(self) -> "Callable[[bool], list[Grid]]":
        """Its runs; the quick ones where that is asked for."""

    @property
    def section(self) -> "Callable[[Study], Section]":
        """The part of the report that its table becomes."""


STUDIES: Mapping[str, str] = {
    name: f"rlrazor.studies.{name.replace('-', '_')}"
    for name in (
        *("precision", "dynamics", "quadrants", "off-policy", "optimizers", "kl-penalty", "unrelated-prior"),
        *("kl-minimal", "baselines", "which-probe", "distilled"),
    )
}
"""Name -> module, of those with runs of their own."""

OF_THE_SWEEP = ("predictors", "representation")
"""Analyses that read the sweep itself and need no runs of their own."""

THEORY = "theory"  # needs no runs at all, but looks at the plain RL runs of the sweep and of these, if they are there
WITH_RL = ("quadrants", "baselines")

SEQUENCES = ("continual", "own-sequence")  # of tables of stages, and then first on the page
STATES = "states"  # of sweeps of robots, which measure KL on states of the new task and of the prior ones
TEXT_PROBES = "text-probes"  # of sweeps of language models that measured KL on further inputs

PAGE = (
    *SEQUENCES,
    *(
        "successes",
        "learning-rates",
        "interactions",
        "items",
        "kl-laws",
        TEXT_PROBES,
        STATES,
        "forecasts",
        "predictors",
        "precision",
        "representation",
        "dynamics",
    ),
    *(THEORY, "quadrants"),
    *("off-policy", "optimizers", "kl-penalty", "unrelated-prior", "kl-minimal", "baselines"),
    *("which-probe", "distilled"),
)
"""Every section, in the order of the page."""

ANALYSES = tuple(name for name in PAGE if name in (*STUDIES, *OF_THE_SWEEP, THEORY))
"""What `razor reproduce parity-mnist --analysis` takes."""


def load(name: str) -> Definition:
    """The study of this name."""
    return cast(Definition, import_module(STUDIES[name]).STUDY)


def kinds() -> "Kinds":
    """The sections that a report may have, those of studies among the report's own."""
    from rlrazor.report.sections import KINDS
    from rlrazor.report.study import Kind

    studies = {name: load(name) for name in STUDIES}
    own = {name: study if isinstance(study, Kind) else Kind(study.section) for name, study in studies.items()}
    of_tables = {
        name: f"rlrazor.studies.{name.replace('-', '_')}" for name in (THEORY, *SEQUENCES, TEXT_PROBES, STATES)
    }
    own |= {name: import_module(module).KIND for name, module in of_tables.items()}
    return {name: (KINDS | own)[name] for name in PAGE}


def parse_analyses(text: str) -> tuple[str, ...]:
    """Comma-separated names, or `all`, in the report's order; raises RazorError for an unknown or empty one."""
    names = ANALYSES if text.strip() == "all" else tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in ANALYSES]
    if unknown:
        raise RazorError(f"Unknown analysis {unknown[0]!r:.60}. Analyses: all, {', '.join(ANALYSES)}.")
    return tuple(name for name in ANALYSES if name in names)


def needs_sweep(analyses: Sequence[str]) -> bool:
    """Whether a command with these analyses is about the sweep: one without any, or with some that read it."""
    return not analyses or bool(set(analyses) & set(OF_THE_SWEEP))
