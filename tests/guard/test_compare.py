"""Comparing checkpoints: the numbers against direct ones, the page, the exit codes, and pairs that do not belong."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers, processors

from laws import GENERIC, PROMPTS, SETTINGS, changed, law_of
from own_tasks import SCORES, metric, own_task
from rlrazor import drift
from rlrazor.cli import main
from rlrazor.cli.compare_output import as_json
from rlrazor.errors import RazorError
from rlrazor.guard import compare as comparing
from rlrazor.guard import comparison_page
from rlrazor.guard.by_prompt import pieces
from rlrazor.guard.compare import compare
from rlrazor.guard.comparison import Completion, Pair
from rlrazor.guard.weight_changes import changes
from rlrazor.lm import kl, probes, representation
from rlrazor.lm.adapters import AdaptedWeights, weights_of
from rlrazor.lm.models import add_lora, load
from rlrazor.lm.prior import PriorTasks
from rlrazor.lm.scores import PriorScores, Score
from rlrazor.lm.sources import SavedWeights
from rlrazor.system import writing
from tiny_models import alive_at_loads, char_tokenizer, saved, tiny_llama

TOKENIZER = char_tokenizer()


def moved(model: Any, size: float = 0.05) -> Any:
    """The same with every weight moved at random."""
    tuned, rng = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += size * torch.randn(weight.shape, generator=rng)
    return tuned


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned, and an adapter for the base; a file of prompts, one of text, and a law."""
    root = tmp_path_factory.mktemp("pair")
    base = tiny_llama()
    saved(root / "base", base, TOKENIZER)
    saved(root / "tuned", moved(base), TOKENIZER)
    law_of(base, scale=20.0).save(root / "law.json")
    adapted = add_lora(copy.deepcopy(base), 2)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_B." in name:
                weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    adapted.save_pretrained(root / "adapter")
    config = json.loads((root / "adapter" / "adapter_config.json").read_text())
    (root / "adapter" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(root / "base")})
    )
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    (root / "text.txt").write_text("\n".join(GENERIC.texts))
    return root


def pair(folders: Path, tuned: str, **settings: Any) -> Pair:
    return Pair(str(folders / "base"), str(folders / tuned), **settings)


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
def test_the_numbers_are_those_of_both_models_in_memory(folders: Path, tuned: str) -> None:
    found = compare(pair(folders, tuned), PROMPTS, generic=GENERIC, settings=SETTINGS)
    base = load(folders / "base")
    adapter = folders / "adapter" if tuned == "adapter" else None
    other = load(folders / "base", adapter=adapter) if adapter else load(folders / "tuned")
    new = probes.of_prompts(base.model, TOKENIZER, PROMPTS, SETTINGS)
    text = probes.of_generic(base.model, TOKENIZER, GENERIC, SETTINGS)
    forward = kl.forward_kl(kl.Probe(base.model, new), other.model)
    own = probes.complete(other.model, TOKENIZER, new.prompts, SETTINGS, probes.NEW)
    reverse = kl.reverse_kl(other.model, kl.Sequences.grouped(new.prompts, own), base.model)
    generic = kl.forward_kl(kl.Probe(base.model, text), other.model)
    for name, expected in (("kl_forward", forward), ("kl_reverse", reverse), ("kl_probe", generic)):
        assert found.kl[name] == pytest.approx(expected.per_completion, rel=1e-4)
        assert found.per_token[name] == pytest.approx(expected.per_token, rel=1e-4)
    # Worst prompts first, their tokens' KL those of the positions.
    totals = [prompt.total for prompt in found.prompts]
    assert totals == sorted(totals, reverse=True)
    assert totals == pytest.approx(sorted(forward.sums, reverse=True), rel=1e-4)
    worst = int(np.argmax(forward.sums))
    assert found.prompts[0].prompt == PROMPTS[worst]
    assert "".join(found.prompts[0].base[0].tokens) == TOKENIZER.decode(new.completions[worst])
    assert "".join(found.prompts[0].tuned[0].tokens) == TOKENIZER.decode(own[worst])
    start = int(forward.lengths[:worst].sum())
    expected_kl = forward.positions[start : start + forward.lengths[worst]]
    assert found.prompts[0].base[0].kl == pytest.approx(tuple(expected_kl), rel=1e-4)
    # Weights and representation.
    before, after = weights_of(base.model), weights_of(other.model)
    measured = drift.measure_weights(before, after, spectra=False)
    assert found.weights.l2 == pytest.approx(measured["weight_l2"], rel=1e-5)
    assert found.weights.unchanged == pytest.approx(measured["weight_sparsity"])
    assert found.weights.whole.parameters == sum(weight.numel() for weight in before.values())
    norm = float(torch.cat([weight.flatten() for weight in before.values()]).double().norm())
    assert found.weights.whole.relative == pytest.approx(measured["weight_l2"] / norm, rel=1e-5)
    assert [layer.name for layer in found.weights.layers if layer.name.startswith("layer ")] == ["layer 0", "layer 1"]
    similar = [representation.representation(lm.model, TOKENIZER, GENERIC.texts) for lm in (base, other)]
    assert found.distances.cknna == pytest.approx(drift.cknna(*similar), abs=1e-5)
    assert (found.law_says, found.forecast) == (None, None)
    assert "Uncalibrated" in comparison_page.verdict(found)


def test_one_model_is_in_memory_at_a_time(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the models alive whenever another is loaded."""
    from rlrazor.guard import compare as module
    from rlrazor.guard import measuring

    counts = alive_at_loads(monkeypatch, module, measuring)
    for tuned, loads in (("tuned", 3), ("adapter", 2)):
        counts.clear()
        told: list[str] = []
        compare(pair(folders, tuned), PROMPTS, generic=GENERIC, settings=SETTINGS, told=told.append)
        assert counts == [0] * loads
        assert len(told) == module.steps(None)


def test_a_law_forecasts_and_the_exit_code_judges(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "compare", cache_of(compare))
    command = ["compare", str(folders / "base"), str(folders / "tuned"), "--prompts", str(folders / "prompts.txt")]
    command += ["--law", str(folders / "law.json"), "--out", str(tmp_path / "page.html")]
    assert main([*command, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    law = law_of(tiny_llama(), scale=20.0)
    expected = law.forecaster.forecast({name: found["kl"][name]["mean"] for name in ("kl_forward", "kl_probe")})
    assert found["forecast"]["drop"] == pytest.approx(expected.drop)
    assert (found["forecast"]["low"], found["forecast"]["high"]) == pytest.approx((expected.low, expected.high))
    assert (found["above"], found["verdict"], found["exit_code"]) == (False, None, 0)
    drop, low, high = expected.drop, expected.low, expected.high
    assert 0.01 < low < drop < high < 0.9
    between = str((drop + high) / 2)
    for limit, options, code, said in (
        (str(high + 0.001), [], 0, "Within the limit of"),
        (str(low - 0.001), [], 1, "Above the limit of"),
        (between, [], 3, "Cannot be told: the forecast drop is"),
        (between, ["--accept-uncertain"], 0, "Within the limit of"),
        (str((low + drop) / 2), ["--accept-uncertain"], 1, "Above the limit of"),
        (between, ["--cautious"], 1, "Above the limit of"),
    ):
        assert main([*command, *options, "--fail-above", limit]) == code
        out = " ".join(capfd.readouterr().out.split())
        assert said in out
        assert f"drops by {100 * drop:.1f} points" in out
    page = (tmp_path / "page.html").read_text()
    assert page.count('<section class="prompt">') == len(PROMPTS)
    assert "http" not in page.replace("http-equiv", "")  # it opens offline
    assert "Forecast: the prior score drops" in page


def cache_of(function: Any) -> Any:
    """What it returned at first, ever after."""
    found: list[Any] = []

    def first(*arguments: Any, **options: Any) -> Any:
        if not found:
            found.append(function(*arguments, **options))
        return found[0]

    return first


def scoring(monkeypatch: pytest.MonkeyPatch, *found: dict[str, Score]) -> None:
    """Evaluate gives these scores, of the base and then of the tuned model."""
    left = list(found)

    def scores(tasks: PriorTasks, lm: Any, told: Any) -> PriorScores:
        assert (tasks.tasks, tasks.limit) == (tuple(left[0]), 7)
        return PriorScores(left.pop(0), ["3 inputs were cut."])

    monkeypatch.setattr(PriorTasks, "scores", scores)


def score(value: float, stderr: float | None, metric: str = "acc", higher: bool = True) -> Score:
    return Score(value, stderr, 7, metric, "1", higher)


def measured(folders: Path, *tasks: str) -> Any:
    suite = PriorTasks(tasks, limit=7)
    return compare(pair(folders, "tuned"), PROMPTS, generic=GENERIC, settings=SETTINGS, suite=suite)


def test_the_truth_is_measured_beside_it(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {"a": score(0.8, 0.03), "b": score(0.6, 0.06)}
    scoring(monkeypatch, before, {"a": score(0.5, 0.04), "b": score(0.7, 0.08)})
    found = measured(folders, "a", "b")
    assert found.truth is not None
    told = as_json(found)["truth"]
    assert (told["base"], told["tuned"]) == ({"a": 0.8, "b": 0.6}, {"a": 0.5, "b": 0.7})
    assert found.truth.drop == found.drop == pytest.approx(0.1)
    assert found.truth.stderr == pytest.approx(np.hypot(0.05, 0.1) / 2)
    assert "Measured: it drops by 10.0 ± 5.6 points [0.8, 19.2] (90% interval)." in comparison_page.verdict(found)
    assert found.notes.count("3 inputs were cut.") == 1


def test_a_standard_error_that_is_not_known_is_not_shown(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring(monkeypatch, {"a": score(0.8, 0.03), "b": score(0.6, None)}, {"a": score(0.5, 0.04), "b": score(0.7, 0.1)})
    found = measured(folders, "a", "b")
    assert found.truth.stderr is None
    assert found.truth.tasks["a"].stderr == pytest.approx(0.05)
    assert "Measured: it drops by 10.0 points" in comparison_page.verdict(found)
    assert any("no standard error: lm-eval gives none for b" in note for note in found.notes)
    page = comparison_page.write_page(found, tmp_path / "page.html").read_text()
    assert "Mean drop of the scores that are fractions of 1: 10.0 points." in page
    assert as_json(found)["truth"]["stderr"] is None


def test_a_drop_is_how_much_worse_in_the_scores_own_unit(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {
        "up": score(0.8, 0.0),
        "down": score(0.2, 0.0, "error_rate", higher=False),
        "ppl": score(12.5, 0.1, "word_perplexity", higher=False),
        "brier": score(0.88, None, "brier_score", higher=False),
    }
    after = {
        "up": score(0.7, 0.0),
        "down": score(0.5, 0.0, "error_rate", higher=False),
        "ppl": score(14.0, 0.1, "word_perplexity", higher=False),
        "brier": score(0.89, None, "brier_score", higher=False),
    }
    scoring(monkeypatch, before, after)
    found = measured(folders, *before)
    drops = {name: task.drop for name, task in found.truth.tasks.items()}
    assert drops == pytest.approx({"up": 0.1, "down": 0.3, "ppl": 1.5, "brier": 0.01})
    # The mean is over fractions of 1 alone.
    assert found.truth.drop == pytest.approx(0.2)
    assert found.truth.stderr == 0
    assert any("left out of the mean drop: ppl (word_perplexity), brier (brier_score)." in note for note in found.notes)
    page = comparison_page.write_page(found, tmp_path / "page.html").read_text()
    for row in (
        ("up", "acc, more is better", "80.0 %", "70.0 %", "10.0 points", "[-17.9, 37.9]", "± 0.0 (not paired)", "7"),
        ("down", "error_rate, less is better", "20.0 %", "50.0 %", "30.0 points"),
        ("ppl", "word_perplexity, less is better", "12.5", "14", "1.5", "[1.267, 1.733]", "± 0.1414 (not paired)", "7"),
        ("brier", "brier_score, less is better", "0.88", "0.89", "0.01", "unknown", "unknown", "7"),
    ):
        assert f"<tr><th>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) in page
    listed = as_json(found)["truth"]["tasks"]["ppl"]
    assert (listed["metric"], listed["higher_is_better"], listed["fraction"]) == ("word_perplexity", False, False)
    assert listed["drop"] == pytest.approx(1.5)


def test_a_score_without_a_fraction_is_not_judged(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compare", str(folders / "base"), str(folders / "tuned"), "--prompts", str(folders / "prompts.txt")]
    command += ["--out", str(tmp_path / "page.html"), "--max-new-tokens", "6", "--no-chat", "--prior-limit", "7"]
    brier = own_task(tmp_path, metric("brier_score", "false", "brier_score"), "brier")
    # Known beforehand, before a model is loaded.
    with monkeypatch.context() as patch:
        patch.setattr(comparing, "load", lambda *_, **__: pytest.fail("loaded"))
        assert main([*command, "--prior", brier, "--fail-above", "0"]) == 2
    assert "and there is none: " + brier + " by brier_score." in capfd.readouterr().err
    # Known by its values alone.
    points = own_task(tmp_path, metric("points", "true"), "points", SCORES + "{'points': 40.0}")
    assert main([*command, "--prior", points, "--fail-above", "0"]) == 2
    assert "by points." in capfd.readouterr().err
    assert not (tmp_path / "page.html").exists()
    # With a law the forecast is judged, and the score shown.
    law = ["--law", str(folders / "law.json"), "--prior", brier, "--fail-above", "0.9"]
    assert main([*command[:4], *command[4:6], str(tmp_path / "page.html"), *law]) == 0
    printed = " ".join(capfd.readouterr().out.split())
    assert "brier_score, less is better" in printed
    assert "Forecast: the prior score drops" in printed
    assert "Measured" not in printed


@pytest.mark.parametrize("direction", ["true", "false"])
def test_a_worse_model_is_above_the_limit_whichever_direction_is_better(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    task = own_task(tmp_path, metric("rate", direction), code=SCORES + "{'rate': 0.5}")
    higher = direction == "true"
    worse = 0.4 if higher else 0.6
    command = ["compare", str(folders / "base"), str(folders / "tuned"), "--prompts", str(folders / "prompts.txt")]
    command += ["--out", str(tmp_path / "page.html"), "--max-new-tokens", "6", "--no-chat", "--prior-limit", "7"]
    command += ["--prior", task, "--fail-above", "0.05", "--json"]
    for first, second, code in ((0.5, worse, 1), (worse, 0.5, 0)):
        scoring(monkeypatch, {task: score(first, 0.01, "rate", higher)}, {task: score(second, 0.01, "rate", higher)})
        assert main(command) == code
        assert json.loads(capfd.readouterr().out)["truth"]["drop"] == pytest.approx(0.1 if code else -0.1)


def test_a_tuned_model_without_a_tokenizer_takes_the_bases(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "tuned", tmp_path / "tuned")
    for file in tmp_path.glob("tuned/*token*"):
        file.unlink()
    whole = compare(pair(folders, "tuned"), PROMPTS, generic=GENERIC, settings=SETTINGS)
    found = compare(pair(folders, str(tmp_path / "tuned")), PROMPTS, generic=GENERIC, settings=SETTINGS)
    assert found.kl == whole.kl
    assert [note for note in found.notes if note not in whole.notes] == [
        f"{tmp_path / 'tuned'} has no tokenizer: the base's is used."
    ]
    with pytest.raises(RazorError, match="tuned has no tokenizer"):
        compare(Pair(str(tmp_path / "tuned"), str(folders / "base")), PROMPTS, generic=GENERIC, settings=SETTINGS)


def test_pieces_put_together_are_the_text() -> None:
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text = "naïve 日 <b>&"
    ids = fast(text)["input_ids"]
    shown = pieces(fast, ids)
    assert len(shown) == len(ids) > len(text)
    assert "".join(shown) == text
    assert shown[2:4] == ["", "ï"]
    # Tokenizers that tidy spaces as they decode would make one token's text depend on those after it.
    tidy = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)
    words = "don 't it 's ."
    assert pieces(tidy, tidy(words)["input_ids"]) == list(words)


def test_text_is_escaped_and_shaded(folders: Path, tmp_path: Path) -> None:
    found = compare(pair(folders, "tuned"), PROMPTS[:2], generic=GENERIC, settings=SETTINGS)
    worst = found.prompts[0]
    object.__setattr__(worst, "prompt", "<script>alert(1)</script>")
    object.__setattr__(worst, "base", (Completion(("<i>", "ok"), (0.0, 1e6)),))
    page = comparison_page.write_page(found, tmp_path / "page.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert 'style="--kl: 0.00" title="0.000 nats">&lt;i&gt;</span>' in page
    assert f'style="--kl: {comparison_page.DARKEST:.2f}" title="1000000.000 nats">ok</span>' in page
    assert "2 prompts are few" in page


def test_pairs_that_do_not_belong_together_are_refused(folders: Path, tmp_path: Path) -> None:
    def comparing(base: Path, tuned: Path, **options: Any) -> Any:
        return compare(Pair(str(base), str(tuned)), PROMPTS, **{"settings": SETTINGS, "generic": GENERIC, **options})

    base, tuned = folders / "base", folders / "tuned"
    with pytest.raises(RazorError, match="is an adapter, so it is not the base"):
        comparing(folders / "adapter", base)
    checkpoint = saved(tmp_path / "checkpoint-3", moved(tiny_llama()), TOKENIZER)
    (checkpoint / "trainer_state.json").write_text("{}")
    with pytest.raises(RazorError, match="seem to be swapped"):
        comparing(checkpoint, base)
    assert compare(Pair(str(checkpoint), str(base), as_given=True), PROMPTS, generic=GENERIC, settings=SETTINGS)
    with pytest.raises(RazorError, match="calibrated for base, and this base is another one"):
        comparing(tuned, base, law=law_of(tiny_llama()))
    wider = saved(tmp_path / "wider", tiny_llama(hidden=32), TOKENIZER)
    with pytest.raises(RazorError, match="one is not tuned from the other"):
        comparing(base, wider)
    other = saved(
        tmp_path / "other", moved(tiny_llama()), char_tokenizer("zyxwvutsrqponmlkjihgfedcba0123456789+-=: \n")
    )
    with pytest.raises(RazorError, match="different vocabularies"):
        comparing(base, other)
    broken = moved(tiny_llama())
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(RazorError, match=r"are damaged: lm_head\.weight is NaN"):
        comparing(base, saved(tmp_path / "broken", broken, TOKENIZER))
    foreign = add_lora(tiny_llama(hidden=32), 2)
    foreign.save_pretrained(tmp_path / "foreign")
    with pytest.raises(RazorError, match="cannot be loaded"):
        comparing(base, tmp_path / "foreign")
    with pytest.raises(RazorError, match="no prompts"):
        compare(Pair(str(base), str(tuned)), [], generic=GENERIC, settings=SETTINGS)
    with pytest.raises(RazorError, match="There is no"):
        comparing(base, tmp_path / "nowhere")


def test_an_adapter_for_another_base_is_noted(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "someone/else"}))
    found = compare(Pair(str(folders / "base"), str(tmp_path / "adapter")), PROMPTS, generic=GENERIC, settings=SETTINGS)
    assert any("trained on someone/else" in note for note in found.notes)
    for damaged in ("{", "[]"):
        path.write_text(damaged)
        with pytest.raises(RazorError, match=r"adapter_config\.json is damaged"):
            compare(Pair(str(folders / "base"), str(tmp_path / "adapter")), PROMPTS)


def test_the_page_tells_turns_that_a_prompt_has_from_what_the_models_say(tmp_path: Path) -> None:
    """Of both models the KL on the same given turn, and below it what each says where the conversation ends."""
    tokenizer = char_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '-' if m['role'] == 'user' else '+' }}{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}+{% endif %}"
    )
    for name, model in (("b", tiny_llama()), ("t", moved(tiny_llama()))):
        saved(tmp_path / name, model, tokenizer)
    said = [("user", "a0"), ("assistant", "0a"), ("user", "b1"), ("assistant", "1b"), ("user", "c2")]
    prompts: list[Any] = [[{"role": role, "content": text} for role, text in said], "d3"]
    settings = probes.ProbeSettings(6, samples=2, turns="all")
    found = compare(Pair(str(tmp_path / "b"), str(tmp_path / "t")), prompts, settings=settings, generic=GENERIC)
    talk, alone = sorted(found.prompts, key=lambda one: -len(one.prompt))
    for side in (talk.base, talk.tuned):
        assert ["".join(one.tokens) for one in side if one.given] == ["0a;", "1b;"]
        assert [one.given for one in side] == [True, True, False, False]
    assert not any(one.given for one in (*alone.base, *alone.tuned))
    labels = [label for label, _ in comparison_page.labelled(talk)]
    assert labels == [
        "turn 1 of the assistant, as the prompt has it, shaded by forward KL",
        "turn 2 of the assistant, as the prompt has it, shaded by forward KL",
        "what the base says, shaded by forward KL",
        "turn 1 of the assistant, as the prompt has it, shaded by reverse KL",
        "turn 2 of the assistant, as the prompt has it, shaded by reverse KL",
        "what the tuned model says, shaded by reverse KL",
    ]
    assert [one for _, those in comparison_page.labelled(talk) for one in those] == [*talk.base, *talk.tuned]
    assert len(comparison_page.labelled(alone)) == 2
    page = comparison_page.write_page(found, tmp_path / "page.html").read_text()
    assert page.count("of the assistant, as the prompt has it") == 4
    assert "assistant’s turns that prompts have already" in page


def test_a_tokenizer_that_changed_is_refused_or_noted(folders: Path, tmp_path: Path) -> None:
    def notes(tokenizer: Any) -> list[str]:
        shutil.rmtree(tmp_path / "tuned", ignore_errors=True)
        saved(tmp_path / "tuned", moved(tiny_llama()), tokenizer)
        return list(compare(pair(folders, str(tmp_path / "tuned")), PROMPTS, settings=SETTINGS, generic=GENERIC).notes)

    assert notes(char_tokenizer()) == []
    template, eos, split = char_tokenizer(), char_tokenizer(), char_tokenizer()
    template.chat_template = "{{ messages }}"
    eos.eos_token = "a"
    split.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("0", "removed")
    assert ["different chat templates" in note for note in notes(template)] == [True]
    assert ["ends a text with 'a', the base's with ';'" in note for note in notes(eos)] == [True]
    assert ["different tokens; the base's are used" in note for note in notes(split)] == [True]
    turns: list[Any] = [[{"role": "user", "content": "a0b"}], "0ab"]
    normal = char_tokenizer()
    normal.chat_template = split.chat_template = "{{ messages[0]['content'] }}"
    for name, model, tokenizer in (("b", tiny_llama(), normal), ("t", moved(tiny_llama()), split)):
        saved(tmp_path / name, model, tokenizer)
    of_turns = compare(Pair(str(tmp_path / "b"), str(tmp_path / "t")), turns, settings=SETTINGS, generic=GENERIC)
    assert any("turn 2 of the 2 prompts into different tokens" in note for note in of_turns.notes)
    # Text that is in the template already, and would be put into it once more.
    normal.chat_template = "u:{% for m in messages %}{{ m['content'] }}{% endfor %}="
    normal.save_pretrained(tmp_path / "b")
    for prompts, said in ((["u:a0b=", "u:b="], True), (["a0b", "b"], False)):
        both, asked = Pair(str(tmp_path / "b"), str(tmp_path / "t")), probes.ProbeSettings(6)
        twice = compare(both, prompts, settings=asked, generic=GENERIC)
        assert any("are put into it again" in note for note in twice.notes) is said
    # What a tokenizer puts behind a text is not measured, so it makes no difference.
    ending = char_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A ;", special_tokens=[(";", 1)])
    assert notes(ending) == []
    # An adapter's own, where it was saved with it.
    shutil.copytree(folders / "adapter", tmp_path / "adapter")
    template.save_pretrained(tmp_path / "adapter")
    adapter = pair(folders, str(tmp_path / "adapter"))
    assert "different chat templates" in compare(adapter, PROMPTS, settings=SETTINGS, generic=GENERIC).notes[0]
    more = char_tokenizer()
    more.add_special_tokens({"pad_token": "<more>"})
    more.save_pretrained(tmp_path / "adapter")
    # Transformers before 4.56 has it in the tokenizer's config.
    (tmp_path / "adapter" / "chat_template.jinja").unlink(missing_ok=True)
    assert (
        "has 1 tokens more than the base's, such as <more>"
        in compare(adapter, PROMPTS, settings=SETTINGS, generic=GENERIC).notes[0]
    )
    char_tokenizer("zyxwvutsrqponmlkjihgfedcba0123456789+-=: \n").save_pretrained(tmp_path / "adapter")
    with pytest.raises(RazorError, match="different vocabularies"):
        compare(adapter, PROMPTS, settings=SETTINGS, generic=GENERIC)


def test_what_weakens_a_forecast_is_noted(folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    law = law_of(tiny_llama(), runs=4, scale=20.0)
    useless = changed(law, choice__guess=0.0)
    long = [f"{letter * 60}:" for letter in "abcd"]
    found = compare(pair(folders, "tuned"), [*PROMPTS[:15], *long], law=useless)
    assert list(found.notes) == [
        "4 of the 19 prompts are left out: they do not fit into the context with a completion of 6 tokens.",
        "15 prompts are few: KL is uncertain, and the interval is widened by it. Give at least 16, better a hundred.",
        "No KL forecast better than guessing the mean: do not rely on this law.",
        "The law's 4 runs allow intervals of 80%, not of 90%.",
    ]
    # A law that is not to be relied on passes nothing in CI, neither by its forecast nor by its interval.
    useless.save(tmp_path / "useless.json")
    command = ["compare", str(folders / "base"), str(folders / "tuned"), "--prompts", str(folders / "prompts.txt")]
    command += ["--law", str(tmp_path / "useless.json"), "--out", str(tmp_path / "page.html"), "--fail-above", "0.9"]
    for options in ([], ["--cautious"], ["--accept-uncertain"]):
        assert main([*command, *options]) == 2
        assert "is not to be relied on, so --fail-above cannot go by its forecast" in capfd.readouterr().err


def test_a_pickle_beside_an_adapter_is_not_read(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "other.safetensors")
    torch.save({}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(RazorError, match=r"has no adapter_model.safetensors file\. Pickled weights are not read"):
        compare(pair(folders, str(tmp_path / "adapter")), PROMPTS)


def test_a_comparison_without_memory_for_it_says_so(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kl, "forward_kl", exhausted)
    with pytest.raises(RazorError, match="Out of memory: --dtype bfloat16 takes half"):
        compare(pair(folders, "tuned"), PROMPTS, settings=SETTINGS, generic=GENERIC)


def test_a_home_folder_is_understood(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folders))
    found = compare(Pair("~/base", "~/adapter"), PROMPTS[:2], generic=GENERIC, settings=SETTINGS)
    assert found.pair.tuned == str(folders / "adapter")
    assert found.pair.base == str(folders / "base")


@pytest.mark.parametrize("bare", ["base", "tuned"])
def test_a_model_saved_without_its_head_has_the_same_weights(tmp_path: Path, bare: str) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    models_ = {"base": base, "tuned": moved(base)}
    for name, model in models_.items():
        saved(tmp_path / name, model.model if name == bare else model, TOKENIZER)
    found = compare(
        Pair(str(tmp_path / "base"), str(tmp_path / "tuned")), PROMPTS[:2], generic=GENERIC, settings=SETTINGS
    )
    expected = drift.measure_weights(*({**dict(model.named_parameters())} for model in models_.values()), spectra=False)
    assert found.weights.l2 == pytest.approx(expected["weight_l2"], rel=1e-5)
    assert [layer.name for layer in found.weights.layers if layer.name.startswith("layer ")] == ["layer 0", "layer 1"]


def test_weights_without_a_pair_are_counted(folders: Path, tmp_path: Path) -> None:
    weights = dict(SavedWeights(folders / "base"))
    more = {**weights, "extra.weight": torch.ones(2)}
    there = "base", "tuned"
    layers, notes = changes(weights, more, there)
    assert sum(layer.l2 for layer in layers) == 0
    assert notes == [
        "1 weights are in one of the two only, such as extra.weight (a head that is tied, say): they are not among the "
        "changes."
    ]
    assert changes(weights, weights, there)[1] == []
    with pytest.raises(RazorError, match="no weight in common"):
        changes({"a.x": torch.ones(1)}, {"b.y": torch.ones(1)}, there)


def test_options_that_make_no_sense_are_refused(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", str(folders / "base"), str(folders / "tuned"), "--prompts", str(folders / "prompts.txt")]
    law = ["--law", str(folders / "law.json")]
    (tmp_path / "empty.txt").write_text("")
    for options, message in (
        (["--fail-above", "0.1"], "give --law to forecast it, or --prior"),
        (["--fail-above", "0.1", "--prior", "none"], "give --law to forecast it, or --prior"),
        (["--prior", "none,winogrande"], "'none' stands alone"),
        ([*law, "--fail-above", "2"], "fraction of 1"),
        (["--fail-above-kl", "-1"], "--fail-above-kl must be at least 0"),
        (["--fail-above-kl", "nan"], "--fail-above-kl must be at least 0, not nan"),
        (["--fail-above-kl", "inf"], "--fail-above-kl must be at most"),
        ([*law, "--samples", "2"], "law's own probe"),
        ([*law, "--generic", str(folders / "text.txt")], "law's own probe"),
        (["--law", str(tmp_path / "none.json")], "There is no law"),
        (["--prompts", str(tmp_path / "empty.txt")], "is empty"),
        (["--stop", ""], "A stop string is empty"),
        (["--level", "90"], "fraction of 1"),
        (["--dtype", "float8"], "one of float32, bfloat16, float16, not float8"),
        (["--out", str(tmp_path)], "is a folder"),
        (["--out", str(tmp_path / "empty.txt" / "page.html")], "Cannot write to"),
    ):
        assert main([*command, *options]) == 2
        assert message in capfd.readouterr().err
    with pytest.raises(SystemExit, match="2"):  # argparse's end of a wrong usage
        main([*command, *law, "--fail-above", "two"])
    assert "--fail-above: invalid float value: 'two'" in capfd.readouterr().err


def test_names_and_prompts_are_shown_as_they_are(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tuned, hostile = tmp_path / "[/red]lr[1e-3]\x1b[31m<b>", "[bold]a\x1b[31m <script>$x_1$"
    shutil.copytree(folders / "tuned", tuned)
    (tmp_path / "prompts[1].jsonl").write_text(json.dumps({"prompt": hostile}))
    command = ["compare", str(folders / "base"), str(tuned), "--prompts", "prompts[1].jsonl", "--max-new-tokens", "4"]
    monkeypatch.setattr(comparison_page, "SHOWN", 1)
    assert main([*command, "--no-chat"]) == 0
    printed = capfd.readouterr().out
    assert "/[/red]lr[1e-3]\\x1b[31m<b> against" in printed.replace("\n", "")
    assert "\x1b" not in printed
    page = (tmp_path / "comparison.html").read_text()
    assert "<script>" not in page
    assert writing.is_ours(tmp_path / "comparison.html", "page")
    tuned.rename(odd := tmp_path / os.fsdecode(b"\xff\xfe"))
    command[2] = str(odd)
    assert main([*command, "--no-chat"]) in (0, 2)  # as the libraries that load it can, or cannot
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert not error or "\\udcff" in error


def test_weights_are_read_from_the_files_as_they_are(folders: Path) -> None:
    read = SavedWeights(folders / "tuned")
    model = load(folders / "tuned").model
    assert set(read) == set(model.state_dict())
    assert all(torch.equal(read[name], weight) for name, weight in model.state_dict().items())
    adapted = load(folders / "base", adapter=folders / "adapter").model
    lazily, copied = AdaptedWeights(adapted), weights_of(adapted)
    assert set(lazily) == set(copied)
    assert all(torch.equal(lazily[name], weight) for name, weight in copied.items())
