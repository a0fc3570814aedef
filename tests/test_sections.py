"""The report's sections on tables with a planted effect and its opposite; their statistics computed again by loops."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from rlrazor.analysis import law
from rlrazor.errors import RazorError
from rlrazor.report import drawing, load, summary, terminal_tables, write_markdown, write_report
from rlrazor.report.drawing import Curve, Figure, Panel, Points
from rlrazor.report.sections import KINDS, predictors, representation
from rlrazor.report.study import Kind, Kinds, Section, Study
from rlrazor.report.tables import Table
from rlrazor.system import writing
from study_tables import mean_and_half
from test_report import CONFIG, make_folder, make_table, row, rows_of, text_of

Floats = drawing.Floats

T_THREE_SEEDS = 4.302653  # of the t-distribution with two degrees of freedom, from a printed table
DESCRIPTION: dict[str, Any] = {
    "preset": "paper",
    "command": "razor reproduce toy --analysis",
    "seeds": [0, 1],
    "labels": {"near": "Near <b>"},
    "config": {"lrs": [1e-5]},
    "data": "fingerprint",
    "versions": {"rlrazor": "0.1.0"},
    "machine": "a machine",
    "core_seconds": 60,
    "diverged": [],
}


# Drawing


def array(*values: float) -> Floats:
    return np.array(values, float)


def one_panel(*layers: drawing.Layer, **panel: Any) -> Figure:
    return Figure("toy", [Panel("Title", "x", "y", layers, **panel)], columns=1)


@pytest.mark.parametrize("along", ["x", "y"])
def test_both_renderers_draw_the_same_intervals(along: Any) -> None:
    x, y = array(1, 2, 3), array(0.1, 0.4, 0.2)
    at = x if along == "x" else y
    low, high = at - array(0.05, 0.01, math.nan), at + array(0.02, -0.005, math.nan)  # the second lies beside its point
    points = Points("a", x, y, "#0072B2", error_low=low, error_high=high, error_along=along)
    figure = one_panel(points)
    (bars,) = (container[2] for container in drawing.draw(figure).axes[0].containers)
    ends = np.array([np.asarray(line)[:, 0 if along == "x" else 1] for line in bars[0].get_segments() if len(line)])
    np.testing.assert_allclose(ends[:2], np.stack([low, high], axis=1)[:2])
    (trace,) = drawing.interactive(figure).data
    shown = trace.error_x if along == "x" else trace.error_y
    np.testing.assert_allclose((at - shown.arrayminus)[:2], low[:2], rtol=1e-6)
    np.testing.assert_allclose((at + shown.array)[:2], high[:2], rtol=1e-6)
    assert np.isnan(shown.array[2])


def test_hover_tells_names_and_intervals() -> None:
    points = Points(
        "a", array(0, 1), array(0.5, 0.6), "#0072B2", error_low=array(0.4, math.nan), error_high=array(0.7, 1)
    )
    panel = Panel("t", "x", "kept", [points], x_ticks=[(0, "GRPO"), (1, "SFT")])
    (trace,) = drawing.interactive(Figure("toy", [panel], 1)).data
    assert trace.hovertemplate.startswith("<b>a</b><br>%{customdata[0]}<br>kept %{y:.2%} %{customdata[1]}")
    assert [list(row) for row in trace.customdata] == [["GRPO", "[40.00%, 70.00%]"], ["SFT", ""]]


def test_log_axes_and_ranges() -> None:
    points = Points("a", array(0.01, 10), array(1, 100), "#0072B2")
    figure = one_panel(points, x_log=True, y_log=True, x_range=(0.01, 100.0), x_percent=False, y_percent=False)
    axis = drawing.draw(figure).axes[0]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert axis.get_xlim() == pytest.approx((0.01, 100))
    low, high = axis.get_ylim()
    assert low < 1 < 100 < high
    layout = drawing.interactive(figure).layout
    assert (layout.xaxis.type, layout.xaxis.range) == ("log", (-2, 2))
    assert layout.yaxis.range is None


def test_categories_simplex_texts_and_bands() -> None:
    ticks = [(float(index), f"a rather long name {index}") for index in range(6)]
    points = Points("a", array(*range(6)), array(*range(6)), "#0072B2", line=True)
    curve = Curve("b", array(0, 1), array(0, 1), "#D55E00", band=(array(-1, 0), array(1, 2)))
    categories = Panel("t", "x", "y", [points, curve], x_ticks=ticks, y_percent=False)
    simplex = Panel("t", "x", "y", [points], equal=True, texts=[(0.5, 0.8, "pi0")])
    figure = Figure("toy", [categories, simplex], 2)
    first, second = drawing.draw(figure).axes
    assert [label.get_text() for label in first.get_xticklabels()] == [name for _, name in ticks]
    assert first.lines[0].get_linestyle() == "-"
    band = first.collections[0].get_paths()[0].vertices
    assert (np.asarray(band)[:, 1].min(), np.asarray(band)[:, 1].max()) == (-1, 2)
    assert (second.get_aspect(), second.axison, second.texts[0].get_text()) == (1.0, False, "pi0")
    page = drawing.interactive(figure)
    assert page.layout.xaxis.ticktext == tuple(name for _, name in ticks)
    assert page.layout.yaxis2.scaleanchor == "x2"
    modes = [(trace.mode, trace.showlegend) for trace in page.data]
    assert modes == [
        *(("lines+markers", True), ("lines", False), ("lines", False), ("lines", True)),
        *(("lines+markers", False), ("text", False)),
    ]
    assert page.data[2].fill == "tonexty"
    assert page.data[2].fillcolor == "rgba(213, 94, 0, 0.15)"


@pytest.mark.parametrize("height", [None, 700])
@pytest.mark.parametrize("names", [6, 20])
def test_legend_is_below_the_axis_labels(names: int, height: int | None) -> None:
    ticks = [(float(index), f"category {index}") for index in range(names)]
    layers = [Points(f"method {index}", array(0, 1), array(0, 1), "#0072B2") for index in range(12)]
    figure = replace(one_panel(*layers, x_ticks=ticks), height=height)
    shown = drawing.draw(figure)
    shown.draw_without_rendering()
    (legend,) = shown.legends
    axis = shown.axes[0]
    lowest = min(label.get_window_extent().y0 for label in (axis.xaxis.label, *axis.get_xticklabels()))
    assert legend.get_window_extent().y1 <= lowest
    assert legend.get_window_extent().x0 >= 0
    layout = drawing.interactive(figure).layout
    plot = layout.height - layout.margin.t - layout.margin.b
    assert -layout.legend.y * plot >= 50  # pixels, for tick labels and the axis title


# Predictors


def with_measures(noise_of: dict[str, float], methods: Sequence[str] = ("near", "middling", "far")) -> pl.DataFrame:
    """The toy sweep with forgetting a saturating function of a hidden drift, which measures show with their noise."""
    rng = np.random.default_rng(2)
    table = make_table(noise=0.0).filter(pl.col("method").is_in(["base", *methods]))
    hidden = table["kl_forward"].to_numpy()
    forgetting = 0.6 * (1 - np.exp(-0.8 * hidden))
    columns = {name: hidden * np.exp(noise * rng.normal(size=len(hidden))) for name, noise in noise_of.items()}
    columns |= {name: np.exp(-values) for name, values in columns.items() if name.startswith("cknna")}
    return table.drop("kl_forward", "kl_reverse").with_columns(
        forgetting=pl.Series(forgetting),
        weight_sparsity=pl.lit(0.0),
        **{name: pl.Series(values) for name, values in columns.items()},
    )


def study_of(table: pl.DataFrame, name: str = "predictors", labels: dict[str, str] | None = None) -> Study:
    bases = table.filter(pl.col("method") == "base")
    return Study(name, {**CONFIG, "labels": labels or {}}, table, law.distinct(table), bases, of_sweep=True)


def test_predictors_forward_kl_wins_where_it_is_planted() -> None:
    noise = {"kl_forward": 0.02, "kl_reverse": 0.3, "total_variation_on_prior": 0.5, "weight_l1": 0.8}
    section = predictors.section(study_of(with_measures(noise)))
    assert re.match(
        r"Of 4 measures, forward KL on new-task inputs best forecasts .* wrong by \d\.\d accuracy points, guessing by "
        r"\d+\.\d\.$",
        section.finding,
    )
    (table,) = section.tables
    names = [tuple(cells[:2]) for cells in table.rows]
    assert names[0] == ("forward KL", "new-task inputs")
    assert names[-1] == ("1 − sparsity of the update", "weights")  # constant: nothing to fit, so last
    assert table.rows[0][-1] == "0.96 ± 0.01"
    assert table.rows[-1][2:7] == ["—", "—", "—", "—", "— / —"]


def test_predictors_forward_kl_loses_where_that_is_planted() -> None:
    noise = {"kl_forward": 0.5, "kl_reverse": 0.2, "cknna_on_prior": 0.02, "total_variation": 0.7}
    table = with_measures(noise)
    section = predictors.section(study_of(table))
    assert "Of 4 measures, 1 − CKNNA on prior-task inputs best forecasts" in section.finding
    assert "; forward KL on new-task inputs comes 3rd with" in section.finding
    assert section.finding.endswith("2nd of the 3 measured on new-task inputs.")
    r2 = {}
    for name in ("kl_forward", "kl_reverse", "total_variation"):
        tuned = table.filter(pl.col("method") != "base")
        x, y = tuned[name].to_numpy(), tuned["forgetting"].to_numpy()
        r2[name] = 1 - np.var(y - np.polyval(np.polyfit(x, y, 2), x)) / np.var(y)
    shown = {cells[0]: cells[2] for cells in section.tables[0].rows}
    assert float(shown["total variation"]) == pytest.approx(r2["total_variation"], abs=0.005)
    assert float(shown["1 − CKNNA"]) > 0.99
    order = [float(cells[2]) for cells in section.tables[0].rows[:4]]
    assert order == sorted(order, reverse=True)
    rising = next(cells for cells in section.tables[0].rows if cells[0] == "1 − CKNNA")
    assert float(rising[5]) > 0.99  # Spearman, of 1 minus the similarity


def test_predictors_that_forecast_nothing_and_one_method() -> None:
    rng = np.random.default_rng(3)
    table = with_measures({"kl_forward": 0.0, "kl_reverse": 0.0})
    shuffled = table.with_columns(
        kl_forward=pl.Series(rng.random(len(table))), kl_reverse=pl.Series(rng.random(len(table)))
    )
    levels = pl.col("method").replace_strict({"base": 0.0, "near": 0.1, "middling": 0.15, "far": 0.2})
    assert predictors.section(
        study_of(shuffled.with_columns(forgetting=levels + 0.01 * pl.col("kl_reverse")))
    ).finding.startswith("None of 2 measures forecasts")
    alone = predictors.section(study_of(with_measures({"kl_forward": 0.1, "weight_l2": 0.4}, ["near"])))
    assert "forward KL on new-task inputs explains forgetting best" in alone.finding
    assert "too few methods tell" in alone.finding
    tiny = predictors.section(
        study_of(with_measures({"kl_forward": 0.1}).filter(pl.col("step") < 1).vstack(table_of_one()))
    )
    assert "too small" in tiny.finding
    drawing.draw(tiny.figure)


def table_of_one() -> pl.DataFrame:
    return with_measures({"kl_forward": 0.1}).filter(pl.col("method") == "near").head(1)


def test_predictors_figure_shows_seeds_and_the_paper() -> None:
    table = with_measures({"kl_forward": 0.1, "kl_reverse": 0.4})
    panel = predictors.section(study_of(table)).figure.panels[0]
    paper, dots = (
        next(layer for layer in panel.layers if layer.label == name)
        for name in ("the paper’s Table 1", "new-task inputs")
    )
    assert isinstance(dots, Points)
    assert dots.interval
    r2 = []
    for seed in (0, 1):
        tuned = table.filter(pl.col("method") != "base", pl.col("seed") == seed)
        x, y = tuned["kl_forward"].to_numpy(), tuned["forgetting"].to_numpy()
        r2.append(1 - np.var(y - np.polyval(np.polyfit(x, y, 2), x)) / np.var(y))
    spread = abs(r2[0] - r2[1]) / math.sqrt(2)
    assert dots.x[0] == pytest.approx(np.mean(r2))
    assert dots.interval[0][0] == pytest.approx(np.mean(r2) - spread)
    assert dots.interval[1][0] == pytest.approx(np.mean(r2) + spread)
    assert dict(zip(paper.y, paper.x, strict=True)) == {2.0: 0.96, 1.0: 0.93}
    assert panel.y_ticks == [(2.0, "forward KL on new-task inputs"), (1.0, "reverse KL on new-task inputs")]


# Representation


def with_probe(loss: dict[str, float], seeds: int = 3, top: float = 0.98) -> pl.DataFrame:
    """Per method CKNNA falls by `loss` from the base's 1 as new rises to `top`; seeds differ by a thousandth."""
    rows = []
    for seed in range(seeds):
        rows.append(
            {
                **row("base", seed, 0, 0, new=0.9, prior=0.8, base_prior=0.8, kl=0.0),
                "cka_on_probe": 1.0,
                "cknna_on_probe": 1.0,
            }
        )
        for method, lost in loss.items():
            for step in range(1, 101):
                progress = step / 100
                plain = row(
                    method, seed, 0, step, new=0.9 + (top - 0.9) * progress, prior=0.7, base_prior=0.8, kl=progress
                )
                similarity = 1 - (lost + 0.001 * seed) * progress
                rows.append({**plain, "cka_on_probe": similarity, "cknna_on_probe": similarity})
    return pl.DataFrame(rows, infer_schema_length=None)


def test_representation_finds_what_is_planted_and_its_opposite() -> None:
    # At 95 %, 5/8 of the way, the mean of the window is the value there, and of seeds the middle one's; at 97 %, 7/8.
    early, kept = (tuple(1 - way * loss for loss in (0.101, 0.401)) for way in (0.625, 0.875))
    section = representation.section(study_of(with_probe({"grpo": 0.1, "sft-1": 0.4}), labels={"grpo": "GRPO"}))
    assert section.finding == (
        f"At 95% new accuracy RL’s CKNNA to the base on unrelated inputs is {early[0]:.2f} ± 0.00, SFT’s "
        f"{early[1]:.2f} ± 0.00 (the paper, on language models: 0.94 and 0.56): RL keeps it better, "
        "by 0.19 ± 0.00 over 3 seeds; "
        f"at 97% they are {kept[0]:.2f} ± 0.00 and {kept[1]:.2f} ± 0.00: "
        "RL keeps it better, by 0.26 ± 0.00 over 3 seeds."
    )
    assert "RL: GRPO. SFT: sft-1." in section.note
    opposite = representation.section(study_of(with_probe({"grpo": 0.4, "sft-1": 0.1}))).finding
    assert opposite.endswith("SFT keeps it better, by 0.26 ± 0.00 over 3 seeds.")
    cells = {cells[0]: cells[1:] for cells in section.tables[0].rows}
    assert cells["RL"] == cells["GRPO"]
    assert cells["SFT"][2] == f"{kept[1]:.2f} ± 0.00"


def test_representation_does_not_claim_what_seeds_do_not_show() -> None:
    table = with_probe({"grpo": 0.2, "sft-1": 0.2})
    wobble = pl.col("cknna_on_probe") - pl.when(pl.col("method") == "sft-1").then(
        0.05 * (pl.col("seed") - 1)
    ).otherwise(0)
    equal = representation.section(study_of(table.with_columns(cknna_on_probe=wobble)))
    assert "which does not tell them apart" in equal.finding
    single = representation.section(study_of(with_probe({"kl-dpg": 0.1, "simpo": 0.4}, seeds=1)))
    assert "in the one seed there is, which leaves it open" in single.finding
    low = representation.section(study_of(with_probe({"grpo": 0.1, "sft-1": 0.4}, top=0.92)))
    assert low.finding.startswith("RL and SFT cannot be compared")
    alone = representation.section(study_of(with_probe({"grpo": 0.1, "oracle": 0.1})))
    assert alone.finding.startswith("RL and SFT cannot be compared")
    assert {tuple(cells) for cells in alone.tables[0].rows if cells[0] == "SFT"} == {("SFT", "—", "—", "—")}
    drawing.draw(alone.figure)


def test_representation_uses_the_highest_accuracy_that_all_seeds_reach() -> None:
    short, full = with_probe({"grpo": 0.1}, top=0.96), with_probe({"sft-1": 0.4})
    assert representation.section(study_of(pl.concat([full, short.filter(pl.col("method") != "base")]))).finding.count(
        "at 96% they are"
    )


def test_representation_along_training_is_the_mean_of_seeds() -> None:
    figure = representation.section(study_of(with_probe({"grpo": 0.1}))).figure
    course = figure.panels[2].layers[0]
    assert isinstance(course, Points)
    assert course.interval
    values = [1 - (0.1 + 0.001 * seed) * 0.5 for seed in range(3)]
    mean, half = mean_and_half(values)
    assert (course.x[49], course.y[49]) == pytest.approx((20.0, mean))
    assert (course.interval[0][49], course.interval[1][49]) == pytest.approx((mean - half, mean + half))


# Folders


def toy_section(study: Study) -> Section:
    figure = one_panel(Points("a", array(1, 2), array(0.1, 0.2), "#0072B2"))
    count = f"{len(study.points)} points & seeds {study.seeds}"
    return Section(
        study.name,
        f"The {study.name} question",
        "Why <so>?",
        f"{study.name} found {count}.",
        figure,
        [Table("Numbers", ["name", "value"], [[study.label("near"), "1.5"]])],
        "Done so.",
    )


TOYS: Kinds = {
    "predictors": KINDS["predictors"],
    **{name: Kind(toy_section, has_table=name != "theory") for name in ("precision", "theory", "quadrants")},
}


def add_study(folder: Path, stem: str, table: pl.DataFrame | None = None, **description: Any) -> Path:
    path = folder / "studies" / stem
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({**DESCRIPTION, "name": stem, **description}))
    if table is not None:
        table.write_parquet(path.with_suffix(".parquet"))
    return path


def test_studies_without_a_sweep(tmp_path: Path) -> None:
    small = make_table(seeds=1, runs=1)
    add_study(tmp_path, "quadrants", small)
    add_study(tmp_path, "precision", make_table(seeds=2, runs=1))
    add_study(tmp_path, "theory")
    results = load(tmp_path, TOYS)
    assert results.sweep is None
    assert [section.name for section in results.sections] == [
        "precision",
        "theory",
        "quadrants",
    ]  # the registry's order
    page = write_report(results).read_text()
    shown = text_of(page)
    assert shown.index("precision found 30 points &amp; seeds [0, 1].") < shown.index("theory found 0 points")
    assert "Why &lt;so&gt;?" in shown
    assert ["Near &lt;b&gt;", "1.5"] in rows_of(page)
    assert ["command", DESCRIPTION["command"]] in rows_of(page)
    assert re.findall(r'<a href="#([^"]*)"', page) == ["precision", "theory", "quadrants"]
    assert max(Counter(re.findall(r'\bid="([^"]*)"', page)).values()) == 1  # or a link or a figure would find another
    assert set(re.findall(r'<h2 id="([^"]*)"', page)) == {"precision", "theory", "quadrants"}
    assert page.count("<!DOCTYPE html>") == 1
    for name in ("precision", "theory", "quadrants"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        ElementTree.parse(tmp_path / "figures" / f"{name}.svg")
    assert len(list((tmp_path / "figures").iterdir())) == 6
    found = json.loads(json.dumps(summary(results), allow_nan=False))
    assert list(found) == ["sections"]
    assert found["sections"]["precision"]["finding"] == "precision found 30 points & seeds [0, 1]."
    assert found["sections"]["precision"]["tables"][0]["rows"] == [["Near <b>", "1.5"]]


def test_sweep_and_studies_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "save", lambda figure, folder: None)  # takes seconds; the test above looks at files
    table = make_table(seeds=1, runs=1).with_columns(output_l2=pl.col("kl_forward") ** 2)
    make_folder(tmp_path, table)
    add_study(tmp_path, "precision", make_table(seeds=1, runs=1))
    results = load(tmp_path, TOYS)
    assert results.sweep
    assert [fit.predictor for fit in results.sweep.laws] == [
        "kl_forward",
        "kl_reverse",
    ]  # the others have their section
    assert [section.name for section in results.sections] == ["predictors", "precision"]
    page = write_report(results).read_text()
    shown = text_of(page)
    for text in ("by 3 methods", "What explains forgetting?", "precision found 15 points", "Of 3 measures"):
        assert text in shown
    assert set(summary(results)["sections"]) == {"predictors", "precision"}
    assert summary(results)["checkpoints"] == 15
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(*terminal_tables(results))
        printed = " ".join(console.export_text().split())
    assert "analysis finding" in printed
    assert "precision precision found 15 points & seeds [0]." in printed
    assert "forward KL" in printed


def test_neither_sweep_nor_studies(tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    with pytest.raises(RazorError, match=r"There is no .*config.json: give the output folder"):
        load(tmp_path, TOYS)


def test_damaged_studies(tmp_path: Path) -> None:
    table = make_table(seeds=2, runs=1)
    path = add_study(tmp_path, "precision", table)

    def fails(match: str) -> None:
        with pytest.raises(RazorError, match=match):
            load(tmp_path, TOYS)

    path.with_suffix(".parquet").write_bytes(b"PAR1 is how it begins")
    fails("precision.parquet is damaged")
    path.with_suffix(".parquet").unlink()
    fails("There is no .*precision.parquet")
    add_study(tmp_path, "precision", table.drop("forgetting"))
    fails("lacks the columns forgetting")
    add_study(tmp_path, "precision", table.filter(pl.col("method") == "base"))
    fails("base policies only")
    add_study(tmp_path, "precision", table.filter((pl.col("method") != "base") | (pl.col("seed") == 0)))
    fails("no base policy for seed 1")
    path.with_suffix(".json").write_text("{")
    fails("precision.json cannot be read")
    path.with_suffix(".json").write_text('{"name": "precision", "seeds": []}')
    fails("precision.json lacks preset, command")
    add_study(tmp_path, "precision", table, name="quadrants")
    fails("describes a study named 'quadrants'")
    path.with_suffix(".json").unlink()
    fails("There is no .*config.json")  # half-written by a process that was killed: as if it were not there
    add_study(tmp_path, "precision", table)
    add_study(tmp_path, "astrology", table)
    fails("a study named 'astrology', which this rlrazor does not know")


def test_markdown_holds_each_section_and_its_figure(tmp_path: Path) -> None:
    add_study(tmp_path, "quadrants", make_table(seeds=1, runs=1), command="razor reproduce toy")
    results = load(tmp_path, TOYS)
    page = write_markdown(results, tmp_path / "docs").read_text()
    assert writing.is_ours(tmp_path / "docs" / "findings.md", "notes")
    (section,) = results.sections
    assert f"**{section.finding}**" in page
    assert "razor reproduce toy" in page
    assert f"](findings/{section.figure.name}.png)" in page
    assert (tmp_path / "docs" / "findings" / f"{section.figure.name}.png").stat().st_size > 1000
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    (table,) = section.tables
    assert cells == [list(table.headers), ["---"] * len(table.headers), *map(list, table.rows)]
