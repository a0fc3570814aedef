"""What became of each item of the prior tasks at a run's checkpoints, beside what the base made of it: items.parquet.

A row per checkpoint and item:

    step       of the checkpoint
    prior      the prior task, as in a record
    task       the task that the item is of: of a group of lm-eval's one of its tasks, else the prior task itself
    category   of a group's task the group that it is in, such as mmlu_stem, or else its own name; null without a group
    item       its place among the task's rows and the hash of what it says, so that a row which is there twice is two
    base       what the base scored on it; null where that is not known
    tuned      what this checkpoint scored on it; null likewise. In a base's own run it is the same as `base`
    choices    how many answers it offers; null where the model writes its own
    right      the places of the right ones among them; null where the task's score does not go by the likeliest
    base_logprobs, tuned_logprobs    a log-likelihood for each answer, in nats, as the metric compares them: of
                                     `acc_norm` per character of the answer, of `acc_bytes` per byte

Runs without outcomes of items, as those of images, have no such file.

What the items ask is the same whichever model is scored, and lies beside the outcomes of the base: questions.parquet, a
row per item, with `prior`, `task` and `item` as above, the end of its `prompt`, and its `answers`, null where the model
writes its own.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import polars as pl

from rlrazor.errors import RazorError
from rlrazor.system.files import read_bytes

NAME, QUESTIONS = "items.parquet", "questions.parquet"
KEY = ("prior", "task", "item")
Schema = dict[str, "pl.DataType | type[pl.DataType]"]
_LOGPROBS = pl.List(pl.Float64)
_NAMES: Schema = dict.fromkeys(("prior", "task", "category", "item"), pl.String)
_ANSWERS: Schema = {"choices": pl.Int32, "right": pl.List(pl.Int32)}
OWN: Schema = {**_NAMES, "outcome": pl.Float64, **_ANSWERS, "logprobs": _LOGPROBS}
"""The columns of one model's outcomes."""
BESIDE: Schema = {
    **_NAMES,
    **dict.fromkeys(("base", "tuned"), pl.Float64),
    **_ANSWERS,
    **dict.fromkeys(("base_logprobs", "tuned_logprobs"), _LOGPROBS),
}
"""The columns of a checkpoint's outcomes beside the base's."""
SCHEMA: Schema = {"step": pl.Int64, **BESIDE}
ASKED: Schema = {**dict.fromkeys((*KEY, "prompt"), pl.String), "answers": pl.List(pl.String)}
"""The columns of what items ask."""
_LARGEST = 2**32  # bytes


def beside(base: pl.DataFrame | None, own: pl.DataFrame) -> pl.DataFrame:
    """A model's outcomes, of the columns `OWN`, beside the base's; those of a prior task that only one has are null.

    In the order of the model's own items. Raises RazorError where a prior task that both have has other items.
    """
    base = own.clear() if base is None else base
    for (prior,), items in own.group_by("prior", maintain_order=True):
        if len(there := base.filter(pl.col("prior") == prior)):
            _check_same(str(prior), there, items)
    after = {"outcome": "tuned", "logprobs": "tuned_logprobs"}
    before = {"outcome": "base", "logprobs": "base_logprobs"}
    tuned, untuned = own.with_row_index("place").rename(after), base.with_row_index("place").rename(before)
    joined = tuned.join(untuned.select(*KEY, *before.values()), on=KEY, how="left").sort("place")
    gone = (
        untuned.join(own, on=KEY, how="anti")
        .sort("place")
        .with_columns(tuned=pl.lit(None, pl.Float64), tuned_logprobs=pl.lit(None, _LOGPROBS))
    )
    return pl.concat([joined.select(*BESIDE), gone.select(*BESIDE)])


def _check_same(prior: str, base: pl.DataFrame, own: pl.DataFrame) -> None:
    new = len(own.join(base, on=KEY, how="anti"))
    gone = len(base.join(own, on=KEY, how="anti"))
    if new or gone:
        raise RazorError(
            f"The items of the prior task {prior} are not those that the base was scored on: {new} of them are new, "
            f"and {gone} are not there any more. Its data have changed since: give the same ones again, or choose "
            "another --out, and the base is scored anew."
        )


def outcomes_of(items: pl.DataFrame, step: int, whose: str = "tuned") -> pl.DataFrame:
    """One model's outcomes, of the columns `OWN`, at a step; without those that are not known."""
    own = items.filter(pl.col("step") == step, pl.col(whose).is_not_null())
    return own.rename({whose: "outcome", f"{whose}_logprobs": "logprobs"}).select(*OWN)


def of_run(checkpoints: Iterable[tuple[int, pl.DataFrame | None]]) -> pl.DataFrame | None:
    """The outcomes of a run's checkpoints, by their steps, of the columns `SCHEMA`; None where none has any."""
    steps = [own.with_columns(step=pl.lit(step, pl.Int64)) for step, own in checkpoints if own is not None]
    return pl.concat(steps).select(*SCHEMA) if steps else None


def to_bytes(items: pl.DataFrame) -> bytes:
    """As a Parquet file; through memory, as polars reports a full disk as an error of its own, which says less."""
    parquet = io.BytesIO()
    items.write_parquet(parquet, compression="zstd")
    return parquet.getvalue()


def read(path: Path, schema: Schema | None = None) -> pl.DataFrame:
    """The table in a file, by default of the columns `SCHEMA`. Raises RazorError where it is damaged."""
    try:
        table = pl.read_parquet(read_bytes(path, _LARGEST))
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise RazorError(f"{path} is damaged.") from error
    expected = pl.Schema(schema or SCHEMA)
    if table.schema != expected:
        raise RazorError(f"{path} is damaged: its columns are not {', '.join(expected)}.")
    known = [name for name in ("step", "prior", "task", "item") if name in expected]
    if any(table[name].null_count() for name in known):
        raise RazorError(f"{path} is damaged: an item has no name, or is of no checkpoint.")
    if "prompt" in expected and table["prompt"].null_count():
        raise RazorError(f"{path} is damaged: an item asks nothing.")
    for name in ("base", "tuned", "outcome"):
        if name in expected and not table[name].drop_nulls().is_finite().all():
            raise RazorError(f"{path} is damaged: an outcome is no number.")
    if table.select(known).is_duplicated().any():
        raise RazorError(f"{path} is damaged: an item is there twice at one checkpoint.")
    if not all(_fits(table, name) for name in ("logprobs", "base_logprobs", "tuned_logprobs") if name in expected):
        raise RazorError(f"{path} is damaged: the log-likelihoods of an item are not a number for each of its answers.")
    return table


def _fits(table: pl.DataFrame, name: str) -> bool:
    """Whether a column of log-likelihoods has a finite one for each answer, of items where their number is known.

    It is not where the tuned model's log-likelihoods were no numbers, and so are not there.
    """
    chosen = table.filter(pl.col(name).is_not_null())
    counts = chosen.select((pl.col(name).list.len() == pl.col("choices")).fill_null(value=True)).to_series()
    values = chosen.filter(pl.col(name).list.len() > 0)[name].explode()
    return bool(counts.all()) and not values.null_count() and bool(values.is_finite().all())
