"""The sections of the report, one per study. To add one: its module, an import, a line in `SECTIONS`.

A study is `OUT/studies/NAME.json` and `OUT/studies/NAME.parquet`; those of `OF_SWEEP` read the sweep, where it applies.
A builder turns a `Study` into a `Section`, and imports both from `rlrazor.report.study`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import polars as pl

from rlrazor.analysis import law
from rlrazor.errors import RazorError, cause_of
from rlrazor.report import tables
from rlrazor.report.sections import (
    baselines,
    distilled,
    dynamics,
    forecasts,
    kl_laws,
    kl_minimal,
    kl_penalty,
    off_policy,
    optimizers,
    precision,
    predictors,
    quadrants,
    representation,
    unrelated_prior,
)
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import Sweep
from rlrazor.runs.records import BASE, JSON

__all__ = ["SECTIONS", "Section", "Study", "build", "in_page_order", "load_studies", "studies_of"]


def _theory(study: Study) -> Section:
    from rlrazor.studies import theory

    return theory.section(study)


# In the order of the page.
SECTIONS: Mapping[str, Callable[[Study], Section]] = {
    "kl-laws": kl_laws.section,
    "forecasts": forecasts.section,
    "predictors": predictors.section,
    "precision": precision.section,
    "representation": representation.section,
    "dynamics": dynamics.section,
    "theory": _theory,
    "quadrants": quadrants.section,
    "off-policy": off_policy.section,
    "optimizers": optimizers.section,
    "kl-penalty": kl_penalty.section,
    "unrelated-prior": unrelated_prior.section,
    "kl-minimal": kl_minimal.section,
    "baselines": baselines.section,
    "distilled": distilled.section,
}

OF_SWEEP: Mapping[str, Callable[[Study], bool]] = {
    "kl-laws": kl_laws.applies,
    "predictors": predictors.applies,
    "representation": representation.applies,
    "quadrants": quadrants.applies,
}
WITHOUT_TABLE = ("theory",)
_OF_DAMAGE = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, StopIteration)
"""What the numbers of a study without a table lead to where they are not those that its command writes."""


def build(study: Study) -> Section:
    """The study's section, its figure called as itself.

    Raises RazorError as its builder does, and where the study's files lack what its builder reads.
    """
    try:
        section = SECTIONS[study.name](study)
    except (pl.exceptions.PolarsError, *_OF_DAMAGE) as error:
        if isinstance(error, _OF_DAMAGE) and study.name not in WITHOUT_TABLE:
            raise
        raise RazorError(
            f"The files of the study {study.name} lack what its section is made from ({cause_of(error).rstrip('.')}): "
            "run the same command again."
        ) from error
    return replace(section, figure=replace(section.figure, name=study.name))


def in_page_order(studies: Iterable[Study]) -> list[Study]:
    """The studies as the page shows them."""
    order = list(SECTIONS)
    return sorted(studies, key=lambda study: order.index(study.name))


def studies_of(sweep: Sweep) -> list[Study]:
    """The studies that need no runs of their own, where the sweep has measured what they are about.

    None of a calibration: of what its runs say, its law has the last word.
    """
    if sweep.is_calibration:
        return []
    studies = [Study(name, sweep.config, sweep.table, sweep.points, sweep.bases, of_sweep=True) for name in OF_SWEEP]
    return [study for study in studies if OF_SWEEP[study.name](study)]


def load_studies(folder: Path) -> list[Study]:
    """Read what studies left in `folder`/studies, in the order of the page; empty where there is none.

    Raises RazorError for a file that is damaged or incomplete, a description without its table, and a name that no
    section knows.
    """
    # A table alone was being written when its process was killed: the same command writes both anew.
    names = {path.stem for path in (folder / "studies").glob("*.json")}
    unknown = sorted(names - set(SECTIONS))
    if unknown:
        raise RazorError(
            f"{folder / 'studies'} holds a study named {unknown[0]!r}, which this rlrazor does not know: "
            f"delete its files, or use the version that made it. Known are {', '.join(SECTIONS)}."
        )
    return [_read(folder / "studies", name) for name in SECTIONS if name in names]


def _read(folder: Path, name: str) -> Study:
    description = _read_description(folder / f"{name}.json", name)
    if name in WITHOUT_TABLE:
        return Study(name, description)
    path = folder / f"{name}.parquet"
    table = tables.read_table(path)
    points, bases = law.distinct(table), table.filter(pl.col("method") == BASE)
    if points.is_empty():
        raise RazorError(f"{path} holds base policies only: run the same command again.")
    unbased = sorted(set(points["seed"]) - set(bases["seed"]))
    if unbased:
        raise RazorError(f"{path} has no base policy for seed {unbased[0]}: run the same command again.")
    return Study(name, description, table, points, bases)


def _read_description(path: Path, name: str) -> JSON:
    from rlrazor.report.description import StudyDescription, TheoryDescription

    description = tables.described(path, TheoryDescription if name in WITHOUT_TABLE else StudyDescription)
    if description["name"] != name:
        raise RazorError(f"{path} describes a study named {description['name']!r}: run the same command again.")
    return description
