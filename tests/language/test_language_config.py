"""The grid of language models: the paper's Table 2, what is refused, and what a run's id depends on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlrazor.errors import RazorError
from rlrazor.experiments.language.config import (
    KINDS,
    PRESETS,
    Config,
    count_steps,
    due_steps,
    parse_setting,
    resolve,
    settled,
    warmup_steps,
)
from rlrazor.experiments.language.experiment import name_of, quadrants
from rlrazor.experiments.language.methods import METHODS, find_method, label_of
from rlrazor.lm import compute
from rlrazor.runs.settings import read_settings

PAPER, TINY = PRESETS["paper"], PRESETS["tiny"]


def test_the_paper_preset_is_table_2() -> None:
    specs = PAPER.specs("base", "data", ["sft", "dr-grpo"])
    grid = {
        (
            s.method,
            s.params["lr"],
            s.params["schedule"],
            s.params["epochs"],
            s.params["batch_size"],
            s.params["iterations"],
        )
        for s in specs
    }
    sft = {
        ("sft", lr, schedule, epochs, batch, 1)
        for lr in (1e-5, 3e-5, 5e-5, 7e-5, 9e-5)
        for schedule in ("constant", "cosine")
        for epochs in (1, 2)
        for batch in (16, 32, 64, 128)
    }
    rl = {("dr-grpo", lr, "constant", 1, 8, mu) for lr in (1e-5, 2e-5, 3e-5, 4e-5, 5e-5) for mu in (1, 2)}
    assert len(specs) == len(grid)
    assert grid == sft | rl
    assert {(s.params["warmup_steps"], s.params["precision"], s.params["kl_coef"]) for s in specs} == {
        (50, "bf16", 0.0)
    }
    assert {s.params["group_size"] for s in specs if s.method == "dr-grpo"} == {64}
    assert PAPER.prior == ("hellaswag", "truthfulqa_mc2", "mmlu", "ifeval", "winogrande", "humaneval")


def test_the_penalty_is_the_suffix() -> None:
    specs = {s.method: s for s in TINY.specs("b", "d", ["dr-grpo", "dr-grpo+kl"])}
    assert (specs["dr-grpo"].params["kl_coef"], specs["dr-grpo+kl"].params["kl_coef"]) == (0.0, 0.1)
    assert label_of("dr-grpo+kl") == "Dr. GRPO + KL"
    assert label_of("sft-uniform") == "SFT on uniform"
    for name in METHODS:
        method, _ = find_method(name)
        assert method.on_policy is (method.trainer in ("grpo", "sdft") or name == "iterative-sft")
        assert (method.advantage is None) is (method.trainer != "grpo")


def test_a_run_depends_on_its_base_its_data_and_what_is_measured() -> None:
    def first(config: Config, base: str = "b", data: str = "d") -> str:
        return config.specs(base, data, ["sft"])[0].run_id

    own = first(TINY)
    assert own == first(TINY)
    others = [first(TINY, base="x"), first(TINY, data="x"), first(replace(TINY, kl_samples=1))]
    others += [first(replace(TINY, lora_rank=4)), first(replace(TINY, pretrain_steps=7))]
    assert len({own, *others}) == 6
    assert first(replace(PAPER, pretrain_steps=7)) == first(PAPER)  # which pre-trains nothing


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": ()}, "methods is empty"),
        ({"methods": ("sft", "sft")}, "twice"),
        ({"methods": ("ppo",)}, "Unknown method 'ppo'"),
        ({"methods": ("sdft+kl",)}, "takes no \\+kl"),
        ({"methods": ("grpo+kl+kl",)}, "Unknown method"),
        ({"methods": ("rl-distilled",)}, "add grpo"),
        ({"schedules": ("linear",)}, "Unknown schedule"),
        ({"precision": "fp8"}, "Unknown precision"),
        ({"scored": "best"}, "Unknown scored"),
        ({"lrs": (0.0,)}, "lrs must be more than 0, not 0"),
        ({"lrs": (float("nan"),)}, "lrs must be more than 0, not nan"),
        ({"group_size": 1}, "at least 2"),
        ({"max_steps": -1}, "max_steps must be at least 0, not -1"),
        ({"seeds": (-1,)}, "seeds must be at least 0, not -1"),
        ({"prior": ("mmlu",)}, "set prior to tiny"),
        ({"base": "somewhere"}, "name others with prior"),
        ({"prior": ("none", "tiny")}, "'none' stands alone"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RazorError, match=sentence):
        replace(TINY, **changes)


def test_there_may_be_no_prior_tasks() -> None:
    for base in ("tiny", "somewhere"):
        config = replace(TINY, base=base, prior=("none",))
        assert not config.has_prior
        assert config.base_specs("b", "d")[0].params["measured"]["prior"] == ["none"]
    assert TINY.has_prior


def test_settings_from_text_and_files(tmp_path: Path) -> None:
    assert parse_setting("rl_lrs", "1e-5:1e-3:3") == (1e-5, 1e-4, 1e-3)
    assert parse_setting("prior", "mmlu, hellaswag") == ("mmlu", "hellaswag")
    assert parse_setting("methods", "paper") == PAPER.methods
    assert parse_setting("base", " tiny ") == "tiny"
    with pytest.raises(RazorError, match="Unknown setting 'rank'"):
        parse_setting("rank", "3")
    with pytest.raises(RazorError, match="not a whole number"):
        parse_setting("group_size", "8.5")
    file = tmp_path / "grid.toml"
    file.write_text('preset = "tiny"\nlrs = [1e-4]\nkl_coef = 1')
    settings = read_settings(file)
    config = resolve(settings.pop("preset"), {name: parse_setting(name, value) for name, value in settings.items()})
    assert (config.lrs, config.kl_coef) == ((1e-4,), 1.0)
    with pytest.raises(RazorError, match="Unknown preset"):
        resolve("huge")
    assert set(KINDS) == set(Config.__dataclass_fields__)


def test_steps_and_checkpoints() -> None:
    long = replace(
        PAPER, epochs=(1, 2), batch_sizes=(16,), schedules=("constant",), lrs=(1e-5,), checkpoints_per_epoch=2
    )
    one, two = long.specs("b", "d", ["sft"])
    assert [count_steps(spec, 160) for spec in (one, two)] == [10, 20]
    assert [due_steps(spec, 160) for spec in (one, two)] == [[5, 10], [5, 10, 15, 20]]
    assert one.trajectory == two.trajectory  # the short run is the beginning of the long one
    assert len({spec.trajectory for spec in long.specs("b", "d", ["self-sft"])}) == 2  # which draw for all their steps
    capped = replace(long, max_steps=6).specs("b", "d", ["sft"])[0]
    assert due_steps(capped, 160) == [3, 6]
    twice = replace(long, rl_lrs=(1e-5,), iterations=(2,)).specs("b", "d", ["grpo"])[0]
    assert count_steps(twice, 160) == 40  # 20 batches of 8 prompts, 2 updates each


@pytest.mark.parametrize("warmup_steps", [0.0, 0.05, 50.0])
@pytest.mark.parametrize("max_steps", [0, 150])
def test_a_run_that_shares_a_trajectory_is_measured_where_the_longer_one_is(
    warmup_steps: float, max_steps: int
) -> None:
    """Trained along with a longer one, it has that one's checkpoints: they have to be its own."""
    config = replace(PAPER, methods=("sft",), lrs=(1e-5,), schedules=("constant",), epochs=(1, 2), batch_sizes=(1,),
                     warmup_steps=warmup_steps, max_steps=max_steps)  # fmt: skip
    short, long = config.specs("b", "d", ["sft"])
    if short.trajectory == long.trajectory:
        assert due_steps(short, 100) == [step for step in due_steps(long, 100) if step <= 100]
    else:
        assert max_steps or warmup_steps == 0.05


def test_a_warm_up_is_a_share_of_the_run_and_never_all_of_it() -> None:
    def warmup(prompts: int, **changes: Any) -> int:
        config = replace(PAPER, epochs=(1,), batch_sizes=(16,), **changes)
        return warmup_steps(config.specs("b", "d", ["sft"])[0], prompts)

    assert PAPER.warmup_steps == 50
    assert [warmup(16 * steps) for steps in (51, 1000)] == [50, 50]  # as the paper has it
    assert [warmup(16 * steps) for steps in (3, 24, 50)] == [0, 1, 2]  # 5 % of an epoch that has no more
    assert [warmup(16 * 1000, max_steps=steps) for steps in (3, 50, 60)] == [0, 2, 50]
    assert [warmup(16 * steps, warmup_steps=0.1) for steps in (3, 24, 200)] == [0, 2, 20]
    assert [warmup(16 * 1000, warmup_steps=0.05, max_steps=steps) for steps in (3, 100)] == [0, 5]
    assert warmup(16 * 100, warmup_steps=0) == 0
    # Where it depends on a run's length, a short run is not the beginning of a longer one.
    for changes, runs in (({}, 1), ({"warmup_steps": 0}, 1), ({"warmup_steps": 0.05}, 2), ({"max_steps": 60}, 2)):
        config = replace(PAPER, batch_sizes=(16,), schedules=("constant",), lrs=(1e-5,), **changes)
        assert len({spec.trajectory for spec in config.specs("b", "d", ["sft"])}) == runs


def test_training_is_in_bfloat16_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, precision in ((False, "float32"), (True, "bf16")):
        monkeypatch.setattr(compute, "has_bf16", lambda has=has: has)
        assert settled(resolve("paper", {"precision": "auto"})).precision == precision
        assert settled(resolve("paper", {"precision": "auto", "dtype": "bfloat16"})).precision == "bf16"
        assert settled(resolve("paper", {"precision": "float32"})).precision == "float32"
        assert settled(resolve("tiny", {"precision": "auto"})).precision == "float32"


def test_a_title_names_a_base_without_hashes(tmp_path: Path) -> None:
    assert name_of("tiny") == "tiny"
    assert name_of("Qwen/Qwen2.5-3B-Instruct") == "Qwen/Qwen2.5-3B-Instruct"
    for path, name in (
        ("my model", "my model"),
        ("models--org--name/snapshots/0123456789abcdef0123", "org/name"),
        ("finetune/models/0123456789abcdef", "finetune"),
        ("gguf/small.Q4-0123456789abcdef", "gguf"),
        ("small.Q4_1.gguf", "small.Q4_1"),
    ):
        (tmp_path / path).mkdir(parents=True)
        assert name_of(str(tmp_path / path)) == name


def test_quadrants_have_one_method_each() -> None:
    assert quadrants(TINY.methods) == {
        "grpo": (True, True),
        "reinforce": (True, False),
        "sft-one": (False, False),
        "simpo": (False, True),
    }
    assert len(quadrants(("grpo", "sft"))) == 2
