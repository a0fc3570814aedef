"""Format, recoverable or lost: models of known truth are told apart, and what training copies of them does."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import numbers_task
from rlrazor.analysis.drop_parts import FORMAT, LOST, RECOVERABLE
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.guard import compare as comparing
from rlrazor.guard import measuring
from rlrazor.guard import recover as recovering
from rlrazor.guard.compare import compare
from rlrazor.guard.comparison import Pair
from rlrazor.guard.measuring import ReadBase
from rlrazor.guard.parts import headers, notes_of, parts_of
from rlrazor.guard.recover import LEARNING_RATES, Recovered, RecoverySet, Trained, _Copy, _trained, recover
from rlrazor.guard.recovery import Recovery
from rlrazor.lm.harness.demonstrations import Demonstration
from rlrazor.lm.models import LanguageModel, Vocabulary, add_lora, load
from rlrazor.lm.prior import PriorTasks
from rlrazor.lm.scores import ItemResults, PriorScores, Score
from tiny_models import alive_at_loads, noisy, saved, tiny_llama

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval's own libraries

TOKENIZER = numbers_task.TOKENIZER
STEPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and what it may have become; the task beside them."""
    root = tmp_path_factory.mktemp("known")
    base = numbers_task.knowing()
    saved(root / "base", base, TOKENIZER)
    saved(root / "template", numbers_task.taught(base, lambda n: f" it is {n}", 60, 3e-3), TOKENIZER)
    saved(root / "silent", numbers_task.taught(base, lambda n: " no", 24, 1e-3), TOKENIZER)
    saved(root / "noisy", noisy(base, 0.1), TOKENIZER)
    numbers_task.task(root)
    (root / "prompts.txt").write_text("\n".join(f"z{n}:" for n in range(20)))
    return root


@pytest.fixture(scope="module")
def suite(folder: Path) -> PriorTasks:
    return PriorTasks([str(folder / "numbers.yaml")], limit=numbers_task.SCORED)


@pytest.fixture(scope="module")
def before(folder: Path, suite: PriorTasks) -> PriorScores:
    return suite.scores(load(folder / "base"))


def read_of(folder: Path) -> ReadBase:
    """The base as recovery needs it, without its probes."""
    lm = load(folder / "base")
    side: Any = None
    return ReadBase(str(folder / "base"), "float32", "", lm.tokenizer, Vocabulary.of(lm), side)


@pytest.mark.parametrize(("tuned", "mainly"), [("template", FORMAT), ("silent", RECOVERABLE), ("noisy", LOST)])
def test_models_of_known_truth_are_told_apart(
    folder: Path, suite: PriorTasks, before: PriorScores, tuned: str, mainly: str
) -> None:
    """In another template; saying no, until it is shown how to answer again; with noise in its weights."""
    (task,) = before
    assert before[task].value > 0.9
    examples = RecoverySet.of(suite, 0)
    found = recover(read_of(folder), str(folder / tuned), suite, Recovery(STEPS, 1e-3), examples, lambda _: None)
    after = suite.scores(load(folder / tuned))
    (parts,) = parts_of(before, after, found, 0.9).values()
    assert parts.drop.value > 0.5
    assert parts.mainly == mainly
    told = {FORMAT: parts.format, RECOVERABLE: parts.recoverable, LOST: parts.lost}[mainly]
    assert told is not None
    assert told.value > 0.7 * parts.drop.value
    # Without recovery only the format is told apart.
    (short,) = parts_of(before, after, None, 0.9).values()
    assert short.format == parts.format
    assert (short.recoverable, short.lost) == (None, None)


def recovered(folder: Path, suite: PriorTasks, tuned: Path, **settings: Any) -> Recovered:
    wanted = Recovery(**{"steps": 1, "lr": 1e-4} | settings)
    return recover(read_of(folder), str(tuned), suite, wanted, RecoverySet.of(suite, wanted.seed), lambda _: None)


def test_the_same_seed_gives_the_same_and_another_other_items(folder: Path, suite: PriorTasks) -> None:
    examples, again, other = (RecoverySet.of(suite, seed) for seed in (0, 0, 1))
    assert examples == again
    assert {one.context for one in examples.trained} != {one.context for one in other.trained}
    one, two = (_trained(load(folder / "base"), examples, Recovery(2, 1e-3), 1e-3) for _ in range(2))
    assert one.loss == two.loss
    assert all(torch.equal(a, b) for a, b in zip(one.lm.model.parameters(), two.lm.model.parameters(), strict=True))


def test_no_item_that_is_scored_or_judges_the_learning_rate_is_trained_on(suite: PriorTasks, folder: Path) -> None:
    rows = [json.loads(line)["q"] for line in (folder / "numbers.jsonl").read_text().splitlines()]
    examples = RecoverySet.of(suite, 0)
    trained, other = ({one.context for one in of} for of in (examples.trained, examples.other))
    assert len(trained) == len(other) == (len(rows) - numbers_task.SCORED) // 2 == 18
    assert trained | other == set(rows[numbers_task.SCORED :])
    assert all(one.answer == f" {str(one.context)[1:-1]}" and one.ends for one in examples.trained)
    assert examples.notes == ["Recovery trained on 18 items, as there are no more that are not scored."]


def test_a_step_is_adams_on_the_mean_over_items_of_the_loss_per_token() -> None:
    """Against gradients of log-probabilities written out; Adam's first step is lr g / (|g| + eps)."""
    model, reference = (tiny_llama() for _ in range(2))
    asked = [Demonstration("t", "ab:", " cd", ends=True), Demonstration("t", "b", "=e", ends=False)]
    examples = RecoverySet(asked, asked, {"t": 2})
    copy = _trained(LanguageModel(model, TOKENIZER, "it", str), examples, Recovery(1, 1e-3), 1e-3)
    losses = []
    for one in asked:
        ids, begins = TOKENIZER.encode(f"{one.context}{one.answer}" + ";" * one.ends), len(one.context)
        logp_TV = reference(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        logps = torch.stack([logp_TV[at - 1, ids[at]] for at in range(begins, len(ids))])
        losses.append(-logps.mean())
    loss = torch.stack(losses).mean()
    assert copy.loss[0] == pytest.approx(float(loss), rel=1e-5)
    loss.backward()
    for trained, before in zip(model.parameters(), reference.parameters(), strict=True):
        assert before.grad is not None
        moved = 1e-3 * before.grad / (before.grad.abs() + 1e-8)
        large = before.grad.abs() > 1e-5  # of others the sign is rounding
        assert torch.allclose(trained[large], (before - moved)[large], atol=1e-6)
    assert (copy.parameters, copy.bytes) == (model.num_parameters(), 16 * model.num_parameters())


def test_the_learning_rate_is_the_largest_that_does_the_base_no_harm(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """By what becomes of the loss on items that are not trained on; the smallest where all do harm."""

    def chosen(harmless: float) -> tuple[float, dict[float, float]]:
        def trained(lm: Any, examples: Any, settings: Any, lr: float, *, may_diverge: bool) -> Any:
            assert may_diverge == (lr != LEARNING_RATES[-1])
            return _Copy(lm, lr, (1.0, 0.5), (1.0, 0.9 if lr <= harmless else 1.1), 1, 1)

        monkeypatch.setattr(recovering, "_opened", lambda *_: None)
        monkeypatch.setattr(recovering, "_trained", trained)
        ladder: dict[float, float] = {}
        examples: Any = None
        return recovering._control(read_of(folder), Recovery(3), "float32", examples, ladder, lambda _: None).lr, ladder

    assert chosen(1.0) == (LEARNING_RATES[0], {LEARNING_RATES[0]: 0.9})
    lr, ladder = chosen(2e-4)
    assert (lr, list(ladder.values())) == (1e-4, [1.1, 1.1, 1.1, 0.9])
    assert chosen(0.0)[0] == LEARNING_RATES[-1]
    assert list(LEARNING_RATES) == sorted(LEARNING_RATES, reverse=True)


def test_a_lora_alone_is_trained_with_a_rank(folder: Path, suite: PriorTasks) -> None:
    base = load(folder / "base")
    before = {name: weight.clone() for name, weight in base.model.named_parameters()}
    copy = _trained(base, RecoverySet.of(suite, 0), Recovery(2, 1e-2, rank=2), 1e-2)
    inner = copy.lm.model.get_base_model()
    kept = {name.replace(".base_layer", ""): weight for name, weight in inner.named_parameters()}
    assert all(torch.equal(weight, kept[name]) for name, weight in before.items())
    linear = [m for m in base.model.modules() if isinstance(m, torch.nn.Linear) and m.out_features != len(TOKENIZER)]
    layers = [one for one in linear if 2 not in (one.in_features, one.out_features)]  # not the LoRA's own
    assert copy.parameters == sum(2 * (one.in_features + one.out_features) for one in layers)
    assert copy.loss[1] < copy.loss[0]


def test_a_copy_that_diverges_is_an_error_whatever_chose_its_learning_rate(folder: Path, suite: PriorTasks) -> None:
    examples, settings = RecoverySet.of(suite, 0), Recovery(3)
    with pytest.raises(RazorError, match=r"diverges at a learning rate of 1e\+30"):
        _trained(load(folder / "base"), examples, settings, 1e30)
    assert _trained(load(folder / "base"), examples, settings, 1e30, may_diverge=True).other_loss[1] == math.inf


def test_of_an_adapter_the_merged_weights_are_trained(folder: Path, suite: PriorTasks, tmp_path: Path) -> None:
    adapted = add_lora(load(folder / "base").model, 2)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_B." in name:
                weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    adapted.save_pretrained(tmp_path)
    opened = recovering._opened(read_of(folder), str(tmp_path), "float32")
    ids = torch.tensor([TOKENIZER.encode("q47: 47")])
    with torch.no_grad():
        assert torch.allclose(opened.model(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-4)
    assert opened.model.num_parameters() == load(folder / "base").model.num_parameters()
    assert recovered(folder, suite, tmp_path, rank=2).tuned.loss[0] > 0


def test_one_model_is_in_memory_at_a_time(folder: Path, suite: PriorTasks, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the copies alive whenever another model is loaded; the learning rate's trials are copies too."""
    read, counts = read_of(folder), alive_at_loads(monkeypatch, recovering, measuring)
    monkeypatch.setattr(recovering, "LEARNING_RATES", (1e30, 1e-4))
    found = recover(read, str(folder / "noisy"), suite, Recovery(1), RecoverySet.of(suite, 0), lambda _: None)
    assert counts == [0, 0, 0]
    assert found.ladder[1e30] == math.inf
    assert found.base.lr == found.tuned.lr == 1e-4


def test_where_nothing_else_can_be_trained_on_it_is_said_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "load", lambda *_, **__: pytest.fail("loaded"))
    pair = Pair(str(folder / "base"), str(folder / "noisy"), recovery=Recovery(2))
    whole = PriorTasks([str(folder / "numbers.yaml")])  # every row is scored
    with pytest.raises(RazorError, match=r"nothing to train on: .*numbers\.yaml has no two items .*--prior-limit"):
        compare(pair, ["z1:"], suite=whole)
    with pytest.raises(RazorError, match="name them with --prior"):
        compare(pair, ["z1:"])


def test_training_that_diverges_is_said(folder: Path, suite: PriorTasks) -> None:
    with pytest.raises(RazorError, match=r"diverges at a learning rate of 1e[+]30: give a smaller --recover-lr"):
        recovered(folder, suite, folder / "noisy", lr=1e30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recover", "3"], "--recover is of the prior tasks: name them with --prior."),
        (["--recover", "3", "--prior", "none"], "--recover is of the prior tasks: name them with --prior."),
        (["--recover-lr", "1e-3", "--prior", "x"], "--recover-lr says how --recover trains: give --recover N as well."),
        (["--recover", "-1", "--prior", "x"], "--recover must be at least 1, not -1."),
        (["--recover", "3", "--recover-lr", "0", "--prior", "x"], "--recover-lr must be more than 0, not 0."),
        (["--recover", "3", "--recover-rank", "-1", "--prior", "x"], "--recover-rank must be at least 0, not -1."),
        (["--first-tokens", "0"], "--first-tokens must be at least 1, not 0."),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "base", "tuned", "--prompts", "here", *options]) == 2
    assert message in " ".join(capfd.readouterr().err.split())


def test_the_parts_are_printed_and_on_the_page(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[Any] = []

    def once(*arguments: Any, **named: Any) -> Any:
        known[:] = known or [compare(*arguments, **named)]
        return known[0]

    monkeypatch.setattr(comparing, "compare", once)
    command = ["compare", str(folder / "base"), str(folder / "template"), "--prompts", str(folder / "prompts.txt")]
    command += ["--no-chat", "--max-new-tokens", "4", "--out", str(tmp_path / "page.html"), "--first-tokens", "2"]
    command += ["--prior", str(folder / "numbers.yaml"), "--prior-limit", str(numbers_task.SCORED)]
    command += ["--recover", "2", "--recover-lr", "1e-4"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    (parts,) = told["truth"]["parts"].values()
    assert parts["mainly"] == FORMAT
    assert parts["drop"]["value"] == pytest.approx(sum(parts[name]["value"] for name in (FORMAT, RECOVERABLE, LOST)))
    recovery = told["truth"]["recovery"]
    assert (recovery["steps"], recovery["lr"], recovery["rank"], recovery["tried"]) == (2, 1e-4, 0, [])
    assert told["depth"]["tokens"] == 2
    page = (tmp_path / "page.html").read_text()
    assert "<h3>Capability or format?</h3>" in page
    assert "<td>format</td>" in page
    assert f"The drop on {folder / 'numbers.yaml'} is mainly format." in told["summary"][0]
    assert "first 2 tokens" in page
    assert any(note.startswith("Recovery: 2 steps on 18 prior items") for note in told["notes"])
    assert main(command) == 0
    printed = " ".join(capfd.readouterr().out.split())
    assert "points of the drop n drop format recoverable lost" in printed
    assert "first 2 tokens" in printed
    assert headers(recovered=False)[3:] == ("format", "not format", "mainly")


def score(items: dict[str, float]) -> Score:
    return Score(sum(items.values()) / len(items), 0.1, len(items), "acc", "1", items=ItemResults({"a": items}))


def trained(scores: dict[str, Score]) -> Trained:
    return Trained(1e-3, (1.0, 0.5), (1.0, 0.9), 10, 160, PriorScores(scores))


def test_what_cannot_be_told_apart_is_said() -> None:
    """A score of a whole corpus, one that is no fraction, and one whose items changed."""
    items = {f"{at}-h": 1.0 for at in range(4)}
    corpus, other = Score(0.5, None, 4, "acc", "1"), score({f"{at}-k": 1.0 for at in range(4)})
    unlike = replace(score(items), metric="word_perplexity")
    base = {"good": score(items), "corpus": corpus, "unlike": unlike, "moved": score(items)}
    tuned = {**base, "moved": other}
    found = Recovered(Recovery(2), {"good": 3}, {}, trained(base), trained(tuned))
    parts = parts_of(base, tuned, found, 0.9)
    assert list(parts) == ["good"]
    assert any(note.startswith("Of corpus, unlike, moved it is not told") for note in notes_of(parts, base, found))
    assert parts_of(base, tuned, None, 0.9) == {}  # nothing is generated, and nothing was trained


def test_harm_to_the_base_is_said_and_not_taken_off() -> None:
    right, wrong = ({f"{at}-h": value for at in range(40)} for value in (1.0, 0.0))
    base, tuned = {"a": score(right)}, {"a": score(wrong)}
    found = Recovered(Recovery(2), {"a": 3}, {}, trained(tuned), trained(tuned))
    parts = parts_of(base, tuned, found, 0.9)
    assert parts["a"].mainly == LOST
    assert any("steps cost the base 100.0 points on a" in note for note in notes_of(parts, base, found))


def test_where_less_is_better_a_drop_is_a_rise() -> None:
    low, high = ({f"{at}-h": value for at in range(40)} for value in (0.0, 1.0))
    base, tuned = ({"a": replace(score(of), metric="error", higher_is_better=False)} for of in (low, high))
    parts = parts_of(base, tuned, Recovered(Recovery(2), {"a": 3}, {}, trained(base), trained(base)), 0.9)
    assert parts["a"].drop.value == 1
    assert parts["a"].mainly == RECOVERABLE
