"""Names and texts of other people's: never a pattern, never markup, nothing that acts on a terminal."""

import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import plotly.io
import polars as pl
import pytest
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import rlrazor
from rlrazor.cli import main
from rlrazor.cli.printing import console_for_tables
from rlrazor.errors import RazorError
from rlrazor.lm.probes import read_prompts
from rlrazor.report import drawing
from rlrazor.report.drawing import Axis, Curve, Figure, Hover, Layer, Marker, Panel, Points, paper
from rlrazor.runs.progress import SweepProgress
from rlrazor.runs.records import Record, RunSpec
from rlrazor.runs.tables import read_table
from rlrazor.system.terminal import PlainColumn, Terminal, printable, say, shown_on
from test_report import make_folder, make_table

NAMES = {
    "a range": "lr[1e-3]",
    "a glob": "a-*",
    "a question": "a?b",
    "braces": "{a,b}",
    "home": "~",
    "a closing tag": "[/red]",
    "an open tag": "[bold",
    "an emoji": ":smile: [link=file:///x]y",
    "a formula": r"$\frac{x}$ and $",
    "half a formula": "a$b\\$c_d^e",
    "HTML": "<b>&amp;</script><!--",
    "a template": "%{x} {{ y }} {% z %} {0}",
    "an escape": "\x1b[31mred\x1b]0;title\x07",
    "a C1 control": "\x9b31m",
    "a newline": "two\nlines",
    "a return": "over\rwritten",
    "not UTF-8": os.fsdecode(b"\xff\xfe"),
    "reversed": "\u202etxt.exe",
    "other scripts": "日本 \U0001f600 עברית",
    "an underscore": "_hidden",
    "long": "x" * 240,
}
ACTS = ("\x1b[31m", "\x1b]", "\x07", "\x9b", "\r", "\u202e")

every_name = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


def written(console: Terminal) -> str:
    stream = console.file
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


@every_name
def test_a_terminal_shows_text_as_it_is(name: str) -> None:
    """As strings, in tables, in progress displays, in lines of a sweep; in colour, as on a terminal."""
    console = Terminal(file=io.StringIO(), width=600, force_terminal=True, color_system="truecolor")
    shown = printable(name).split("\n")[0]
    table = Table(name, title=name, caption=name)
    table.add_column(name)
    table.add_row(name, Text(name))
    console.print(name, style="bold")
    console.print(table)
    console.print(Text(name))
    with console.status(Text(name)), Progress(PlainColumn("{task.description}"), console=console) as bar:
        bar.add_task(name)
    assert written(console).count(shown) >= 6  # Rich takes some controls out of a `Text` itself
    assert not [code for code in ACTS if code in written(console).replace("\r", "")]
    plain = Terminal(file=io.StringIO(), width=600)
    told = SweepProgress(name, 1, 1, plain)
    spec = RunSpec("x", name, {"lr": 1e-3, "schedule": "constant", "epochs": 1}, 0)
    told.checkpoint(spec, Record("run", 1, 1.0, 0.5, {"a": 0.5}, {}, {}))
    told.say(told.line)
    assert shown in written(plain)


def test_a_progress_display_leaves_nothing_in_a_file() -> None:
    console = Terminal(file=io.StringIO())
    with Progress(PlainColumn("{task.description}"), console=console, transient=True) as bar:
        bar.add_task("")
    assert written(console) == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_no_encoding_is_too_small(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, encoding=encoding)
    for name in NAMES.values():
        say(name, stream)
        assert shown_on(stream, name).encode(encoding)
    assert len(data.getvalue().split(b"\n")) == len(NAMES) + 2
    closed = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    closed.close()
    say("nobody hears this", closed)
    monkeypatch.setattr(sys, "stdout", out := io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert main(["tasks"]) == 0
    assert main(["tasks", "--json"]) == 0
    out.flush()
    assert isinstance(out.buffer, io.BytesIO)
    text = out.buffer.getvalue().decode(encoding)
    assert json.loads(text[text.index("[\n") :])[0]["name"] == "math"


@every_name
def test_a_name_is_no_pattern(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`a-*` beside `a-b`, `lr[1e-3]` beside `lr1`: the tables of both would be read, or neither."""
    name = name.replace("/", "-")
    ours, neighbours = make_table(1, 1, 1), make_table(1, 1, 2)
    folder = make_folder(tmp_path / name, ours)
    for other in ("a-b", "lr1", "a", "axb", "b"):
        make_folder(tmp_path / other, neighbours)
    assert read_table(folder / "records.parquet").equals(ours)
    assert main(["pick", str(folder), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["folder"] == str(folder)
    assert len(found["candidates"]) == ours.height - 1
    assert main(["pick", str(folder / "nothing")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("razor: ")
    assert "Traceback" not in error
    assert not [code for code in ACTS if code in error]
    (folder / name).write_text('{"prompt": "a"}\n')
    assert read_prompts(folder / name) == ["a"]


def test_a_report_of_folders_named_anyhow(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them in one name and in every label: printed, drawn, and on a page that no markup gets into."""
    every = "".join(name for kind, name in NAMES.items() if kind not in ("long", "not UTF-8"))
    table = make_table(2, 1, 2).with_columns(pl.col("method").replace("near", every))
    labels = {every: every, "middling": "$", "far": "_far"}
    families = {"RL": [every], "SFT": ["middling", "far"]}
    config = {"title": every, "new_task": every, "prior_task": "$\\beta$", "labels": labels, "families": families}
    folders = [make_folder(tmp_path / name.replace("/", ""), table, **config) for name in (f"{every}\udcff", "b")]
    out = tmp_path / ("out " + NAMES["a range"] + NAMES["not UTF-8"])
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    printed = capfd.readouterr().out
    assert printable(NAMES["not UTF-8"]) in printed
    assert not [code for code in ACTS if code in printed]
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert "<b>&amp;</script>" not in page
    monkeypatch.setattr(drawing, "save", lambda *arguments, **options: None)  # once is enough
    assert main(["report", *map(str, folders), "--out", str(out), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["report"] == str(out / "comparison.html")
    make_folder(folders[1], table, labels={"near": "\ud800"})
    assert main(["report", *map(str, folders), "--out", str(out)]) == 2
    assert "config.json cannot be read" in capfd.readouterr().err


def test_labels_are_drawn_as_they_are(tmp_path: Path) -> None:
    line = np.arange(2.0)
    labels = list(NAMES.values())
    ticks = list(enumerate(labels))
    layers: list[Layer] = [
        *(Curve(name, line, line, "#000000") for name in labels[::2]),
        *(
            Points(name, line, line, Marker("#000000"), hover=Hover("%{customdata[0]}", [[name]] * 2))
            for name in labels[1::2]
        ),
    ]
    formula = NAMES["a formula"]
    panels = [
        Panel(name, Axis(formula, ticks=ticks), Axis(name, ticks=ticks), layers, texts=[(0, 0, name)])
        for name in (formula, NAMES["long"])
    ]
    figure = Figure("figure", panels, columns=2)
    drawing.save(figure, tmp_path, dpi=20)
    shown = drawing.draw(figure)
    axis = shown.axes[0]
    assert axis.get_title() == formula.replace("$", r"\$")
    assert {text.get_text().strip() for text in shown.legends[0].get_texts()} == {
        paper._literal(name).strip() for name in labels
    }
    html = drawing.to_html(figure, with_library=False)
    told = json.loads(plotly.io.to_json(drawing.interactive(figure)))
    assert "&lt;b&gt;&amp;amp;&lt;/script&gt;&lt;!--" in {trace.get("name") for trace in told["data"]}
    assert "</script><!--" not in html


@pytest.mark.parametrize("half", [r"\ud800", r"a \uDFFF b", r"\ud800\ud800"])
def test_half_a_character_in_a_prompt_is_refused(half: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "whole: \\ud83d\\ude00"}}\n{{"prompt": "{half}"}}\n')
    with pytest.raises(
        RazorError, match=r"prompts\.jsonl, line 2: the text is not valid Unicode \('.*\\ud[8f][0-9a-f]{2}"
    ):
        read_prompts(path)
    path.write_text('{"prompt": "whole: \\ud83d\\ude00"}\n')
    assert read_prompts(path) == ["whole: \U0001f600"]


def test_json_is_valid_whatever_is_in_it(capfd: pytest.CaptureFixture[str]) -> None:
    from rlrazor.cli.printing import print_json

    print_json({"nan": float("nan"), "inf": [float("-inf"), (1.0, "é\ud800")], "name": NAMES["an escape"]})
    out = capfd.readouterr().out
    assert out.isascii()
    assert json.loads(out, parse_constant=pytest.fail) == {
        "nan": None,
        "inf": [None, [1.0, "é\ud800"]],
        "name": NAMES["an escape"],
    }


def test_a_table_in_a_file_is_wide_enough() -> None:
    assert console_for_tables().width == 120


def test_nothing_prints_or_reads_in_another_way() -> None:
    """Rich's own consoles and columns take brackets for markup, and polars takes paths for patterns."""
    wrong = re.compile(
        r"(?<!\w)(Console|TextColumn)\(|from_markup|pl\.(read|scan)_\w+\((?!io\.BytesIO|file\)|.*read_bytes)"
    )
    source = Path(rlrazor.__file__).parent
    found = [
        f"{path.relative_to(source)}: {line.strip()}"
        for path in source.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if path.name != "terminal.py" and wrong.search(line)
    ]
    assert found == []


def test_a_monitor_that_nobody_can_hear_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk, on a closed output, and on one whose encoding lacks a character."""
    from rlrazor.guard import monitor

    full = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(full, "write", lambda text: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for stream in (full, None, narrow := io.TextIOWrapper(io.BytesIO(), encoding="ascii")):
        monkeypatch.setattr(sys, "stdout", stream)
        monitor._say("[razor] 1 ± 2 \x1b[31m")
    narrow.flush()
    assert isinstance(narrow.buffer, io.BytesIO)
    assert narrow.buffer.getvalue() == b"[razor] 1 \\xb1 2 \\x1b[31m\n"
