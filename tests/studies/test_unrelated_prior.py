"""An unrelated task that obeys the law, departs from it by method or learning rate, or is never forgotten."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import optimize, stats

from rlrazor.analysis import law
from rlrazor.analysis.carry_over import beyond_all, beyond_others, departures, half_lost, per_seed
from rlrazor.report import drawing, keyed
from rlrazor.report.drawing import Curve
from rlrazor.report.study import Study
from rlrazor.studies.unrelated_prior import STUDY, tables_of, tasks_of
from study_tables import T_THREE_SEEDS, check, plus_minus, run, study_of

LABELS = {"sft-1": "SFT-1", "sft-2": "SFT-2", "oracle": "oracle SFT", "grpo": "GRPO"}
FARTHEST = {"sft-1": 6.0, "sft-2": 3.0, "oracle": 0.4, "grpo": 1.5}  # nats
PENALISED = {"grpo+kl": 1.0}
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
                    kl = {**FARTHEST, **PENALISED}[method] * row["epoch"] * (1 if lr > 1e-4 else 0.5)
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


def numbers_of(of: Study) -> dict[str, str]:
    return keyed.numbers_of(tables_of(of, tasks_of(of)))


def example() -> Study:
    """What the paper preset leaves, for the text."""
    return study(methods=(*FARTHEST, *PENALISED))


def test_law_holds_for_both() -> None:
    planted = study()
    found = numbers_of(planted)
    assert found["dots.forecast.verdict"] == found["fashion.forecast.verdict"] == "better"
    assert (found["dots.fit.verdict"], found["fashion.fit.verdict"]) == ("cannot be told", "—")
    assert {found[f"dots.{method}.verdict"] for method in FARTHEST} <= {"cannot be told", "forgets less"}
    section = STUDY.section(planted)
    check(section, "unrelated-prior")
    assert ": better: FashionMNIST (−" in section.finding
    related, unrelated, explained = section.figure.panels
    assert (related.title, unrelated.title) == ("Forgetting of FashionMNIST", "Forgetting of dots")
    assert explained.title == "What explains forgetting?"
    assert related.y.range == unrelated.y.range
    [curve] = [layer for layer in unrelated.layers if isinstance(layer, Curve) and layer.label == "monotone law"]
    assert curve.y == pytest.approx([forgotten(max(kl, 0.0)) for kl in curve.x], abs=0.01)


def test_numbers_by_other_means() -> None:
    planted = study(beyond=lambda method, lr: 0.1 if method == "grpo" else 0.0)
    rows = planted.points.to_dicts()
    x = np.array([row["kl_forward"] for row in rows])
    y = np.array([BASE_DOTS - 0.01 * row["seed"] - row["prior_dots"] for row in rows])
    seed, method_of = (np.array([row[name] for row in rows]) for name in ("seed", "method"))
    found = numbers_of(planted)
    assert found["base.dots"] == f"89.0 ± {T_THREE_SEEDS / 3**0.5:.1f}"
    assert found["mean.dots"] == plus_minus([y[seed == at].mean() for at in range(3)])
    assert found["most.dots"] == plus_minus([y[seed == at].max() for at in range(3)])
    r2 = 1 - np.var(y - np.polyval(np.polyfit(x, y, 2), x)) / np.var(y)
    assert found["quadratic.dots"] == found["dots.kl_forward.quadratic"] == f"{r2:.2f}"
    assert float(found["rank.dots"]) == pytest.approx(stats.spearmanr(x, y).statistic, abs=0.005)
    errors, guesses = [], []
    for method in FARTHEST:
        out = method_of == method
        fitted = np.polyfit(x[~out], y[~out], 2)
        errors.append(np.mean(np.abs(np.polyval(fitted, x[out]) - y[out])))
        guesses.append(np.mean(np.abs(y[~out].mean() - y[out])))
    assert found["error-quadratic.dots"] == f"{100 * np.mean(errors):.1f}"
    assert found["guess.dots"] == f"{100 * np.mean(guesses):.1f}"
    assert found["error.dots"] == found["dots.kl_forward.error"]
    within = x <= 1
    near = 1 - np.var(y[within] - np.polyval(np.polyfit(x[within], y[within], 2), x[within])) / np.var(y[within])
    assert found["dots.within-1.checkpoints"] == str(within.sum())
    assert found["dots.within-1.quadratic"] == f"{near:.2f}"
    limits = [key.split(".")[1] for key in found if key.startswith("dots.within-") and key.endswith(".monotone")]
    assert limits == ["within-1", "within-2", "within-4"]


def test_law_against_guessing_by_other_means() -> None:
    """Seed by seed, with a law fitted by scipy's least squares."""
    planted = study(beyond=lambda method, lr: 0.1 if method == "grpo" else 0.0, noise=0.0)

    def error(seed: int) -> float:
        rows = [row for row in planted.points.to_dicts() if row["seed"] == seed]
        x = np.array([row["kl_forward"] for row in rows])
        y = np.array([BASE_DOTS - 0.01 * seed - row["prior_dots"] for row in rows])
        of, gaps = np.array([row["method"] for row in rows]), []
        for method in FARTHEST:
            out = of == method
            fit = optimize.least_squares(  # type: ignore[operator]  # mypy takes it for the module of that name
                lambda t, x=x[~out], y=y[~out]: t[0] * -np.expm1(-t[1] * x ** t[2]) - y,
                [0.5, 0.7, 1.0],
                bounds=([0, 0, 0.2], [1, 10, 5]),
                loss="soft_l1",
                f_scale=0.02,
            )
            own = fit.x[0] * -np.expm1(-fit.x[1] * x[out] ** fit.x[2]) - y[out]
            gaps.append(np.mean(np.abs(own)) - np.mean(np.abs(y[~out].mean() - y[out])))
        return float(np.mean(gaps))

    mean = float(numbers_of(planted)["dots.forecast.gap"].split(" ")[0].replace("−", "-"))
    assert mean == pytest.approx(100 * np.mean([error(seed) for seed in range(3)]), abs=0.15)


def test_departures_are_those_planted() -> None:
    planted = study(beyond=lambda method, lr: 0.1 if method == "grpo" else 0.0, noise=0.0)
    dots = tasks_of(planted)[1].points
    grpo = departures(dots, "method", beyond_others)["grpo"]
    assert grpo
    assert grpo.mean == pytest.approx(0.1, abs=0.002)
    assert grpo.half == pytest.approx(0.0, abs=1e-6)
    # What a method adds at all learning rates is no learning rate's doing.
    rates = departures(dots, "lr", beyond_all).values()
    assert [one.mean for one in rates if one] == pytest.approx([0, 0], abs=0.01)


def test_half_is_lost_where_the_law_says() -> None:
    """Of 0.5 (1 - exp(-0.7 KL)), up to 6 nats, solved by bisection."""
    planted = study(dots=lambda kl: forgotten(5 * kl), seeds=2, noise=0.0)
    for task, scale in zip(tasks_of(planted), (1.0, 5.0), strict=True):
        half = optimize.brentq(lambda kl, scale=scale: forgotten(scale * kl) - forgotten(scale * 6) / 2, 0, 6)
        assert list(per_seed(task.points, half_lost).values()) == pytest.approx([half, half], rel=1e-3)
    found = numbers_of(planted)
    assert (found["half.dots"], found["half.fashion"]) == ("0.20", "0.97")


@pytest.mark.parametrize(
    ("beyond", "of", "planted", "verdict"),
    [
        (lambda method, lr: 0.15 * (method == "grpo"), "grpo.near", 15, "forgets more"),
        (lambda method, lr: -0.1 * (method == "sft-1"), "sft-1.near", -10, "forgets less"),
        (lambda method, lr: 0.2 * (lr > 1e-4), "lr-1.0e-04", -12, "forgets less"),  # not −20: the law of all follows
    ],
    ids=["GRPO more", "SFT-1 less", "low learning rate less"],
)
def test_where_the_law_breaks(beyond: Beyond, of: str, planted: float, verdict: str) -> None:
    # Three learning rates: of two, both are as far from the law of all.
    found = numbers_of(study(beyond=beyond, lrs=(1e-4, 5e-4, 1e-3) if of.startswith("lr") else LRS))
    assert found[f"dots.{of}.verdict"] == verdict
    assert float(found[f"dots.{of}.gap"].split(" ")[0].replace("−", "-")) == pytest.approx(planted, abs=2)
    assert found["dots.fit.verdict"] == "worse"
    assert found["best-measure.dots"] == "weight L2"


def test_law_does_not_hold() -> None:
    """What is forgotten falls with the KL: a law of other methods misleads."""
    found = numbers_of(study(dots=lambda kl: 0.4 * np.exp(-2 * kl)))
    assert (found["dots.forecast.verdict"], found["fashion.forecast.verdict"]) == ("worse", "better")
    assert found["dots.fit.verdict"] == "worse"


def test_better_than_the_related_task() -> None:
    noisy = study(beyond=lambda method, lr: 0.2 * (lr > 1e-4))
    swap = {"prior_dots": "prior_fashion_mnist", "prior_fashion_mnist": "prior_dots"}
    table = noisy.table.rename(swap)
    bases = table.filter(pl.col("method") == "base")
    swapped = replace(noisy, table=table, points=law.distinct(table), bases=bases)
    assert numbers_of(swapped)["dots.fit.verdict"] == "better"


def test_hardly_forgotten() -> None:
    found = numbers_of(study(dots=lambda kl: 0.001 * kl, noise=0.0))
    assert found["most.dots"] == "0.6 ± 0.0"


def test_one_seed_and_one_method(tmp_path: Path) -> None:
    section = STUDY.section(study(seeds=1))
    check(section, "unrelated-prior")
    assert "±" not in section.finding
    assert ": cannot be told: FashionMNIST (−" in section.finding
    drawing.save(section.figure, tmp_path)
    assert drawing.to_html(section.figure, with_library=False)
    alone = STUDY.section(study(methods=("grpo",), seeds=2))
    check(alone, "unrelated-prior")
    assert alone.finding.endswith(": not comparable: FashionMNIST, dots.")


@pytest.mark.parametrize(("column", "left"), [("prior_dots", "FashionMNIST"), ("prior_fashion_mnist", "dots")])
def test_missing_task(column: str, left: str) -> None:
    whole = study(seeds=2)
    tables = {name: getattr(whole, name).drop(column) for name in ("table", "points", "bases")}
    found = replace(whole, **tables)
    section = STUDY.section(found)
    check(section, "unrelated-prior")
    assert [one.name for one in tasks_of(found)] == [left]
    if left == "dots":
        assert numbers_of(found)["dots.fit.verdict"] == "not comparable"


def test_too_small_for_a_law() -> None:
    whole = study(seeds=1, methods=("grpo",))
    points = whole.points.head(3)
    small = replace(whole, table=points, points=points)
    check(STUDY.section(small), "unrelated-prior")
    found = numbers_of(small)
    assert (found["monotone.dots"], found["half.dots"], found["best-measure.dots"]) == ("—", "—", "—")
    assert found["dots.forecast.verdict"] == "not comparable"
