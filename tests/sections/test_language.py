"""The report on language models: which KL forecasts forgetting, quadrants, representation and thresholds of a sweep."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from rlrazor.analysis import law
from rlrazor.analysis.statistics import Estimate
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.report import compare_folders, drawing, load, summary, write_report
from rlrazor.report.drawing import Curve, Points
from rlrazor.report.sections import kl_laws, representation
from rlrazor.report.study import Section, Study
from rlrazor.studies import kinds, quadrants
from study_tables import cells, check, plus_minus
from test_report import text_of

# Method -> how much faster than the probe's its KL on the new task grows: a law in the probe's KL alone holds across.
PACE = {"sft-one": 1.0, "sft-uniform": 4.0, "simpo": 2.0, "grpo": 0.5, "reinforce": 8.0, "kl-dpg": 0.25}
LABELS = {"sft-one": "SFT, one answer", "sft-uniform": "SFT, uniform", "simpo": "SimPO", "grpo": "GRPO"}
LABELS |= {"reinforce": "1-0 REINFORCE", "kl-dpg": "KL-DPG"}
CONFIG: dict[str, Any] = {
    "experiment": "language",
    "title": "Language model, pairs",
    "task": "pairs",
    "new_task": "pairs",
    "prior_task": "prior tasks",
    "prior_tasks": ["copy", "sort"],
    "thresholds": [0.8, 0.9],
    "kl_unit": "nats per completion",
    "families": {"RL": ["grpo", "reinforce", "kl-dpg"], "SFT": ["sft-one", "sft-uniform"]},
    "quadrants": {"grpo": [True, True], "reinforce": [True, False], "simpo": [False, True], "sft-one": [False, False]},
    "representation": "On 100 paragraphs.",
    "accuracy_margin": 0.03,
    "preset": "tiny",
    "command": "razor reproduce language --preset tiny",
    "labels": LABELS,
    "config": {"lrs": [1e-4, 2e-4]},
    "data": "fingerprint",
    "versions": {"rlrazor": "0.1.0"},
    "machine": "a machine",
    "core_seconds": 60,
    "diverged": [],
    "drift": ["kl_forward", "kl_reverse", "kl_correct", "kl_probe", "weight_l2"],
}
BASE_PRIOR = 0.95


def forgotten(kl: float) -> float:
    """What a KL on the probe costs."""
    return 0.5 * (1 - math.exp(-0.8 * kl))


def make_table(
    law_in: str = "kl_probe",
    seeds: int = 2,
    methods: Sequence[str] = tuple(PACE),
    noise: float = 0.002,
    fingerprint: float = 0.0,
) -> pl.DataFrame:
    """Forgetting is a function of `law_in`, kl_probe or kl_forward; the other is PACE times apart, method by method.

    With `fingerprint`, it is that much of how early a method comes in PACE, and nothing else, but for noise.
    """
    rng = np.random.default_rng(5)
    rows = []
    for seed in range(seeds):
        rows.append(row("base", seed, 0, 0, 0.3, 0.0, 0.0, 0.0))
        for method in methods:
            for run in range(3):
                for step in range(1, 7):
                    progress = (run + 1) * step / 18
                    drift = 1.2 * progress
                    apart = drift * PACE[method]
                    kls = {"kl_probe": drift, "kl_forward": apart}
                    if law_in == "kl_forward":
                        kls = {"kl_probe": apart, "kl_forward": drift}
                    loss = forgotten(drift) if law_in in kls else fingerprint * list(PACE).index(method)
                    new = 0.3 + 0.65 * progress ** (0.4 if method in ("grpo", "reinforce", "kl-dpg") else 0.5)
                    loss += noise * float(rng.normal())
                    rows.append(row(method, seed, run, step, new, loss, kls["kl_forward"], kls["kl_probe"]))
    return pl.DataFrame(rows, infer_schema_length=None)


def row(
    method: str, seed: int, run: int, step: int, new: float, loss: float, kl_forward: float, kl_probe: float
) -> dict[str, Any]:
    tuned = method != "base"
    rl = method in ("grpo", "reinforce", "kl-dpg")
    return {
        "run_id": f"{method} {run} {seed}",
        "trajectory": f"{method} {run} {seed}",
        "method": method,
        "lr": 1e-4 * (run + 1) if tuned else None,
        "schedule": "constant" if tuned else None,
        "epochs": 1 if tuned else None,
        "seed": seed,
        "step": step,
        "epoch": step / 6,
        "new": new,
        "prior": BASE_PRIOR - loss,
        "prior_copy": BASE_PRIOR - 2 * loss,
        "prior_sort": BASE_PRIOR,
        "forgetting": loss,
        "kl_forward": kl_forward,
        "kl_reverse": kl_forward**1.3,
        "kl_correct": kl_forward / 2,
        "kl_probe": kl_probe,
        "kl_forward_per_token": kl_forward / 5,
        "kl_probe_per_token": kl_probe / 5,
        "weight_l2": 1.0 if tuned else 0.0,
        "cknna_on_probe": 1 - (0.1 + 0.001 * seed if rl else 0.4) * new,
    }


def study_of(table: pl.DataFrame, name: str = "kl-laws", **config: Any) -> Study:
    bases = table.filter(pl.col("method") == "base")
    return Study(name, {**CONFIG, **config}, table, law.distinct(table), bases, of_sweep=True)


def make_folder(folder: Path, table: pl.DataFrame, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table.write_parquet(folder / "records.parquet")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def found_in(table: pl.DataFrame) -> str:
    """The finding, without the intervals of R2, which it does not tell."""
    return kl_laws.finding(kl_laws.examine(law.distinct(table), samples=0))


@pytest.fixture(scope="module")
def probe_law() -> Section:
    return kl_laws.section(study_of(make_table()))


def test_law_in_the_probe_holds_across_methods_and_the_paper_s_within_one(probe_law: Section) -> None:
    check(probe_law, "kl-laws")
    assert probe_law.finding.startswith("Across methods the law holds in KL on a generic probe (R² 0.99")
    assert "; only within a method in forward KL (R² 0." in probe_law.finding
    assert "weight L2" not in probe_law.finding  # which does not vary
    assert "On a method not in the fit, KL on a generic probe is wrong by 0.2 ± 0.0 accuracy" in probe_law.finding
    assert "forward KL itself cannot be told from guessing" in probe_law.finding


def test_law_in_forward_kl_holds_where_that_is_planted() -> None:
    finding = found_in(make_table("kl_forward"))
    assert finding.startswith("Across methods the law holds in forward KL (R² 0.99")
    across, within = finding.split("; only within a method in ")
    assert "KL on a generic probe" not in across
    assert within.startswith("KL on a generic probe (R² 0.")


def test_nothing_beats_guessing_where_only_the_method_matters() -> None:
    finding = found_in(make_table("nothing", noise=0.01, fingerprint=0.05))
    assert finding.startswith("Across methods no law holds; in neither sense in forward KL (")
    assert "no measure can be told from guessing" in finding


def test_equal_measures_are_not_told_apart() -> None:
    """The same KL on both, each with noise of its own."""
    rng = np.random.default_rng(1)
    table = make_table()
    drift = table["kl_probe"].to_numpy()
    same = table.with_columns(
        pl.Series(name, drift * np.exp(0.2 * rng.normal(size=len(drift)))) for name in ("kl_forward", "kl_probe")
    ).with_columns(kl_reverse=pl.col("kl_forward") ** 1.3, kl_correct=pl.col("kl_forward") / 2)
    finding = found_in(same)
    assert "which does not tell the two apart" in finding
    assert "only within" not in finding


def by_hand(table: pl.DataFrame, column: str) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of the monotone law, and of guessing, on each method, seed by seed, by a loop."""
    errors: dict[str, float] = dict.fromkeys(PACE, 0.0)
    guesses: dict[str, float] = dict.fromkeys(PACE, 0.0)
    for method in PACE:
        for seed in (0, 1):
            tuned = table.filter(pl.col("method") != "base", pl.col("seed") == seed)
            own, others = (tuned.filter(keep) for keep in (pl.col("method") == method, pl.col("method") != method))
            fit = law.fit_saturating(others[column].to_numpy(), others["forgetting"].to_numpy())
            y = own["forgetting"].to_numpy()
            errors[method] += float(np.abs(fit.predict(own[column].to_numpy()) - y).mean()) / 2
            guesses[method] += float(np.abs(others["forgetting"].to_numpy().mean() - y).mean()) / 2
    return errors, guesses


def test_errors_and_gains_are_by_method(probe_law: Section) -> None:
    table = make_table()
    t_six_methods = 2.570582  # of the t-distribution with five degrees of freedom, from a printed table

    def shown(values: Sequence[float]) -> str:
        half = t_six_methods * float(np.std(values, ddof=1)) / math.sqrt(6)
        return f"{100 * abs(float(np.mean(values))):.1f} ± {100 * half:.1f}"

    forecasts = cells(probe_law.tables[1])
    forward, guesses = by_hand(table, "kl_forward")
    probe, _ = by_hand(table, "kl_probe")
    assert forecasts["KL on a generic probe"][1] == shown(list(probe.values()))
    assert forecasts["forward KL"][1] == shown(list(forward.values()))
    assert forecasts["guessing the mean"][1] == shown(list(guesses.values()))
    assert forecasts["KL on a generic probe"][2] == f"+{shown([guesses[m] - probe[m] for m in PACE])}"
    assert forecasts["KL on a generic probe"][3] == f"+{shown([forward[m] - probe[m] for m in PACE])}"
    assert forecasts["forward KL"][3] == "—"


def test_within_a_method_is_a_fit_to_each(probe_law: Section) -> None:
    def r2(rows: pl.DataFrame) -> float:
        x, y = rows["kl_forward"].to_numpy(), rows["forgetting"].to_numpy()
        return float(1 - np.mean((y - law.fit_saturating(x, y).predict(x)) ** 2) / np.var(y))

    by_seed = [make_table().filter(pl.col("method") != "base", pl.col("seed") == seed) for seed in (0, 1)]
    values = [np.mean([r2(rows.filter(pl.col("method") == method)) for rows in by_seed]) for method in PACE]
    row = cells(probe_law.tables[0])["forward KL"]
    low, high = min(values), max(values)
    written = [f"{value:.2f}" if value < 0.995 else f"{value:.3f}" for value in (np.median(values), low, high)]
    assert row[4:] == ["{} ({} to {})".format(*written), "within a method"]
    one, other = map(r2, by_seed)
    assert row[3] == f"{(one + other) / 2:.2f} ± {12.7062 * abs(one - other) / 2:.2f}"
    low_r2, high_r2 = map(float, re.findall(r"\[(.*), (.*)\]", row[1])[0])
    assert low_r2 < float(row[1].split()[0]) < high_r2


def test_a_law_of_every_base_is_one_although_the_bases_differ() -> None:
    """Of two bases one forgets five times as readily: together no law in forward KL, in each alone a perfect one."""
    table = make_table("kl_forward", noise=0.0)
    easily = pl.when(pl.col("seed") == 1).then(5.0).otherwise(1.0)
    differing = table.with_columns(
        [(pl.col(name) / easily).alias(name) for name in ("kl_forward", "kl_probe", "kl_reverse", "kl_correct")]
    )
    found = {one.column: one for one in kl_laws.examine(law.distinct(differing), samples=0)}
    forward = found["kl_forward"]
    pooled = forward.summary.saturating
    assert pooled
    assert pooled.r2 < 0.9
    assert forward.r2 == pytest.approx(1.0, abs=1e-3)
    assert forward.verdict == "across"
    assert max(forward.errors.values()) < 0.01


def test_residuals_tell_who_forgets_more_than_its_kl_suggests(probe_law: Section) -> None:
    """At one KL on the new task KL-DPG has forgotten most, since its KL grows slowest, and 1-0 REINFORCE least."""
    found = cells(probe_law.tables[2])
    forward = {name: float(row[3].split()[0].replace("−", "-")) for name, row in found.items()}
    assert max(forward, key=lambda name: forward[name]) == "KL-DPG"
    assert min(forward, key=lambda name: forward[name]) == "1-0 REINFORCE"
    assert forward["KL-DPG"] > 5
    assert forward["1-0 REINFORCE"] < -5
    assert all(row[4].split()[0].strip("+−") in ("0.0", "0.1") for row in found.values())
    tuned = make_table().filter(pl.col("method") == "grpo")
    assert float(found["GRPO"][0]) == pytest.approx(100 * tuned["forgetting"].to_numpy().mean(), abs=0.05)


def test_one_method_and_nothing_to_fit() -> None:
    alone = kl_laws.section(study_of(make_table(methods=["grpo"])))
    check(alone, "kl-laws")
    assert alone.finding.startswith("With one method nothing can be said across methods; within it the law is that of")
    drawing.draw(alone.figure)
    tiny = make_table(methods=["grpo"]).filter(pl.col("step") < 2, pl.col("seed") == 0).head(2)
    assert kl_laws.section(study_of(tiny)).finding == "The sweep is too small to fit a law to any KL."


def test_figure_has_the_laws_the_errors_and_the_residuals(probe_law: Section) -> None:
    new, probe, errors, residuals = probe_law.figure.panels
    assert [layer.label for layer in new.layers if isinstance(layer, Curve)] == ["quadratic law", "monotone law"]
    assert new.x_label == "forward KL, nats per completion"
    assert re.fullmatch(r"On a generic probe: R² 0\.99\d? / 0\.99\d?", probe.title)
    dots, guess = errors.layers
    assert isinstance(dots, Points)
    assert errors.y_ticks
    assert list(dots.x) == sorted(dots.x, reverse=True)  # the best on top
    assert errors.y_ticks[-1][1] in ("KL on a generic probe", "KL on a generic probe per token")
    _, guesses = by_hand(make_table(), "kl_forward")
    assert guess.x[0] == pytest.approx(100 * np.mean(list(guesses.values())))
    assert [name for _, name in residuals.x_ticks or ()] == list(LABELS.values())


# Quadrants and representation of a sweep


def test_quadrants_come_from_the_config() -> None:
    study = study_of(make_table(), "quadrants")
    assert quadrants.applies(study)
    found = quadrants.section(study)
    check(found, "quadrants")
    [square, *_] = found.tables
    assert [[cell.split(":")[0] for cell in row] for row in square.rows] == [
        ["on-policy", "1-0 REINFORCE", "GRPO"],
        ["offline", "SFT, one answer", "SimPO"],
    ]
    assert found.finding.startswith("What each is worth in prior score kept, at new ≥ 80%: better: being on-policy (+")
    assert [header for table in found.tables for header in table.headers if header.startswith("new ≥ ")] == [
        *("new ≥ 80%", "new ≥ 90%"),
    ]
    assert not quadrants.applies(study_of(make_table(methods=["grpo", "simpo", "sft-one"])))
    assert not quadrants.applies(Study("quadrants", {}, study.table, study.points, study.bases))


def test_quadrants_take_the_first_method_there_is() -> None:
    more = {"dr-grpo": [True, True], **CONFIG["quadrants"], "sft-uniform": [False, False]}
    study = study_of(make_table(), "quadrants", quadrants=more)
    assert quadrants.quadrants_of(study) == {
        "grpo": (True, True),
        "reinforce": (True, False),
        "simpo": (False, True),
        "sft-one": (False, False),
    }
    with pytest.raises(RazorError, match="leave one of the four without a method"):
        quadrants.quadrants_of(study_of(make_table(), "quadrants", quadrants={"grpo": [True, True]}))


def test_representation_takes_families_margin_and_text_from_the_config() -> None:
    study = study_of(make_table(), "representation")
    assert representation.applies(study)
    found = representation.section(study)
    check(found, "representation")
    assert re.match(
        r"At 80% new accuracy RL’s CKNNA to the base on unrelated inputs is 0\.92 ± .*, SFT’s 0\.69 ± ", found.finding
    )
    assert "RL keeps it better, by 0.23 ± " in found.finding
    assert [panel.title for panel in found.figure.panels] == ["CKNNA at equal accuracy", "CKNNA along training"]
    assert "On 100 paragraphs." in found.note
    assert "images" not in found.note
    assert "within 3 points" in found.note
    assert "SFT: SFT, one answer, SFT, uniform." in found.note  # SimPO is not among them
    (table,) = found.tables
    assert table.headers[1:] == ["new = 80% ± 3", "new = 90% ± 3"]
    swapped = {"RL": CONFIG["families"]["SFT"], "SFT": CONFIG["families"]["RL"]}
    assert "SFT keeps it better" in representation.section(study_of(make_table(), families=swapped)).finding


# The page


def test_page_of_a_language_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "save", lambda figure, folder: None)  # takes seconds
    monkeypatch.setattr(law, "bootstrap", lambda *_, **__: (0.0, 1.0))  # so does this
    table = make_table(methods=["grpo", "reinforce", "simpo", "sft-one"])
    results = load(make_folder(tmp_path, table), kinds())
    names = ["kl-laws", "predictors", "representation", "quadrants"]
    assert [section.name for section in results.sections] == names
    page = write_report(results).read_text()
    shown = text_of(page)
    assert "A policy that can do both pairs and prior tasks was fine-tuned on pairs alone" in shown
    assert "95.0 % on prior tasks, the mean over copy, sort." in shown
    assert "Of the checkpoints with at least 80 % on the new task" in shown
    assert "in nats per completion, over pairs inputs only" in shown
    assert "new ≥ 80%" in shown
    assert "new ≥ 95%" not in shown
    assert not re.search(r"\bimages?\b|\bdigits?\b|\blabels? that", shown)
    assert {row["threshold"] for row in summary(results)["retention"]} == {0.8, 0.9}
    # Copying loses all that is lost, sorting nothing.
    best = table.filter(pl.col("method") == "simpo", pl.col("new") >= 0.8)
    losses = [best.filter(pl.col("seed") == seed)["forgetting"].min() for seed in (0, 1)]
    assert f"−{200 * np.mean(losses):.1f} ± " in shown  # type: ignore[arg-type]
    assert "Change of each prior task at new ≥ 80%, points" in shown


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"thresholds": []}, "thresholds that are not accuracies"),
        ({"thresholds": [90]}, "thresholds that are not accuracies"),
        ({"families": {"RL": ["grpo"]}}, "families other than RL and SFT"),
    ],
)
def test_wrong_configs(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RazorError, match=message):
        load(make_folder(tmp_path, make_table(), **wrong))


def test_gap_is_taken_method_by_method() -> None:
    found = kl_laws.gap({"a": 0.3, "b": 0.5, "c": 9.0}, {"a": 0.1, "b": 0.2})
    assert found
    assert (found.mean, found.half) == pytest.approx((0.25, 12.7062 * 0.1 / math.sqrt(2) / math.sqrt(2)))
    assert kl_laws.gap({"a": 0.3}, {"a": 0.1}) is None
    assert isinstance(found, Estimate)


def test_r2_within_methods_leaves_out_what_cannot_be_fitted() -> None:
    x = np.linspace(0, 1, 12)
    y = np.concatenate([x[:5] ** 2, np.full(4, 0.1), x[9:]])
    methods = [*["curved"] * 5, *["flat"] * 4, *["short"] * 3]
    assert law.r2_within_methods(law.fit_quadratic, x, y, methods) == {"curved": pytest.approx(1.0)}


def test_left_out_residuals_are_signed() -> None:
    """One of two methods forgets .1 more at every drift: the other's law misses it by as much, and the reverse."""
    x = np.tile(np.linspace(0, 1, 6), 2)
    y = x**2 + np.repeat([0.0, 0.1], 6)
    found = law.left_out_residuals(law.fit_quadratic, x, y, [*"aaaaaa", *"bbbbbb"])
    np.testing.assert_allclose(found, np.repeat([-0.1, 0.1], 6), atol=1e-9)


# Several folders


def test_comparison_has_a_panel_per_folder_and_says_where_rl_forgets_less(tmp_path: Path) -> None:
    kept_more = pl.when(pl.col("method").is_in(CONFIG["families"]["RL"])).then(0.2).otherwise(0.0)
    better = make_table(seeds=3).with_columns(prior=pl.col("prior") + kept_more)
    worse = make_table(seeds=3).with_columns(prior=pl.col("prior") - kept_more)
    never = make_table(seeds=3).with_columns(new=pl.col("new") / 2)
    folders = [
        make_folder(tmp_path / name, table, title=name, new_task=name)
        for name, table in (("math", better), ("tools", worse), ("science", never))
    ]
    section, page = compare_folders(folders, tmp_path / "out")
    check(section, "fig2")
    sizes = []
    for table in (better, worse):
        tuned = table.filter(pl.col("new") >= 0.9).to_dicts()
        gaps = [
            max(r["prior"] for r in tuned if r["seed"] == seed and r["method"] in CONFIG["families"]["RL"])
            - max(r["prior"] for r in tuned if r["seed"] == seed and r["method"] in CONFIG["families"]["SFT"])
            for seed in range(3)
        ]
        sizes.append(plus_minus([abs(gap) for gap in gaps]))
    assert section.finding == (
        f"Prior accuracy that RL keeps minus what SFT keeps, points: math +{sizes[0]} (new ≥ 90%); tools −{sizes[1]} "
        "(new ≥ 90%); science: no accuracy that both reach. RL forgets less on 1 of 3 tasks, SFT on 1."
    )
    assert [panel.title for panel in section.figure.panels] == ["math", "tools", "science"]
    assert [layer.label for layer in section.figure.panels[0].layers] == [
        *("RL", "RL frontier", "SFT", "SFT frontier", "base")
    ]
    frontier = section.figure.panels[0].layers[1]
    among = better.filter(pl.col("method").is_in(CONFIG["families"]["RL"])).to_dicts()
    for new, prior in zip(frontier.x, frontier.y, strict=True):
        assert not any(
            r["new"] >= new and r["prior"] >= prior and (r["new"], r["prior"]) != (new, prior) for r in among
        )
    assert page == tmp_path / "out" / "comparison.html"
    assert text_of(page.read_text()).count(section.finding.replace("<", "&lt;")) == 2  # in the contents and below
    assert (tmp_path / "out" / "figures" / "fig2.png").read_bytes().startswith(b"\x89PNG")


def test_comparison_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make_folder(tmp_path / name, make_table(seeds=2), title=name, new_task=name) for name in ("one", "two")]
    out = tmp_path / "both"
    assert main(["report", *map(str, folders), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(out / "comparison.html")
    assert found["finding"] == compare_folders(folders, out)[0].finding
    assert [table["title"] for table in found["tables"]] == [f"{n}: best prior accuracy, %" for n in ("one", "two")]
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    assert "two: best prior accuracy, %" in capsys.readouterr().out
    for options, message in (
        ([str(folders[0]), "--out", str(out)], "--out is for the comparison of several folders"),
        ([*map(str, folders), "--markdown", str(out)], "--markdown is for the report of one folder"),
    ):
        assert main(["report", *options]) == 2
        assert message in capsys.readouterr().err


def test_comparison_needs_two_different_folders_and_seeds(tmp_path: Path) -> None:
    one = make_folder(tmp_path / "one", make_table(seeds=1))
    for folders in ([one], [one, tmp_path / "." / "one"]):
        with pytest.raises(RazorError, match="at least two different output folders"):
            compare_folders(folders, tmp_path)
    with pytest.raises(RazorError, match=r"There is no .*config.json"):
        compare_folders([one, tmp_path / "none"], tmp_path)
    other = make_folder(tmp_path / "other", make_table(seeds=1, methods=["grpo", "simpo"]), labels={})
    section, _ = compare_folders([one, other], tmp_path)
    assert section.finding.endswith("; where there is one seed, chance is not ruled out.")
    assert "SFT being none in this sweep" in section.note
