"""An unrelated task that obeys the law, departs from it by method or learning rate, or is never forgotten."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import optimize, stats

from rlrazor.analysis import law
from rlrazor.report import drawing
from rlrazor.report.drawing import Curve
from rlrazor.report.study import Study
from rlrazor.studies.unrelated_prior import departures, section, tasks_of
from study_tables import T_THREE_SEEDS, cells, check, run, study_of

LABELS = {"sft-1": "SFT-1", "sft-2": "SFT-2", "oracle": "oracle SFT", "grpo": "GRPO"}
FARTHEST = {"sft-1": 6.0, "sft-2": 3.0, "oracle": 0.4, "grpo": 1.5}  # nats
LRS = (1e-4, 1e-3)
BASE_DOTS, BASE_FASHION = 0.9, 0.75

Beyond = Callable[[str, float], float]


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bootstrap intervals are tested with the laws; here they would take most of the time."""
    whole = law.summarise
    monkeypatch.setattr(
        "rlrazor.studies.unrelated_prior.law.summarise",
        lambda *of, **with_: whole(*of, **{**with_, "samples": 0}),
    )


def forgotten(kl: float) -> float:
    """A monotone law."""
    return float(0.5 * -np.expm1(-0.7 * kl))


def study(
    dots: Callable[[float], float] = forgotten,
    beyond: Beyond = lambda method, lr: 0.0,
    seeds: int = 3,
    methods: tuple[str, ...] = tuple(FARTHEST),
    noise: float = 0.004,
    lrs: tuple[float, ...] = LRS,
) -> Study:
    """FashionMNIST obeys the law; dots are forgotten by `dots` of the KL, and `beyond` by method and learning rate."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for method in methods:
        for seed in range(seeds):
            for lr in lrs:
                for row in run(method, seed, lr=lr, news=(0.92, 0.93, 0.94, 0.95, 0.96)):
                    kl = FARTHEST[method] * row["epoch"] * (1 if lr > 1e-4 else 0.5)
                    lost = dots(kl) + beyond(method, lr) + noise * float(rng.normal())
                    row |= {"kl_forward": kl, "weight_l2": lost + 0.2}
                    row["prior_fashion_mnist"] = (
                        BASE_FASHION + 0.01 * seed - forgotten(kl) - noise * float(rng.normal())
                    )
                    row["prior_dots"] = BASE_DOTS - 0.01 * seed - lost
                    rows.append(row)
    plain = study_of("unrelated-prior", rows)
    of_seed = 0.01 * pl.col("seed")
    bases = {"prior_fashion_mnist": BASE_FASHION + of_seed, "prior_dots": BASE_DOTS - of_seed}
    is_base = pl.col("method") == "base"
    own = (pl.when(is_base).then(value).otherwise(pl.col(name)).alias(name) for name, value in bases.items())
    table = plain.table.with_columns(own)
    return Study(plain.name, {"labels": LABELS}, table, law.distinct(table), table.filter(is_base))


def test_law_holds_for_both() -> None:
    found = section(study())
    check(found, "unrelated-prior")
    assert found.finding.startswith(
        "Forward KL on the new task still predicts the forgetting of dots by a method not in the fit: the monotone law"
    )
    assert ", a fit not to be told apart from that of FashionMNIST (R² 0.99" in found.finding
    assert "; no method or learning rate measurably breaks it;" in found.finding
    related, unrelated, explained = found.figure.panels
    assert (related.title, unrelated.title) == ("Forgetting of FashionMNIST", "Forgetting of dots")
    assert explained.title == "What explains forgetting?"
    assert related.y_range == unrelated.y_range
    [curve] = [layer for layer in unrelated.layers if isinstance(layer, Curve) and layer.label == "monotone law"]
    assert curve.y == pytest.approx([forgotten(max(kl, 0.0)) for kl in curve.x], abs=0.01)


def test_numbers_by_other_means() -> None:
    planted = study(beyond=lambda method, lr: 0.1 if method == "grpo" else 0.0)
    found = section(planted)
    rows = planted.points.to_dicts()
    x = np.array([row["kl_forward"] for row in rows])
    y = np.array([BASE_DOTS - 0.01 * row["seed"] - row["prior_dots"] for row in rows])
    r2 = 1 - np.var(y - np.polyval(np.polyfit(x, y, 2), x)) / np.var(y)
    laws, measures, beyond, ranges = (cells(table) for table in found.tables)
    base, mean, most, quadratic, _, monotone, _, spearman, half, error, monotone_error, guess = (
        row[1] for row in laws.values()
    )
    assert base == f"89.0 ± {T_THREE_SEEDS / 3**0.5:.1f}"
    assert mean.startswith(f"{100 * y.mean():.1f} ± ")
    highest = [max(value for value, row in zip(y, rows, strict=True) if row["seed"] == seed) for seed in range(3)]
    assert most.startswith(f"{100 * np.mean(highest):.1f} ± ")
    assert quadratic == f"{r2:.2f}"
    assert half == "{:.2f} to {:.2f}".format(*(tasks_of(planted)[1].half_lost()[end] for end in (0, -1)))
    assert float(spearman) == pytest.approx(stats.spearmanr(x, y).statistic, abs=0.005)
    method_of = np.array([row["method"] for row in rows])
    quadratic_errors, guesses = [], []
    for method in FARTHEST:
        out = method_of == method
        fitted = np.polyfit(x[~out], y[~out], 2)
        quadratic_errors.append(np.mean(np.abs(np.polyval(fitted, x[out]) - y[out])))
        guesses.append(np.mean(np.abs(y[~out].mean() - y[out])))
    assert error == f"{100 * np.mean(quadratic_errors):.1f}"
    assert guess == f"{100 * np.mean(guesses):.1f}"
    assert measures["forward KL"][3:] == [
        f"{quadratic} / {monotone}",
        spearman,
        monotone_error,
    ]
    assert list(beyond) == [*LABELS.values(), "learning rate 1.0e-04", "learning rate 1.0e-03"]
    within = x <= 1
    near = 1 - np.var(y[within] - np.polyval(np.polyfit(x[within], y[within], 2), x[within])) / np.var(y[within])
    assert ranges["≤ 1 nats"][0] == str(within.sum())
    assert ranges["≤ 1 nats"][2].startswith(f"{near:.2f} / ")
    assert list(ranges) == ["≤ 1 nats", "≤ 2 nats", "≤ 4 nats", "all"]


def test_departures_are_those_planted() -> None:
    planted = study(beyond=lambda method, lr: 0.1 if method == "grpo" else 0.0, noise=0.0)
    dots = planted.points.with_columns(forgetting=BASE_DOTS - 0.01 * pl.col("seed") - pl.col("prior_dots"))
    [grpo] = [one for one in departures(dots, "method", unseen=True) if one.name == "grpo"]
    assert grpo.excess.mean == pytest.approx(0.1, abs=0.002)
    assert grpo.excess.half == pytest.approx(0.0, abs=1e-6)
    # What a method adds at all learning rates is no learning rate's doing.
    assert [one.excess.mean for one in departures(dots, "lr", unseen=False)] == pytest.approx([0, 0], abs=0.01)


def test_half_is_lost_where_the_law_says() -> None:
    """Of 0.5 (1 - exp(-0.7 KL)), up to 6 nats, solved by bisection."""
    related, unrelated = tasks_of(study(dots=lambda kl: forgotten(5 * kl), seeds=2, noise=0.0))
    for task, scale in ((related, 1.0), (unrelated, 5.0)):
        half = optimize.brentq(lambda kl, scale=scale: forgotten(scale * kl) - forgotten(scale * 6) / 2, 0, 6)
        assert task.half_lost() == pytest.approx([half, half], rel=1e-3)
    assert "half of what is lost of dots is lost by 0.20 nats, of FashionMNIST by 0.97;" in (
        section(study(dots=lambda kl: forgotten(5 * kl), seeds=2, noise=0.0)).finding
    )


@pytest.mark.parametrize(
    ("beyond", "planted", "said"),
    [
        (
            lambda method, lr: 0.15 * (method == "grpo"),
            15,
            "breaks where within 2 nats GRPO forgets {} points more than the others’ law says; of",
        ),
        (
            lambda method, lr: -0.1 * (method == "sft-1"),
            10,
            "breaks where within 2 nats SFT-1 forgets {} points less than the others’ law says; of",
        ),
        (
            lambda method, lr: 0.2 * (lr > 1e-4),
            12,  # less than 20, since the law of all follows
            "runs at a learning rate of 1.0e-04 forget {} points less than the law of all says and",
        ),
    ],
    ids=["GRPO more", "SFT-1 less", "low learning rate less"],
)
def test_where_the_law_breaks(beyond: Beyond, planted: float, said: str) -> None:
    # Three learning rates: of two, both are as far from the law of all.
    found = section(study(beyond=beyond, lrs=(1e-4, 5e-4, 1e-3) if "learning rate" in said else LRS))
    check(found, "unrelated-prior")
    dots = cells(found.tables[2])
    sizes = {"GRPO": dots["GRPO"][3], "SFT-1": dots["SFT-1"][3], "1.0e-04": dots["learning rate 1.0e-04"][1]}
    [size] = [size[1:] for name, size in sizes.items() if f" {name} forget" in said]
    assert said.format(size) in found.finding
    assert abs(float(size.split(" ")[0]) - planted) < 2
    assert "a worse fit than that of FashionMNIST" in found.finding
    assert "weight L2 forecasts best" in found.finding


def test_law_does_not_hold() -> None:
    """What is forgotten falls with the KL: a law of other methods misleads."""
    finding = section(study(dots=lambda kl: 0.4 * np.exp(-2 * kl))).finding
    assert finding.startswith("Forward KL on the new task no longer predicts the forgetting of dots by a method not in")
    assert "a worse fit than that of FashionMNIST" in finding


def test_better_than_the_related_task() -> None:
    planted = study()
    swap = {"prior_dots": "prior_fashion_mnist", "prior_fashion_mnist": "prior_dots"}
    noisy = study(beyond=lambda method, lr: 0.2 * (lr > 1e-4))
    table = noisy.table.rename(swap)
    swapped = Study(
        planted.name, {"labels": LABELS}, table, law.distinct(table), table.filter(pl.col("method") == "base")
    )
    assert "a better fit than that of FashionMNIST" in section(swapped).finding


def test_hardly_forgotten() -> None:
    finding = section(study(dots=lambda kl: 0.001 * kl, noise=0.0)).finding
    assert finding == (
        "Dots are hardly forgotten at all, by 0.6 ± 0.0 points at most, so there is nothing for a law to predict "
        "(3 seeds)."
    )


def test_one_seed_and_one_method(tmp_path: Path) -> None:
    found = section(study(seeds=1))
    check(found, "unrelated-prior")
    assert "±" not in found.finding
    assert found.finding.endswith("(1 seed, which leaves it open).")
    drawing.save(found.figure, tmp_path)
    assert drawing.to_html(found.figure, with_library=False)
    alone = section(study(methods=("grpo",), seeds=2))
    check(alone, "unrelated-prior")
    assert "too few methods" in alone.finding


def test_missing_task() -> None:
    whole = study(seeds=2)
    for column, words in (
        ("prior_dots", "no prior task that is unrelated"),
        ("prior_fashion_mnist", "the forgetting of"),
    ):
        table, points, bases = (table.drop(column) for table in (whole.table, whole.points, whole.bases))
        found = section(Study(whole.name, whole.description, table, points, bases))
        check(found, "unrelated-prior")
        assert words in found.finding
        assert "FashionMNIST (R²" not in found.finding


def test_too_small_for_a_law() -> None:
    whole = study(seeds=1, methods=("grpo",))
    points = whole.points.head(3)
    found = section(Study(whole.name, whole.description, points, points, whole.bases))
    assert found.finding == "The study is too small to fit a law to the forgetting of dots."
    check(found, "unrelated-prior")
