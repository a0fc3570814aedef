"""What can be installed, and what works without the rest."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlrazor import extras, guard
from rlrazor.errors import RazorError

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = {".venv": "requirements-dev.txt", ".venv-compat": "requirements-compat.txt"}  # that the Makefile makes


def pins(requirements: str) -> dict[str, str]:
    """Version by name, of a file and those it includes."""
    text = (ROOT / requirements).read_text()
    found = dict(re.findall(r"^([\w.-]+)==(\S+)", text, flags=re.MULTILINE))
    for included in re.findall(r"^-r (\S+)", text, flags=re.MULTILINE):
        found |= pins(included)
    return found


@pytest.mark.skipif(Path(sys.prefix).name not in ENVIRONMENTS, reason="not an environment that the Makefile made")
def test_the_environment_is_what_its_file_pins() -> None:
    """A newer library that leaked into the old environment would be tested instead."""
    wanted = pins("requirements.txt") | pins(ENVIRONMENTS[Path(sys.prefix).name])
    assert {name: version(name).partition("+")[0] for name in wanted} == wanted


def test_the_lower_bounds_of_the_guard_are_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(
        re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(project["optional-dependencies"]["guard"]), re.MULTILINE)
    )
    tested = pins("requirements-compat.txt")
    assert set(bounds) == set(extras.EXTRAS["guard"])
    for name, bound in bounds.items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", tested[name])


def test_what_the_robot_imports_is_declared() -> None:
    """By the package itself or by its extra, not by what another package happens to bring: Pillow came that way."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["robot"]]
    declared = {re.match(r"[\w-]+", line)[0].lower() for line in lines}  # type: ignore[index]
    files = list((ROOT / "src" / "rlrazor" / "experiments" / "robot").glob("*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"rlrazor"}
    assert {"numpy", "torch", "mujoco", "PIL"} <= modules
    assert {{"PIL": "pillow"}.get(module, module) for module in modules} <= declared


GUARDED = """
import json
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from laws import GENERIC, PROMPTS, SETTINGS, law_of
from rlrazor.cli import main
from rlrazor.guard import ForgettingMonitor, Measuring
from tiny_models import char_tokenizer, saved, tiny_llama

base = tiny_llama()
saved(Path("base"), base, char_tokenizer())
law = law_of(base, scale=20.0)
law.save(Path("law.json"))
Path("prompts.txt").write_text("\\n".join(PROMPTS))
monitor = ForgettingMonitor(PROMPTS, law, every=2, measuring=Measuring(cache_dir=Path("cache")))
config = TrainingArguments(
    "run", max_steps=4, per_device_train_batch_size=4, learning_rate=3e-3, save_steps=2, logging_steps=2,
    report_to="none", use_cpu=True, disable_tqdm=True,
)
ids = [{"input_ids": torch.arange(2, 10), "labels": torch.arange(2, 10)} for _ in range(8)]
trainer = Trainer(base, config, train_dataset=ids, processing_class=char_tokenizer(), callbacks=[monitor])
trainer.train()
pair = ["compare", "base", "run/checkpoint-4", "--prompts", "prompts.txt", "--law", "law.json"]
measured = ["--base", "base", "--prompts", "prompts.txt", "--law", "law.json", "--metric", "loss", "--budget", "0.9"]
codes = [main([*pair, "--json"]), main(["pick", "run", *measured])]
Path("adapter").mkdir()
Path("adapter/adapter_config.json").write_text("{}")
Path("model.gguf").touch()
for more in (
    ["compare", "base", "adapter", "--prompts", "prompts.txt"],
    ["compare", "model.gguf", "base", "--prompts", "prompts.txt"],
    [*pair, "--prior", "winogrande"],
    ["evaluate", "base", "--task", "letters"],
    ["calibrate", "base", "--prompts", "prompts.txt"],
    ["finetune", "base", "--task", "letters", "--lr", "1e-4"],
    ["sweep", "--base", "tiny"],
    ["reproduce", "language"],
    ["reproduce", "forecast"],
):
    codes.append(main(more))
steps = [reading.step for reading in monitor.readings]
Path("found.json").write_text(json.dumps([codes, steps, monitor.readings[-1].kl["kl_forward"].mean]))
"""


def site_without(missing: Collection[str], folder: Path) -> list[str]:
    """A path like ours but for some packages."""
    folder.mkdir()
    for site in dict.fromkeys(path for path in sys.path if Path(path).name in ("site-packages", "shared")):
        for installed in Path(site).iterdir():
            name = re.split(r"[-.]", installed.name)[0].lower()
            if name not in missing and not (folder / installed.name).exists():
                (folder / installed.name).symlink_to(installed)
    return [str(ROOT / "tests"), str(ROOT / "src"), str(folder)]


def test_the_guard_needs_no_more_than_its_extra(tmp_path: Path) -> None:
    missing = ("trl", "peft", "datasets", "lm_eval", "math_verify", "gguf", "evaluate")
    path = site_without(missing, tmp_path / "site")
    script = f"import sys; sys.path += {path}\n" + GUARDED
    line = [sys.executable, "-I", "-S", "-c", script]  # nothing but the standard library and that
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    codes, steps, kl = json.loads((tmp_path / "found.json").read_text())
    assert codes == [0, 0] + [2] * 9
    assert steps == [2, 4]
    compared = json.loads(done.stdout[done.stdout.index('{\n  "base"') :].rpartition("}")[0] + "}")
    assert compared["kl"]["kl_forward"]["mean"] == pytest.approx(kl, rel=1e-3)
    said = [line for line in done.stderr.splitlines() if line.startswith("razor: ")]
    lacks = (
        "razor: This needs the extra [{extra}], and {package} is missing: in the checkout of rlrazor, "
        "pip install -e '.[{extra}]'."
    )
    assert said == [
        "razor: An adapter needs the package peft, which is not installed: pip install peft.",
        "razor: A GGUF file needs the package gguf, which is not installed: pip install gguf.",
        *[lacks.format(extra="eval", package="lm_eval")] * 2,
        *[lacks.format(extra="train", package="trl")] * 5,
    ]


class Refuses:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "accelerate":
            raise ModuleNotFoundError(name)


@pytest.mark.parametrize("refused", [False, True])
def test_the_guards_own_packages_are_asked_for(refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In either way in which they can be kept away."""
    if refused:
        monkeypatch.delitem(sys.modules, "accelerate", raising=False)
        monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])
    else:
        monkeypatch.setitem(sys.modules, "accelerate", None)
    said = (
        r"^This needs the extra \[guard\], and accelerate is missing: in the checkout of rlrazor, pip install -e '.*'.$"
    )
    with pytest.raises(RazorError, match=said):
        _ = guard.ForgettingMonitor
    with pytest.raises(ImportError, match=said):  # what an import raises
        from rlrazor.guard import ForgettingMonitor  # noqa: F401
    for module in ("monitor", "trackers", "schedule", "placing"):
        monkeypatch.delitem(sys.modules, f"rlrazor.guard.{module}", raising=False)
    monkeypatch.delitem(sys.modules, "accelerate.state", raising=False)
    with pytest.raises(ImportError, match=said):
        import rlrazor.guard.monitor  # noqa: F401


def test_a_run_that_was_watched_is_picked_from_without_any_extra(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        history = [{"step": one, "epoch": float(one), "eval_accuracy": one / 10} for one in range(1, step + 1)]
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
        save_file({"weight": np.zeros(1)}, checkpoint / "model.safetensors")
    rows = [{"step": step, "forecast": {"drop": 0.1 * step, "low": 0.0, "high": 0.5}} for step in (1, 2)]
    (tmp_path / "razor.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    missing = [name for names in extras.EXTRAS.values() for name in names if name != "safetensors"]  # a core dependency
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); from rlrazor.cli import main; "
    code += f"raise SystemExit(main(['pick', {str(tmp_path)!r}, '--budget', '0.15', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr  # by its estimate: its interval holds the budget
    assert json.loads(done.stdout)["recommended"]["step"] == 1
