"""Probes of a language model of which one holds for methods that protect, as planted: it is found, and by how much."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from language_tables import CONFIG, make_folder, make_table
from rlrazor.analysis import law
from rlrazor.experiments.language.methods import METHODS, protection_of
from rlrazor.report import drawing, keyed, load
from rlrazor.report.study import Study
from rlrazor.studies import kinds, text_probes
from rlrazor.studies.text_probes import DRAWN, MEASURES, applies, protects, section
from rlrazor.studies.which_probe import ProbeColumns, examined, tables
from study_tables import BASE_PRIOR, check, plus_minus, run, study_of

FREE, HELD = ("sft", "oracle", "grpo"), ("replay", "ewc", "grpo+kl")
KLS = (0.1, 0.3, 0.6, 1.0, 1.5)


def planted(seeds: int = 3, noise: float = 0.0, own: str = "kl_forward_on_self", of_generic: str = "") -> Study:
    """Forgetting is a law of KL on `own`; elsewhere methods that protect move five times as far, on the prior twice."""
    rng = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for place, method in enumerate((*FREE, *HELD)):
            away = method in HELD
            for row, step in zip(run(method, seed, news=[0.93 + 0.01 * at for at in range(5)]), KLS, strict=True):
                kl = (0.8 + 0.1 * place) * (1 + 0.1 * seed) * step
                row["forgetting"] = 0.5 * (1 - np.exp(-kl)) + noise * rng.normal()
                row["prior"] = BASE_PRIOR - row["forgetting"]
                row |= {
                    "kl_forward": 5 * kl if away else kl,
                    "kl_forward_on_prior": 2 * kl if away else kl,
                    "kl_forward_on_self": kl,
                }
                row["kl_forward_on_unlike"] = row["kl_forward"] * 1.1
                row |= {own: kl} | ({"kl_probe": row[of_generic]} if of_generic else {})
                rows.append(row)
    return study_of("text-probes", rows)


def example() -> Study:
    """Of the texts' test: every probe."""
    study = planted(noise=0.005)
    more = {
        "kl_forward_on_paragraphs": pl.col("kl_forward_on_unlike") / 2,
        "kl_probe": pl.col("kl_forward_on_self") * 1.2,
    }
    table, points = (of.with_columns(**more) for of in (study.table, study.points))
    return Study(study.name, study.description, table, points, study.bases)


def numbers_of(study: Study) -> dict[str, str]:
    found = examined(study, ProbeColumns(MEASURES, DRAWN, protects))
    return keyed.numbers_of(tables(study, found))


def test_the_probe_that_was_planted_is_found_and_the_others_fail_where_the_old_is_protected() -> None:
    found = numbers_of(planted())
    assert found["best.probe"] == found["best-protected.probe"] == "the base’s own texts"
    assert (found["self.holds"], found["self.protected-verdict"]) == ("across methods", "better")
    assert float(found["self.seeds-protected"].split(" ")[0]) < 0.5
    assert (found["self.seeds-protected-verdict"], found["self.lead-verdict"]) == ("better", "better")
    assert float(found["new.seeds-protected"].split(" ")[0]) > 5
    assert float(found["prior.protected"].split(" ")[0]) < float(found["new.protected"].split(" ")[0])
    assert found["unlike.lead-verdict"] != "better"  # a tenth more KL everywhere is the same law
    assert found["new.lead-gap"] == "—"


def test_another_truth_is_another_answer() -> None:
    found = numbers_of(planted(own="kl_forward"))
    assert found["best.probe"] == found["best-protected.probe"] == "the new task’s prompts"
    assert found["self.lead-verdict"] != "better"


def test_intervals_over_seeds_are_of_each_seeds_mean_over_methods() -> None:
    study = planted(noise=0.01)
    found = numbers_of(study)
    errors, guesses = list[float](), list[float]()
    for seed in study.seeds:
        rows = study.points.filter(pl.col("seed") == seed)
        x, y, methods = rows["kl_forward_on_prior"].to_numpy(), rows["forgetting"].to_numpy(), rows["method"].to_list()
        for fit, into in ((law.fit_saturating, errors), (law.fit_constant, guesses)):
            by_method = law.leave_one_method_out(fit, x, y, methods).by_method
            into.append(sum(by_method[name] for name in HELD) / len(HELD))
    gains = [guess - error for guess, error in zip(guesses, errors, strict=True)]
    for values, key in (
        (errors, "seeds-protected"),
        (guesses, "seeds-protected-guess"),
        (gains, "seeds-protected-gap"),
    ):
        assert found[f"prior.{key}"].removeprefix("+").replace("−", "-") == plus_minus(values)
    assert found["prior.seeds-protected-n"] == "3"


def test_one_seed_has_no_interval_and_no_verdict() -> None:
    found = numbers_of(planted(seeds=1))
    assert "±" not in found["self.seeds-error"]
    assert found["self.seeds-verdict"] == "cannot be told"


def test_the_section_shows_a_generic_probe_that_is_another_once() -> None:
    study = planted(seeds=1, of_generic="kl_forward_on_prior")
    told = section(study)
    check(told, "text-probes")
    assert [row[0] for row in told.tables[0].rows] == [
        *("the new task’s prompts", "the base’s own texts", "the prior tasks’ inputs", "text unlike the prior tasks"),
    ]
    held = ", ".join(map(study.label, HELD))
    assert f"Methods that protect: {held}. Methods that do not: " in " ".join(told.note.split())
    assert "On methods that protect: better: the base’s own texts (+" in told.finding
    shown = section(example())
    check(shown, "text-probes")
    assert len(shown.tables[0].rows) == len(MEASURES) == 6
    assert [panel.title for panel in shown.figure.panels][-1] == "Asked about a method not in the fit"


def test_without_methods_that_protect_it_says_that_nothing_can_be_compared() -> None:
    study = planted(seeds=2)
    rows = [row for row in study.table.to_dicts() if row["method"] in FREE]
    plain = study_of("text-probes", rows)
    check(section(plain), "text-probes")
    found = numbers_of(plain)
    assert (found["self.protected"], found["self.seeds-protected"], found["best-protected.probe"]) == ("—", "—", "—")
    assert found["self.protected-verdict"] == found["self.seeds-protected-verdict"] == "not comparable"
    assert found["self.verdict"] == "better"


def test_methods_that_protect_are_those_of_the_experiment() -> None:
    for name in METHODS:
        assert protects(name) == (protection_of(name) is not None)
    assert all(map(protects, HELD))
    assert protects("grpo+kl-before")
    assert not any(map(protects, (*FREE, "sft-one", "of-another-table")))


def test_a_report_has_the_section_where_the_sweep_has_such_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "save", lambda figure, folder: None)  # takes seconds
    monkeypatch.setattr(law, "bootstrap", lambda *_, **__: (0.0, 1.0))
    table = make_table(methods=["grpo", "sft-one", "simpo"])
    assert not applies(Study("text-probes", {}, table))
    # A sequence and digits have a column of such a name, and no further probes.
    staged = table.with_columns(kl_forward_on_prior=pl.col("kl_probe"))
    assert not applies(Study("text-probes", {"config": {"tasks": ["a", "b"]}}, staged))
    table = table.with_columns(kl_forward_on_self=pl.col("kl_probe"), kl_forward_on_unlike=pl.col("kl_forward") * 2)
    settings = {**CONFIG.get("config", {}), "probes": ["self", "unlike"]}
    names = [one.name for one in load(make_folder(tmp_path, table, config=settings), kinds()).sections]
    assert names[:3] == ["learning-rates", "kl-laws", text_probes.NAME]


def test_seeds_are_paired_by_their_number_where_one_has_no_law_in_one_of_the_probes() -> None:
    study = planted(noise=0.01)
    gone = pl.when(pl.col("seed") == 0).then(None).otherwise(pl.col("kl_forward"))
    table, points = (of.with_columns(kl_forward=gone) for of in (study.table, study.points))
    partly = Study(study.name, study.description, table, points, study.bases)
    new, own = (one for one in examined(partly, ProbeColumns(MEASURES, DRAWN, protects)) if one.of.column in DRAWN[:2])
    assert (list(new.of.errors_of_seeds), list(own.of.errors_of_seeds)) == ([1, 2], [0, 1, 2])
    found = numbers_of(partly)
    assert (found["self.lead-n"], found["self.lead-verdict"]) == ("2 of 3", "not comparable")
    gaps = [
        sum(new.of.errors_of_seeds[seed][name] - own.of.errors_of_seeds[seed][name] for name in HELD) / len(HELD)
        for seed in (1, 2)
    ]
    assert found["self.lead-gap"].split(" ")[0] == f"+{100 * sum(gaps) / 2:.1f}"
