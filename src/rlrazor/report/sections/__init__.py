"""The sections of the report that any table of records has, and how sections are made of what a folder holds.

A study is `OUT/studies/NAME.json` and `OUT/studies/NAME.parquet`; a section of the sweep itself reads that. Which names
there are, the caller says: `KINDS` are this package's own, `rlrazor.studies` adds the studies to them.
"""

from dataclasses import replace
from pathlib import Path

import polars as pl

from rlrazor.errors import RazorError, cause_of
from rlrazor.report.sections import (
    forecasts,
    interactions,
    items,
    kl_laws,
    learning_rates,
    predictors,
    representation,
    successes,
)
from rlrazor.report.study import Kind, Kinds, Section, Study
from rlrazor.report.sweep import Sweep, described, study_in
from rlrazor.runs.records import JSON

KINDS: Kinds = {
    successes.NAME: Kind(successes.section, successes.applies),
    learning_rates.NAME: Kind(learning_rates.section, learning_rates.applies),
    interactions.NAME: Kind(interactions.section, interactions.applies),
    items.NAME: Kind(items.section, items.applies),
    "kl-laws": Kind(kl_laws.section, kl_laws.applies),
    "forecasts": Kind(forecasts.section),
    "predictors": Kind(predictors.section, predictors.applies),
    "representation": Kind(representation.section, representation.applies),
}

_OF_DAMAGE = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, StopIteration)
"""What the numbers of a study without a table lead to where they are not those that its command writes."""


def build(study: Study, kinds: Kinds = KINDS) -> Section:
    """The study's section, its figure called as itself.

    Raises RazorError as its builder does, and where the study's files lack what its builder reads.
    """
    kind = kinds[study.name]
    try:
        section = kind.section(study)
    except (pl.exceptions.PolarsError, *_OF_DAMAGE) as error:
        if isinstance(error, _OF_DAMAGE) and kind.has_table:
            raise
        raise RazorError(
            f"The files of the study {study.name} lack what its section is made from ({cause_of(error).rstrip('.')}): "
            "run the same command again."
        ) from error
    return replace(section, figure=replace(section.figure, name=study.name))


def of_sweep(sweep: Sweep, kinds: Kinds) -> list[Study]:
    """The studies that need no runs of their own, where the sweep has measured what they are about.

    Of some sweeps only those that it names itself; none of a calibration, as its law has the last word.
    """
    if sweep.is_calibration:
        return []
    named = sweep.config.get("sections")
    studies = [replace(sweep.study, name=name) for name in kinds if named is None or name in named]
    return [study for study in studies if (applies := kinds[study.name].applies) and applies(study)]


def load_studies(folder: Path, kinds: Kinds) -> list[Study]:
    """Read what studies left in `folder`/studies, in the order of the page; empty where there is none.

    Raises RazorError for a file that is damaged or incomplete, a description without its table, and a name that is not
    among `kinds`.
    """
    # A table alone was being written when its process was killed: the same command writes both anew.
    names = {path.stem for path in (folder / "studies").glob("*.json")}
    unknown = sorted(names - set(kinds))
    if unknown:
        raise RazorError(
            f"{folder / 'studies'} holds a study named {unknown[0]!r}, which this rlrazor does not know: "
            f"delete its files, or use the version that made it. Known are {', '.join(kinds)}."
        )
    return [_read(folder / "studies", name, kind) for name, kind in kinds.items() if name in names]


def _read(folder: Path, name: str, kind: Kind) -> Study:
    description = _read_description(folder / f"{name}.json", name, kind)
    if not kind.has_table:
        return Study(name, description)
    return study_in(name, description, folder / f"{name}.parquet")


def _read_description(path: Path, name: str, kind: Kind) -> JSON:
    from rlrazor.report.description import StudyDescription, TheoryDescription

    description = described(path, StudyDescription if kind.has_table else TheoryDescription)
    if description["name"] != name:
        raise RazorError(f"{path} describes a study named {description['name']!r}: run the same command again.")
    return description
