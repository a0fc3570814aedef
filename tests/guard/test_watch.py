"""`razor watch`: the numbers of the monitor and of `razor compare`, restarts, half-written checkpoints, budgets."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from laws import PROMPTS, law_of
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.guard import log as log_module
from rlrazor.guard import watch as watching_module
from rlrazor.guard.compare import compare
from rlrazor.guard.comparison import Pair
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.log_schema import LogRow
from rlrazor.guard.measuring import ReadBase
from rlrazor.guard.watch_command import OnBudgetCommand
from rlrazor.guard.watch_layout import StepFolder
from rlrazor.guard.watch_whole import is_finished, missing_of, weights_digest
from rlrazor.lm.probes import read_prompts
from rlrazor.system.documents import checked
from tiny_models import char_tokenizer, noisy, saved, tiny_llama
from watching import trainer_of, watch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a Trainer with a monitor: base, law, prompts, and run/ with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    base = tiny_llama()
    saved(folder / "base", base, char_tokenizer())
    law = law_of(base, scale=20.0)
    law.save(folder / "law.json")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    monitor = watch(folder, law, budget=0.25, every=2)
    trainer_of(folder / "run", [monitor], base, save_strategy="steps", save_steps=2).train()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Its checkpoints alone, as if nobody had watched."""
    ignored = shutil.ignore_patterns("razor.json*", ".razor*")
    return Path(shutil.copytree(trained / "run", tmp_path / "run", ignore=ignored))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching_module, "SETTLE", 0.1)


@pytest.fixture
def razor(trained: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[Any], str]]:
    """`razor watch RUN` with more options: the exit code, the rows that it printed, and what it said."""

    def call(run: Path, *more: str, law: bool = True, once: bool = True) -> tuple[int, list[Any], str]:
        own = ["--law", str(trained / "law.json")] if law else ["--max-new-tokens", "6", "--no-chat"]
        command = ["watch", str(run), "--base", str(trained / "base"), "--prompts", str(trained / "prompts.jsonl")]
        capfd.readouterr()
        code = main([*command, *own, *(["--once"] if once else []), "--json", "--interval", "0.05", *more])
        out, said = capfd.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], said

    return call


def rows_of(run: Path) -> list[Any]:
    return [json.loads(line) for line in (run / "razor.jsonl").read_text().splitlines()]


def figures_and_rest(row: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """What is rounded, and what is not; without groups, as `approx` wants it: "forecast.drop"."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= {f"{name}.{own}": one for own, one in value.items()} if isinstance(value, dict) else {name: value}
    figures = {name: value for name, value in flat.items() if isinstance(value, float)}
    return figures, {name: value for name, value in flat.items() if name not in figures}


def again(run: Path, step: int, change: float = 0.0) -> Path:
    """A checkpoint as it is, or with noise in its weights, at another step."""
    place = run / f"checkpoint-{step}"
    if not place.exists():
        shutil.copytree(run / "checkpoint-2", place)
    weights = load_file(place / "model.safetensors")
    rng = torch.Generator().manual_seed(step)
    save_file(
        {name: weight + change * torch.randn(weight.shape, generator=rng) for name, weight in weights.items()},
        place / "model.safetensors",
        {"format": "pt"},
    )
    state = json.loads((place / "trainer_state.json").read_text())
    (place / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))
    return place


# The numbers


def test_its_log_is_the_monitors(trained: Path, run: Path, razor: Any) -> None:
    """But for what is the monitor's own: its plan, the time that it took, and the id of the run.

    Not to the bit: torch's attention rounds by where in memory its inputs lie, and a checkpoint's weights lie elsewhere
    than those in training.
    """
    code, rows, _ = razor(run, "--budget", "0.25")
    monitored = rows_of(trained / "run")
    assert [row["step"] for row in rows] == [row["step"] for row in monitored] == [2, 4, 6]
    own = {"run", "seconds", "every", "probe_fraction", "last_probe_fraction", "checkpoint", "weights"}
    for row, other in zip(rows, monitored, strict=True):
        (figures, rest), (others, rest_of_other) = (
            figures_and_rest({name: of[name] for name in of if name not in own}) for of in (row, other)
        )
        assert rest == rest_of_other
        assert figures == pytest.approx(others, rel=1e-5, abs=1e-6)
        assert set(row) <= set(LogRow.model_fields)
        checked(LogRow, row, "it")
    assert [row["checkpoint"] for row in rows] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert len({row["run"] for row in rows}) == 1
    assert rows_of(run) == rows
    assert [row["within"] for row in rows] == [True, True, False]
    assert code == 1  # by the last one


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_its_kls_are_those_of_compare(trained: Path, run: Path, razor: Any, dtype: str) -> None:
    code, rows, said = razor(run, "--dtype", dtype, law=False)
    assert code == 0
    assert "uncalibrated" in said
    settings = watch(run).asked.settings  # those of the tests' law
    found = compare(
        Pair(str(trained / "base"), str(run / "checkpoint-4"), dtype),
        read_prompts(trained / "prompts.jsonl"),
        settings=settings,
    )
    for name in ("kl_forward", "kl_probe"):
        assert rows[1][name] == pytest.approx(found.distances.kl[name].mean, abs=1e-6)
        assert rows[1][f"{name}_stderr"] == pytest.approx(found.distances.kl[name].stderr, abs=1e-6)
        assert rows[1][f"{name}_per_token"] == pytest.approx(found.distances.per_token[name].mean, abs=1e-6)
    assert rows[1]["forecast"] is None


def test_for_people_it_prints_the_monitors_lines(trained: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [
        "watch",
        str(run),
        "--base",
        str(trained / "base"),
        "--prompts",
        str(trained / "prompts.jsonl"),
        "--once",
    ]
    capfd.readouterr()
    assert main([*command, "--law", str(trained / "law.json"), "--budget", "0.25"]) == 1
    out, said = capfd.readouterr()
    lines = out.splitlines()
    assert [line[:15] for line in lines] == ["[razor] step 2:", "[razor] step 4:", "[razor] step 6:"]
    assert "within the budget of 25.0" in lines[0]
    assert lines[2].endswith("is over the budget of 25.0: training goes on")
    assert "the first prompt, as measured in float32: 'a0:'" in said


# Pick


def test_pick_reads_its_log(run: Path, razor: Any, capfd: pytest.CaptureFixture[str]) -> None:
    razor(run, "--budget", "0.25")
    capfd.readouterr()
    assert main(["pick", str(run), "--metric", "loss", "--budget", "0.25", "--json", "--accept-uncertain"]) == 0
    found = json.loads(capfd.readouterr().out)
    forecasts = {row["step"]: row["forecast"]["drop"] for row in rows_of(run)}
    assert {one["step"]: one["drop"] for one in found["candidates"]} == forecasts
    assert (
        found["recommended"]["name"]
        == min((one for one in found["candidates"] if one["drop"] <= 0.25), key=lambda one: one["new"])["name"]
    )
    assert found["notes"] == []


def test_pick_takes_no_row_of_other_weights(run: Path, razor: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever a checkpoint is called: it is told by what is in it."""
    razor(run)
    (run / "checkpoint-2").rename(run / "checkpoint-3")
    again(run, 4, 0.1)
    capfd.readouterr()
    assert main(["pick", str(run), "--metric", "loss", "--budget", "0.5", "--json"]) in (0, 3)
    found = json.loads(capfd.readouterr().out)
    assert [one["name"] for one in found["candidates"]] == ["checkpoint-3", "checkpoint-6"]
    assert "checkpoint-4 is left out: `razor watch` has not measured its weights." in found["notes"]


def test_pick_without_a_trainers_metrics_takes_the_last_within_the_budget(
    run: Path, razor: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    other = run.parent / "verl"
    for step in (2, 4, 6):
        place = other / f"global_step_{step}" / "actor" / "huggingface"
        shutil.copytree(run / f"checkpoint-{step}", place, ignore=shutil.ignore_patterns("trainer_state.json"))
    razor(other, "--budget", "0.25")
    capfd.readouterr()
    assert main(["pick", str(other), "--budget", "0.25", "--json", "--accept-uncertain"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["metric"], found["recommended"]["name"]) == ("step", "global_step_4")
    assert [one["step"] for one in found["candidates"]] == [2, 4, 6]
    assert "the last counts as the best" in found["notes"][0]
    assert main(["pick", str(other), "--metric", "loss"]) == 2
    assert "metrics" in capfd.readouterr().err
    shutil.rmtree(other / "global_step_4")
    assert main(["pick", str(other), "--budget", "0.25", "--json", "--accept-uncertain"]) == 0
    assert json.loads(capfd.readouterr().out)["recommended"]["name"] == "global_step_2"


# Restarts


def test_what_is_in_the_log_is_not_measured_again(run: Path, razor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.move(run / "checkpoint-6", run.parent / "later")
    _, first, _ = razor(run)
    shutil.move(run.parent / "later", run / "checkpoint-6")
    (run / "checkpoint-2").touch()
    os.utime(run / "checkpoint-2" / "model.safetensors")  # as a copy without times has it
    with (run / "razor.jsonl").open("a") as log:
        log.write('{"run": "' + first[0]["run"] + '", "step": 6, "kl_for')  # killed there
    _, second, said = razor(run)
    assert [row["step"] for row in first] == [2, 4]
    assert [row["step"] for row in second] == [6]
    assert "razor.jsonl has 2 readings, up to step 4: nothing is measured twice." in said
    assert rows_of(run) == first + second
    assert {row["run"] for row in rows_of(run)} == {first[0]["run"]}
    monkeypatch.setattr(ReadBase, "measured", None)
    assert razor(run)[:2] == (0, [])


def test_a_monitors_own_readings_are_not_made_again(trained: Path, tmp_path: Path, razor: Any) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    assert razor(run)[:2] == (0, [])
    again(run, 8, 0.01)
    _, rows, _ = razor(run)
    assert [row["step"] for row in rows] == [8]
    assert rows[0]["run"] == rows_of(run)[0]["run"]


def test_a_monitor_that_resumes_keeps_its_rows(trained: Path, tmp_path: Path, razor: Any) -> None:
    """Of steps that are to come, too: which command was run for them is known from nowhere else."""
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    (run / "razor.jsonl").unlink()
    assert razor(run, "--budget", "0.25", "--on-budget", "true")[0] == 1
    watched = rows_of(run)
    assert [(row["step"], "on_budget" in row) for row in watched] == [(2, False), (4, False), (6, True)]
    law, model = LawFile.load(trained / "law.json"), tiny_llama()
    monitor = watch(trained, law, budget=0.25, every=1)
    resumed = trainer_of(run, [monitor], model, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    rows = rows_of(run)
    assert rows[:3] == watched
    assert [row["step"] for row in rows[3:]] == [5, 6]
    assert len({row["run"] for row in rows}) == 1
    # Another run is not this one.
    trainer_of(run, [watch(trained, law, budget=0.25, every=3)], tiny_llama(), save_strategy="no").train()
    assert [row["step"] for row in rows_of(run)] == [3, 6]


def test_what_was_written_anew_is_measured_again(run: Path, razor: Any) -> None:
    razor(run)
    again(run, 4, 0.05)
    code, rows, said = razor(run)
    assert (code, [row["step"] for row in rows]) == (0, [4])
    assert "checkpoint-4 was written anew since it was measured: it is measured again." in said
    assert [row["step"] for row in rows_of(run)] == [2, 4, 6, 4]


def test_a_log_of_another_base_or_other_prompts_is_refused(trained: Path, run: Path, razor: Any) -> None:
    razor(run)
    before = rows_of(run)
    (run.parent / "others.txt").write_text("a1:\nb2:\n")
    code, _, said = razor(run, "--prompts", str(run.parent / "others.txt"))
    assert code == 2
    assert "go on with the KLs in" in said
    assert "other prompts" in said
    assert rows_of(run) == before


def test_one_watch_at_a_time_writes_to_a_log(run: Path, razor: Any) -> None:
    from rlrazor.system.locks import locked

    with locked(run / ".razor.jsonl.lock", "taken"):
        code, _, said = razor(run)
        assert code == 2
        assert "Another razor watch writes to" in said
        assert razor(run, "--log", str(run.parent / "other.jsonl"))[0] == 0
    assert razor(run)[0] == 0


# Beside a monitor


def monitors(trained: Path) -> list[dict[str, Any]]:
    """Rows of steps 2, 4 and 6."""
    return rows_of(trained / "run")


def added(run: Path, rows: list[dict[str, Any]]) -> Any:
    with (run / "razor.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def told_to(out: Path) -> str:
    """A command that writes a line of what it was told."""
    script = "import os; print(os.environ['RAZOR_STEP'], os.environ.get('RAZOR_CHECKPOINT'), file=open('{}', 'a'))"
    return f'{sys.executable} -c "{script.format(out)}"'


def test_what_a_monitor_adds_meanwhile_is_not_measured_and_is_judged(
    trained: Path, run: Path, razor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step's row is over the budget: the command is run, once, and the run is over."""
    later, out = run.parent / "later", run.parent / "told"
    later.mkdir()
    for step in (4, 6):
        (run / f"checkpoint-{step}").rename(later / f"checkpoint-{step}")
    rows = monitors(trained)
    events: list[Callable[[], Any]] = [
        lambda: (added(run, [rows[1]]), (later / "checkpoint-4").rename(run / "checkpoint-4")),
        lambda: None,
        lambda: (added(run, [rows[2]]), (later / "checkpoint-6").rename(run / "checkpoint-6")),
    ]
    scripted(monkeypatch, [*events, *[lambda: None] * 1000], 0.02)  # the command is waited for, too
    command = told_to(out)
    code, printed, said = razor(run, "--budget", "0.25", "--on-budget", command, once=False)
    assert (code, [row["step"] for row in printed]) == (1, [2])
    assert "step 6, which is in the log, is over the budget" in said
    assert out.read_text() == f"6 {run / 'checkpoint-6'}\n"
    found = rows_of(run)
    assert [row["step"] for row in found] == [2, 4, 6, 6]
    assert [row.get("kl_forward") for row in found[1:]] == [rows[1]["kl_forward"], rows[2]["kl_forward"], None]
    assert razor(run, "--budget", "0.25", "--on-budget", command)[:2] == (1, [])
    assert len(out.read_text().splitlines()) == 1


def test_a_monitors_row_over_the_budget_that_is_not_the_last_runs_the_command(
    trained: Path, run: Path, razor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows come between two looks, and the later is within the budget; nothing is saved of either."""
    out, (within, _, above) = run.parent / "told", monitors(trained)
    for step in (4, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    rows = [{**above, "step": 4}, {**within, "step": 8}]
    scripted(monkeypatch, [lambda: added(run, rows), *[lambda: None] * 1000], 0.02)
    monkeypatch.setenv("RAZOR_CHECKPOINT", "of-another-watch")
    given = ("--budget", "0.25", "--on-budget", told_to(out), "--idle", "0.01")
    code, printed, said = razor(run, *given, once=False)
    assert (code, [row["step"] for row in printed]) == (0, [2])
    assert "step 4, which is in the log, is over the budget" in said
    assert out.read_text() == "4 None\n"


def test_who_lags_behind_a_monitor_runs_the_command_for_a_checkpoint_over_the_budget(
    trained: Path, run: Path, razor: Any
) -> None:
    """The exit code is by the last in the log all the same."""
    out = run.parent / "told"
    added(run, [{**monitors(trained)[0], "step": 8}])
    code, printed, _ = razor(run, "--budget", "0.25", "--on-budget", told_to(out))
    assert (code, [row["step"] for row in printed]) == (0, [2, 4, 6])
    assert [row["verdict"] for row in printed] == ["within the limit"] * 2 + ["above the limit"]
    assert out.read_text() == f"6 {run / 'checkpoint-6'}\n"


def test_of_a_log_that_is_begun_anew_nothing_is_kept(
    trained: Path, run: Path, razor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the verdict, where it ends before there is another reading; nor the id, in the row of what was begun."""
    log, known = run / "razor.jsonl", ReadBase.measured
    for step in (2, 4):
        shutil.rmtree(run / f"checkpoint-{step}")
    emptied = [lambda: (log.rename(run / "earlier.jsonl"), log.write_text("")), *[lambda: None] * 1000]
    scripted(monkeypatch, emptied, 0.02)
    code, printed, _ = razor(run, "--budget", "0.25", "--idle", "0.01", once=False)
    assert (code, [row["step"] for row in printed], log.read_text()) == (0, [6], "")

    def measured(self: ReadBase, path: str | Path, notes: list[str]) -> Any:
        found = known(self, path, notes)
        log.unlink()
        added(run, [{**monitors(trained)[0], "run": "another"}])
        return found

    added(run, [{**monitors(trained)[0], "run": "earlier"}])
    monkeypatch.setattr(ReadBase, "measured", measured)
    assert [row["run"] for row in razor(run)[1]] == ["another"]


def test_what_is_in_a_log_stays_as_it_is(trained: Path, run: Path, razor: Any) -> None:
    """Also what only another version reads, and what somebody has noted; half a row of a killed process is cut off."""
    log, row = run / "razor.jsonl", monitors(trained)[0]
    added(run, [row, {"step": 3, "kl_forward": 0.2, "share": 1.5}])
    text = log.read_text() + "a note\n"
    log.write_text(text + '{"run": "a", "st')
    _, printed, _ = razor(run)
    assert [row["step"] for row in printed] == [4, 6]
    assert log.read_text() == text + "".join(json.dumps(row) + "\n" for row in printed)


def test_a_log_that_a_monitor_begins_anew_is_taken_up(
    trained: Path, run: Path, razor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run begins in the folder: what comes is added to its log, under its id."""
    earlier = run / "razor-of-earlier-run-1.jsonl"

    def anew() -> None:
        (run / "razor.jsonl").rename(earlier)
        added(run, [{**monitors(trained)[0], "run": "another"}])
        again(run, 8, 0.01)

    scripted(monkeypatch, [anew, lambda: None])
    code, printed, _ = razor(run, once=False)
    assert (code, [row["step"] for row in printed]) == (0, [2, 4, 6, 8])
    assert rows_of(run)[1:] == printed[3:]
    assert {row["run"] for row in rows_of(run)} == {"another"}
    assert [json.loads(line) for line in earlier.read_text().splitlines()] == printed[:3]


def test_beside_a_monitor_of_other_prompts_it_ends_and_adds_nothing(
    trained: Path, run: Path, razor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {**monitors(trained)[0], "step": 8, "prompts_hash": "0" * 16}
    scripted(monkeypatch, [lambda: (added(run, [other]), again(run, 8, 0.01))])
    code, printed, said = razor(run, once=False)
    assert (code, [row["step"] for row in printed]) == (2, [2, 4, 6])
    assert "give `razor watch` a --log of its own" in said
    assert rows_of(run) == [*printed, other]


# Half-written checkpoints


def test_a_model_that_is_being_written_is_never_whole(tmp_path: Path) -> None:
    """Files in any order, each cut anywhere: whole where all of them are, and nowhere else."""
    tiny_llama().save_pretrained(tmp_path / "whole", max_shard_size="12KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    weights = [name for name in files if "safetensors" in name]
    assert len(weights) > 3
    rng = random.Random(0)
    for trial in range(60):
        place = tmp_path / f"part-{trial}"
        place.mkdir()
        order = rng.sample(sorted(files), len(files))
        last = rng.randrange(len(order))
        for name in order[:last]:
            (place / name).write_bytes(files[name])
        cut = rng.choice([0, 1, 7, 8, 9, len(files[order[last]]) - 1, rng.randrange(len(files[order[last]]))])
        (place / order[last]).write_bytes(files[order[last]][:cut])
        lacks = set(weights) - set(order[:last]) or order[last] == "config.json"  # which names the file of weights
        assert (missing_of(place) is None) == (not lacks), (order, last, cut)
    assert missing_of(tmp_path / "whole") is None
    single = tmp_path / "single"
    tiny_llama().save_pretrained(single)
    whole = (single / "model.safetensors").read_bytes()
    for cut in range(0, len(whole), 97):
        (single / "model.safetensors").write_bytes(whole[:cut])
        assert missing_of(single) is not None
    with (single / "model.safetensors").open("wb") as file:  # room was made for it, and the end not written yet
        file.truncate(len(whole))
    assert missing_of(single) is not None


def test_a_state_older_than_the_weights_is_of_another_save(run: Path) -> None:
    place = run / "checkpoint-2"
    step = StepFolder(2, [place])
    assert is_finished(step, place)
    now = time.time_ns()
    os.utime(place / "model.safetensors", ns=(now, now))
    assert not is_finished(step, place)
    os.utime(place / "trainer_state.json", ns=(now, now))
    assert is_finished(step, place)
    (place / "trainer_state.json").unlink()
    assert not is_finished(step, place)


def scripted(monkeypatch: pytest.MonkeyPatch, events: list[Callable[[], Any]], wait: float = 0.0) -> None:
    """What happens each time that the watch looks again; after the last, whoever waits presses Ctrl-C."""
    waiting = iter(events)

    def sleep(seconds: float) -> None:
        event = next(waiting, None)
        if event is None:
            raise KeyboardInterrupt
        event()
        real(wait)

    real = time.sleep
    monkeypatch.setattr(time, "sleep", sleep)


def test_checkpoints_are_measured_as_they_become_whole(run: Path, razor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of order, in parts, and one that is deleted before it is whole; the last step of the run ends the watch."""
    source, empty = run, run.parent / "empty"
    empty.mkdir()

    def part(step: int, name: str, size: int | None = None) -> Any:
        place = empty / f"checkpoint-{step}"
        place.mkdir(exist_ok=True)
        (place / name).write_bytes((source / place.name / name).read_bytes()[:size])

    def all_but_state(step: int) -> Any:
        for path in (source / f"checkpoint-{step}").iterdir():
            if path.name != "trainer_state.json" and path.is_file():
                part(step, path.name)

    heard: list[int] = []
    known = ReadBase.measured

    def measured(self: ReadBase, path: str | Path, notes: list[str]) -> Any:
        heard.append(int(Path(path).name.partition("-")[2]))
        return known(self, path, notes)

    def quiet(steps: list[int]) -> Any:
        assert heard == steps

    events: list[Callable[[], Any]] = [
        lambda: part(4, "config.json"),
        lambda: part(4, "model.safetensors", 1000),
        lambda: part(4, "model.safetensors"),
        lambda: (quiet([]), all_but_state(4)),
        lambda: (quiet([]), part(4, "trainer_state.json")),
        lambda: (quiet([4]), part(2, "model.safetensors", 5000)),
        lambda: shutil.rmtree(empty / "checkpoint-2"),
        lambda: (all_but_state(6), part(6, "trainer_state.json")),
    ]
    monkeypatch.setattr(ReadBase, "measured", measured)
    monkeypatch.setattr(watching_module, "SETTLE", 1000.0)
    scripted(monkeypatch, events)
    code, rows, said = razor(empty, once=False)
    assert code == 0
    assert [row["step"] for row in rows] == heard == [4, 6]
    assert "has no checkpoints yet (folders such as checkpoint-50" in said
    assert said.count("no checkpoints yet") == 1
    assert "[razor] checkpoint-2 was deleted before it was measured." in said


def test_without_a_file_that_is_written_last_it_waits_until_nothing_changes(
    run: Path, razor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    for step in (4, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    seen: list[bool] = []
    monkeypatch.setattr(watching_module, "SETTLE", 0.6)
    events = [
        lambda: (run / "checkpoint-2" / "optimizer.pt").write_bytes(b"more"),
        lambda: seen.append(not (run / "razor.jsonl").exists()),
        *[lambda: None] * 30,
    ]
    scripted(monkeypatch, events, 0.05)
    _, rows, _ = razor(run, once=True)
    assert seen == [True]
    assert [row["step"] for row in rows] == [2]


def test_one_that_never_becomes_whole_is_said_once(run: Path, razor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = run / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    monkeypatch.setattr(watching_module, "GIVE_UP", 0.1)
    scripted(monkeypatch, [lambda: None] * 8, 0.05)
    code, rows, said = razor(run, once=False)
    assert code == 130
    assert [row["step"] for row in rows] == [2, 6]
    (line,) = (line for line in said.splitlines() if "checkpoint-4" in line)
    assert line.startswith("[razor] checkpoint-4 is not measured: ")
    assert "it is not a whole safetensors file" in line


def test_one_that_vanishes_while_it_is_measured_is_passed_over(
    run: Path, razor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As save_total_limit deletes them."""
    known = ReadBase.opened

    def opened(self: ReadBase, path: str | Path) -> Any:
        if Path(path).name == "checkpoint-4":
            shutil.rmtree(path)
        return known(self, path)

    monkeypatch.setattr(ReadBase, "opened", opened)
    code, rows, said = razor(run)
    assert code == 0
    assert [row["step"] for row in rows] == [2, 6]
    assert "[razor] checkpoint-4 was deleted while it was measured." in said
    assert len(rows_of(run)) == 2


def test_who_is_slower_than_checkpoints_are_deleted_takes_the_newest(
    run: Path, razor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until there is none left: in order of step it would look at what is about to be deleted, each time."""
    for step in (8, 10, 12, 14):
        again(run, step, 0.001)
    known, order = ReadBase.opened, list[int]()

    def opened(self: ReadBase, path: str | Path) -> Any:
        order.append(int(Path(path).name.partition("-")[2]))
        if order[-1] == 4:  # deleted in the meantime, and those that follow it
            for step in (4, 6, 8):
                shutil.rmtree(run / f"checkpoint-{step}")
        return known(self, path)

    monkeypatch.setattr(ReadBase, "opened", opened)
    _, rows, said = razor(run)
    assert order == [2, 4, 14, 12, 10]
    assert [row["step"] for row in rows] == [2, 14, 12, 10]
    assert "checkpoint-4 was deleted while it was measured." in said
    assert "checkpoint-6 was deleted before it was measured." in said
    assert razor(run, "--budget", "0.6")[0] == 0  # by step 14, which is not the last in the log


def test_one_that_is_written_over_while_it_is_measured_is_looked_at_again(
    run: Path, razor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, done = ReadBase.measured, list[Path]()

    def measured(self: ReadBase, path: str | Path, notes: list[str]) -> Any:
        found = known(self, path, notes)
        if Path(path).name == "checkpoint-4" and not done:
            done.append(again(run, 4, 0.05))
        return found

    monkeypatch.setattr(ReadBase, "measured", measured)
    _, rows, said = razor(run)
    assert "checkpoint-4 was written to while it was measured: it is looked at again." in said
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[1]["weights"] == weights_digest(run / "checkpoint-4")


# What cannot be measured


def test_one_that_cannot_be_measured_does_not_end_it(
    trained: Path, run: Path, razor: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    again(run, 3, float("nan"))
    other = tiny_llama(50)
    saved(run / "checkpoint-5", other, char_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789+-=: \n.,!?_<"))
    saved(run / "checkpoint-7", tiny_llama(hidden=32), char_tokenizer())
    code, rows, said = razor(run)
    assert code == 0
    assert [row["step"] for row in rows] == [2, 4, 6]
    for sentence in (
        "[razor] checkpoint-7 is not measured: its hidden states have 32 numbers, and those of",
        "[razor] checkpoint-3 is not measured: The weights of",
        "[razor] checkpoint-5 is not measured: ",
        "have different vocabularies (50 and 44 outputs",
    ):
        assert sentence in said
    failed = {row["step"]: row["error"] for row in rows_of(run) if "error" in row}
    assert set(failed) == {3, 5, 7}
    # It is tried again by the next one, and what fails in the same way is not logged twice.
    _, rows, said = razor(run)
    assert rows == []
    assert "checkpoint-3 is not measured" in said
    assert len(rows_of(run)) == 6
    capfd.readouterr()
    shutil.copy(run / "checkpoint-4" / "trainer_state.json", run / "checkpoint-5")
    assert main(["pick", str(run), "--metric", "loss", "--budget", "0.5", "--json"]) in (0, 3)
    found = json.loads(capfd.readouterr().out)
    assert [one["step"] for one in found["candidates"]] == [2, 4, 6]
    assert any("checkpoint-3 is left out: it could not be measured: The weights" in note for note in found["notes"])


def test_where_memory_runs_out_it_goes_on(run: Path, razor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ReadBase.opened

    def opened(self: ReadBase, path: str | Path) -> Any:
        if Path(path).name == "checkpoint-2":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return known(self, path)

    monkeypatch.setattr(ReadBase, "opened", opened)
    code, rows, said = razor(run)
    assert (code, [row["step"] for row in rows]) == (0, [4, 6])
    assert "[razor] checkpoint-2 is not measured: Out of memory: --dtype bfloat16 takes half of it" in said
    monkeypatch.undo()
    assert [row["step"] for row in razor(run)[1]] == [2]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--on-budget", "true"], "--on-budget would never be run: give --law and --budget."),
        (
            ["--budget", "0.2", "--on-budget", "kill 'x"],
            "--on-budget cannot be split into words (No closing quotation)",
        ),
        (["--budget", "0.2", "--on-budget", ""], "--on-budget is empty"),
        (["--budget", "0.2", "--on-budget", "no-such-program 1"], "there is no program no-such-program to run"),
        (["--budget", "2"], "--budget must be a fraction of 1"),
        (["--idle", "3"], "leave --idle out"),
        (["--interval", "0"], "--interval must be at least"),
        (["--every", "0"], "--every must be at least 1"),
        (["--samples", "2"], "the law's own probe and settings are used"),
        (["--dtype", "bfloat16"], "measured in float32"),
    ],
)
def test_what_makes_no_sense_is_said_at_once(run: Path, razor: Any, more: list[str], sentence: str) -> None:
    code, rows, said = razor(run, *more)
    assert (code, rows) == (2, [])
    assert sentence in said
    assert len([line for line in said.splitlines() if line.startswith("razor: ")]) == 1


def test_files_that_are_not_there_are_said_at_once(trained: Path, run: Path, razor: Any) -> None:
    code, _, said = razor(run.parent / "typo")
    assert code == 2
    assert "There is no folder" in said
    assert "mkdir -p" in said
    assert razor(run, "--budget", "0.2", law=False)[0] == 2
    assert "There is no law" in razor(run, "--law", str(run / "none.json"))[2]
    law_of(tiny_llama(seed=1)).save(run.parent / "other.json")
    code, _, said = razor(run, "--law", str(run.parent / "other.json"))
    assert code == 2
    assert "this base is another one" in said
    (run / "razor.jsonl").write_text("my notes\n")
    code, _, said = razor(run)
    assert code == 2
    assert (run / "razor.jsonl").read_text() == "my notes\n"


def test_a_log_that_cannot_be_written_is_an_error_in_the_end_alone(run: Path, razor: Any) -> None:
    """What was measured is printed all the same, and added as soon as there is room."""
    left = [2]

    def full(*given: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*given)

    real = log_module._append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_module, "_append", full)
        code, rows, said = razor(run)
        assert (code, [row["step"] for row in rows], rows_of(run)) == (0, [2, 4, 6], rows)
        assert said.count("razor.jsonl cannot be written (No space left on device): what is measured is added") == 1
        (run / "razor.jsonl").unlink()
        left[0] = 99
        code, rows, said = razor(run)
        assert (code, [row["step"] for row in rows], rows_of(run)) == (2, [2, 4, 6], [])
        assert "cannot be written (No space left on device), and lacks the last 3 of what was measured: make" in said
    assert [row["step"] for row in razor(run)[1]] == [2, 4, 6]


# The budget


def test_the_command_is_run_once_when_the_budget_is_exceeded(run: Path, razor: Any) -> None:
    out = run.parent / "told"
    script = "import os; print(os.environ['RAZOR_STEP'], os.environ['RAZOR_CHECKPOINT'])"
    command = f"{sys.executable} -c \"{script}; open('{out}', 'a').write('x'); raise SystemExit(3)\""
    again(run, 8, 0.1)
    code, rows, said = razor(run, "--budget", "0.25", "--on-budget", command)
    assert code == 1
    assert [row.get("on_budget") for row in rows] == [None, None, OnBudgetCommand(command).digest, None]
    assert "raise SystemExit" not in (run / "razor.jsonl").read_text()  # commands may hold tokens
    assert f"6 {run / 'checkpoint-6'}" in said
    assert "ended with 3." in said
    assert razor(run, "--budget", "0.25", "--on-budget", command)[0] == 1
    again(run, 10, 0.2)
    assert [row["step"] for row in razor(run, "--budget", "0.25", "--on-budget", command)[1]] == [10]
    assert out.read_text() == "x"


def test_a_run_that_is_over_the_budget_already_is_ended_as_watching_begins(run: Path, razor: Any) -> None:
    """Given a budget, or a command that is right, only now."""
    assert razor(run)[0] == 0
    training = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        code, rows, said = razor(run, "--budget", "0.25", "--on-budget", f"kill -TERM {training.pid}")
        assert training.wait(10) == -signal.SIGTERM
    finally:
        training.kill()
    assert (code, rows) == (1, [])
    assert f"step 6, which is in the log, is over the budget: `kill -TERM {training.pid}` ended with 0." in said
    last = rows_of(run)[-1]
    assert (last["step"], last["on_budget"]) == (6, OnBudgetCommand(f"kill -TERM {training.pid}").digest)


def test_a_budget_that_is_kept_runs_nothing(run: Path, razor: Any) -> None:
    out = run.parent / "told"
    code, rows, _ = razor(run, "--budget", "0.6", "--on-budget", f"touch {out}")
    assert code == 0
    assert not out.exists()
    assert [row["verdict"] for row in rows] == ["within the limit"] * 3


def test_beyond_what_the_law_has_seen_it_cannot_be_told(run: Path, razor: Any, trained: Path) -> None:
    law_of(tiny_llama(), scale=0.001).save(run.parent / "small.json")
    law = LawFile.load(run.parent / "small.json")
    code, rows, _ = razor(run, "--law", str(run.parent / "small.json"), "--budget", "0.9")
    assert law.objection(limit=0.9) is None
    assert rows[-1]["forecast"]["extrapolated"]
    assert code == 3
    assert razor(run, "--law", str(run.parent / "small.json"), "--budget", "0.9", "--cautious")[0] == 1


def test_a_command_that_takes_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlrazor.guard.watch_command.PATIENCE", 0.05)
    command = OnBudgetCommand("sleep 0.5")
    assert "still runs after" in command.run(3, Path("checkpoint-3"))
    assert command.ended() is None
    assert command.ended(5.0) == "`sleep 0.5` ended with 0"
    assert command.ended() is None
    killed = OnBudgetCommand("sh -c 'kill -9 $$'")
    assert killed.run(3, Path("checkpoint-3")).endswith("was ended by signal 9") or killed.ended(5.0)
    with pytest.raises(RazorError, match="no program"):
        OnBudgetCommand("cd /")


# When


def test_only_some_steps_and_the_end_when_nothing_is_new(
    run: Path, razor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, rows, said = razor(run, "--every", "3", "--idle", "0.002", once=False)
    assert (code, [row["step"] for row in rows]) == (0, [6])
    assert "nothing new was saved for 0.12 s: watching ends here." in said


def test_idle_minutes_are_counted_from_when_looking_begins(
    tmp_path: Path, razor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not from before the base was read: training had ended without a checkpoint by then, it would seem."""
    ahead, read, clock = [0.0], ReadBase.of_source, time.monotonic

    def slow(*given: Any) -> ReadBase:
        ahead[0] += 1000.0
        return read(*given)

    monkeypatch.setattr(ReadBase, "of_source", slow)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + ahead[0])
    scripted(monkeypatch, [lambda: None, lambda: ahead.append(ahead.pop() + 301.0)])
    (tmp_path / "empty").mkdir()
    code, _, said = razor(tmp_path / "empty", "--idle", "5", once=False)
    assert (code, ahead) == (0, [1301.0])
    assert "nothing new was saved" in said


def test_steps_that_are_left_out_are_not_said_to_be_missing(run: Path, razor: Any) -> None:
    code, _, said = razor(run, "--every", "5")
    assert code == 2
    assert "has checkpoints, and none of a step that is a multiple of --every 5." in said
    for step in (2, 4, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    assert "has no checkpoints (folders such as" in razor(run, "--every", "5")[2]


def test_a_run_that_had_ended_before_is_waited_with_until_ctrl_c(
    run: Path, razor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next training run may be about to write into the folder."""
    for expected in ([2, 4, 6], []):  # and again where the log has all of it
        with pytest.MonkeyPatch.context() as patch:
            scripted(patch, [lambda: None] * 3)
            code, rows, said = razor(run, once=False)
        assert (code, [row["step"] for row in rows]) == (130, expected)
        assert said.count("checkpoint-6, the last of its training, was there before watching began") == 1
        assert "interrupted" in said
    state = run / "checkpoint-6" / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "max_steps": 9}))
    scripted(monkeypatch, [lambda: None] * 3)
    assert "the last of its training" not in razor(run, once=False)[2]


# Processes


@pytest.fixture
def process(trained: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """`razor watch` as a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(run: Path, *more: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "rlrazor", "watch", str(run), "--base", str(trained / "base")]
        own = ["--prompts", str(trained / "prompts.jsonl"), "--law", str(trained / "law.json"), "--interval", "0.1"]
        started.append(
            subprocess.Popen([*command, *own, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


@pytest.mark.slow
def test_a_killed_watch_loses_nothing(run: Path, process: Any) -> None:
    """Killed at the first reading, again, and ended with Ctrl-C: each checkpoint is in the log once, whole."""
    for step in range(8, 20, 2):
        again(run, step, 0.01)
    for _ in range(2):
        one = process(run)
        assert one.stdout.readline().startswith("[razor] step")
        one.kill()
        one.wait()
    last = process(run)
    while "step 18" not in last.stdout.readline():
        assert last.poll() is None
    last.send_signal(signal.SIGINT)
    _, said = last.communicate(timeout=30)
    assert last.returncode == 130
    assert "the same command goes on from there" in said
    assert [row["step"] for row in rows_of(run)] == list(range(2, 20, 2))
    assert not [path for path in run.iterdir() if path.suffix == ".tmp"]


@pytest.mark.slow
def test_a_training_run_beside_it_is_ended_on_budget(trained: Path, tmp_path: Path, process: Any) -> None:
    """Two processes: one trains and saves, the other watches and ends it.

    Training keeps no more than two checkpoints, and waits for the log where it is two ahead of it: on a busy machine
    they would else be deleted faster than any can be read.
    """
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from watching import trainer_of\n"
        "import json, pathlib, time, transformers\n"
        f"log = pathlib.Path({str(tmp_path / 'run' / 'razor.jsonl')!r})\n"
        "def measured():\n"
        "    lines = log.read_text().splitlines(True) if log.exists() else []\n"
        "    return max((json.loads(line)['step'] for line in lines if line.endswith('\\n')), default=0)\n"
        "class Slow(transformers.TrainerCallback):\n"
        "    def on_step_end(self, args, state, *_, **__):\n"
        "        while state.global_step - measured() > 4: time.sleep(0.1)\n"
        f"trainer_of({str(tmp_path / 'run')!r}, [Slow()], max_steps=2000, logging_steps=500, "
        "save_strategy='steps', save_steps=2, save_total_limit=2).train()\n"
    )
    root, quiet = Path(__file__).parents[2], {**os.environ, "PYTHONPATH": "src"}
    (tmp_path / "run").mkdir()
    training = subprocess.Popen([sys.executable, "-c", script], cwd=root, env=quiet, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "run" / "checkpoint-2").exists():  # it may take longer than the minute of --idle
            assert training.poll() is None
            time.sleep(0.1)
        one = process(tmp_path / "run", "--budget", "0.3", "--on-budget", f"kill -TERM {training.pid}", "--idle", "1")
        assert training.wait(600) == -signal.SIGTERM
        out, _ = one.communicate(timeout=300)
    finally:
        training.kill()
    assert one.returncode == 1
    assert f"is over the budget of 30.0: `kill -TERM {training.pid}` ended with 0" in out
    rows = rows_of(tmp_path / "run")
    assert sum("on_budget" in row for row in rows) == 1
    assert len({row["step"] for row in rows}) == sum("kl_forward" in row for row in rows)


def test_noise_tells_weights_apart(tmp_path: Path) -> None:
    """Also where one number of a file of megabytes is another, as long as it is in a block that is read."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "one")
    noisy(base, 1e-6).save_pretrained(tmp_path / "other")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert weights_digest(tmp_path / "one") == weights_digest(tmp_path / "copy") != weights_digest(tmp_path / "other")


def test_a_newest_checkpoint_that_is_measured_again_is_judged_anew(run: Path, razor: Any) -> None:
    """Training was resumed from an earlier one, and came to another end."""
    assert razor(run, "--budget", "0.25")[0] == 1
    shutil.copy(run / "checkpoint-2" / "model.safetensors", run / "checkpoint-6" / "model.safetensors")
    code, rows, _ = razor(run, "--budget", "0.25")
    assert (code, [row["step"] for row in rows]) == (0, [6])
    assert razor(run, "--budget", "0.25")[:2] == (0, [])
