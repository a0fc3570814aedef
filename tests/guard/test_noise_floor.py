"""The noise floor of prior scores: measured by other ways of computing, cached, and shown beside every drop."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hellaswag import write_mirror
from laws import GENERIC, PROMPTS, SETTINGS
from own_tasks import SCORES, metric, own_task
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.guard import compare as comparing
from rlrazor.guard import comparison_page
from rlrazor.guard.compare import compare, steps
from rlrazor.guard.comparison import Pair
from rlrazor.guard.truth import truth_of
from rlrazor.lm import noise_floor
from rlrazor.lm.noise_floor import NoiseFloor, OfTask
from rlrazor.lm.prior import BATCH, PriorTasks
from rlrazor.lm.scores import ItemResults, NotANumberError, PriorScores, Score
from tiny_models import char_tokenizer, saved, tiny_llama

ITEMS = {"a": {f"{at}-h": float(at < 6) for at in range(10)}}


def score(lost: int = 0, gained: int = 0, **named: Any) -> Score:
    """Of ten items six are right; of those some are lost, of the others some gained."""
    items = {name: float(lost <= at < 6 or 6 <= at < 6 + gained) for at, name in enumerate(ITEMS["a"])}
    return Score(sum(items.values()) / 10, 0.1, 10, "acc", "1", items=ItemResults({"a": items}), **named)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("tuned", 1)):
        saved(root / name, tiny_llama(seed=seed, max_position_embeddings=256), char_tokenizer())
    write_mirror(root)
    (root / "prompts.txt").write_text("\n".join(map(str, PROMPTS)))
    return root


def scoring(monkeypatch: pytest.MonkeyPatch, *, examples: bool, coarse: bool = False) -> list[tuple[str, int, int]]:
    """Scores by how they were computed; what was asked for: the precision, the batch and the seed of examples."""
    asked: list[tuple[str, int, int]] = []

    def scores(tasks: PriorTasks, lm: Any, told: Any, *, batch: int = BATCH, examples_seed: int = 1234) -> PriorScores:
        precision = str(next(lm.model.parameters()).dtype).removeprefix("torch.")
        asked.append((precision, batch, examples_seed))
        told("a (1 of 1)")
        if precision == "bfloat16" and coarse:
            raise NotANumberError("no number")
        changed = (precision == "bfloat16") * 1, (batch != BATCH) * 2 + (examples_seed != 1234) * 3
        return PriorScores({"a": score(*changed)})

    monkeypatch.setattr(PriorTasks, "scores", scores)
    monkeypatch.setattr(PriorTasks, "shows_examples", lambda tasks: examples)
    return asked


def measured(folders: Path, cache: Path | None, *, asked: bool) -> Any:
    pair = Pair(str(folders / "base"), str(folders / "tuned"), cache_dir=cache, noise_floor=asked)
    return compare(pair, PROMPTS, generic=GENERIC, settings=SETTINGS, suite=PriorTasks(["a"]))


def test_it_is_the_base_computed_otherwise_and_measured_once(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scoring(monkeypatch, examples=True)
    assert measured(folders, tmp_path, asked=False).truth.floor is None
    asked.clear()
    found = measured(folders, tmp_path, asked=True)
    assert asked == [
        ("float32", BATCH, 1234),  # the base,
        ("float32", BATCH // 2, 1234),
        ("float32", BATCH, 4321),
        ("bfloat16", BATCH, 1234),
        ("float32", BATCH, 1234),  # and the tuned model
    ]
    variants = found.truth.floor.variants
    assert {name: (of["a"].lost, of["a"].gained) for name, of in variants.items()} == {
        "in batches of 4": (0, 2),
        "with other examples in the prompts": (0, 3),
        "in bfloat16": (1, 0),
    }
    assert found.truth.floor.of_task("a") == pytest.approx(0.3)
    assert found.truth.mean_floor == pytest.approx(0.3)
    # From now on it is there, whether it is asked for or not.
    for again in (False, True):
        asked.clear()
        assert measured(folders, tmp_path, asked=again).truth.floor == found.truth.floor
        assert len(asked) == 2
    (path,) = tmp_path.glob("floor-*.json")
    path.write_text("{}")  # a damaged one is not
    assert measured(folders, tmp_path, asked=False).truth.floor is None
    assert measured(folders, None, asked=False).truth.floor is None


def test_where_nothing_shows_examples_or_a_precision_is_too_coarse_there_is_less(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring(monkeypatch, examples=False, coarse=True)
    assert list(measured(folders, None, asked=True).truth.floor.variants) == ["in batches of 4"]


def test_it_is_of_these_very_items_and_of_this_base(tmp_path: Path) -> None:
    def path(digest: str = "d", dtype: str = "float32", **named: Any) -> Path | None:
        return noise_floor.path_of(tmp_path, digest, dtype, PriorScores({"a": replace(score(), **named)}))

    other = {"a": {**ITEMS["a"], "10-h": 1.0}}
    paths = {
        path(),
        path("e"),
        path(dtype="bfloat16"),
        path(items=ItemResults(other)),
        path(version="2"),
        path(metric="acc_norm"),
    }
    assert len(paths) == 6
    assert path() == path(value=0.1)  # whatever the base scored


def test_a_drop_of_what_less_is_better_is_a_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    own, again = (score(gained=more, higher_is_better=False) for more in (0, 2))
    found = noise_floor._of_tasks(PriorScores({"a": own}), PriorScores({"a": again}))
    assert found["a"].drop == pytest.approx(0.2)
    assert (found["a"].lost, found["a"].gained) == (2, 0)
    unknown = PriorScores({"p": Score(10.0, None, 5, "perplexity", "1", higher_is_better=False)})
    (one,) = noise_floor._of_tasks(unknown, unknown).values()
    assert (one.drop, one.lost, one.gained) == (0.0, None, None)


def test_it_is_shown_beside_every_drop(folders: Path, tmp_path: Path) -> None:
    found = compare(Pair(str(folders / "base"), str(folders / "tuned")), PROMPTS, generic=GENERIC, settings=SETTINGS)
    rate = Score(12.0, None, 5, "perplexity", "1", higher_is_better=False)
    floor = NoiseFloor(
        variants={
            "in batches of 4": {
                "a": OfTask(drop=-0.02, lost=0, gained=1),
                "p": OfTask(drop=0.5, lost=None, gained=None),
            },
            "in bfloat16": {"a": OfTask(drop=0.01, lost=1, gained=0), "p": OfTask(drop=0.25, lost=None, gained=None)},
        }
    )
    truth = truth_of({"a": score(), "p": rate}, {"a": score(3), "p": rate}, 0.9, None)
    assert "noise floor" not in comparison_page.verdict(replace(found, truth=truth))
    with_floor = replace(truth, floor=floor)
    shown = replace(found, truth=with_floor, notes=with_floor.notes)
    assert "noise floor 2.0 points" in comparison_page.verdict(shown)
    page = comparison_page.write_page(shown, tmp_path / "page.html").read_text()
    for cell in ("<th>noise floor</th>", "<td>2.0 points</td></tr>", "<td>0.5</td></tr>"):
        assert cell in page
    assert "when it is computed in batches of 4, or in bfloat16." in page


def test_the_command_measures_it(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With lm-eval itself; a second time it is not measured again."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("rlrazor.lm.probes.default_cache", lambda: tmp_path / "cache")
    command = ["compare", str(folders / "base"), str(folders / "tuned"), "--prompts", str(folders / "prompts.txt")]
    command += ["--max-new-tokens", "4", "--no-chat", "--out", str(tmp_path / "page.html"), "--json"]
    with_prior = [*command, "--prior", "hellaswag", "--data-mirror", str(folders)]
    assert main([*with_prior, "--noise-floor"]) == 0
    found = json.loads(capfd.readouterr().out)["truth"]["noise_floor"]
    assert set(found["variants"]) == {"in batches of 4", "in bfloat16"}  # hellaswag shows no examples
    assert found["of_mean"] >= 0
    monkeypatch.setattr(noise_floor, "load", lambda *_, **__: pytest.fail("measured again"))
    assert main(with_prior) == 0
    assert json.loads(capfd.readouterr().out)["truth"]["noise_floor"] == found
    assert main([*command, "--noise-floor"]) == 2
    assert "name them with --prior" in capfd.readouterr().err


def test_a_task_that_draws_its_examples_is_known(tmp_path: Path) -> None:
    for name, count in (("none", 0), ("two", 2)):
        task = own_task(tmp_path, metric("rate", "true"), name, code=SCORES + "{'rate': 0.5}")
        path = Path(task)
        path.write_text(path.read_text() + f"\nnum_fewshot: {count}\nfewshot_split: test\n")
        assert PriorTasks([task]).shows_examples() is (count > 0)


def test_the_progress_counts_it() -> None:
    suite = PriorTasks(["a", "b"])
    assert steps(suite, noise_floor=True) == steps(suite) + 2 * noise_floor.VARIANTS
    assert steps(None, noise_floor=True) == comparing.STEPS
    with pytest.raises(RazorError):
        PriorTasks([]).shows_examples()
