"""`razor continual tasks.yaml`: two tasks on the tiny base, one of them with prompts and a verifier of a file."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binomtest  # type: ignore[attr-defined]  # scipy exports it dynamically

from rlrazor.cli import main
from rlrazor.experiments.language import cost
from rlrazor.experiments.language.own_sequence import OwnSequence
from rlrazor.experiments.language.sequence_file import config_of, read
from rlrazor.experiments.language.setup import TaskSource
from rlrazor.experiments.language.tasks import Form, OwnTask, score
from rlrazor.report import drawing
from tiny_models import char_tokenizer, saved, tiny_llama

pytestmark = [
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SEQUENCE = """
base: tiny
method: sft
lr: 1e-3
target: 0.95
batch_size: 4
max_steps: 4
checkpoints_per_epoch: 2
pretrain_steps: 5
test_prompts: 8
train_prompts: 32
kl_samples: 2
tasks:
  - ascending
  - task: last letter
    prompts: prompts.jsonl
    verifier: verify.py:verify
    stop: ";"
    chat: false
    max_new_tokens: 5
"""
VERIFIER = """
def verify(prompt, completion, last):
    return float(len(completion) == 3 and last in completion)
"""


def written(folder: Path, text: str = SEQUENCE) -> Path:
    """The folder of a user."""
    folder.mkdir(parents=True, exist_ok=True)
    strings = ["".join(random.Random(n).sample("abcdefghij", 6)) for n in range(40)]
    rows = [{"prompt": f"PC:{one}=", "last": one[-1], "completion": one[-3:]} for one in strings]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "verify.py").write_text(VERIFIER)
    (folder / "tasks.yaml").write_text(text)
    return folder / "tasks.yaml"


def records_of(out: Path) -> dict[str, bytes]:
    """Of finished runs."""
    return {path.parent.name: path.read_bytes() for path in out.glob("runs/[!.]*/records.jsonl")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "save", lambda *arguments, **options: None)
        assert main(["continual", str(written(folder)), "--out", str(folder / "out")]) == 0
    return folder


def told(whole: Path, capfd: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, what is printed as JSON, and what is said."""
    code = main(["continual", str(whole / "tasks.yaml"), "--out", str(whole / "out"), "--json", *more])
    out, err = capfd.readouterr()
    return code, json.loads(out), err


def test_every_stage_is_measured_on_every_task(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, found, err = told(whole, capfd)
    assert code == 0
    assert "0 runs trained, 3 kept" in err
    first, second = found["stages"]
    assert [stage["task"] for stage in (first, second)] == ["ascending", "last letter"]
    for stage in (first, second):
        assert {"score_ascending", "score_last letter"} <= set(stage["end"]["metrics"])
    assert found["spent"] == sum(stage["end"]["drift"]["kl_forward_since_before"] for stage in (first, second))
    # By hand: what the first stage has to cost, and the second with what the first cost beyond that.
    p, q = found["base"]["metrics"]["score_ascending"], first["end"]["metrics"]["score_last letter"]
    assert (first["before"], second["before"]) == (p, q)
    least = p * math.log(p / 0.95) + (1 - p) * math.log((1 - p) / 0.05)
    assert first["forecast"]["kl"] == pytest.approx(least)
    reached = first["end"]["new"]  # short of the target: only that had to be paid for
    paid = p * math.log(p / reached) + (1 - p) * math.log((1 - p) / (1 - reached)) if reached > p else 0
    beyond = first["end"]["drift"]["kl_forward_since_before"] - paid
    least = (q * math.log(q / 0.95) if q else 0) + (1 - q) * math.log((1 - q) / 0.05)
    assert second["forecast"]["kl"] == pytest.approx(least + beyond)
    assert f"Stage 1, ascending, ended at a score of {reached:.3f}, short of its target of 0.95." in err


def test_every_stage_leaves_its_model(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for stage in told(whole, capfd)[1]["stages"]:
        model = AutoModelForCausalLM.from_pretrained(stage["model"])
        (kept,) = (whole / "out" / "runs" / stage["end"]["run_id"] / "weights").glob("*.safetensors")
        for name, weight in load_file(kept).items():
            assert torch.equal(model.state_dict()[name], weight)
        assert AutoTokenizer.from_pretrained(stage["model"]).eos_token == ";"


def test_the_page_tells_what_is_left_and_what_it_cost(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, second = told(whole, capfd)[1]["stages"]
    page = (whole / "out" / "report.html").read_text()
    assert "What is left of each task?" in page
    assert "last letter, %" in page
    for stage in (first, second):
        assert f"{100 * stage['end']['metrics']['score_ascending']:.1f}" in page
        assert f"{stage['end']['drift']['kl_forward_since_before']:.2f}" in page
    assert "Which KL forecasts forgetting?" not in page  # of one method at one learning rate it would say nothing
    assert main(["report", str(whole / "out")]) == 0
    assert (whole / "out" / "report.html").read_text() == page


def test_a_killed_run_goes_on_to_the_same_records(whole: Path, tmp_path: Path) -> None:
    """By SIGKILL in the middle of the second stage."""
    out = tmp_path / "out"
    command = ["continual", str(whole / "tasks.yaml"), "--out", str(out)]
    script = "import sys\nfrom rlrazor.report import drawing\ndrawing.save = lambda *a, **b: None\n"
    script += f"from rlrazor.cli import main\nsys.exit(main({command!r}))"
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL, env=dict(os.environ)) as process:
        while process.poll() is None and not (
            len(records_of(out)) == 2 and list(out.glob(".unfinished/*/checkpoint-2/trainer_state.json"))
        ):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(records_of(out)) == 2
    assert main(command) == 0
    assert records_of(out) == records_of(whole / "out")
    assert len(list((out / "models").iterdir())) == 2


def test_the_budget_stops_before_a_stage_and_a_larger_one_goes_on(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a base that is never right, any method pays kl(0 || 0.95) = log 20 = 3.0 nats for a stage."""
    command = ["continual", str(whole / "tasks.yaml"), "--out", str(tmp_path / "out")]
    assert main([*command, "--kl-budget", "2.9"]) == 1
    out, err = capfd.readouterr()
    assert "Stopped before stage 1, ascending: 0 nats are spent, and it is forecast to cost 2.99" in err
    assert "the budget is 2.9. With a larger --kl-budget the same command goes on from here." in err
    assert "Report:" not in out
    for most in ("0", "0.0"):  # nothing may be spent
        assert main([*command, "--target", "1", "--kl-budget", most]) == 1
        assert "Stopped before stage 1, ascending" in capfd.readouterr().err
    assert main([*command, "--kl-budget", "3.1"]) == 1
    out, err = capfd.readouterr()
    assert "Stopped before stage 2, last letter: 0." in err
    assert "Report:" in out
    assert "of 3.1" in (tmp_path / "out" / "report.html").read_text()
    assert main([*command, "--kl-budget", "50"]) == 0
    assert "1 run trained, 2 kept" in capfd.readouterr().err
    assert records_of(tmp_path / "out") == records_of(whole / "out")
    # A smaller one does not undo what is there, and says that it is exceeded.
    assert main([*command, "--kl-budget", "0.1"]) == 1
    assert "nats, which is more than the budget of 0.1." in capfd.readouterr().err


def test_a_dry_run_trains_nothing(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["continual", str(whole / "tasks.yaml"), "--out", str(tmp_path / "out"), "--dry-run", "--json"]
    assert main(command) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["estimate"]["runs"], found["estimate"]["steps"], found["estimate"]["checkpoints"]) == (3, 8, 5)
    assert found["estimate"]["seconds"] > 0
    assert not (tmp_path / "out").exists()


def test_a_plan_needs_none_of_the_prior_tasks_data(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    base = saved(tmp_path / "base", tiny_llama(), char_tokenizer())
    first = "  - task: first\n    prompts: prompts.jsonl\n    verifier: verify.py:verify\n"
    text = SEQUENCE.replace("base: tiny", f"base: {base}\nprior: winogrande\ngeneric: prior")
    asked = written(tmp_path / "own", text.replace("pretrain_steps: 5\n", "").replace("  - ascending\n", first))
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(cost, "is_at_hand", lambda base: False)
    command = ["continual", str(asked), "--data-mirror", str(tmp_path / "empty"), "--dry-run"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["estimate"]["steps"] == 8


def test_the_command_line_overrides_the_file(whole: Path) -> None:
    file = read(whole / "tasks.yaml")
    assert config_of(file.names, file.settings).lrs == (1e-3,)
    found = config_of(file.names, {**file.settings, "lr": "2e-4", "method": "grpo"})
    assert (found.lrs, found.rl_lrs, found.methods, found.scored) == ((2e-4,), (2e-4,), ("grpo",), "sampled")


ADAPTER = """
base: base
method: sft
lr: 1e-2
lora_rank: 2
max_steps: 2
batch_size: 4
checkpoints_per_epoch: 1
max_new_tokens: 4
test_prompts: 4
prior: [winogrande]
prior_limit: 4
generic: prior
tasks:
  - {task: first, prompts: data/first.jsonl, stop: "\\n"}
  - {task: second, prompts: data/second.jsonl, stop: "\\n"}
"""


def test_an_adapters_stages_leave_whole_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model in a folder, named from where the file lies; the second adapter is around the first one's policy."""
    from transformers import AutoModelForCausalLM

    folder, mirror = tmp_path / "user", tmp_path / "mirror"
    written(folder, ADAPTER)
    saved(folder / "base", tiny_llama(max_position_embeddings=256), char_tokenizer())
    for name, answer in (("first", "b"), ("second", "c")):
        rows = [{"prompt": f"{a}{b}=", "completion": answer} for a in "abcd" for b in "0123456789"]
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mirror.mkdir()
    rows = [{"sentence": f"a {n} _ b", "option1": "cat", "option2": "dog", "answer": str(1 + n % 2)} for n in range(6)]
    (mirror / "winogrande_validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    assert main(["continual", "user/tasks.yaml", "--out", "out", "--data-mirror", "mirror"]) == 0
    assert "The generic probe is 64 prompts of the prior tasks at most" in Path("out/config.json").read_text()
    models = sorted(Path("out/models").iterdir())
    assert [path.name.rsplit("-", 1)[0] for path in models] == ["1-first", "2-second"]
    weights = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder / "base", *models)]
    for path, found in zip(models, weights[1:], strict=True):
        (kept,) = Path("out/runs", path.name.rsplit("-", 1)[1], "weights").glob("*.safetensors")
        assert all(torch.equal(found[name], weight) for name, weight in load_file(kept).items())
    moved = [{name for name in one if not torch.equal(one[name], other[name])} for one, other in pairwise(weights)]
    assert moved[0] == moved[1] != set()  # the second stage has moved the same matrices, further


WRONG = {
    "tasks: [ascending, descending]\nlrr: 1e-3": "there is no key 'lrr'. Keys: tasks, generic, old_examples,",
    "tasks: []": "tasks is a list of 0, and should have at least 2 entries",
    "tasks: [ascending]": "tasks is a list of 1, and should have at least 2 entries",
    "tasks: ascending": 'tasks is "ascending", and should be a list',
    "base: tiny": "lacks tasks",
    "- ascending": "has no keys: it needs `tasks`, a list",
    "": "has no keys: it needs `tasks`, a list",
    "tasks: [ascending, ascendin]": "There is no task 'ascendin'. Tasks:",
    "tasks: [ascending, letters]": "In a sequence the base 'tiny' takes the tasks ascending,",
    "tasks: [ascending, ascending]": "the task 'ascending' is there twice: name one otherwise",
    "tasks: [ascending, {task: prior, prompts: prompts.jsonl}]": "cannot be called 'prior', as columns of KL are",
    "tasks: [ascending, {task: earlier, prompts: prompts.jsonl}]": "cannot be called 'earlier', as columns of KL",
    "tasks: [ascending, {task: a_since_before, prompts: prompts.jsonl}]": "cannot be called 'a_since_before'",
    "tasks: [ascending, a+b]": "a task's name has letters, digits, spaces,",
    "tasks: [ascending, {verifier: 'verify.py:verify'}]": "tasks[1] needs `task`, one of `razor tasks`, or `prompts`",
    "tasks: [ascending, {task: a, verifier: 'verify.py:verify'}]": "a: verifier goes with prompts FILE",
    "tasks: [ascending, {prompts: nope.jsonl}]": "nope: There is no FOLDER/nope.jsonl, which prompts names",
    "tasks: [ascending, {prompts: prompts.jsonl, verifier: 'nope.py:verify'}]": "nope.py",
    "tasks: [ascending, {prompts: p.jsonl, verifer: 'v.py:verify'}]": "tasks.yaml is wrong, as tasks[1].verifer is not",
    "tasks: [{task: ascending, max_new_tokens: 5}, descending]": "max_new_tokens is of prompts of one's own",
    "tasks: [ascending, {prompts: prompts.jsonl, max_new_tokens: 5}]\nmax_new_tokens: 4": "in a file that has none",
    "tasks: [ascending, {prompts: 3}]": "tasks[1].prompts is 3, and should be text",
    "tasks: [ascending, descending]\nkl_budget: -1": "kl_budget is -1, and should be at least 0",
    "tasks: [ascending, descending]\nkl_budget: .nan": 'kl_budget is ".nan", and should be a number',
    "tasks: [ascending, descending]\nlr: [1e-3, 1e-4]": "lr has one value in a sequence, not 2",
    "tasks: [ascending, descending]\nlr: fast": "'fast' is not a number",
    "tasks: [ascending, descending]\nlr: 0": "lr must be",
    "tasks: [ascending, descending]\nlr: null": "lr: None is not a number",
    "tasks: [ascending, descending]\ntarget: 1.5": "target must be a fraction of 1",
    "tasks: [ascending, descending]\nmethod: dr-gpro": "Unknown method 'dr-gpro'",
    "tasks: [ascending, descending]\nold_examples: verify.py": "tasks.yaml: old_examples is for the methods replay",
    "tasks: [ascending, descending]\nold_examples: nope": "There is no FOLDER/nope, which old_examples names",
    "tasks: [ascending, {task: descending, chat: false}]": "descending: chat goes with prompts FILE",
    "tasks: [ascending, descending]\nprior: none": "it takes at least one: name some with",
    "tasks: [ascending, descending]\ngeneric: paragraphs": "knows ten letters and no words: leave generic paragraphs",
    "tasks: [ascending, descending]\nbase: ./nope": "There is no ./nope. Give a hub id, a folder",
    "tasks: [ascending, descending]\na: b: c": "cannot be read, as it is not YAML",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_one_sentence(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each with a base and a learning rate, unless the text is about those."""
    rest = "".join(f"\n{name}: {value}" for name, value in (("base", "tiny"), ("lr", "1e-3")) if f"{name}:" not in text)
    file = written(tmp_path, text + (rest if text.startswith("tasks") else ""))
    assert main(["continual", str(file), "--out", str(tmp_path / "out")]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert WRONG[text].replace("FOLDER", str(tmp_path)) in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kl-budget", "nan"], "--kl-budget must be at least 0, not nan"),
        (["--kl-budget", "-1"], "--kl-budget must be at least 0, not -1"),
        (["--kl-budget", "much"], "argument --kl-budget: invalid float value: 'much'"),
        (["--lr", "0"], "lr must be more than 0"),
        (["--target", "2"], "target must be a fraction of 1"),
        (["--budget", "0.02"], "Unknown option '--budget'."),
        (["--data-mirror", "nope"], "There is no nope, which --data-mirror names."),
        (["--out", "FOLDER/prompts.jsonl"], "FOLDER/prompts.jsonl"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    options: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [option.replace("FOLDER", str(tmp_path)) for option in options]
    try:
        code: Any = main(["continual", str(written(tmp_path)), "--out", str(tmp_path / "out"), *options])
    except SystemExit as done:  # argparse's
        code = done.code
    assert code == 2
    out, err = capfd.readouterr()
    assert (out, len(err.splitlines())) == ("", 1), err
    assert said.replace("FOLDER", str(tmp_path)) in err


def test_prompts_that_cannot_be_read_are_said_to_be_those_of_their_task(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "PC:abc=", "last": "c"}\n{"prompt": 3}\n')
    assert main(["continual", str(file), "--out", str(tmp_path / "out")]) == 2
    said = f"The task last letter: {tmp_path / 'prompts.jsonl'}, line 2: the prompt is the number 3"
    assert said in capfd.readouterr().err


def test_a_score_of_none_or_all_right_is_not_known_for_certain() -> None:
    """The limits of Wilson's interval, by scipy, and those of a coin in between."""
    config = config_of(["ascending", "descending"], {"base": "somewhere", "lr": 1e-3, "kl_samples": 4})
    sequence = OwnSequence("somewhere", TaskSource("ascending"), further=(TaskSource("descending"),))
    samples = min(sequence.data["ascending"][2], config.test_prompts) * 4
    errors = {right: sequence._stderr("ascending", right / samples, config) for right in (0, 100, samples)}
    wilson = binomtest(0, samples).proportion_ci(0.95, method="wilson").high
    assert 1.96 * errors[0] == 1.96 * errors[samples] == pytest.approx(wilson, rel=1e-3)
    share = 100 / samples
    assert errors[100] == pytest.approx((share * (1 - share) / samples) ** 0.5)


def test_a_file_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["continual", str(tmp_path / "nope.yaml")]) == 2
    assert capfd.readouterr().err == f"razor: There is no {tmp_path / 'nope.yaml'}.\n"


def test_the_guides_files_are_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompts are made, and verified, and its sequence is read."""
    text = (Path(__file__).parents[1] / "docs" / "guides" / "continual.md").read_text()
    prompts, verifier, sequence = (
        re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)[number]
        for kind, number in (("python", 0), ("python", 1), ("yaml", 0))
    )
    monkeypatch.chdir(tmp_path)
    exec(prompts, {})
    Path("verify.py").write_text(verifier)
    Path("tasks.yaml").write_text(sequence)
    file = read(Path("tasks.yaml"))
    assert (file.names, file.kl_budget) == (["ascending", "last-letter"], 4)
    config = config_of(file.names, file.settings)
    assert (config.methods, config.rl_lrs, config.target, config.max_steps) == (("dr-grpo",), (3e-5,), 0.8, 100)
    task = OwnTask(Path("prompts.jsonl"), "verify.py:verify", Form(stop=(";",), chat=False)).task()
    items = task.load(None).train[:3]
    answers = [item.columns["last"] for item in items]
    right = [f"{item.prompt[3:5]}{last}" for item, last in zip(items, answers, strict=True)]
    assert score(task, items, right).values == [1, 1, 1]
    assert score(task, items, [one[::-1] + "x" for one in right]).values == [0, 0, 0]


def test_the_folder_of_another_sequence_keeps_both(whole: Path, tmp_path: Path) -> None:
    """Models are named by stage, task and run, so that one of other settings is not taken for this one's."""
    assert len({path.name for path in (whole / "out" / "models").iterdir()}) == 2
    for path in (whole / "out" / "models").iterdir():
        number, rest = path.name.split("-", 1)
        task, run = rest.rsplit("-", 1)
        assert (number, task) in {("1", "ascending"), ("2", "last letter")}
        assert (whole / "out" / "runs" / run / "spec.json").exists()


def test_what_must_not_change_is_what_the_base_writes(whole: Path, tmp_path: Path) -> None:
    """By the word, and by a file of that name, which is named from where tasks.yaml lies."""
    kls = {}
    for name, given in (("word", "self"), ("file", "./self")):
        file = written(tmp_path / name, f"{SEQUENCE}generic: {given}\n")
        (tmp_path / name / "self").write_text("C:abcd=abcd\nR:abcd=dcba\n")
        assert main(["continual", str(file), "--out", str(tmp_path / name / "out")]) == 0
        rows = [json.loads(line) for text in records_of(tmp_path / name / "out").values() for line in text.splitlines()]
        kls[name] = [(row["drift"]["kl_forward"], row["drift"]["kl_probe"]) for row in rows if row["drift"]]
    rows = [json.loads(line) for text in records_of(whole / "out").values() for line in text.splitlines()]
    before = [(row["drift"]["kl_forward"], row["drift"]["kl_probe"]) for row in rows if row["drift"]]
    for found in kls.values():
        assert sorted(new for new, _ in found) == sorted(new for new, _ in before)
    assert len({probe for found in (*kls.values(), before) for _, probe in found}) == 3 * len(before)
