"""Nothing is written over that is not ours, nor over what is read, whatever the command and whatever the name."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from rlrazor.cli import build_parser, main
from rlrazor.cli.outputs import check_folder
from rlrazor.errors import RazorError
from rlrazor.experiments.language.unfinished import save_model
from rlrazor.report import drawing
from rlrazor.report.drawing import Axis, Curve, Figure, Panel
from rlrazor.runs.records import Record, RunSpec
from rlrazor.runs.store import Checkpoint, RunStore
from rlrazor.system import writing
from test_report import make_table
from tiny_models import char_tokenizer, tiny_llama

NOT_OURS = "is there already, and was not written by this command"
READ_AS_WELL = "would be written, and is read as well"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, with all that `compare` reads; its models are never loaded."""
    monkeypatch.chdir(tmp_path)
    for model in ("base", "tuned"):
        (tmp_path / model).mkdir()
        (tmp_path / model / "config.json").write_text("{}")
        (tmp_path / model / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    (tmp_path / "text.txt").write_text("a text\n")
    (tmp_path / "law.json").write_text("{}")
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "winogrande_validation.jsonl").write_text("{}\n")
    (tmp_path / "own.py").write_text("def verify(prompt, completion): return 1.0\n")
    (tmp_path / "grid.toml").write_text("seeds = [0]\n")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


COMPARE = ("compare", "base", "tuned", "--prompts", "prompts.txt")
SWEEP = ("--data-mirror", "mirror", "--prompts", "prompts.txt", "--verifier", "own.py:verify", "--generic", "text.txt")


def refused(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a command ends that writes nothing."""
    before = contents(Path())
    assert main(arguments) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert error.startswith("razor: ")
    assert error.count("\n") == 1
    assert contents(Path()) == before
    return error


@pytest.mark.parametrize(
    "out",
    [
        *("prompts.txt", "law.json", "text.txt", "mirror/winogrande_validation.jsonl"),
        *("tuned/model.safetensors", "tuned/config.json", "base/model.safetensors", "./base/../prompts.txt"),
    ],
)
def test_a_page_is_not_written_over_what_is_read(out: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = [*COMPARE, "--law", "law.json", "--generic", "text.txt", "--prior", "winogrande", "--data-mirror", "mirror"]
    assert READ_AS_WELL in refused([*given, "--out", out], capfd)
    linked = [Path("symbolic.html"), Path("hard.html")]
    linked[0].symlink_to(out)
    linked[1].hardlink_to(out)
    for path in linked:
        assert READ_AS_WELL in refused([*given, "--out", str(path)], capfd)
    assert linked[0].is_symlink()


def test_a_page_of_ours_that_is_read_is_not_written_over(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    writing.write_text(here / "page.html", '<!DOCTYPE html><meta name="generator" content="rlrazor">')
    assert READ_AS_WELL in refused([*COMPARE, "--generic", "page.html", "--out", "page.html"], capfd)


def test_a_page_is_written_over_no_file_of_the_users(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The default one neither, nor one that a link leads to, nor one that only speaks of us; nor an empty one."""
    for content in ("mine", "", '<!DOCTYPE html><p>content="rlrazor"</p>', '<meta name="generator" content="rlrazor">'):
        Path("comparison.html").write_text(content)
        assert NOT_OURS in refused(list(COMPARE), capfd)
    Path("other.html").symlink_to("comparison.html")
    assert NOT_OURS in refused([*COMPARE, "--out", "other.html"], capfd)
    Path("loop").symlink_to("loop")
    assert "Too many levels of symbolic links" in refused([*COMPARE, "--out", "loop"], capfd)


def test_a_page_is_a_file(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("to-pipe.html").symlink_to("pipe")
    for out, said in {
        "folder": "folder is a folder",
        "pipe": "no file but a device or a pipe",
        "to-pipe.html": "no file but a device or a pipe",
        "/dev/null": "is a device",
        "/dev/full": "is a device",
        "/dev/stdout": "is a device",
        "/proc/self/fd/1": "is a device",
        "/dev/null/page.html": "Not a directory",
        "prompts.txt/page.html": "Not a directory",
        f"{'x' * 300}.html": "File name too long",
        "nul\0.html": "NUL character",
    }.items():
        assert said in refused([*COMPARE, "--out", out], capfd)
    with pytest.raises(SystemExit) as done:
        main([*COMPARE, "--out", ""])
    assert done.value.code == 2
    assert "it is empty" in capfd.readouterr().err


Prepare = Callable[[Path], object]


def wrote(name: str, content: str = "mine") -> Prepare:
    def prepare(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)

    return prepare


@pytest.mark.parametrize("name", ["config.json", "records.parquet", "teachers.json", "report.html", "figures/fig3.png"])
@pytest.mark.parametrize(
    "command",
    [
        ("sweep", "--base", "base", "--task", "letters"),
        ("reproduce", "language"),
        ("reproduce", "parity-mnist"),
        ("reproduce", "forecast"),
        ("calibrate", "tiny", "--task", "letters"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_run_folder_of_the_users_is_added_to_only(
    command: tuple[str, ...], name: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrote(f"out/{name}")(here)
    assert f"{name} {NOT_OURS}" in refused([*command, "--out", "out"], capfd)


def test_the_tiny_base_is_no_folder(here: Path) -> None:
    (here / "tiny").mkdir()
    given = build_parser().parse_args(["calibrate", "tiny", "--task", "letters", "--out", "tiny"])
    check_folder(given, given.out)


@pytest.mark.parametrize("name", ["law.json", "law.png", "law.svg", "prompts.jsonl", "train.jsonl", "base/config.json"])
def test_a_calibration_is_written_over_nothing_of_the_users(
    name: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrote(f"out/{name}", '{"prompt": "mine"}\n')(here)
    said = refused(["calibrate", "tiny", "--task", "letters", "--out", "out"], capfd)
    assert f"{'base' if 'base' in name else name} {NOT_OURS}" in said


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("calibrate", "base", *SWEEP, "--out", "base"), "base would be written to"),
        (("calibrate", "base", *SWEEP, "--out", "mirror"), "mirror would be written to"),
        (("sweep", "--base", "base", "--task", "letters", "--out", "base"), "base would be written to"),
        (("finetune", "base", "--task", "letters", "--lr", "1e-3", "--out", "base"), "base would be written to"),
        (("reproduce", "parity-mnist", "--data-dir", "mirror", "--out", "mirror"), "mirror would be written to"),
        (("calibrate", "tiny", "--task", "letters", "--out", "\udcff"), "\\udcff is not UTF-8"),
        (("finetune", "tiny", "--task", "letters", "--lr", "1", "--out", "\udcff"), "\\udcff is not UTF-8"),
        (("reproduce", "parity-mnist", "--out", "\udcff"), "\\udcff is not UTF-8"),
        (("theory", "--out", "out"), f"theory.json {NOT_OURS}"),
        (("pick", "run", "--figure", "out"), f"pick.png {NOT_OURS}"),
        (("report", "base", "--markdown", "out"), f"findings.md {NOT_OURS}"),
        (("report", "run"), f"report.html {NOT_OURS}"),
        (("report", "run", "base", "--out", "out"), f"comparison.html {NOT_OURS}"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_no_command_writes_over_what_is_there(
    command: tuple[str, ...], said: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("out/theory.json", "out/pick.png", "out/findings.md", "run/report.html", "out/comparison.html"):
        wrote(name)(here)
    assert said in refused(list(command), capfd)


def test_a_calibration_does_not_write_over_the_prompts_it_reads(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wrote("out/prompts.jsonl", '{"prompt": "a"}\n')(here)
    command = ["calibrate", "base", "--prompts", "out/prompts.jsonl", "--out", "out"]
    assert READ_AS_WELL in refused(command, capfd)


def test_two_outputs_that_are_one_file(here: Path) -> None:
    Path("a.svg").symlink_to("b.svg")
    with pytest.raises(RazorError, match=r"a\.svg and b\.svg are one file"):
        writing.check([(Path("a.svg"), "svg"), (Path("b.svg"), "svg")])


def test_what_we_wrote_is_written_again(here: Path) -> None:
    """Each kind, by what our own writers leave; a link to it stays one, and its file is the new one."""
    figure = Figure(
        "pick", [Panel("t", Axis("x"), Axis("y"), [Curve("c", np.arange(2.0), np.arange(2.0), "#000000")])], columns=1
    )
    drawing.save(figure, here)
    drawing.save(figure, here)
    for drawn in drawing.KINDS:
        assert writing.is_ours(here / f"pick.{drawn}", drawn)
    make_table(runs=1, checkpoints=1).write_parquet(here / "records.parquet")
    assert writing.is_ours(here / "records.parquet", "table")
    pl.DataFrame({"step": [1]}).write_parquet(here / "mine.parquet")
    assert not writing.is_ours(here / "mine.parquet", "table")
    for kind, ours, others in (
        ("json", '{"versions": {"rlrazor": "0"}}', ["{", "[]", "1", '{"versions": {}}', "[" * 100_000]),
        ("log", '{"run": "a", "step": 1, "kl_forward": 0}\n{"ru', ["mine", '{"prompt": "a"}', '{"step": 1}']),
        ("log", "", ["\n"]),
    ):
        for content in (ours, *others):
            (here / "file").write_text(content)
            assert writing.is_ours(here / "file", kind) == (content == ours)  # type: ignore[arg-type]
    (here / "link.json").symlink_to("target.json")
    for value in (1, 2):
        with writing.atomic_path(here / "link.json") as partial:
            partial.write_text(json.dumps({"versions": {"rlrazor": "0"}, "value": value}))
    assert (here / "link.json").is_symlink()
    assert json.loads((here / "target.json").read_text())["value"] == 2


def test_a_name_as_long_as_names_can_be(here: Path) -> None:
    path = here / f"{'x' * 250}.html"
    writing.write_text(path, "<!DOCTYPE html>half of a pair: \ud800")
    assert path.read_bytes() == rb"<!DOCTYPE html>half of a pair: \ud800"
    assert [one.name for one in here.glob(".*")] == []


def test_a_saved_model_replaces_none_of_the_users(here: Path) -> None:
    model, tokenizer = tiny_llama(), char_tokenizer()
    with pytest.raises(RazorError, match=NOT_OURS):
        save_model(model, tokenizer, here / "base")
    assert (here / "base" / "model.safetensors").read_bytes() == b"weights"
    for _ in range(2):
        save_model(model, tokenizer, here / "models" / "new")
    assert not list((here / "models").glob(".*"))


def test_a_run_replaces_none_of_the_users(here: Path) -> None:
    spec = RunSpec("toy", "sft", {}, 0)
    store = RunStore(here)
    wrote(f"runs/{spec.run_id}/notes.txt")(here)
    with store.open_for_writing(), pytest.raises(RazorError, match=NOT_OURS):
        store.write(spec, [Checkpoint(Record(spec.run_id, 1, 1.0, 0.5, {"a": 0.5}, {}, {}))], seconds=0)
    assert (store.runs / spec.run_id / "notes.txt").read_text() == "mine"


def test_a_lock_is_no_file_of_the_users_emptied(here: Path) -> None:
    (here / ".lock").write_text("mine")
    with RunStore(here).open_for_writing():
        pass
    assert (here / ".lock").read_text() == "mine"
    (here / ".lock").unlink()
    (here / ".lock").symlink_to("prompts.txt")
    with pytest.raises(RazorError, match="Cannot write to"), RunStore(here).open_for_writing():
        pass
    assert (here / "prompts.txt").read_text() == "a prompt\n"


def test_a_folder_that_is_replaced_is_ours(here: Path) -> None:
    with pytest.raises(RazorError, match=NOT_OURS):
        writing.require_our_folder(here / "base")
    writing.mark_folder(here / "base")
    (here / "empty").mkdir()
    for name in ("base", "empty", "missing"):
        writing.require_our_folder(here / name)


def test_a_file_of_any_size_is_told_by_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "LARGEST", 100)
    row = '{"run": "a", "step": 1, "kl_forward": 0.1}\n'
    (tmp_path / "razor.jsonl").write_text(row * 10)
    writing.check_writable(tmp_path / "razor.jsonl", "log")
    (tmp_path / "law.json").write_text('{"format": 2, "law": "' + "x" * 100 + '", "interval": {}}')
    with pytest.raises(RazorError, match="was not written by this command"):
        writing.check_writable(tmp_path / "law.json", "json")
