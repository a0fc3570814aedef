"""What compare says of limits, of the same model twice, and of a KL that no law explains; and the page's settings."""

import argparse
import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from laws import GENERIC, PROMPTS, SETTINGS, changed, law_of
from own_tasks import metric, own_task
from rlrazor.analysis import paired
from rlrazor.cli import main
from rlrazor.cli.probe import suite_of
from rlrazor.errors import RazorError
from rlrazor.guard import compare as comparing
from rlrazor.guard import comparison_page, scale
from rlrazor.guard.compare import compare
from rlrazor.guard.comparison import Comparison, Completion, LawSays, Pair, PromptDrift
from rlrazor.guard.judgement import check_judge, judgements, worst
from rlrazor.guard.truth import truth_of
from rlrazor.guard.verdict import Limits, Verdict
from rlrazor.lm import kl
from rlrazor.lm.means import MeanKL
from rlrazor.lm.models import add_lora
from rlrazor.lm.probes import content_hash
from rlrazor.lm.prompts import last_said
from rlrazor.lm.scores import ItemResults, Metric, Score
from tiny_models import char_tokenizer, saved, tiny_llama

TOKENIZER = char_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, one that has moved a little, and an adapter of zeros; prompts."""
    root = tmp_path_factory.mktemp("verdicts")
    base = tiny_llama()
    saved(root / "base", base, TOKENIZER)
    add_lora(copy.deepcopy(base), 2).save_pretrained(root / "zeros")
    config = json.loads((root / "zeros" / "adapter_config.json").read_text())
    (root / "zeros" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(root / "base")})
    )
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in base.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=rng)
    saved(root / "tuned", base, TOKENIZER)
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


@pytest.fixture(scope="module")
def found(folders: Path) -> Comparison:
    pair = Pair(str(folders / "base"), str(folders / "tuned"))
    return compare(pair, PROMPTS, generic=GENERIC, settings=SETTINGS)


def command(folders: Path, out: Path, tuned: str = "tuned") -> list[str]:
    options = ["--max-new-tokens", "6", "--no-chat", "--out", str(out / "page.html")]
    return ["compare", str(folders / "base"), str(folders / tuned), "--prompts", str(folders / "prompts.txt"), *options]


def score(outcomes: Any, metric: str = "acc", by_size: bool = True, higher: bool = True) -> Score:
    """By items; of several tasks where the outcomes are a mapping."""
    items = outcomes if isinstance(outcomes, dict) else {"t": outcomes}
    named = {task: {str(n): float(one) for n, one in enumerate(of)} for task, of in items.items()}
    flat = [one for of in named.values() for one in of.values()]
    value = np.mean(flat) if by_size else np.mean([np.mean(list(of.values())) for of in named.values()])
    return Score(float(value), 0.1, len(flat), metric, "1", higher, ItemResults(named, by_size))


def with_truth(found: Comparison, base: Any, tuned: Any, limit: int | None = None) -> Comparison:
    return replace(found, truth=truth_of({"a": score(base)}, {"a": score(tuned)}, 0.9, limit))


# --- measured drops


def test_too_few_items_cannot_pass(found: Comparison) -> None:
    """The drop of 0.0 ± 23.7 points that was within two points."""
    outcomes = np.array([1, 0, 1, 1, 0, 1, 0])
    few = with_truth(found, outcomes, outcomes, limit=7)
    assert few.truth is not None
    assert (few.truth.drop, few.truth.stderr) == (0, 0)
    low, high = few.truth.interval or (0.0, 0.0)
    assert high == pytest.approx(paired.tango(0, 0, 7, 0.9)[1])
    assert low == pytest.approx(-high)
    (one,) = judgements(few, Limits(drop=0.02))
    assert one.verdict is Verdict.UNCERTAIN
    assert one.sentence.startswith("Cannot be told: the measured drop is 0.0 points [-27.9, 27.9] (90% interval)")
    wanted = re.search(r"With --prior-limit (\d+) instead of 7", one.sentence)
    assert wanted is not None
    # So many items of which none differs have an interval that ends at the limit.
    assert paired.tango(0, 0, int(wanted[1]), 0.9)[1] <= 0.02 < paired.tango(0, 0, int(wanted[1]) - 2, 0.9)[1]
    for limits, verdict in (
        (Limits(drop=0.02, accept_uncertain=True), Verdict.WITHIN),
        (Limits(drop=0.02, cautious=True), Verdict.ABOVE),
        (Limits(drop=0.3), Verdict.WITHIN),
    ):
        assert judgements(few, limits)[0].verdict is verdict
    every = with_truth(found, outcomes, outcomes)
    assert (
        "All items were measured (7); it would take 19.0 times as many" in judgements(every, Limits(0.02))[0].sentence
    )


def test_an_unknown_error_passes_nothing(found: Comparison) -> None:
    unknown = replace(score([1, 0]), items=ItemResults(), stderr=None)
    truth = truth_of({"a": unknown}, {"a": unknown}, 0.9, None)
    (one,) = judgements(replace(found, truth=truth), Limits(drop=0.5))
    assert (one.verdict, one.low, one.high) == (Verdict.UNCERTAIN, None, None)
    assert "of unknown error" in one.sentence
    assert judgements(replace(found, truth=truth), Limits(drop=0.5, accept_uncertain=True))[0].verdict is Verdict.WITHIN


def test_errors_are_paired_where_items_are_known() -> None:
    rng = np.random.default_rng(0)
    before = (rng.random(300) < 0.7).astype(float)
    after = np.where(rng.random(300) < 0.1, 0.0, before)
    change = truth_of({"a": score(before)}, {"a": score(after)}, 0.9, None).tasks["a"]
    assert (change.paired, change.n) == (True, 300)
    assert change.stderr == pytest.approx(np.std(before - after, ddof=1) / math.sqrt(300))
    assert change.interval == pytest.approx(paired.tango(int((before - after).sum()), 0, 300, 0.9))
    assert change.interval is not None
    assert change.interval[1] - change.interval[0] < 0.7 * 2 * 1.645 * math.hypot(
        *([before.std() / math.sqrt(300)] * 2)
    )
    # Less is better: the drop has the same sign.
    errors = truth_of(
        {"a": score(1 - before, "error_rate", higher=False)},
        {"a": score(1 - after, "error_rate", higher=False)},
        0.9,
        None,
    )
    assert errors.drop == pytest.approx(change.drop)
    assert errors.interval == pytest.approx(change.interval)
    # Other items than before, or none: as if they were different ones, and said.
    for other in (score(after[:200]), replace(score(after), items=ItemResults())):
        apart = truth_of({"a": score(before)}, {"a": other}, 0.9, None)
        assert not apart.tasks["a"].paired
        assert apart.tasks["a"].stderr == pytest.approx(0.1 * math.sqrt(2))
        assert "The error of a is not paired" in apart.notes[0]


def test_a_groups_error_weighs_items_as_its_score_does() -> None:
    before, after = {"x": [1, 1, 1, 1], "y": [1, 0]}, {"x": [1, 1, 1, 0], "y": [0, 0]}
    pooled = truth_of({"g": score(before)}, {"g": score(after)}, 0.9, None)
    assert pooled.drop == pytest.approx(2 / 6)
    assert pooled.interval == pytest.approx(paired.tango(2, 0, 6, 0.9))
    tasks = truth_of({"g": score(before, by_size=False)}, {"g": score(after, by_size=False)}, 0.9, None)
    assert tasks.drop == pytest.approx((1 / 4 + 1 / 2) / 2)
    parts = paired.Mean([paired.Proportions(1, 0, 4), paired.Proportions(1, 0, 2)])
    assert tasks.interval == pytest.approx(parts.interval(0.9))


def test_no_limit_of_items_is_all_of_them() -> None:
    """0 was refused, after minutes of measuring; elsewhere it means all."""
    given = {"prior": "a, b", "data_mirror": None, "allow_code_execution": False}
    given |= {"chat_template": None, "fewshot": None, "chat_template_kwargs": None}
    for limit, items in ((0, None), (None, None), (7, 7)):
        suite = suite_of(argparse.Namespace(**given, prior_limit=limit))
        assert suite is not None
        assert (suite.tasks, suite.limit) == (("a", "b"), items)


def test_prior_tasks_are_paired_from_lm_evals_own_items(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    task = own_task(tmp_path, metric("acc", "true"))
    run = [*command(folders, tmp_path), "--prior", task, "--prior-limit", "9", "--fail-above", "0.02", "--json"]
    code = main(run)
    out, err = capfd.readouterr()
    printed = json.loads(out)
    assert err == ""  # neither bars nor warnings of libraries
    change = printed["truth"]["tasks"][task]
    assert (change["paired"], change["n"], printed["settings"]["prior_limit"]) == (True, 9, 9)
    low, high = change["interval"]
    assert low < change["drop"] < high
    assert high - low > 0.1
    (one,) = printed["judgements"]
    assert (printed["verdict"], printed["interval"], printed["exit_code"]) == (one["verdict"], [low, high], code)
    assert (code, one["verdict"]) == (3, "cannot be told")
    page = (tmp_path / "page.html").read_text()
    assert "Cannot be told: the measured drop" in page
    assert re.search(r"<td>(± [0-9.]+|no item differs)</td><td>9</td>", page)


# --- forecasts


def forecast_of(found: Comparison, **ends: Any) -> tuple[Comparison, Any]:
    law = law_of(tiny_llama())
    made = law.forecast({"kl_forward": MeanKL(0.1, 0.0), "kl_probe": MeanKL(0.1, 0.0)}, prompts=PROMPTS)
    return replace(found, law_says=LawSays(replace(made, **ends), law)), law


def test_a_forecast_is_judged_by_its_interval(found: Comparison) -> None:
    there, _ = forecast_of(found, drop=0.01, low=0.0, high=0.03)
    for limit, verdict in ((0.02, Verdict.UNCERTAIN), (0.03, Verdict.WITHIN), (0.0, Verdict.UNCERTAIN)):
        assert judgements(there, Limits(drop=limit))[0].verdict is verdict
    assert "Measure the drop with --prior" in judgements(there, Limits(drop=0.02))[0].sentence
    # Beyond what the law has seen its interval is not one.
    assert there.law_says is not None
    assert there.forecast is there.law_says.forecast  # as scripts read it
    forecast = replace(there.law_says.forecast, extrapolated=True)
    beyond = replace(there, law_says=replace(there.law_says, forecast=forecast))
    assert judgements(beyond, Limits(drop=0.05))[0].verdict is Verdict.UNCERTAIN


def test_a_law_that_may_not_judge_passes_nothing(found: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    there, law = forecast_of(found, drop=0.0, low=0.0, high=0.0)
    useless = changed(law, choice__guess=0.0)
    assert there.law_says is not None
    by_useless = replace(there, law_says=replace(there.law_says, law=useless))
    for limits in (Limits(drop=0.5), Limits(drop=0.5, accept_uncertain=True), Limits(drop=0.5, cautious=True)):
        with pytest.raises(RazorError, match="is not to be relied on"):
            judgements(by_useless, limits)
    with pytest.raises(RazorError, match="is not to be relied on"):
        check_judge(useless, {}, 0.5)
    # One that misses by more than guessing, where the limit is, may judge others.
    monkeypatch.setattr(type(law), "objection", lambda self, limit: "Not there." if limit < 0.1 else None)
    with pytest.raises(RazorError, match=r"not to be relied on, .* Not there\. Measure the drop with --prior"):
        judgements(there, Limits(drop=0.05))
    assert judgements(there, Limits(drop=0.5))[0].verdict is Verdict.WITHIN
    # A measured drop needs no law.
    check_judge(useless, {"a": Metric("acc", True)}, 0.5)


# --- KL


def test_kl_is_judged_by_its_own_interval(found: Comparison) -> None:
    measured, count = found.kl["kl_forward"], len(PROMPTS)
    low, high = measured.interval(count, 0.9)
    assert 0 < low < measured.mean < high
    values = np.random.default_rng(0).normal(2, 1, 30)
    from scipy import stats

    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert MeanKL(values.mean(), stats.sem(values)).interval(30, 0.9) == pytest.approx(tuple(expected))
    for limit, verdict in (
        (high + 1e-6, Verdict.WITHIN),
        (low - 1e-6, Verdict.ABOVE),
        ((measured.mean + high) / 2, Verdict.UNCERTAIN),
    ):
        (one,) = judgements(found, Limits(kl=limit))
        assert (one.verdict, one.of) == (verdict, "forward KL on the new task's prompts")
    assert re.search(r"About [\d,]+ prompts instead of 24 would tell", one.sentence)
    # A single prompt has no standard error: that passes nothing but what is 0.
    kls = {**found.kl, "kl_forward": MeanKL(0.1, math.nan)}
    setup = replace(found.setup, measured=1)
    alone = replace(found, distances=replace(found.distances, kl=kls), setup=setup)
    assert judgements(alone, Limits(kl=0.11))[0].verdict is Verdict.UNCERTAIN


def test_the_worst_verdict_counts(found: Comparison) -> None:
    few = with_truth(found, [1, 0, 1], [1, 0, 1], limit=3)
    for kl_limit, verdict in ((1e3, Verdict.UNCERTAIN), (0.0, Verdict.ABOVE)):
        both = judgements(few, Limits(drop=0.1, kl=kl_limit))
        deciding = worst(both)
        assert len(both) == 2
        assert deciding is not None
        assert deciding.verdict is verdict


def test_kl_sets_the_exit_code_without_a_law(
    folders: Path,
    tmp_path: Path,
    found: Comparison,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comparing, "compare", lambda *_, **__: found)
    run = [*command(folders, tmp_path), "--json", "--fail-above-kl"]
    low, high = found.kl["kl_forward"].interval(len(PROMPTS), 0.9)
    for limit, code in ((2 * high, 0), (low / 2, 1), (found.kl["kl_forward"].mean, 3)):
        assert main([*run, str(limit)]) == code
        printed = json.loads(capfd.readouterr().out)
        assert printed["exit_code"] == code
        assert printed["interval"] == pytest.approx([low, high], rel=1e-3)
    with pytest.raises(SystemExit, match="2"):
        main([*run, "1", "--cautious", "--accept-uncertain"])


# --- the same model twice


@pytest.mark.parametrize("tuned", ["base", "zeros"])
def test_the_base_against_itself_is_everyones_first_check(
    folders: Path, tmp_path: Path, tuned: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(folders, tmp_path, tuned), "--fail-above-kl", "0", "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["same"] is True
    said = "The two are the same model: no weight has changed, and KL is 0 within the noise"
    assert said in (tmp_path / "page.html").read_text()
    assert any(said in line for line in printed["summary"])
    assert "there is nothing to judge" in printed["judgements"][0]["sentence"]
    assert printed["kl"]["kl_forward"]["mean"] < 1e-6
    assert (printed["weights"]["l2"], printed["weights"]["unchanged"]) == (0, 1)


def test_both_models_samples_are_drawn_alike_and_what_is_the_same_needs_no_evidence(folders: Path) -> None:
    pair = Pair(str(folders / "base"), str(folders / "base"))
    same = compare(pair, PROMPTS[:3], generic=GENERIC, settings=SETTINGS, law=None)
    assert all(one.base[0].tokens == one.tuned[0].tokens for one in same.prompts)
    few = with_truth(same, [1, 0], [1, 0], limit=2)
    assert few.same
    assert judgements(few, Limits(drop=0.0))[0].verdict is Verdict.WITHIN


# --- what can be said without a law


def test_the_noise_floor_is_the_base_against_itself(found: Comparison) -> None:
    assert found.distances.noise.prompts == scale.NOISE_PROMPTS
    assert 0 <= found.distances.noise.batch < 1e-6
    assert found.distances.noise.rounding is not None
    assert found.distances.noise.batch < found.distances.noise.rounding < 0.1
    assert found.distances.noise.other == "bfloat16"
    base = tiny_llama()
    sequences = kl.Sequences.grouped([[5, 6], [7]], [[3, 4, 5], [6]])
    rounding = scale.noise_of(base, kl.Probe(base, sequences)).rounding
    # Against the model in half precision, whose logits are exact: of one size.
    rounded = kl.forward_kl(kl.Probe(base, sequences), copy.deepcopy(base).to(torch.bfloat16).float())
    assert rounding is not None
    assert 0.05 < rounding / rounded.per_token.mean < 20
    # Autocast keeps no half-precision copy of the weights meanwhile.
    with scale._without_copies():
        assert not torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled()
    half = base.to(torch.bfloat16)
    assert scale.noise_of(half, kl.Probe(half, sequences)).rounding is None


def test_a_kl_is_set_beside_noise_and_known_runs(found: Comparison) -> None:
    noise = scale.Noise(1e-9, 1e-3, "bfloat16", 4)
    for value, said in (
        (1e-9, "is 0 within it"),
        (5e-4, "no more than such rounding"),
        (0.25, "is 250 times this floor"),
    ):
        sentence = scale.against_noise(MeanKL(value, 0.0), noise)
        assert said in sentence.partition("The forward KL per token, ")[2]
    known = scale.known_runs()
    assert len(known["checkpoints"]) >= 10
    assert known["command"].startswith("razor calibrate")
    rows = sorted(known["checkpoints"], key=lambda one: one["kl_forward"])
    inside = MeanKL((rows[3]["kl_forward"] + rows[4]["kl_forward"]) / 2, 0.0)
    sentence = scale.against_known({"kl_forward": inside, "kl_probe": MeanKL(1e3, 0.0)})
    between = f"{100 * rows[3]['drop']:.1f} and {100 * rows[4]['drop']:.1f} points"
    assert f"by forward KL per token, between checkpoints that had lost {between}" in sentence
    most = max(known["checkpoints"], key=lambda one: one["kl_probe"])
    assert f"by the generic probe's, above all of them; the last had lost {100 * most['drop']:.1f} points" in sentence
    assert "not a forecast" in sentence
    shown = comparison_page.sentences(found)
    assert [line.split()[0] for line in shown] == ["Noise", "Beside", "Half"]


def test_where_a_kl_lies() -> None:
    lengths = np.full(4, 20)
    beginning, everywhere = np.full(80, 0.01), np.full(80, 0.5)
    beginning.reshape(4, 20)[:, :3] = 2.0
    found = scale.focus_of(kl.Drift(beginning, lengths, np.arange(4)))
    assert (found.at_the_beginning, found.token_share) == (True, scale.FIRST / 20)
    assert found.kl_share == pytest.approx((3 * 2 + 2 * 0.01) / (3 * 2 + 17 * 0.01))
    assert "how answers begin has moved" in scale.where(found)
    even = scale.focus_of(kl.Drift(everywhere, lengths, np.arange(4)))
    assert (even.at_the_beginning, even.half_prompts) == (False, 2)
    assert even.kl_share == pytest.approx(0.25)
    one = scale.focus_of(kl.Drift(np.array([8.0, 1.0, 1.0, 1.0]), np.ones(4, int), np.arange(4)))
    assert (one.half_prompts, one.prompts) == (1, 4)
    assert "no completion is longer than 5 tokens" in scale.where(one)
    assert scale.where(scale.focus_of(kl.Drift(np.zeros(4), np.ones(4, int), np.arange(4)))) == "No prompt has moved."


def test_how_deep_a_kl_goes() -> None:
    """Per token over the first three tokens and over the rest, each prompt counting once; errors by a loop."""
    rng = np.random.default_rng(0)
    lengths, prompt_of = np.array([2, 7, 5, 9]), np.array([0, 0, 1, 2])
    rows = [rng.random(length) for length in lengths]
    found = scale.depth_of(kl.Drift(np.concatenate(rows), lengths, prompt_of), 3)
    assert found.rest is not None
    for part, cut in ((found.first, slice(0, 3)), (found.rest, slice(3, None))):
        sums, counts = (
            [np.mean([of(row[cut]) for row, at in zip(rows, prompt_of, strict=True) if at == p]) for p in range(3)]
            for of in (np.sum, len)
        )
        ratio = np.mean(sums) / np.mean(counts)
        spread = np.std(np.array(sums) - ratio * np.array(counts), ddof=1) / np.sqrt(3) / np.mean(counts)
        assert part == pytest.approx((ratio, spread))
    assert scale.depth_of(kl.Drift(np.ones(4), np.full(2, 2), np.arange(2)), 2).rest is None
    whole = kl.Drift(np.concatenate(rows), lengths, prompt_of)
    assert scale.focus_of(whole, 3).token_share == pytest.approx((2 + 3 + 3 + 3) / 23)


# --- what the user said


def test_moved_most_shows_what_the_user_said_last(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    system = {"role": "system", "content": "be good"}
    turns = [[system, {"role": "user", "content": f"ask {letter}"}] for letter in "abc"]
    turns[0] = [turns[0][0], {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, *turns[0][1:]]
    rng, model = torch.Generator().manual_seed(1), tiny_llama()
    saved(tmp_path / "base", model, tokenizer)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=rng)
    saved(tmp_path / "tuned", model, tokenizer)
    rows = [*({"prompt": one} for one in turns), {"prompt": "z" * 70}]  # the last does not fit into the context
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = ["compare", str(tmp_path / "base"), str(tmp_path / "tuned"), "--prompts", str(tmp_path / "prompts.jsonl")]
    run += ["--max-new-tokens", "4", "--out", str(tmp_path / "page.html")]
    assert main(run) == 0
    moved = capfd.readouterr().out.partition("Moved most")[2].splitlines()[1:4]
    assert sorted(line.split("%")[1].strip() for line in moved) == ["ask a", "ask b", "ask c"]
    page = (tmp_path / "page.html").read_text()
    assert page.count('<div class="text">ask ') == 3
    assert page.count("system: be good\nuser: ") >= 3  # the whole, folded away


def test_the_last_thing_said() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "old"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "so"},
    ]
    assert last_said("as it is") == "as it is"
    assert last_said(turns) == "ab"
    assert last_said({"prompt": turns, "tools": []}) == "ab"
    assert last_said([{"role": "system", "content": "only"}]) == "only"


def test_lines_that_begin_alike_are_shown_where_they_differ() -> None:
    def lines(*texts: str) -> list[str]:
        return comparison_page.told_apart([PromptDrift(text, 1.0, (), (), text) for text in texts])

    opening = "You are a helpful assistant and answer briefly. The question is:"
    assert lines(f"{opening} why", f"{opening} who", f"{opening} where") == ["… why", "… who", "… where"]
    assert lines("a b c", "a b d") == ["a b c", "a b d"]
    ending = "Answer with the letter of one of the choices."
    assert lines(f"{opening} why? {ending}", f"{opening} who? {ending}") == ["… why? …", "… who? …"]
    assert lines(f"a {ending}", f"b {ending}", "c") == [f"a {ending}", f"b {ending}", "c"]
    assert lines(opening, opening) == [opening, opening]


# --- the page


def test_shades_are_the_same_on_every_page(found: Comparison, tmp_path: Path) -> None:
    def page(kl: float) -> str:
        prompt = replace(found.prompts[0], base=(Completion(("word",), (kl,)),))
        return comparison_page.write_page(replace(found, prompts=[prompt]), tmp_path / "page.html").read_text()

    def shade_of(text: str) -> float:
        return float(re.search(r"--kl: ([0-9.]+)\" title=\"[0-9.]+ nats\">word", text)[1])  # type: ignore[index]

    mild, ruined, beyond = (shade_of(page(kl)) for kl in (0.01, 3.0, 100.0))
    assert mild < 0.1 < 0.6 < ruined < beyond == comparison_page.DARKEST
    assert "≥ 4</span>" in page(0.01)


def test_a_histogram_counts_every_prompt() -> None:
    values = [0.0, 1e-5, 1e-4, 0.2, 0.25, 5.0, 100.0, 1e6]
    bars = comparison_page.histogram(values)
    assert sum(bar.count for bar in bars) == len(values)
    for bar in bars:
        assert bar.count == sum(bar.low <= value < bar.high for value in values)
    assert (bars[0].low, bars[-1].high, len(bars)) == (0, math.inf, 14)


def test_the_page_and_json_say_how_it_was_measured(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(folders, tmp_path), "--json", "--stop", "<x>", "--level", "0.8"]) == 0
    printed = json.loads(capfd.readouterr().out)
    settings = printed["settings"]
    assert settings["probe"] == {
        "max_new_tokens": 6, "samples": 1, "stop": ["<x>"], "chat": False, "precision": "float32"
    }  # fmt: skip
    assert (settings["prompts"], settings["measured"], settings["level"]) == (24, 24, 0.8)
    assert settings["prompts_hash"] == content_hash(PROMPTS)
    assert settings["sources"]["prompts"] == str(folders / "prompts.txt")
    assert settings["sources"]["command"].startswith("razor compare ")
    assert settings["versions"]["torch"] == torch.__version__
    assert re.match(r"\d{4}-\d\d-\d\dT", settings["date"])
    worst = printed["prompts"][0]
    assert worst["said"] == worst["prompt"] in PROMPTS
    assert 0 <= worst["first_share"] <= 1
    depth = printed["depth"]
    assert depth["tokens"] == 5
    for name in ("kl_forward", "kl_reverse", "kl_probe"):
        ends = sorted([depth[name]["first"]["mean"], depth[name]["rest"]["mean"]])
        assert ends[0] <= printed["per_token"][name]["mean"] <= ends[1]
    page = (tmp_path / "page.html").read_text()
    for text in (
        settings["prompts_hash"], settings["date"], "at most 6 tokens", "&#39;&lt;x&gt;&#39;", "not used", "float32",
        "80%", f"torch {torch.__version__}", str(folders / "prompts.txt"), "--max-new-tokens 6",
    ):  # fmt: skip
        assert text in page
    assert page.count("<svg") == 2
    assert page.count("<rect") == 14 + len(printed["layers"])
    assert "<script" not in page


def test_names_are_escaped_on_the_page(found: Comparison, tmp_path: Path) -> None:
    evil = "<b>&\"'"
    sources = {"prompts": evil, "command": evil}
    layer = replace(found.weights.layers[0], name=evil)
    hostile = replace(
        found,
        pair=replace(found.pair, base=evil, tuned=evil),
        notes=[evil],
        weights=replace(found.weights, layers=[layer]),
        setup=replace(found.setup, sources=sources),
    )
    page = comparison_page.write_page(hostile, tmp_path / "page.html").read_text()
    assert "<b>" not in page
