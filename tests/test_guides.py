"""The examples in docs/guides and the README are run as they stand there, one after the other, as a user would.

Only the hub's model is another, a local one of random weights, calibration's ten runs are shorter, and training is on a
CPU, which TRL wants to be told.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from rlrazor.cli import main
from rlrazor.experiments.language import world
from rlrazor.report import drawing
from tiny_models import char_tokenizer, saved, tiny_llama

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHORTER = ["--max-steps", "5", "--checkpoints-per-epoch", "2", "--test-prompts", "20", "--max-new-tokens", "4"]
SHORTER += ["--lrs", "1e-4,3e-4,1e-3,3e-3,1e-2", "--batch-sizes", "4", "--precision", "float32", "--warmup-steps", "0"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


def examples(guide: str, language: str) -> list[str]:
    """The code blocks of a guide, or of a page named from the guides' folder."""
    text = (GUIDES / f"{guide}.md").read_text()
    return [block.replace(MODEL, "base") for block in re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)]


def command(guide: str, number: int = 0) -> list[str]:
    """A guide's command line, without `razor`."""
    razor, *arguments = shlex.split(examples(guide, "sh")[number])
    assert razor == "razor"
    return arguments


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of someone who has followed the calibration guide."""
    folder = tmp_path_factory.mktemp("guide")
    tokenizer = char_tokenizer()
    saved(folder / "base", tiny_llama(len(tokenizer), max_position_embeddings=256), tokenizer)
    rows: list[dict[str, Any]] = [
        {"prompt": f"{a}{b}=", "completion": f"{b}{a}"} for a in "abcdefghij" for b in "0123456789"
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "mirror").mkdir()
    rows = [{"sentence": f"a {n} _ b", "option1": "cat", "option2": "dog", "answer": str(1 + n % 2)} for n in range(6)]
    (folder / "mirror" / "winogrande_validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save = drawing.save
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(drawing, "save", lambda figure, folder: save(figure, folder) if figure.name == "law" else None)
        world.last_world.clear()
        assert main([*command("calibrate"), "--data-mirror", "mirror", *SHORTER]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(calibrated: Path) -> Path:
    """... and the monitor's."""
    (script,) = examples("monitor", "python")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(calibrated)
        patch.setenv("XDG_CACHE_HOME", str(calibrated / "cache"))
        exec(script.replace('report_to="none"', 'report_to="none", bf16=False, use_cpu=True'), {})
    return calibrated


def test_calibration_leaves_what_its_guide_says(calibrated: Path) -> None:
    files = re.findall(r"^\| `([\w.]+)` \|", (GUIDES / "calibrate.md").read_text(), flags=re.MULTILINE)
    assert files == ["law.json", "prompts.jsonl", "train.jsonl", "law.png", "report.html"]
    assert all((calibrated / "runs" / "law" / name).exists() for name in files)
    law = json.loads((calibrated / "runs" / "law" / "law.json").read_text())
    assert len(law["interval"]["runs"]) == 10
    prompts, whose = law["probe"]["generic"]["prompts"], law["probe"]["generic"]["prior"]
    assert prompts == [f"a {n} cat" for n in range(6)]
    assert whose == {"tasks": ["winogrande"], "scored": ["winogrande"], "max_new_tokens": 32, "without": []}


def test_the_monitor_watches(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (trained / "runs" / "sft" / "razor.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 40
    assert rows[-1]["forecast"] is not None
    assert rows[-1]["budget"] == 0.02


def test_the_readmes_lines_watch_and_keep(
    calibrated: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (script,) = examples("../../README", "python")
    for given, here in (
        ("runs/law/base", "base"),
        ("runs/sft", "runs/readme"),
        ("every=32", "every=2"),
        ('"num_train_epochs": 1', '"max_steps": 8'),
    ):
        assert given in script
        script = script.replace(given, here)
    monkeypatch.chdir(calibrated)
    monkeypatch.setenv("XDG_CACHE_HOME", str(calibrated / "cache"))
    exec(script, {})
    rows = [json.loads(line) for line in (calibrated / "runs" / "readme" / "razor.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert {row["budget"] for row in rows} == {0.02}
    out, err = capfd.readouterr()
    said = " ".join((out + err).split())
    assert all(f"[razor] step {step}: KL " in said for step in (2, 4, 6, 8))


def test_the_pair_is_compared(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.setenv("XDG_CACHE_HOME", str(trained / "cache"))
    assert main(command("compare")) == 0
    assert "Forecast: the prior score drops by" in " ".join(capfd.readouterr().out.split())
    assert (trained / "comparison.html").exists()


def test_a_checkpoint_is_picked(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.setenv("XDG_CACHE_HOME", str(trained / "cache"))
    # The guide's three: a random model loses less than six items' noise, so its law may not judge.
    for number, code in ((0, 3), (1, 3), (2, 0)):
        given = [argument.replace("0.02", "0.9") for argument in command("pick", number)]
        assert main([*given, "--json"]) == code
        found = json.loads(capfd.readouterr().out)
        assert [one["step"] for one in found["candidates"]] == [10, 20, 30, 40]
        assert found["metric"] == "mean_token_accuracy"
        if code:
            assert (found["recommended"], found["verdict"]) == (None, "cannot be told")
            assert "which the noise of the scores" in found["doubt"]
        else:
            assert found["recommended"]["new"] == max(one["new"] for one in found["candidates"])
