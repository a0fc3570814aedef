"""The report on tables whose law and frontiers are known, its numbers computed again by other means."""

import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from matched_loops import by_seed, reported
from rlrazor.analysis import law
from rlrazor.report import Results, drawing, figures, load, summary, terminal_tables, write_report
from rlrazor.report import page as report_page
from rlrazor.report.sweep import Sweep
from rlrazor.system import writing

BASE_NEW, BASE_PRIOR = 0.90, 0.80
DRIFT = {"near": 0.6, "middling": 1.5, "far": 3.0}  # nats at the end of a method's longest run
LABELS = {"near": "Near <b>", "middling": "Middling", "far": "Far"}
CONFIG: dict[str, Any] = {
    "experiment": "toy",
    "title": "Toy & co",
    "preset": "paper",
    "command": "razor reproduce toy --preset paper",
    "new_task": "NewTask",
    "prior_task": "PriorTask",
    "labels": LABELS,
    "config": {"methods": list(DRIFT), "lrs": [1e-5, 3e-4], "batch_size": 64},
    "data": "fingerprint-of-the-data",
    "versions": {"rlrazor": "0.1.0", "torch": "2.9.0"},
    "machine": "a machine",
    "drift": ["kl_forward", "kl_reverse", "total_variation"],
    "core_seconds": 600,
    "diverged": [],
}


def forgetting_at(kl: float) -> float:
    """The law the tables obey, but for noise."""
    return 0.02 + 0.25 * kl - 0.03 * kl**2


def make_table(seeds: int = 2, runs: int = 4, checkpoints: int = 5, noise: float = 0.03) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        base_prior = BASE_PRIOR + 0.01 * seed
        rows.append(row("base", seed, 0, 0, new=BASE_NEW, prior=base_prior, base_prior=base_prior, kl=0.0))
        for method, farthest in DRIFT.items():
            for run in range(runs):
                for step in range(1, checkpoints + 1):
                    progress = (run + 1) * step / (runs * checkpoints)
                    kl = farthest * progress
                    prior = base_prior - forgetting_at(kl) + noise * float(rng.normal())
                    new = BASE_NEW + (0.055 if method == "far" else 0.08) * progress
                    rows.append(row(method, seed, run, step, new=new, prior=prior, base_prior=base_prior, kl=kl))
    return pl.DataFrame(rows, infer_schema_length=None)


def row(
    method: str, seed: int, run: int, step: int, *, new: float, prior: float, base_prior: float, kl: float
) -> dict[str, Any]:
    tuned = method != "base"
    return {
        "run_id": f"run-{method}-{seed}-{run}",
        "trajectory": f"trajectory-{method}-{seed}-{run}",
        "method": method,
        "lr": 1e-5 * (run + 1) if tuned else None,
        "schedule": "cosine" if tuned else None,
        "epochs": 2 if tuned else None,
        "seed": seed,
        "step": step,
        "epoch": 0.4 * step,
        "new": new,
        "prior": prior,
        "forgetting": base_prior - prior,
        "kl_forward": kl,
        "kl_reverse": math.sqrt(kl),
    }


def make_folder(folder: Path, table: pl.DataFrame, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "records.parquet").open("wb") as file:  # the name need not be one that polars takes
        table.write_parquet(file)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


TEACHERS = [
    {"seed": seed, "method": "near", "run_id": f"run-near-{seed}-3", "step": 3, "student": "middling"}
    for seed in (0, 1)
]


@pytest.fixture(scope="module")
def table() -> pl.DataFrame:
    return make_table()


@pytest.fixture(scope="module")
def results(table: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A folder with everything: records, a sensitivity study and teachers."""
    folder = make_folder(tmp_path_factory.mktemp("report"), table)
    variants = [
        table.with_columns(setting=pl.lit("batch_size"), value=pl.lit(value), prior=pl.col("prior") - loss)
        for value, loss in ((256, 0.1), (64, 0.0))
    ]
    pl.concat(variants).write_parquet(folder / "sensitivity.parquet")
    (folder / "teachers.json").write_text(json.dumps(TEACHERS))
    return load(folder)


@pytest.fixture(scope="module")
def sweep(results: Results) -> Sweep:
    return sweep_of(results)


def sweep_of(results: Results) -> Sweep:
    assert results.sweep
    return results.sweep


@pytest.fixture(scope="module")
def page(results: Results) -> str:
    path = write_report(results)
    assert path == results.folder / "report.html"
    for file, kind in report_page.outputs(results.folder):
        assert not file.exists() or writing.is_ours(file, kind)
    return path.read_text()


def text_of(page: str) -> str:
    """What a reader sees of the page, spaces collapsed."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page[page.index("<body>") :], flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", body).replace("&nbsp;", " ").split())


def test_law_is_the_one_the_table_obeys(table: pl.DataFrame, results: Results, page: str) -> None:
    tuned = table.filter(pl.col("method") != "base")
    x, y = tuned["kl_forward"].to_numpy(), tuned["forgetting"].to_numpy()
    coefficients = np.polyfit(x, y, 2)
    r2 = 1 - np.var(y - np.polyval(coefficients, x)) / np.var(y)
    found = summary(results)["laws"][0]
    assert found["predictor"] == "kl_forward"
    assert found["quadratic"]["r2"] == pytest.approx(r2)
    assert list(found["quadratic"]["law"].values()) == pytest.approx(coefficients[::-1])
    assert found["quadratic"]["law"]["slope"] == pytest.approx(0.25, abs=0.03)  # of forgetting_at
    low, high = found["quadratic"]["r2_interval"]
    assert f"R² = {r2:.2f} (95 % interval {low:.2f} to {high:.2f})" in text_of(page)
    errors = []
    for method in DRIFT:
        others = tuned.filter(pl.col("method") != method)
        held_out = tuned.filter(pl.col("method") == method)
        fit = np.polyfit(others["kl_forward"].to_numpy(), others["forgetting"].to_numpy(), 2)
        errors.append(np.abs(np.polyval(fit, held_out["kl_forward"].to_numpy()) - held_out["forgetting"]).mean())
    assert f"that quadratic is wrong by {100 * np.mean(errors):.1f} accuracy points" in text_of(page)


def kept_priors(table: pl.DataFrame, method: str, threshold: float) -> list[float]:
    """Per seed the prior accuracy kept at `threshold`, by plain loops."""
    return by_seed(table.filter(pl.col("method") != "base").to_dicts(), method, threshold)


def test_retention(table: pl.DataFrame, results: Results, page: str) -> None:
    t_two_seeds = 12.7062  # of the t-distribution with one degree of freedom, from a printed table
    shown = text_of(page)
    for method, threshold in (("near", 0.95), ("near", 0.97), ("middling", 0.96), ("far", 0.95)):
        first, second = kept_priors(table, method, threshold)
        half = t_two_seeds * abs(first - second) / 2
        assert f"{50 * (first + second):.1f} ± {100 * half:.1f}" in shown
    assert kept_priors(table, "far", 0.97) == []
    far = next(cells for cells in rows_of(page) if cells[0] == "Far")
    assert far[2:5] == ["—", "—", "95.5"]
    order = [cells[0] for cells in rows_of(page) if cells[0] in {"base (not fine-tuned)", "Middling", "Far"}]
    assert order[:3] == ["base (not fine-tuned)", "Middling", "Far"]
    base = next(cells for cells in rows_of(page) if cells[0] == "base (not fine-tuned)")
    assert base[1].startswith("(80.5 ±")
    assert base[4] == "90.0 ± 0.0"


def rows_of(page: str) -> list[list[str]]:
    """The cells of all table rows."""
    rows = re.findall(r"<tr>(.*?)</tr>", page[page.index("<body>") :], flags=re.S)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.S) for row in rows]


def test_frontier_area_is_the_dominated_share(table: pl.DataFrame, results: Results) -> None:
    new = np.linspace(BASE_NEW, 1, 20_001)
    shares = []
    for seed in (0, 1):
        points = table.filter(pl.col("method") == "near", pl.col("seed") == seed)
        reached = np.where(points["new"].to_numpy() >= new[:, None], points["prior"].to_numpy(), 0).max(axis=1)
        shares.append(reached.mean() / (BASE_PRIOR + 0.01 * seed))
    assert summary(results)["frontier_area"]["near"]["mean"] == pytest.approx(np.mean(shares), abs=2e-4)


def test_distillation(table: pl.DataFrame, results: Results, page: str) -> None:
    taught = {
        of["seed"]: table.filter(pl.col("run_id") == of["run_id"], pl.col("step") == of["step"]).to_dicts()[0]
        for of in TEACHERS
    }
    students = reported(
        table.filter(pl.col("method") == "middling").to_dicts(), lambda row: taught[row["seed"]]["new"] - 0.002
    )
    gaps = []
    for teacher, pair in zip(TEACHERS, summary(results)["distillation"], strict=True):
        seed = int(teacher["seed"])
        own, student = taught[seed], students["middling", seed]
        assert (pair["teacher"]["prior"], pair["student"]["prior"]) == (own["prior"], student["prior"])
        gaps.append(student["prior"] - own["prior"])
    shown = text_of(page)
    assert (
        f"minus its teacher’s is −{-100 * np.mean(gaps):.1f} ± {100 * 12.7062 * abs(gaps[0] - gaps[1]) / 2:.1f} points "
        in shown
    )
    assert "to within 0.2 points" in shown


def test_distillation_judges_students_by_their_own_teacher(table: pl.DataFrame, tmp_path: Path) -> None:
    """Two levels in each seed; the gap is the mean over seeds of the mean over a seed's pairs."""
    teachers = [
        {"level": level, "seed": seed, "method": "near", "run_id": f"run-near-{seed}-{run}", "step": step}
        for level, run, step in ((0.93, 0, 3), (0.94, 3, 3), (0.941, 3, 3))
        for seed in (0, 1)
    ]
    taught_by = [pl.format("run-near-{}-{}/3", "seed", pl.lit(run)) for run in (0, 3)]
    own = pl.when(pl.col("lr") < 2.5e-5).then(taught_by[0]).otherwise(taught_by[1])
    with_teachers = table.with_columns(teacher=pl.when(pl.col("method") == "middling").then(own))
    folder = make_folder(tmp_path / "report", with_teachers)
    (folder / "teachers.json").write_text(json.dumps([{**teacher, "student": "middling"} for teacher in teachers]))
    found = load(folder)
    pairs = summary(found)["distillation"]
    assert len(pairs) == 4  # the third level has the second's teachers
    gaps: dict[int, list[float]] = {0: [], 1: []}
    goals = {
        f"{of['run_id']}/{of['step']}": pair["teacher"]["new"] for pair, of in zip(pairs, teachers[:4], strict=True)
    }
    level_of = {f"{of['run_id']}/{of['step']}": of["level"] for of in teachers[:4]}
    students = reported(
        with_teachers.drop_nulls("teacher").to_dicts(),
        lambda row: goals[row["teacher"]] - 0.002,
        lambda row: level_of[row["teacher"]],
    )
    for pair, teacher in zip(pairs, teachers[:4], strict=True):
        student = students[teacher["level"], int(teacher["seed"])]
        assert pair["student"]["prior"] == student["prior"]
        gaps[pair["seed"]].append(student["prior"] - pair["teacher"]["prior"])
    assert found.sweep is not None
    gap = found.sweep.imitation_gap
    assert gap is not None
    assert gap.mean == pytest.approx(np.mean([np.mean(of) for of in gaps.values()]))
    assert gap.seeds == 2


def test_sensitivity(results: Results, page: str) -> None:
    small, large = summary(results)["sensitivity"]
    assert (small["value"], small["configured"], large["value"], large["configured"]) == (64, True, 256, False)
    assert small["base_prior"] - large["base_prior"] == pytest.approx(0.1)
    assert list(small["kept"]) == ["near", "middling", "far"]
    assert small["quadratic_r2"] == pytest.approx(summary(results)["laws"][0]["quadratic"]["r2"])
    assert "batch_size = 64 (as run)" in text_of(page)


def test_page_says_how_it_was_run(page: str) -> None:
    shown = text_of(page)
    for text in (CONFIG["command"], CONFIG["data"], "torch 2.9.0", "1e-05, 0.0003", "a machine", "Seeds: 0, 1"):
        assert text in shown
    assert "24 in 24 trajectories, 120 distinct checkpoints" in shown


def test_names_are_escaped(page: str) -> None:
    assert "Near &lt;b&gt;" in page
    assert "Near <b>" not in page
    assert "Toy &amp; co" in page


def test_summary_is_json(results: Results) -> None:
    assert json.loads(json.dumps(summary(results), allow_nan=False))["checkpoints"] == 120


def test_terminal_tables(results: Results) -> None:
    console = Console(width=160, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(*terminal_tables(results))
        shown = console.export_text()
    assert "Middling" in shown
    assert "forward KL" in shown


def test_shared_beginnings_count_once(tmp_path: Path) -> None:
    table = make_table(seeds=1)
    again = table.filter(pl.col("run_id") == "run-near-0-0").with_columns(run_id=pl.lit("its-prefix"))
    results = load(make_folder(tmp_path, pl.concat([table, again])))
    assert (len(sweep_of(results).points), summary(results)["runs"]) == (60, 13)


def test_hover_tells_the_run(sweep: Sweep) -> None:
    panel = figures.trade_off_figure(sweep).panels[0]
    near = next(layer for layer in panel.layers if layer.label == LABELS["near"])
    assert isinstance(near, drawing.Points)
    expected = sweep.points.filter(pl.col("method") == "near").to_dicts()[7]
    values = [round(expected[name], 4) for name in ("new", "prior", "forgetting", "kl_forward")]
    assert near.hover
    assert list(near.hover.rows[7]) == [2e-5, "cosine", 2, 0, 3, 1.2, *values]
    assert near.x[7] == expected["new"]
    for text in ("lr %{customdata[0]", "seed %{customdata[3]}", "step %{customdata[4]}", "forward KL %{customdata[9]}"):
        assert text in near.hover.template


def test_frontier_line_is_not_dominated(sweep: Sweep) -> None:
    panel = figures.trade_off_figure(sweep).panels[0]
    for line in panel.layers:
        if isinstance(line, drawing.Curve):
            assert (np.diff(line.x) > 0).all()
            assert (np.diff(line.y) < 0).all()


def test_points_far_below_the_base_are_out_of_view_and_counted(tmp_path: Path) -> None:
    table = make_table(seeds=1, runs=1)
    collapsed = row("near", 0, 9, 1, new=0.5, prior=0.1, base_prior=BASE_PRIOR, kl=5.0)
    results = load(make_folder(tmp_path, pl.concat([table, pl.DataFrame([collapsed])], how="vertical_relaxed")))
    figure = figures.trade_off_figure(sweep_of(results))
    assert figure.clipped == 1
    view = figure.panels[0].x.range
    assert view
    assert 0.85 < view[0] < BASE_NEW
    assert "1 of 16 checkpoints" in text_of(write_report(results).read_text())


def test_figures_are_valid_and_the_same_each_time(results: Results, page: str) -> None:
    folder = results.folder / "figures"
    names = ["fig3.png", "fig3.svg", "fig6.png", "fig6.svg", "learning-rates.png", "learning-rates.svg"]
    assert sorted(path.name for path in folder.iterdir()) == names
    before = {name: (folder / name).read_bytes() for name in names}
    for name, data in before.items():
        if name.endswith("png"):
            assert data.startswith(b"\x89PNG\r\n\x1a\n")
            assert len(data) > 20_000
        else:
            assert ElementTree.fromstring(data).tag == "{http://www.w3.org/2000/svg}svg"
            assert b"<dc:date>" not in data
    assert write_report(results).read_text() == page
    assert {name: (folder / name).read_bytes() for name in names} == before
    assert not list(results.folder.rglob(".*"))  # no temporary file stays


class Fetches(HTMLParser):
    """Collects what the page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_page_fetches_nothing(page: str) -> None:
    parser = Fetches()
    parser.feed(page)
    # The empty icon, so that the browser does not ask for one, and a link within the page.
    assert parser.found == ["data:,", "#learning-rates"]
    assert not re.search(r"@import|url\(", page[page.index("<style>") : page.index("</style>")])
    assert len(page) < 10_000_000


def find_browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if path := shutil.which(name):
            return path
    if os.environ.get("CI"):
        pytest.fail("No Chromium or Chrome was found, and CI must open the report in one.")
    pytest.skip("No Chromium or Chrome was found to open the report in.")


def test_page_opens_in_a_browser(results: Results, sweep: Sweep, page: str, tmp_path: Path) -> None:
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=20000 --enable-logging=stderr --v=0"
    opened = subprocess.run(
        [
            find_browser(),
            *flags.split(),
            f"--user-data-dir={tmp_path}",
            "--dump-dom",
            str(results.folder / "report.html"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert opened.returncode == 0
    assert [line for line in opened.stderr.splitlines() if "CONSOLE" in line] == []
    assert opened.stdout.count('class="main-svg"') >= 2
    # Every checkpoint in four panels, and a base per seed in three; nothing here is out of view. Then the section's.
    layers = [layer for panel in results.sections[0].figure.panels for layer in panel.layers]
    own = sum(int(np.isfinite(layer.y).sum()) for layer in layers if isinstance(layer, drawing.Points))
    shown = 4 * len(sweep.points) + 3 * len(sweep.study.bases) + own
    assert len(re.findall(r'class="point[ "]', opened.stdout)) == shown
    assert 'data-title="Share' not in opened.stdout  # plotly's button for uploading the data


def test_distinct_is_the_laws(sweep: Sweep) -> None:
    assert sweep.points.equals(law.distinct(sweep.study.table))
