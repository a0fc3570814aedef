"""The report's sections on tables with a planted effect and its opposite; their statistics computed again by loops."""

import json
import math
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from rlrazor.errors import RazorError
from rlrazor.report import drawing, load, summary, terminal_tables, write_markdown, write_report
from rlrazor.report.drawing import Axis, Curve, Figure, Interval, Marker, Panel, Points
from rlrazor.report.sections import KINDS
from rlrazor.report.study import Kind, Kinds, Section, Study
from rlrazor.report.tables import Table
from rlrazor.system import writing
from test_report import make_folder, make_table, rows_of, text_of

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


def one_panel(*layers: drawing.Layer, x: Axis = Axis("x"), y: Axis = Axis("y")) -> Figure:  # noqa: B008
    return Figure("toy", [Panel("Title", x, y, layers)], columns=1)


@pytest.mark.parametrize("along", ["x", "y"])
def test_both_renderers_draw_the_same_intervals(along: Any) -> None:
    x, y = array(1, 2, 3), array(0.1, 0.4, 0.2)
    at = x if along == "x" else y
    low, high = at - array(0.05, 0.01, math.nan), at + array(0.02, -0.005, math.nan)  # the second lies beside its point
    points = Points("a", x, y, Marker("#0072B2"), interval=Interval(low, high, along))
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
        "a", array(0, 1), array(0.5, 0.6), Marker("#0072B2"), interval=Interval(array(0.4, math.nan), array(0.7, 1))
    )
    panel = Panel("t", Axis("x", ticks=[(0, "GRPO"), (1, "SFT")]), Axis("kept"), [points])
    (trace,) = drawing.interactive(Figure("toy", [panel], 1)).data
    assert trace.hovertemplate.startswith("<b>a</b><br>%{customdata[0]}<br>kept %{y:.2%} %{customdata[1]}")
    assert [list(row) for row in trace.customdata] == [["GRPO", "[40.00%, 70.00%]"], ["SFT", ""]]


def test_log_axes_and_ranges() -> None:
    points = Points("a", array(0.01, 10), array(1, 100), Marker("#0072B2"))
    figure = one_panel(
        points, x=Axis("x", (0.01, 100.0), percent=False, log=True), y=Axis("y", percent=False, log=True)
    )
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
    points = Points("a", array(*range(6)), array(*range(6)), Marker("#0072B2", line=True))
    curve = Curve("b", array(0, 1), array(0, 1), "#D55E00", band=(array(-1, 0), array(1, 2)))
    categories = Panel("t", Axis("x", ticks=ticks), Axis("y", percent=False), [points, curve])
    simplex = Panel("t", Axis("x"), Axis("y"), [points], equal=True, texts=[(0.5, 0.8, "pi0")])
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
    layers = [Points(f"method {index}", array(0, 1), array(0, 1), Marker("#0072B2")) for index in range(12)]
    figure = replace(one_panel(*layers, x=Axis("x", ticks=ticks)), height=height)
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


# Folders


def toy_section(study: Study) -> Section:
    figure = one_panel(Points("a", array(1, 2), array(0.1, 0.2), Marker("#0072B2")))
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
    for text in ("by 3 methods", "What explains forgetting?", "precision found 15 points", "the best of 3 measures"):
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
