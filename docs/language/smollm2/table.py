"""The table of a run folder with prior tasks of lm-eval: what each run learned and lost, a row each.

    python docs/language/smollm2/table.py docs/language/smollm2/run

Lost and gained are counted as in the section of items of the report of the folder, which has more. The prior tasks have
as many items each, so that the share of all items is the mean over tasks; the interval of all items is here that of as
many items of one task, while the report's, as that of `razor compare`, is put together from those of the tasks.
"""

import sys
from pathlib import Path

import polars as pl

from rlrazor.analysis.lost import Transitions, transitions
from rlrazor.analysis.lost_in_runs import changes_of
from rlrazor.runs.store import RunStore

LEVEL = 0.95


def main(folder: Path) -> None:
    """Print it."""
    table = pl.read_parquet(folder / "records.parquet")
    store = RunStore(folder)
    base = table.filter(pl.col("method") == "base").row(0, named=True)
    priors = store.items(base["run_id"])["prior"].unique(maintain_order=True).to_list()
    heads = ["method", "lr", "seed", "step", "new, % ± s.e.", "forward KL", "KL, generic", "prior-text loss"]
    heads += ["all: lost", "gained", "net drop, points [95 %]", *(f"{name}: net drop" for name in priors)]
    print("|", " | ".join(heads), "|\n|", "---|" * len(heads))
    for row in table.sort("new", descending=True).iter_rows(named=True):
        cells = [row["method"], "" if row["lr"] is None else f"{row['lr']:.0e}", str(row["seed"]), str(row["step"])]
        cells += [f"{row['new']:.0%} ± {row['new_sampled_stderr']:.0%}".replace("%", "")]
        if row["method"] == "base":
            scores = [f"scores {row[f'prior_{name}']:.1%}" for name in priors]
            print("|", " | ".join([*cells, "0", "0", f"{row['prior_loss']:.3f}", "", "", "", *scores]), "|")
            continue
        loss = row["prior_loss"] - base["prior_loss"]
        cells += [f"{row['kl_forward']:.2f}", f"{row['kl_probe']:.2f}", f"{loss:+.3f}"]
        items = store.items(row["run_id"]).filter(pl.col("step") == row["step"])
        tasks = changes_of(items.with_columns(run=pl.lit(row["run_id"])), LEVEL).tasks
        whole = transitions(items["base"].to_numpy(), items["tuned"].to_numpy(), LEVEL)
        assert whole is not None
        cells += [str(whole.lost.count), str(whole.gained.count), drop(whole)]
        print("|", " | ".join([*cells, *(drop(tasks[name]) for name in priors)]), "|")


def drop(found: Transitions) -> str:
    """In points, with its interval."""
    return f"{100 * found.drop:+.1f} [{100 * found.interval[0]:+.1f}, {100 * found.interval[1]:+.1f}]"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
