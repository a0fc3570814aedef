"""Which KL orders what methods lose: correlations over the methods of a run folder, and a figure of two of them.

    python docs/language/smollm2/orders.py docs/language/smollm2/forgetting hellaswag

Pearson's, of the logarithm of KL with the drop of a prior task in points, and with the logarithm of the rise of the
prior-text loss; Fisher's 95 % intervals, over the runs. The figure is FOLDER/orders.png.
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from matplotlib.ticker import NullFormatter, ScalarFormatter
from scipy.stats import pearsonr

KLS = {
    "kl_forward": "the new task",
    "kl_probe": "paragraphs",
    "kl_forward_on_unlike": "unlike text",
    "kl_forward_on_self": "own texts",
    "kl_forward_on_prior": "prior tasks' prompts",
}
DRAWN = ("kl_forward", "kl_forward_on_self")
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
MARKERS = "osD^vPX*<>hp8"


def main(folder: Path, prior: str) -> None:
    """Print them and draw."""
    table = pl.read_parquet(folder / "records.parquet")
    base = table.filter(pl.col("method") == "base").row(0, named=True)
    runs = table.filter(pl.col("method") != "base")
    drop_R = 100 * (base[f"prior_{prior}"] - runs[f"prior_{prior}"].to_numpy())
    loss_R = np.log(runs["prior_loss"].to_numpy() - base["prior_loss"])
    for column, name in KLS.items():
        logs_R = np.log(runs[column].to_numpy())
        print(f"KL on {name}: with the drop {shown(logs_R, drop_R)}, with the loss {shown(logs_R, loss_R)}")
    figure, panels = plt.subplots(1, len(DRAWN), figsize=(10, 3.8), sharey=True, layout="constrained")
    for panel, column in zip(panels, DRAWN, strict=True):
        for marker, method, kl, drop in zip(MARKERS, runs["method"], runs[column], drop_R, strict=False):
            panel.scatter(kl, drop, s=50, marker=marker, label=method)
        panel.set(xscale="log", xlabel="nats", title=f"KL on {KLS[column]}")
        panel.axhline(0, color="0.7", linewidth=0.8)
        panel.margins(0.12)
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())
        lowest, highest = min(runs[column]), max(runs[column])
        panel.set_xticks([tick for tick in TICKS if lowest / 1.3 <= tick <= highest * 1.3])
    panels[0].set_ylabel(f"{prior}: net drop, points")
    panels[-1].legend(loc="lower right", fontsize=9)
    figure.savefig(folder / "orders.png", dpi=120)


def shown(one_R: np.ndarray, other_R: np.ndarray) -> str:
    """A correlation with its interval."""
    found = pearsonr(one_R, other_R)
    low, high = found.confidence_interval(0.95)
    assert math.isfinite(low)
    return f"{found.statistic:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
