"""The picture of the README, from records: two ways to the same score, and a run under the monitor.

    razor reproduce parity-mnist --methods sft-1,sft-2,grpo --lrs 5e-5 --seeds 0,1,2,3,4 --checkpoints-per-epoch 10 \
      --out runs/paths
    razor calibrate tiny --task letters --out runs/law
    python docs/first_screen.py watch    # the README's lines of Python, as they stand there: runs/sft
    python docs/first_screen.py draw     # docs/first_screen.png

Left: all checkpoints, a thin line per seed, a thick one through the seeds' means after the same number of updates.
Right: what the monitor wrote to runs/sft/razor.jsonl, and what the checkpoints really score on the prior tasks,
measured here.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RL, SFT, INK, LIMIT = "#0072b2", "#d55e00", "#222222", "#b3005e"
PATHS = {"grpo": (RL, "RL (GRPO)"), "sft-2": (SFT, "SFT")}


def watch() -> None:
    """Run what the README shows."""
    from rlrazor.lm import compute

    compute.prepare_process()
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(lines, {})


def really_lost(run: Path, base: Path) -> dict[int, float]:
    """Step -> the drop of the mean prior score against the base's, in points, of each checkpoint of the run."""
    from rlrazor.experiments.language.suites import tiny_suite
    from rlrazor.lm.models import load

    def score(folder: Path) -> float:
        values = [score.value for score in tiny_suite().scores(load(str(folder))).values()]
        return 100 * sum(values) / len(values)

    before = score(base)
    folders = {int(folder.name.partition("-")[2]): folder for folder in run.glob("checkpoint-*")}
    return {0: 0.0} | {step: before - score(folders[step]) for step in sorted(folders)}


def say(axis: Any, text: str, at: tuple[float, float], away: tuple[float, float], colour: str, **more: Any) -> None:
    """A label beside what it names."""
    style = {"textcoords": "offset points", "fontsize": 17, "weight": "bold", "va": "center", **more}
    axis.annotate(text, at, away, color=colour, **style)


def draw_paths(axis: Any, table: Any) -> None:
    """From the base to where each method's training leads, on the plane of new and prior score."""
    import polars as pl

    scores = table.select("method", "seed", "step", pl.col("new", "prior") * 100)
    bases = scores.filter(pl.col("method") == "base")
    for method, (colour, name) in PATHS.items():
        rows = pl.concat([bases, scores.filter(pl.col("method") == method)]).sort("step")
        for _, own in rows.group_by("seed"):
            axis.plot(own["new"], own["prior"], color=colour, alpha=0.3, linewidth=1.2)
        mean = rows.group_by("step").agg(pl.col("new", "prior").mean()).sort("step")
        *_, before, end = points = list(zip(mean["new"], mean["prior"], strict=True))
        axis.plot(*zip(*points, strict=True), color=colour, linewidth=5, solid_capstyle="round")
        head = {"arrowstyle": "-|>", "color": colour, "lw": 5, "mutation_scale": 30}
        axis.annotate("", end, before, arrowprops=head)
        say(axis, f"{name}\nkeeps {end[1]:.0f} %", end, (26, 0), colour)
    base = bases["new"].mean(), bases["prior"].mean()
    axis.plot(*base, "o", color=INK, markersize=15, zorder=5)
    say(axis, f"base: {base[1]:.0f} %", base, (0, 24), INK, ha="center")
    left, right = axis.get_xlim()
    axis.set(xlim=(left - 0.3, right), ylim=(30, 86))
    axis.set(xlabel="new task: digits, % right", ylabel="old task: clothes, % right")
    axis.set_title("Same base, same new task", fontsize=20, weight="bold", loc="left", pad=14)


def draw_watched(axis: Any, rows: list[dict[str, Any]], lost: dict[int, float]) -> None:
    """The forecast with its interval at each reading, the budget, and what the checkpoints really lost."""
    steps = [0] + [row["step"] for row in rows]
    middle, low, high = ([0.0] + [100 * row["forecast"][name] for row in rows] for name in ("drop", "low", "high"))
    budget, end = 100 * rows[0]["budget"], steps[-1]
    axis.fill_between(steps, low, high, color=RL, alpha=0.22, linewidth=0)
    axis.plot(steps, middle, color=RL, linewidth=4)
    axis.plot(list(lost), list(lost.values()), "o", color=INK, markersize=9, clip_on=False, zorder=4)
    axis.axhline(budget, color=LIMIT, linewidth=3, linestyle=(0, (5, 2)))
    half = len(steps) // 2 + 1
    say(axis, "forecast and\n90 % interval", (steps[half], high[half]), (-16, 24), RL, ha="right")
    say(axis, "really lost", (end, list(lost.values())[-1]), (16, 0), INK)
    say(axis, f"budget: {budget:g} points", (end, budget), (14, 0), LIMIT)
    kept = max(row["step"] for row in rows if row["within"])
    axis.plot(kept, lost[kept], "o", color="none", markeredgecolor=LIMIT, markeredgewidth=3, markersize=20, zorder=5)
    say(axis, f"kept: the model\nof step {kept}", (kept, lost[kept]), (4, 110), LIMIT, ha="center")
    axis.set(xlabel="training step", ylabel="old tasks: points lost", xlim=(0, end), ylim=(-1, None))
    axis.set_title("A run under the monitor", fontsize=20, weight="bold", loc="left", pad=14)


def draw(arguments: argparse.Namespace) -> None:
    """The two panels side by side."""
    import matplotlib
    import polars as pl

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 15, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 6.2), layout="constrained", gridspec_kw={"wspace": 0.08})
    draw_paths(left, pl.read_parquet(arguments.paths / "records.parquet"))
    rows = [json.loads(line) for line in (arguments.run / "razor.jsonl").read_text(encoding="utf-8").splitlines()]
    draw_watched(right, rows, really_lost(arguments.run, arguments.law / "base"))
    figure.savefig(arguments.out, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("watch", "draw"))
    parser.add_argument("--paths", type=Path, default=Path("runs/paths"), help="the folder of razor reproduce")
    parser.add_argument("--law", type=Path, default=Path("runs/law"), help="the folder of razor calibrate")
    parser.add_argument("--run", type=Path, default=Path("runs/sft"), help="the output folder of the watched run")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "first_screen.png")
    given = parser.parse_args()
    watch() if given.what == "watch" else draw(given)
