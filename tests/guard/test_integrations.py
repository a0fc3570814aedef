"""The lines of docs/guides/integrations.md, with the part of each trainer's interface that they use remade here."""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from laws import PROMPTS, law_of
from rlrazor.errors import RazorError
from rlrazor.guard import ForgettingMonitor
from tiny_models import char_tokenizer, tiny_llama

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "integrations.md"
IDS = [{"input_ids": torch.arange(2, 10), "labels": torch.arange(2, 10)} for _ in range(8)]


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    law_of(tiny_llama()).save(tmp_path / "law.json")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in PROMPTS))


def example(section: str, number: int = 0) -> str:
    """A code block of a section of the guide."""
    text = GUIDE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return str(re.findall(r"```\w+\n(.*?)```", text, flags=re.DOTALL)[number])


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """A module of a package that is not installed."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    for key, value in attributes.items():
        setattr(sys.modules[name], key, value)


def settings(kind: Callable[..., Any] = TrainingArguments) -> Any:
    return kind(
        output_dir="run", max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip


def trained(callbacks: list[Any]) -> ForgettingMonitor:
    """Of the callbacks the monitor, after two steps."""
    trainer = Trainer(
        tiny_llama(), settings(), train_dataset=IDS, processing_class=char_tokenizer(), callbacks=callbacks
    )
    return watched(trainer)


def watched(trainer: Trainer) -> ForgettingMonitor:
    trainer.train()
    found = [one for one in trainer.callback_handler.callbacks if isinstance(one, ForgettingMonitor)]
    assert len(found) == 1
    assert found[0].rule.drop == 0.02
    assert found[0].readings[-1].step == 2
    assert found[0].readings[-1].forecast is not None
    assert found[0].readings[-1].kl["kl_forward"].mean > 0
    return found[0]


def test_transformers() -> None:
    names = {"model": tiny_llama(), "args": settings(), "dataset": IDS, "tokenizer": char_tokenizer()}
    exec(example("transformers"), names)
    watched(names["trainer"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("section", ["TRL", "unsloth"])
def test_trl(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth patches this very class."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    pretend(monkeypatch, "unsloth", FastLanguageModel=None)
    rows = datasets.Dataset.from_list([{"prompt": f"{a}1=", "completion": f"1{a};"} for a in "abcdefgh"])
    args = settings(lambda **given: trl.SFTConfig(**given, bf16=False))
    names = {"model": tiny_llama(), "args": args, "dataset": rows, "tokenizer": char_tokenizer()}
    exec(example(section), names)
    watched(names["trainer"])


def test_llama_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    """llamafactory 0.9.5, train/tuner.py: it adds its own callbacks to those given and hands all to its trainer."""
    made: list[ForgettingMonitor] = []

    def run_exp(args: Any = None, callbacks: list[Any] | None = None) -> None:
        made.append(trained([*(callbacks or [])]))

    pretend(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
    exec(example("LLaMA-Factory"), {})
    assert len(made) == 1


def test_ms_swift(monkeypatch: pytest.MonkeyPatch) -> None:
    """4.6.0, trainers/mixin.py: `callbacks_map[callback](args, self)`; 3.12.6, llm/train/sft.py: a list of them."""
    callbacks_map: dict[str, Any] = {}
    pretend(monkeypatch, "swift.callbacks", callbacks_map=callbacks_map)
    exec(example("ms-swift"), {})
    trained([callbacks_map["razor"](settings(), object())])
    extra_callbacks: list[Any] = []
    pretend(monkeypatch, "swift.plugin", extra_callbacks=extra_callbacks)
    exec(example("ms-swift", 1), {})
    trained([*extra_callbacks])


class BasePlugin:
    """axolotl 0.19.0, integrations/base.py: what the manager calls of every plugin."""

    def register(self, cfg: Mapping[str, Any]) -> None: ...

    def get_input_args(self) -> str | None: ...

    def add_callbacks_pre_trainer(self, cfg: Mapping[str, Any], model: Any) -> list[Any]:
        return []


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """What axolotl does with a config: plugins by name, the config validated with what they add, then the trainer."""
    pydantic, yaml = pytest.importorskip("pydantic"), pytest.importorskip("yaml")
    pretend(monkeypatch, "axolotl.integrations.base", BasePlugin=BasePlugin)
    monkeypatch.delitem(sys.modules, "rlrazor.guard.axolotl", raising=False)

    def by_name(name: str) -> Any:
        module, _, attribute = name.rpartition(".")
        return getattr(__import__(module, fromlist=[attribute]), attribute)

    def callbacks_of(text: str) -> list[Any]:
        cfg = yaml.safe_load(text)
        (plugin,) = (by_name(name)() for name in cfg["plugins"])
        assert isinstance(plugin, BasePlugin)
        plugin.register(cfg)
        declared = by_name(str(plugin.get_input_args()))
        base = pydantic.create_model("AxolotlInputConfigBase", plugins=(list[str], ...))
        config = pydantic.create_model("AxolotlInputConfig", __base__=(base, declared))
        return plugin.add_callbacks_pre_trainer(config(**cfg).model_dump(exclude_none=True), tiny_llama())

    return callbacks_of


def test_axolotl(axolotl: Callable[[str], list[Any]]) -> None:
    text = example("axolotl")
    assert trained(axolotl(text)).rule.cautious is False
    assert axolotl(f"{text}  cautious: true\n")[0].rule.cautious is True
    own = axolotl(text.replace("  law: law.json\n", "  settings: {max_new_tokens: 9, stop: [';'], chat: false}\n"))[0]
    assert (own.on.settings.max_new_tokens, own.on.settings.stop, own.on.settings.chat) == (9, (";",), False)
    assert own.law is None
    other = axolotl(text.replace("  law: law.json\n", "  level: 0.8\n  cache_dir: kept\n"))[0]
    assert (other.measuring.level, other.measuring.cache_dir) == (0.8, "kept")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("budget", "bugdet", "has 'bugdet' under `razor`, which has only prompts, law, budget"),
        ("budget: 0.02", "tokenizer: x", "has 'tokenizer' under `razor`"),
        (
            "budget: 0.02",
            "settings: {max_tokens: 9}",
            "has 'max_tokens' under `razor.settings`, which has only max_new",
        ),
        ("budget: 0.02", "budget: 2e-2", "a value of the wrong kind under `razor`"),
        ("prompts: prompts.jsonl", "every: 2", "needs a section `razor` with at least `prompts`"),
        ("razor:\n", "other:\n", "needs a section `razor` with at least `prompts`"),
    ],
)
def test_axolotls_settings_are_checked(axolotl: Callable[[str], list[Any]], old: str, new: str, message: str) -> None:
    text = example("axolotl")
    assert old in text
    with pytest.raises(RazorError, match=re.escape(message)):
        axolotl(text.replace(old, new))
