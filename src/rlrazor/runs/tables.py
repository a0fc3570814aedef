"""Tables of checkpoints, as an experiment writes them and everyone who analyses them reads them."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from rlrazor.errors import RazorError
from rlrazor.runs.records import BASE
from rlrazor.system.files import read_bytes

_WORDS = ("run_id", "trajectory", "method", "schedule")
_NUMBERS = ("lr", "epochs", "seed", "step", "epoch", "new", "prior", "forgetting", "kl_forward")
COLUMNS = (*_WORDS, *_NUMBERS)
"""Of every table of checkpoints."""
_DRIFT = ("kl_forward", "kl_reverse", "kl_probe", "total_variation")
_FRACTIONS = ("new", "prior", "forgetting")
_LARGEST_FRACTION = 2  # of 1: no score is that, nor a drop, and every percentage of a score is
_LARGEST_TABLE = 2**32  # bytes


def read_table(path: Path, columns: Sequence[str] = COLUMNS) -> pl.DataFrame:
    """A table of checkpoints.

    Raises RazorError when it is missing, damaged or without `columns`, or where one that we know holds something else.
    """
    if not path.is_file():
        raise RazorError(f"There is no {path}: give the output folder of a finished `razor reproduce`.")
    try:
        table = pl.read_parquet(read_bytes(path, _LARGEST_TABLE))  # of a path, polars takes [ and * for a pattern
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise RazorError(f"{path} is damaged: delete it and run the same command again.") from error
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise RazorError(f"{path} lacks the columns {', '.join(missing)}: run the same command again.")
    wrong = [name for name in _NUMBERS if name in table.columns and not _has_numbers(table, name)]
    if wrong:
        raise RazorError(f"{path} has no numbers in the columns {', '.join(wrong)}: run the same command again.")
    if (sentence := _wrong_in(table)) is not None:
        raise RazorError(f"{path} is damaged, as {sentence}: run the same command again.")
    return table


def _wrong_in(table: pl.DataFrame) -> str | None:
    """What is wrong with a table of checkpoints, if anything is."""
    there = set(table.columns)
    for name in sorted(there.intersection(_WORDS)):
        if table.schema[name] not in (pl.String, pl.Null):
            return f"the column {name} holds no text"
    if any(table[name].null_count() for name in there.intersection(_WORDS[:3])):
        return "a checkpoint lacks its run or its method"
    for name in sorted(there & {"seed", "step"}):
        if not table.schema[name].is_integer() or table[name].null_count() or (table[name] < 0).any():
            return f"the column {name} holds anything but whole numbers from 0 up"
    for name in sorted(there.intersection(_FRACTIONS)):
        values = table[name].cast(pl.Float64)
        if values.null_count() or not values.is_between(-_LARGEST_FRACTION, _LARGEST_FRACTION).all():
            return f"the column {name} has a value that is no fraction of 1"
    for name in sorted(there.intersection(_DRIFT)):
        if not _has_numbers(table, name):
            return f"the column {name} holds no numbers"
        if table[name].cast(pl.Float64).is_infinite().any():
            return f"the column {name} has an infinite value"
    if {"lr", "method"} <= there and table.filter(pl.col("method") != BASE)["lr"].null_count():
        return "a fine-tuned checkpoint has no lr"
    return None


def _has_numbers(table: pl.DataFrame, name: str) -> bool:
    return table.schema[name].is_numeric() or table.schema[name] == pl.Null
