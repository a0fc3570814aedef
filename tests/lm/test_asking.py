"""Prior tasks in the chat template and after examples: item by item what lm-eval's own `simple_evaluate` gives."""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from rlrazor.cli.probe import probe_without_law, read_probe, suite_of
from rlrazor.errors import RazorError
from rlrazor.experiments.language.config import resolve
from rlrazor.guard.recover import RecoverySet, _rows
from rlrazor.lm.encoding import as_read
from rlrazor.lm.harness.asking import Asking
from rlrazor.lm.models import LanguageModel
from rlrazor.lm.prior import PriorTasks
from rlrazor.lm.probes import GenericText, ProbeSettings, of_generic
from rlrazor.lm.prompts import encode
from rlrazor.lm.scores import Score
from tiny_models import CHARACTERS, char_tokenizer, tiny_llama

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<a>{% if think is defined and not think %}no:{% endif %}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
DESCRIBED, PREFIXED = "description: 'be good'", "gen_prefix: 'so'"
CHAT = Asking(chat_template=True)


def tokenizer_of(template: str | None = TEMPLATE) -> Any:
    tokenizer = char_tokenizer(CHARACTERS + "<>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(autouse=True)
def without_a_report_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: results)
    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: "")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(len(CHARACTERS) + 4, hidden=32, max_position_embeddings=256)


def task(folder: Path, kind: str, *more: str, name: str = "own") -> str:
    """A task of eight rows, with as many others to show as examples."""
    for split, shift in (("test", 0), ("train", 40)):
        rows = [
            {
                "q": f"q{n + shift}:",
                "choices": ["b", "cc", "d"],
                "label": n % 3,
                "a": f"{n}",
                "two": [f"x{n}", f"yy{n}"],
            }
            for n in range(8)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    how = {
        "choices": [
            *("output_type: multiple_choice", "doc_to_text: '{{q}}'", "doc_to_target: label", "doc_to_choice: choices"),
            *("metric_list:", "  - metric: acc", "    higher_is_better: true", "    aggregation: mean"),
        ],
        "inputs": [  # as WinoGrande
            *("output_type: multiple_choice", "doc_to_text: !function own_code.text", "doc_to_choice: two"),
            *("doc_to_target: !function own_code.target", "metric_list:", "  - metric: acc"),
            *("    higher_is_better: true", "    aggregation: mean"),
        ],
        "generated": [
            *("output_type: generate_until", "doc_to_text: '{{q}}'", "doc_to_target: '{{a}}'", "generation_kwargs:"),
            *("  max_gen_toks: 6", "  until: [';']", "  do_sample: false", "metric_list:", "  - metric: exact_match"),
            *("    higher_is_better: true", "    aggregation: mean"),
        ],
    }[kind]
    code = "def text(doc):\n    return doc['label'] % 2\n\ndef target(doc):\n    return 'end'\n"
    (folder / "own_code.py").write_text(code)
    lines = [
        *(f"task: {name}", "dataset_path: json", "dataset_kwargs:", "  data_files:"),
        *(f"    {split}: {folder / f'{split}.jsonl'}" for split in ("test", "train")),
        *("test_split: test", "fewshot_split: train", *more, *how),
    ]
    path = folder / f"{name}.yaml"
    path.write_text("\n".join(lines))
    return str(path)


def by_lm_eval(model: Any, tokenizer: Any, path: str, asking: Asking) -> list[Mapping[str, Any]]:
    """What it logs of each item."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    harness = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=4, chat_template_args=dict(asking.chat_template_kwargs)
    )
    found = lm_eval.simple_evaluate(
        model=harness,
        tasks=[path],
        num_fewshot=asking.fewshot,
        apply_chat_template=asking.chat_template,
        fewshot_as_multiturn=asking.multiturn,
        log_samples=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),  # which would read 14,000 files
    )
    assert found is not None
    ((_, rows),) = found["samples"].items()
    return sorted(rows, key=lambda row: int(row["doc_id"]))


def ours(model: Any, tokenizer: Any, path: str, asking: Asking) -> tuple[Score, tuple[str, ...]]:
    found = PriorTasks([path], asking=asking).scores(LanguageModel(model, tokenizer, "it", str))
    return found[path], found.notes


def test_options_say_how() -> None:
    given = {"prior": "a,b", "prior_limit": None, "data_mirror": None, "allow_code_execution": False}
    told = {"chat_template": "one-turn", "fewshot": 2, "chat_template_kwargs": '{"think": false}'}
    asking = Asking(True, 2, False, {"think": False})
    assert suite_of(Namespace(**given, **told)) == PriorTasks(("a", "b"), asking=asking)
    unused = {"chat_template": None, "fewshot": None, "chat_template_kwargs": '{"think": false}'}
    assert suite_of(Namespace(**given, **unused)) == PriorTasks(("a", "b"))  # which the prompts are told alone
    with pytest.raises(RazorError, match="are about prior tasks: name them with --prior"):
        suite_of(Namespace(**given | {"prior": None}, **told))
    with pytest.raises(RazorError, match="is an object in JSON, such as"):
        suite_of(Namespace(**given, **told | {"chat_template_kwargs": "think=no"}))
    # A sweep's, whose runs are others then, and as they were without.
    config, usual = (resolve("paper", one) for one in ({**told, "fewshot": "2"}, {}))
    assert config.asking == asking
    assert config.base_specs("b", "d")[0].params["measured"]["asked"] == asking.as_json()
    assert config.base_specs("b", "d")[0].params["chat_template_kwargs"] == {"think": False}
    assert not {"asked", "chat_template_kwargs"} & {*usual.base_specs("b", "d")[0].params["measured"]}
    assert "chat_template_kwargs" not in usual.base_specs("b", "d")[0].params
    with pytest.raises(RazorError, match="has no chat template, and prior tasks without examples"):
        resolve("tiny", {"fewshot": "2"})
    with pytest.raises(RazorError, match="Unknown chat_template 'yes'"):
        resolve("paper", {"chat_template": "yes"})


@pytest.mark.parametrize("asks", [True, False], ids=["compare", "watch"])
def test_with_a_law_only_who_asks_prior_tasks_may_tell_templates_otherwise(
    asks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere what was asked for would reach nothing."""
    (tmp_path / "prompts").write_text("a\n")
    law: Any = SimpleNamespace(settings=ProbeSettings(precision="float32"), generic=GenericText.built_in())
    told = {"chat_template_kwargs": '{"think": false}', "generic": None, "dtype": None, "prompts": tmp_path / "prompts"}
    usual: dict[str, Any] = {"max_new_tokens": None, "samples": None, "stop": [], "no_chat": False, "turns": None}
    suite = PriorTasks(("a",), asking=CHAT)
    if asks:
        _, on = read_probe(Namespace(**told, **usual), law, suite, asks_prior=True)
        assert on.settings == law.settings
    else:
        with pytest.raises(RazorError, match=r"nothing of them: leave --chat-template-kwargs out\.$"):
            read_probe(Namespace(**told, **usual), law, suite)


def test_with_a_law_the_template_may_be_told_what_the_law_says() -> None:
    """Prior tasks in the chat template need it, and the probe has it already."""
    told = {"chat_template_kwargs": '{"think": false}', "generic": None}
    usual: dict[str, Any] = {"max_new_tokens": None, "samples": None, "stop": [], "no_chat": False, "turns": None}
    law: Any = SimpleNamespace(settings=ProbeSettings(chat_template_kwargs={"think": False}))
    other: Any = SimpleNamespace(settings=ProbeSettings())
    assert probe_without_law(Namespace(**told, **usual), law) == {}
    assert probe_without_law(Namespace(**told, **usual), None) == {"chat_template_kwargs": {"think": False}}
    otherwise = told | {"chat_template_kwargs": '{"think": true}'}
    for given, of, says in ((told, other, "nothing of them"), (otherwise, law, '{"think": false} of them')):
        # Of commands that ask no prior tasks, naming some would be no help.
        with pytest.raises(RazorError, match=rf"template {says}: leave --chat-template-kwargs out\.$"):
            probe_without_law(Namespace(**given, **usual), of)
        with pytest.raises(RazorError, match=f"template {says}: leave .* name these with --prior and add"):
            probe_without_law(Namespace(**given, **usual), of, prior_in_template=False)
        # Of prior tasks in the chat template it is told, and the law's settings are the prompts'.
        assert probe_without_law(Namespace(**given, **usual), of, prior_in_template=True) == {}
        with pytest.raises(RazorError, match="the law's own probe and settings are used"):
            probe_without_law(Namespace(**given, **usual | {"samples": 2}), of, prior_in_template=True)


ASKED = [
    ("choices", (), CHAT),
    ("choices", (DESCRIBED,), Asking(chat_template=True, fewshot=2)),
    ("choices", (DESCRIBED,), Asking(chat_template=True, fewshot=2, multiturn=False)),
    ("choices", (PREFIXED,), Asking(chat_template=True, fewshot=1, chat_template_kwargs={"think": False})),
    ("choices", ("num_fewshot: 0",), Asking(fewshot=3)),
    ("choices", ("num_fewshot: 1",), Asking(fewshot=3)),
    ("inputs", (), Asking(chat_template=True, fewshot=1)),
    ("generated", (DESCRIBED,), Asking(chat_template=True, fewshot=2, chat_template_kwargs={"think": False})),
]


@pytest.mark.parametrize(("kind", "more", "asking"), ASKED)
def test_every_item_is_scored_as_lm_eval_scores_it(
    model: Any, tmp_path: Path, kind: str, more: tuple[str, ...], asking: Asking
) -> None:
    tokenizer, path = tokenizer_of(), task(tmp_path, kind, *more)
    score, _ = ours(model, tokenizer, path, asking)
    rows = by_lm_eval(model, tokenizer, path, asking)
    ((_, outcomes),) = score.items.outcomes.items()
    assert list(outcomes.values()) == [row["exact_match" if kind == "generated" else "acc"] for row in rows]
    assert len(rows) == len(outcomes) == 8
    ((_, questions),) = score.items.questions.items()
    for row, question in zip(rows, questions.values(), strict=True):
        context = str(row["arguments"][0][0])
        assert (f"<{'a' if asking.chat_template else ''}" in context) is asking.chat_template
        if kind != "generated":
            assert question.logprobs == pytest.approx([float(one[0]) for one in row["filtered_resps"]], rel=1e-4)
        if kind != "inputs":
            assert question.prompt.lstrip("…") == context[-len(question.prompt.lstrip("…")) :]
    assert score.version.endswith(f"({asking.words})")


def test_the_form_is_part_of_a_scores_version(model: Any, tmp_path: Path) -> None:
    path = task(tmp_path, "choices")
    plain, _ = ours(model, tokenizer_of(), path, Asking())
    chat, _ = ours(model, tokenizer_of(), path, Asking(True, 5, False, {"think": False}))
    assert plain.version == "0" or "(" not in plain.version
    assert (
        chat.version == f"{plain.version} (in the chat template, after 5 examples, examples in one turn, think = False)"
    )
    # What one call has set up, the next does not see.
    again, _ = ours(model, tokenizer_of(), path, Asking())
    assert again.items.questions == plain.items.questions
    assert Asking().as_json() == {}
    assert Asking(True, 0).as_json() == {"chat_template": True, "fewshot": 0}
    assert PriorTasks([path]).shows_examples() is False
    assert PriorTasks([path], asking=Asking(fewshot=1)).shows_examples() is True


def test_what_cannot_be_asked_so_is_said(model: Any, tmp_path: Path) -> None:
    path = task(tmp_path, "choices", DESCRIBED)
    with pytest.raises(RazorError, match="are to be asked in the chat template, and the tokenizer has none"):
        ours(model, tokenizer_of(None), path, CHAT)
    score, notes = ours(model, tokenizer_of(NO_SYSTEM), path, CHAT)
    rows = by_lm_eval(model, tokenizer_of(NO_SYSTEM), path, CHAT)
    assert list(score.items.outcomes["own"].values()) == [row["acc"] for row in rows]
    assert any(
        note.startswith("8 questions were asked without what their task says as a system's turn") for note in notes
    )
    without = task(tmp_path, "choices", "num_fewshot: 0", name="without")
    _, notes = ours(model, tokenizer_of(), without, Asking(fewshot=3))
    assert any(note.startswith("1 of the 1 tasks show no examples, as they say themselves") for note in notes)
    with pytest.raises(RazorError, match="so it is not used"):
        ours(
            model,
            tokenizer_of("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"),
            path,
            CHAT,
        )
    for wrong in ({"fewshot": -1}, {"multiturn": False}, {"chat_template_kwargs": {"a": 1}}):
        with pytest.raises(RazorError):
            Asking(**wrong)


def test_their_prompts_are_the_same_ones_in_the_template(model: Any, tmp_path: Path) -> None:
    tokenizer, told = tokenizer_of(), {"think": False}
    path = task(tmp_path, "choices", DESCRIBED)
    asking = Asking(chat_template=True, fewshot=1, chat_template_kwargs=told)
    suite = PriorTasks([path], 3, asking=asking)
    generic = GenericText.of_prior(suite)
    assert generic.prior is not None
    assert not generic.prior.scored
    shown = {as_read(tokenizer, ids) for ids in encode(tokenizer, generic.prompts, False)}
    beside = [str(row["arguments"][0][0]) for row in by_lm_eval(model, tokenizer, path, asking)[3:]]
    assert len(shown) == 5
    # Examples are drawn one after the other, and lm-eval has drawn some for the three before.
    assert {one.rsplit("<u>", 1)[1] for one in shown} == {one.rsplit("<u>", 1)[1] for one in beside}
    assert all(one.startswith("<s>be good;<u>q4") and one.endswith(";<a>no:") for one in shown)
    assert of_generic(model, tokenizer, generic, ProbeSettings(4)).prompts == encode(tokenizer, generic.prompts, False)


@pytest.mark.parametrize(("kind", "answers"), [("choices", ("b", "cc", "d")), ("generated", tuple("01234567"))])
def test_what_recovery_trains_on_is_in_the_template_too(
    model: Any, tmp_path: Path, kind: str, answers: tuple[str, ...]
) -> None:
    tokenizer = tokenizer_of()
    suite = PriorTasks([task(tmp_path, kind, "training_split: train")], asking=CHAT)
    examples = RecoverySet.of(suite, 0)
    for ids, begins in _rows(LanguageModel(model, tokenizer, "it", str), examples.trained):
        before, after = as_read(tokenizer, ids[:begins]), as_read(tokenizer, ids[begins:])
        assert before.startswith("<u>q4")
        assert before.endswith(":;<a>")
        assert after.rstrip(";") in answers
