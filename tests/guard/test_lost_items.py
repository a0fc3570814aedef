"""What compare says of items that were lost and gained: the counts, the ten lost most surely, the page and the JSON."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from laws import GENERIC, PROMPTS, SETTINGS
from rlrazor.analysis.lost import FEW_CLUSTERS, SHOWN, WITHIN_LUCK, Transitions
from rlrazor.analysis.paired import tango
from rlrazor.cli.compare_output import as_json, print_findings
from rlrazor.guard import comparison_page
from rlrazor.guard.compare import compare
from rlrazor.guard.comparison import Comparison, Pair
from rlrazor.guard.lost_items import MARGIN, ORDER, ItemChanges, in_turn, item_changes, shown_changes
from rlrazor.guard.truth import truth_of
from rlrazor.lm.scores import ItemResults, Question, Score
from tiny_models import char_tokenizer, saved, tiny_llama

Outcomes = dict[str, dict[str, float]]


def score(items: Outcomes, higher: bool = True, **results: Any) -> Score:
    """The mean of the outcomes."""
    every = [one for of in items.values() for one in of.values()]
    return Score(sum(every) / len(every), 0.01, len(every), "acc", "1", higher, ItemResults(items, **results))


def of(name: str, hits: str) -> Outcomes:
    return {name: {f"{at}-hash": float(hit) for at, hit in enumerate(hits)}}


def asked(items: Outcomes, tops: dict[str, float], right: int = 0) -> dict[str, dict[str, Question]]:
    """Two answers each; the right one's likelihood is as far above the other's as `tops` says, by item, or 1 nat."""
    return {
        task: {
            item: Question(f"what is {item}?", ("<b>yes</b>", "no"), (tops.get(item, 1.0), 0.0), (right,))
            for item in own
        }
        for task, own in items.items()
    }


def changes(base: Score, tuned: Score, level: float = 0.9) -> ItemChanges:
    found = item_changes(base, tuned, level)
    assert found is not None
    return found


def test_items_are_counted_whatever_their_order() -> None:
    before, after = of("a", "1111100000"), of("a", "1100011000")
    shuffled = {"a": dict(reversed(after["a"].items()))}
    whole = changes(score(before), score(shuffled)).whole
    assert (whole.n, whole.lost.count, whole.gained.count) == (10, 3, 2)
    assert whole.interval == pytest.approx(tango(3, 2, 10, 0.9))
    assert whole.lost.adjusted is None  # nothing is known of any choices


def test_a_score_of_which_less_is_better_is_lost_where_it_rises() -> None:
    base, tuned = (score(of("a", hits), higher=False) for hits in ("0000", "0111"))
    assert changes(base, tuned).whole.lost.count == 3


def test_what_is_no_right_or_wrong_has_no_items() -> None:
    masses = score({"a": {"0-x": 0.5, "1-x": 1.0}})
    assert item_changes(masses, masses, 0.9) is None
    assert item_changes(Score(0.5, 0.1, 3, "acc", "1"), Score(0.5, 0.1, 3, "acc", "1"), 0.9) is None
    truth = truth_of({"a": masses, "b": score(of("b", "10"))}, {"a": masses, "b": score(of("b", "00"))}, 0.9, None)
    assert list(truth.items) == ["b"]
    other = truth_of({"b": score(of("b", "10"))}, {"b": score(of("b", "101"))}, 0.9, None)
    assert other.items == {}  # other items: nothing is counted


def test_the_ten_whose_margin_fell_most_come_first() -> None:
    before, after = of("a", "1" * 14 + "0"), of("a", "0" * 14 + "1")
    falls = {f"{at}-hash": float(at % 7 + at / 100) for at in range(14)}
    base = score(before, questions=asked(before, dict.fromkeys(falls, 1.0)))
    tuned = score(after, questions=asked(after, {item: 1.0 - by for item, by in falls.items()}))
    found = changes(base, tuned)
    expected = sorted(falls, key=lambda item: -falls[item])[:SHOWN]
    assert [one.item for one in found.surest] == expected
    assert found.ranked == MARGIN
    first = found.surest[0]
    assert first.fall == pytest.approx(falls[expected[0]])
    assert (first.before, first.after) == ("<b>yes</b>", "no")
    plain = changes(score(before), score(after))
    assert [one.item for one in plain.surest] == list(falls)[:SHOWN]
    assert (plain.ranked, plain.surest[0].fall, plain.surest[0].before) == (ORDER, None, None)


def test_luck_is_taken_off_only_where_one_answer_of_several_is_right() -> None:
    before, after = of("a", "1110000000"), of("a", "1000000000")
    base, tuned = (score(items, questions=asked(items, {})) for items in (before, after))
    assert changes(base, tuned).whole.lost.adjusted == pytest.approx((2 - 7 / 1) / 10)
    assert WITHIN_LUCK in shown_changes(changes(base, tuned).whole)
    two = {"a": {item: replace(one, right=(0, 1)) for item, one in base.items.questions["a"].items()}}
    assert changes(replace(base, items=replace(base.items, questions=two)), tuned).whole.lost.adjusted is None


def test_a_group_is_told_by_category_and_clustered_by_task() -> None:
    tasks = [f"g_{at}" for at in range(2 * FEW_CLUSTERS)]
    before = {task: of(task, "1" * 10)[task] for task in tasks}
    after = {task: of(task, "0" * 10 if at % 4 == 0 else "1" * 10)[task] for at, task in enumerate(tasks)}
    categories = {task: "g_first" if at < FEW_CLUSTERS else "g_second" for at, task in enumerate(tasks)}
    found = changes(score(before, categories=categories), score(after, categories=categories))
    assert list(found.categories) == ["g_first", "g_second"]
    assert found.whole.clusters == 2 * FEW_CLUSTERS
    assert {one.clusters for one in found.categories.values()} == {FEW_CLUSTERS}
    assert [one.n for one in found.categories.values()] == [10 * FEW_CLUSTERS] * 2
    low, high = found.whole.interval
    alone = tango(40, 0, 160, 0.9)
    assert high - low > 2 * (alone[1] - alone[0])  # whole tasks are lost
    assert shown_changes(found.whole)[0] == f"{20 * FEW_CLUSTERS} ({2 * FEW_CLUSTERS})"
    assert changes(score(of("a", "10")), score(of("a", "00"))).categories == {}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    root = tmp_path_factory.mktemp("models")
    for name in ("base", "tuned"):
        saved(root / name, tiny_llama(), char_tokenizer())
    return compare(Pair(str(root / "base"), str(root / "tuned")), PROMPTS, generic=GENERIC, settings=SETTINGS)


def test_the_page_the_tables_and_the_json_have_it(
    compared: Comparison, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, after = of("a", "1111100000"), of("a", "1100011000")
    base = {"a": score(before, questions=asked(before, {})), "b": score(of("b", "1110"))}
    tuned = {"a": score(after, questions=asked(after, {"2-hash": -3.0, "3-hash": -1.0, "4-hash": -2.0}))}
    tuned["b"] = score(of("b", "0111"))
    found = replace(compared, truth=truth_of(base, tuned, 0.9, None))
    told = as_json(found)["truth"]["items"]
    assert (told["a"]["n"], told["a"]["lost"]["count"], told["a"]["gained"]["share"]) == (10, 3, pytest.approx(0.2))
    assert told["a"]["drop"] == pytest.approx(0.1)
    assert told["a"]["lost"]["adjusted"] == pytest.approx((3 - 3) / 10)
    assert told["a"]["p"] == pytest.approx(1.0)
    assert [one["item"] for one in told["a"]["lost_items"]] == ["2-hash", "4-hash", "3-hash"]
    assert (told["a"]["ranked_by"], told["b"]["ranked_by"]) == ("margin", "order")
    page = comparison_page.write_page(found, tmp_path / "page.html").read_text()
    cells = "".join(f"<td>{cell}</td>" for cell in shown_changes(found.truth.items["a"].whole))  # type: ignore[union-attr]
    assert f"<tr><th>a</th>{cells}</tr>" in page
    assert "what is 2-hash?" in page
    assert "&lt;b&gt;yes&lt;/b&gt;" in page
    assert "<b>yes</b>" not in page
    assert "b: 1 of 1 lost items, in the task’s order" in page
    print_findings(found, [])
    printed = " ".join(capfd.readouterr().out.split())
    assert "a: what is 2-hash? base '<b>yes</b>', tuned 'no'" in printed
    assert printed.index("what is 2-hash?") < printed.index("b: ") < printed.index("what is 4-hash?")
    assert "gained beyond" in printed


def test_tasks_take_turns_and_their_margins_are_not_compared() -> None:
    before, after = of("a", "111"), of("a", "000")
    far = changes(score(before, questions=asked(before, {})), score(after, questions=asked(after, {"0-hash": -90.0})))
    near = changes(score(of("b", "11")), score(of("b", "00")))
    assert [name for name, _ in in_turn({"a": far, "b": near}, 4)] == ["a", "b", "a", "b"]
    assert in_turn({}, 10) == []
    assert isinstance(far.whole, Transitions)
