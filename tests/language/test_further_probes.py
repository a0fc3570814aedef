"""Several probes in one run: each column is KL on that probe by hand, and runs without any are the runs they were."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hellaswag import CONTEXTS, write_mirror
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.experiments.language import config, tiny
from rlrazor.experiments.language.config import PRESETS, PROBES, Config, resolve
from rlrazor.experiments.language.demonstrations import Prompts
from rlrazor.experiments.language.evaluate import Asked, Reference
from rlrazor.experiments.language.setup import PriorSource, Setup, TaskSource
from rlrazor.experiments.language.suites import PriorSuite
from rlrazor.experiments.language.tasks import Form, Item, Splits, Task
from rlrazor.lm import kl, own_texts
from rlrazor.lm.models import LanguageModel
from rlrazor.lm.prior import PriorTasks
from rlrazor.lm.prior_prompts import PriorPrompts
from rlrazor.lm.probes import GenericText, ProbeSettings, of_generic
from rlrazor.lm.representation import paragraphs, unlike
from rlrazor.lm.scores import Score
from rlrazor.system import phases
from tiny_models import char_tokenizer, tiny_llama

OWN = GenericText.of_base(samples=6, max_new_tokens=8)
ITEMS = [Item("a:"), Item("b:")]
SETTINGS = ProbeSettings(4)


def reference_of(
    probes: dict[str, GenericText], generic: GenericText | None = None, tokenizer: Any = None
) -> tuple[Reference, Any]:
    """Of a tiny random model, and the model."""
    base = LanguageModel.in_memory(tiny_llama(), tokenizer or char_tokenizer(), "base")
    texts = paragraphs()[:12]
    generic = generic or GenericText(tuple(texts))
    suite = PriorSuite(lambda lm: {"prior": Score(0.5, 0.1, 4, "acc", "1")}, generic, texts, texts, further=probes)
    task = Task("a", "A", "", lambda path: Splits([], []), lambda prompt, completion: 1.0, Form(4))
    asked = Asked(base, task, Prompts.of(task, ITEMS, base), suite, 1, "greedy")
    return Reference(base, [asked], suite), base.model


def test_each_column_is_kl_forward_on_that_probe() -> None:
    probes = {
        "paragraphs": GenericText.built_in(),
        "self": OWN,
        "prior": GenericText(prompts=("abc=", "3+4=", "x"), prior=PriorPrompts(("p",), max_new_tokens=5)),
        "unlike": GenericText(tuple(unlike())),
    }
    reference, base = reference_of(probes)
    tuned, tokenizer = tiny_llama(seed=1), char_tokenizer()
    record = reference.checkpoint("run", 1, 1.0, tuned, frozen=base).record
    for name, one in probes.items():
        by_hand = kl.Probe(base, of_generic(base, tokenizer, one, SETTINGS))
        expected = kl.forward_kl(by_hand, tuned)
        assert record.drift[f"kl_forward_on_{name}"] == expected.per_completion.mean > 0
        assert record.drift[f"kl_forward_on_{name}_per_token"] == expected.per_token.mean
        assert record.metrics[f"kl_forward_on_{name}_stderr"] == expected.per_completion.stderr
        assert record.metrics[f"kl_forward_on_{name}_per_token_stderr"] == expected.per_token.stderr
    assert len({record.drift[f"kl_forward_on_{name}"] for name in probes}) == 4
    # The texts are what they are said to be, cut to the 64 tokens of this model's context.
    cut = [tokenizer(text).input_ids[:64] for text in unlike()]
    by_hand = kl.Probe(base, kl.Sequences.texts(cut))
    assert record.drift["kl_forward_on_unlike"] == pytest.approx(kl.forward_kl(by_hand, tuned).per_completion.mean)


def test_without_further_probes_a_record_is_as_it_was() -> None:
    plain, base = reference_of({})
    more, _ = reference_of({"self": OWN, "unlike": GenericText(("some text", "and more"))})
    tuned = tiny_llama(seed=1)
    before, after = (one.checkpoint("run", 1, 1.0, tuned, frozen=base).record for one in (plain, more))
    assert not [name for name in (*before.drift, *before.metrics) if "kl_forward_on" in name]
    assert after.drift.items() > before.drift.items()
    assert after.metrics.items() > before.metrics.items()


def test_the_generic_probe_is_measured_once_where_it_is_asked_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, base = reference_of({"self": OWN, "unlike": GenericText(("a b",))}, OWN)
    assert reference.further["self"] is reference.probe
    measured: list[kl.Probe] = []
    forward_kl = kl.forward_kl

    def counted(probe: kl.Probe, tuned: Any) -> kl.Drift:
        measured.append(probe)
        return forward_kl(probe, tuned)

    monkeypatch.setattr(kl, "forward_kl", counted)
    drift = reference.checkpoint("run", 1, 1.0, tiny_llama(seed=1), frozen=base).record.drift
    assert drift["kl_forward_on_self"] == drift["kl_probe"] > 0
    assert len(measured) == len(set(map(id, measured))) == 3  # with the new task's prompts


def test_of_the_tiny_base_the_prior_prompts_are_its_generic_probe() -> None:
    settings = replace(PRESETS["tiny"], probes=("unlike", "self", "prior"), test_prompts=4, kl_samples=1)
    setup = Setup("tiny", TaskSource("letters"))
    suite = setup.suite(settings.base_specs("tiny", "data")[0])
    assert suite.further["unlike"].texts == tuple(tiny.unrelated_texts())
    whole = suite
    suite = suite.cut(12, tokens=32)
    # Five sorts of text, and 64 texts of 128 tokens that the base writes: of those 12, a quarter as long.
    assert suite.uncut is whole
    assert (whole.own_tokens, suite.own_tokens) == (64 * 128, 12 * 32)
    assert suite.count == 5 * 12 + 12 / 4
    base = LanguageModel.in_memory(tiny.make_model(0), tiny.make_tokenizer(), "tiny")
    base.model.eval()
    task = setup.task.task()
    test = Prompts.of(task, setup.task.load().test[:4], base)
    reference = Reference(base, [Asked(base, task, test, suite, 1, "sampled")], suite)
    assert reference.further["prior"] is reference.probe
    assert list(reference.further) == ["self", "prior", "unlike"]


def test_what_a_base_writes_for_a_further_probe_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_texts, "cautions", lambda sequences, ends: [f"{len(sequences.completions)} loop"])
    ignored: Any = lambda *_: None  # noqa: E731
    for generic in (None, OWN):
        whose = PriorPrompts(("p", "q"), ("q",), 4)
        asked = GenericText(prompts=("a b",), prior=whose)
        reference, _ = reference_of({"self": OWN, "prior": asked}, generic)
        heard: list[str] = []
        with phases.heard(ignored, heard.append):
            reference.measure_base()
        own = [sentence for sentence in heard if "new task" not in sentence]
        assert own == ["6 loop", *whose.cautions()]
        assert "scored of q," in own[1]


def test_prompts_that_do_not_fit_are_told_of_with_the_base() -> None:
    """Before anything is trained."""
    asked = GenericText(prompts=("a b", "c" * 40, "d" * 60), prior=PriorPrompts(("p",)))
    heard: list[str] = []
    ignored: Any = lambda *_: None  # noqa: E731
    with phases.heard(ignored, heard.append):
        reference_of({}, asked)[0].measure_base()  # of a context of 64
    assert [sentence for sentence in heard if "generic probe" in sentence] == [
        "2 of the 3 rows of the generic probe are left out: they do not fit into the context with a completion of 32 "
        "tokens."
    ]


def test_a_base_that_cannot_write_from_nothing_is_refused_before_training() -> None:
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(RazorError, match=r"The probe 'self' cannot be made of this base: .* cannot write a text from"):
        reference_of({"self": OWN}, tokenizer=tokenizer)


def ids_of(of: Config) -> list[str]:
    return [spec.run_id for spec in (*of.base_specs("b", "d"), *of.specs("b", "d", ["sft"]))]


@pytest.mark.parametrize(
    ("preset", "known"),
    [("paper", ["dc65b8ef53b199f4", "7f40a4f888119e4f"]), ("tiny", ["f172f5a803c62c9e", "c08001615f4222d9"])],
)
def test_ids_of_runs_without_further_probes_are_those_of_before(
    preset: str, known: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "RECIPE", 3)  # of the version that had none
    assert ids_of(PRESETS[preset])[:2] == known
    assert ids_of(resolve(preset, {"probes": "none"})) == ids_of(PRESETS[preset])


def test_probes_decide_a_runs_id_in_any_order() -> None:
    one, other = (resolve("tiny", {"probes": names}) for names in ("self,prior", "prior,self"))
    assert ids_of(one) == ids_of(other) != ids_of(PRESETS["tiny"])
    assert one.base_specs("b", "d")[0].params["measured"]["probes"] == ["self", "prior"]


@pytest.mark.parametrize(
    ("preset", "given", "said"),
    [
        ("paper", {"probes": "news"}, "Unknown probe 'news'. Choose from: paragraphs, self, prior, unlike."),
        ("paper", {"probes": "self,self"}, "the same value twice: self"),
        ("paper", {"probes": "prior", "prior": "none"}, "prior tasks' prompts, and there are none"),
        ("tiny", {"probes": "paragraphs"}, "knows ten letters and no words"),
    ],
)
def test_probes_that_cannot_be_are_refused(preset: str, given: dict[str, str], said: str) -> None:
    with pytest.raises(RazorError, match=said):
        resolve(preset, given)


@pytest.mark.filterwarnings("ignore")  # of lm-eval's own libraries
def test_prompts_of_prior_tasks_are_of_items_beside_the_scored_ones(tmp_path: Path) -> None:
    write_mirror(tmp_path)
    beside = PriorTasks(["hellaswag"], 2, tmp_path).prompts(64)
    assert [str(prompt).partition(": ")[2].lower() for prompt in beside.prompts] == [
        one.lower() for one in CONTEXTS[2:]
    ]
    assert beside.scored == []
    every = PriorTasks(["hellaswag"], None, tmp_path).prompts(2)
    assert [str(prompt).partition(": ")[2].lower() for prompt in every.prompts] == [
        CONTEXTS[0].lower(),
        CONTEXTS[2].lower(),
    ]
    assert every.scored == ["hellaswag"]


@pytest.mark.filterwarnings("ignore")
def test_probes_of_a_real_base_come_with_what_has_to_be_said(tmp_path: Path) -> None:
    write_mirror(tmp_path)
    setup = Setup("base", TaskSource("math"), PriorSource(tmp_path))
    some, every = (setup.suite_of(["hellaswag"], limit, PROBES) for limit in (2, 0))
    assert list(some.further) == list(PROBES)
    assert some.further["prior"].prior == PriorPrompts(("hellaswag",), (), 32)
    assert every.further["prior"].prior == PriorPrompts(("hellaswag",), ("hellaswag",), 32)
    assert some.further["prior"].completed(SETTINGS) == ProbeSettings(32, chat=False)
    assert some.count == 60 + 60 + 60 + 60 + 64 + 2 + 40
    cut = replace(setup, prior=replace(setup.prior, texts=12)).suite_of(["hellaswag"], 2, PROBES)
    assert cut.count == 12 * 6 + 2


def test_the_command_takes_them(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["reproduce", "language", "--preset", "tiny", "--out", str(tmp_path / "x"), "--dry-run"]
    assert main([*command, "--probes", "self,music"]) == 2
    assert "Unknown probe 'music'" in capfd.readouterr().err
