"""A command a run: the lines of a plan, each trained by a process of its own, make the folder of the whole."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from idx_files import write_dataset
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.runs import lines
from rlrazor.runs.dry_run import planned
from rlrazor.runs.runner import Options, run
from rlrazor.runs.store import RunStore
from test_runner import Config, Toy, quiet, trained


def bits(out: Path) -> dict[str, bytes]:
    """All files of the runs but their wall time, and what is beside them but the command and its costs."""
    named = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    wanted = re.compile(r"runs/.*|records\.parquet|teachers\.json")
    return {
        name: path.read_bytes()
        for name, path in named.items()
        if wanted.fullmatch(name) and not name.endswith("seconds.json")
    }


def numbers(toy: Toy, config: Config) -> list[list[int]]:
    return [[line.number for line in wave] for wave in lines.lines(planned(toy, config))]


def test_lines_come_in_the_order_in_which_runs_need_one_another() -> None:
    toy, config = Toy(), Config()
    waves = lines.lines(planned(toy, config))
    # Bases, the sweep, of each level and seed a teacher, and its student.
    assert numbers(toy, config) == [[1, 2], [3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14]]
    assert [wave[0].title for wave in waves] == ["weights for sweep", "sweep", "weights for students", "students"]
    assert [line.what for line in waves[0]] == ["base seed 0", "base seed 1"]
    assert waves[2][0].what == "the best of plus, seed 0"
    assert numbers(Toy(staged=True), config) == [[1], [2], [3], [4]]
    with pytest.raises(RazorError, match="There are 14 lines, and --line 15 is none"):
        lines.find(planned(toy, config), 15)


def test_a_line_says_what_it_waits_for(tmp_path: Path) -> None:
    with pytest.raises(RazorError, match=r"Line 3 needs base seed 0, which is not finished in .*: wait for the lines"):
        run(Toy(), Config(), Options(tmp_path, line=3), quiet())
    for number in (1, 2, 3):
        run(Toy(), Config(), Options(tmp_path, line=number), quiet())
    with pytest.raises(RazorError, match=r"Line 11 needs plus lr 2.0e-01 constant 1 epoch seed 0, which is not"):
        run(Toy(), Config(), Options(tmp_path, line=11), quiet())  # its teacher is chosen among them


@pytest.mark.parametrize("toy", [Toy(), Toy(staged=True)])
def test_all_lines_make_the_folder_that_the_whole_command_makes(toy: Toy, tmp_path: Path) -> None:
    run(toy, Config(), Options(tmp_path / "whole"), quiet())
    out = tmp_path / "lines"
    for wave in numbers(toy, Config()):
        for number in reversed(wave):  # in any order
            run(toy, Config(), Options(out, line=number), quiet())
    before = trained(out)
    assert before == trained(tmp_path / "whole")
    for wave in numbers(toy, Config()):
        for number in wave:
            assert run(toy, Config(), Options(out, line=number), quiet()).trained == 0
    done = run(toy, Config(), Options(out), quiet())
    assert (done.trained, trained(out)) == (0, before)
    assert bits(out) == bits(tmp_path / "whole")
    assert not (out / ".locks").exists()


def test_lines_write_beside_one_another_but_not_the_same_run_nor_beside_the_whole_command(tmp_path: Path) -> None:
    toy, config = Toy(), replace(Config(), seeds=(0,))
    run(toy, config, Options(tmp_path, line=1), quiet())
    store = RunStore(tmp_path)
    sweep = next(toy.phases(config, store)).specs
    half = tmp_path / "runs" / f".{sweep[0].run_id}.1"
    others = tmp_path / "runs" / f".{sweep[1].run_id}.1"
    half.mkdir()
    holder = f"""
import sys, test_runner
from pathlib import Path
from rlrazor.runs.store import RunStore
store = RunStore(Path({str(tmp_path)!r}))
spec = next(test_runner.Toy().phases(test_runner.Config(seeds=(0,)), store)).specs[1]
with store.open_for_runs([spec]):
    print("held", flush=True)
    sys.stdin.read()
"""
    path = ":".join([str(Path(__file__).parent), *filter(None, sys.path)])
    other = subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PYTHONPATH": path}
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    others.mkdir()
    try:
        # What a killed process has left of a run is cleared by whoever trains it; what of others, may be being written.
        assert run(toy, config, Options(tmp_path, line=2), quiet()).trained == 1
        assert (half.exists(), others.exists()) == (False, True)
        with pytest.raises(RazorError, match=r"Another razor process is training plus lr 2.0e-01 .*: wait for it\."):
            run(toy, config, Options(tmp_path, line=3), quiet())
        with pytest.raises(RazorError, match="Another razor process is writing to"):
            run(toy, config, Options(tmp_path), quiet())
    finally:
        other.communicate()
    assert run(toy, config, Options(tmp_path, line=3), quiet()).trained == 1
    with store.open_for_writing():
        assert not others.exists()


def lines_on(out: Path, machines: dict[int, str], patch: pytest.MonkeyPatch) -> list[str]:
    """Train these lines, each on its machine; returns what each has said of the machines."""
    said = []
    for number, machine in machines.items():
        for module in ("runner", "store"):
            patch.setattr(f"rlrazor.runs.{module}.MACHINE", machine)
        console = quiet()
        with console.capture() as captured:
            run(Toy(), Config(), Options(out, line=number), console)
        said.append(" ".join(captured.get().split()))
    return said


def test_lines_on_several_machines_are_told_of_and_named_beside_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, alone = tmp_path / "several", tmp_path / "one"
    said = lines_on(out, {1: "here", 2: "there", 3: "here"}, monkeypatch)
    torch = version("torch")
    here, there = (f"with torch {torch} on {machine}" for machine in ("here", "there"))
    assert "digits" not in said[0]
    assert f"were made {here}, these will be {there}: their last digits may differ." in said[1]
    assert f"were made {here} and {there}, these will be {here}: their last digits may differ." in said[2]
    lines_on(out, dict.fromkeys(range(4, 15), "here"), monkeypatch)
    assert "digits" not in " ".join(lines_on(alone, dict.fromkeys(range(1, 15), "here"), monkeypatch))
    for folder, machines in ((out, "here; there"), (alone, "here")):
        run(Toy(), Config(), Options(folder), quiet())
        assert json.loads((folder / "config.json").read_text())["machine"] == machines
    assert bits(out) == bits(alone)  # who made a run is no part of it


GRID = [
    *("reproduce", "parity-mnist", "--methods", "sft-1", "--lrs", "1e-3", "--schedules", "constant", "--epochs", "1,2"),
    *("--seeds", "0,1", "--batch-size", "16", "--checkpoints-per-epoch", "1", "--pretrain-epochs", "1"),
    *("--pretrain-size", "100"),
]


@pytest.mark.usefixtures("undrawn")
def test_the_printed_commands_run_at_the_same_time_make_the_folder_of_the_plain_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_dataset(tmp_path / "the data", train=200, test=100)
    command = [*GRID, "--data-dir", str(data), "--jobs", "1"]
    whole, out = tmp_path / "whole", tmp_path / "by line"
    assert main([*command, "--out", str(whole)]) == 0
    capsys.readouterr()
    assert main([*command, "--out", str(out), "--print-commands"]) == 0
    assert not out.exists()
    waves = [wave.splitlines() for wave in capsys.readouterr().out.split("# wait for all above\n")]
    commands = [[line for line in wave if not line.startswith("#")] for wave in waves]
    # Two bases; of each seed a run, whose beginning is another one; the tables.
    assert [len(wave) for wave in commands] == [2, 2, 1]
    assert commands[1][0].endswith("--line 3  # sft-1 lr 1.0e-03 constant 2 epochs seed 0")
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    for wave in commands[:-1]:
        at_once = [subprocess.Popen(["sh", "-c", line], stderr=subprocess.PIPE, text=True) for line in wave]
        for process in at_once:
            said = process.communicate()[1]
            assert process.returncode == 0, said
            assert "trained, " in said
    assert main([*command, "--out", str(out)]) == 0
    assert "0 runs trained, 6 kept" in capsys.readouterr().err
    assert (out / "report.html").exists()
    assert len(bits(whole)) > 6 * 2
    assert bits(out) == bits(whole)


def test_an_analysis_has_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "parity-mnist", "--analysis", "theory", "--line", "1"]) == 2
    assert "leave --analysis out" in capsys.readouterr().err
