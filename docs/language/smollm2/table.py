"""The table of a run folder with prior tasks of lm-eval: what each run learned, and item by item what it lost.

    python docs/language/smollm2/table.py docs/language/smollm2/run

The prior tasks have as many items each, so that the share of all items is the mean over tasks. Intervals are paired,
95 %, over items.
"""

import sys
from pathlib import Path

import polars as pl

from rlrazor.analysis.lost import Transitions, transitions
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
        whole = of(items)
        cells += [str(whole.lost.count), str(whole.gained.count), drop(whole)]
        print("|", " | ".join([*cells, *(drop(of(items.filter(pl.col("prior") == name))) for name in priors)]), "|")


def of(items: pl.DataFrame) -> Transitions:
    """What became of them."""
    found = transitions(items["base"].to_numpy(), items["tuned"].to_numpy(), LEVEL)
    assert found is not None
    return found


def drop(found: Transitions) -> str:
    """In points, with its interval."""
    return f"{100 * found.drop:+.1f} [{100 * found.interval[0]:+.1f}, {100 * found.interval[1]:+.1f}]"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
