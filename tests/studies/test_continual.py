"""Sequences of tasks whose scores and KLs are planted: what the section makes of them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import polars as pl
import pytest

from rlrazor.report.study import Study
from rlrazor.report.tables import Table
from rlrazor.studies import kinds
from rlrazor.studies.continual import section
from rlrazor.studies.engine import text_of

TASKS = ("parity", "prime", "round")
LABELS = {"sft-1": "SFT-1", "sft-2": "SFT-2", "grpo": "GRPO", "reinforce": "1-0 REINFORCE"}
BASE = dict.fromkeys(TASKS, 0.8)


def rows_of(method: str, seed: int, order: str, lost: tuple[float, float], new: float) -> list[dict[str, Any]]:
    """What a stage loses of each earlier task and of the prior one is `lost`; KL on old inputs is the root of that."""
    earlier, prior_lost = lost
    tasks = TASKS if order == "1" else TASKS[::-1]
    rows = []
    for stage, task in enumerate(tasks, 1):
        scores = {f"score_{name}": 0.8 for name in TASKS}
        for at, name in enumerate(tasks[:stage], 1):
            scores[f"score_{name}"] = new - earlier * (stage - at)
        name = f"{method} {seed} {order} {stage}"
        kl = {"kl_forward": 0.1 * stage + 0.01 * seed, "kl_forward_since_before": 0.5}
        for step, own in ((1, 0.9), (2, new)):
            ids = {"run_id": name, "trajectory": name, "method": method, "order": order, "stage": stage, "task": task}
            old = {"kl_forward_on_prior": (stage * prior_lost) ** 0.5, "kl_forward_on_earlier": 0.2 * stage}
            row = {**ids, "seed": seed, "step": step, "new": own, "prior": 0.7 - prior_lost * stage, **kl, **old}
            rows.append({**row, **scores, "forgetting": prior_lost * stage})
    for other, tasks_of in (("joint", "+".join(TASKS)), ("alone", "parity")):
        name = f"{method} {seed} {other}"
        ids = {"run_id": name, "trajectory": name, "method": method, "order": other, "stage": 1, "task": tasks_of}
        rows.append({**rows[-1], **ids, "new": 0.97, "prior": 0.66})
    return rows


def study_of(lost: Mapping[str, tuple[float, float]], news: Mapping[tuple[str, int], float] | None = None) -> Study:
    """Method -> what each stage loses of the earlier tasks and of the prior one; (method, seed) -> score reached."""
    base = {"method": "base", "step": 0, "new": 0.8, "prior": 0.7, "kl_forward": 0.0, "forgetting": 0.0}
    base |= {f"score_{task}": 0.8 for task in TASKS} | {"kl_forward_on_prior": 0.0}
    bases = pl.DataFrame([{**base, "run_id": f"base {seed}", "seed": seed} for seed in range(3)])
    tuned = [
        row
        for seed in range(3)
        for order in ("1", "2")
        for method, (earlier, prior) in lost.items()
        for row in rows_of(
            *(method, seed, order, (earlier + 0.001 * seed * (method == "grpo"), prior)),
            (news or {}).get((method, seed), 0.96),
        )
    ]
    points = pl.DataFrame(tuned)
    config = {"labels": LABELS, "config": {"target": 0.95}}
    return Study("continual", config, pl.concat([bases, points], how="diagonal_relaxed"), points, bases, of_sweep=True)


def table_of(study: Study, title: str, number: int = 0) -> dict[str, list[str]]:
    """The rows of a table of the section, by their first cell."""
    tables: list[Table] = [one for one in section(study).tables if one.title.startswith(title)]
    return {row[0]: list(row[1:]) for row in tables[number].rows}


LOST = {"sft-1": (0.3, 0.15), "sft-2": (0.2, 0.1), "grpo": (0.05, 0.02), "reinforce": (0.1, 0.02)}
HELD = {
    "grpo+kl": (0.06, 0.01),
    "reinforce+kl": (0.09, 0.01),
    "grpo+kl-before": (0.03, 0.02),
    "reinforce+kl-before": (0.04, 0.02),
}


def example() -> Study:
    """What the paper preset leaves, for the text."""
    return study_of(LOST | HELD)


def test_measures_are_those_of_the_matrix() -> None:
    found = table_of(study_of(LOST), "After the last stage")
    accuracy, backward, forward, forgotten, prior, kl, joint, joint_prior, alone, n, learned = found["SFT-2"]
    # At the end the tasks are at 0.56, 0.76 and 0.96; two were 0.96 each; both later ones began where the base was.
    assert (accuracy, backward, forward) == ("76.0 ± 0.0", "−30.0 ± 0.0", "0.0 ± 0.0")
    assert (forgotten, prior, kl) == ("+30.0 ± 0.0", "40.0 ± 0.0", "1.50 ± 0.00")
    assert (joint, joint_prior, alone) == ("97.0 ± 0.0", "66.0 ± 0.0", "66.0 ± 0.0")
    assert (n, learned) == ("3", "3")
    assert found["SFT"][1] == "−37.5 ± 0.0"  # the mean of SFT-1's −45 and SFT-2's −30


def test_rl_is_judged_against_sft_and_each_method_against_sft_2() -> None:
    study = study_of(LOST)
    earlier, prior = (table_of(study, "Minus SFT’s mean", at)["RL"] for at in (0, 1))
    # RL: −7.5 and −15, seed by seed 0, 0.15 and 0.3 points lower for GRPO; SFT: −37.5.
    assert earlier[0].startswith("+26.2")
    assert earlier[2:] == ["3", "better"]
    assert prior[0] == "+31.5 ± 0.0"
    assert prior[3] == "better"
    of_methods = table_of(study, "Minus SFT-2")
    assert of_methods["SFT-1"][3] == "worse"
    assert of_methods["GRPO"][3] == "better"


def test_a_penalty_to_the_base_is_compared_with_one_to_the_stage_before() -> None:
    """The mean BWT is 1.5 times what a stage loses, here 7.5 and 3.5 points; of the prior task, 3 times 1 and 2."""
    to_base, to_before = "RL + KL to the base", "RL + KL to the stage before"
    found = [table_of(study_of(LOST | HELD), "Minus RL with a KL penalty", at)[to_base] for at in (0, 1)]
    assert [row[0] for row in found] == ["−6.0 ± 0.0", "+3.0 ± 0.0"]
    assert [row[3] for row in found] == ["worse", "better"]
    # A family's mean with a penalty is of the same methods as that without, or there is none.
    some = {name: lost for name, lost in HELD.items() if name != "reinforce+kl"}
    assert to_base not in table_of(study_of(LOST | some), "After the last stage")
    assert to_before in table_of(study_of(LOST | some), "After the last stage")


def test_sequences_that_did_not_learn_are_not_compared() -> None:
    study = study_of(LOST, {("grpo", 1): 0.94})
    assert table_of(study, "After the last stage")["GRPO"][-2:] == ["3", "2"]
    assert table_of(study, "Minus SFT-2")["GRPO"][2:] == ["2 of 3", "not comparable"]
    assert table_of(study, "Minus SFT’s mean")["RL"][3] == "not comparable"
    assert table_of(study, "Minus SFT-2")["1-0 REINFORCE"][3] == "better"


def test_the_kl_that_forgetting_follows_has_the_best_quadratic() -> None:
    found = table_of(study_of(LOST), "What tells how much of the prior")
    by_kl = {name.split(",")[0] + name.split(",")[-1]: row for name, row in found.items()}
    assert by_kl["KL to the base old inputs"][0] == "1.000"
    assert float(by_kl["KL to the base old inputs"][2]) < 0.1
    assert float(by_kl["KL accumulated new inputs"][0]) < 0.9
    assert {row[-1] for row in found.values()} == {"72"}  # 3 seeds, 2 orders, 4 methods, 3 stages
    earlier = table_of(study_of(LOST), "What tells how much of the earlier")
    assert {row[-1] for row in earlier.values()} == {"48"}  # the first stage has nothing before it


def test_the_orders_of_a_seed_are_one_observation() -> None:
    """GRPO loses more in the second order: an interval over the three seeds' means, not over six sequences."""
    study = study_of(LOST)
    later = pl.col("method").eq("grpo") & pl.col("order").eq("2") & pl.col("stage").eq(3)
    kept = pl.when(later).then(pl.col("prior") - 0.06 - 0.02 * pl.col("seed")).otherwise("prior")
    study = replace(study, table=study.table.with_columns(prior=kept))
    # 64 % in the first order; 58, 56 and 54 % in the second. Seeds: 61, 60 and 59.
    half = 4.302652729911275 * 1 / 3**0.5  # t of 95 % with 2 degrees of freedom; the seeds' standard deviation is 1
    assert table_of(study, "After the last stage")["GRPO"][4] == f"60.0 ± {half:.1f}"


@pytest.mark.parametrize("methods", [("sft-2",), ("grpo", "sft-1"), ("sft-2", "grpo")])
def test_it_stands_with_few_methods(methods: tuple[str, ...]) -> None:
    found = section(study_of({name: LOST[name] for name in methods}))
    assert ("against" in found.finding) == (methods != ("sft-2",))
    assert len(found.figure.panels) == len(methods) + 1


def test_it_stands_with_one_method_one_seed_one_order_and_two_tasks() -> None:
    whole = study_of({"grpo": LOST["grpo"]})
    of_order = pl.col("order").eq("1") & pl.col("stage").lt(3)
    of_bases = pl.col("method") == "base"
    table = whole.table.filter((of_order | of_bases) & (pl.col("seed") == 0))
    points, bases = table.filter(~of_bases), table.filter(of_bases)
    found = section(replace(whole, table=table, points=points, bases=bases))
    assert [one.title for one in found.tables] == ["After the last stage"]
    assert found.finding == "GRPO: ACC 93.5 %, prior kept 66.0 %."  # 0.91 of parity, 0.96 of prime
    assert found.tables[0].headers[-2:] == ["seeds", "all learned in"]
    assert "all at once: ACC, %" not in found.tables[0].headers
    assert "RL minus SFT" not in found.note
    assert "R²" not in found.note
    assert "\0" not in found.note
    assert "Better or worse" not in found.note
    assert found.note.endswith("1 sequence, 1 seed.")
    heat, _ = found.figure.panels
    assert [name for _, name in heat.y.ticks or ()] == ["base", "1: parity", "2: prime"]
    assert [name for _, name in heat.x.ticks or ()] == ["1", "2"]


def test_no_paragraph_is_left_out_where_all_was_run() -> None:
    study, varied = example(), ("kl_forward_since_before", "kl_forward_on_earlier")  # a curve needs three values
    study = replace(study, table=study.table.with_columns(pl.col(name) + 0.01 * pl.col("seed") for name in varied))
    written = text_of("continual").read_text().partition("## ")[2].split("\n\n")
    assert len(section(study).note.split("\n\n")) == len(written) + 1  # the counts


def test_a_curve_through_a_handful_of_stages_is_no_finding() -> None:
    """Four sequences have 12 stages, and near copies of each other in each: no R² without an interval."""
    whole = study_of(LOST)
    of_bases = pl.col("method") == "base"
    table = whole.table.filter((pl.col("order").eq("1") | of_bases) & (pl.col("seed") == 0))
    found = section(replace(whole, table=table, points=table.filter(~of_bases), bases=table.filter(of_bases)))
    assert not [one.title for one in found.tables if one.title.startswith("What tells")]
    assert "R²" not in found.note
    assert "The KL on old inputs" not in found.note
    assert "RL minus SFT" in found.note


def test_language_models_are_compared_by_their_names_of_methods() -> None:
    names = {"sft-1": "sft-one", "sft-2": "sft-two"}
    study = study_of(LOST)
    renamed = {name: getattr(study, name).with_columns(pl.col("method").replace(names)) for name in ("table", "points")}
    description = {**study.description, "labels": {"sft-two": "SFT on two"}, "kl_unit": "nats per completion"}
    renamed_study = replace(study, description=description, **renamed)
    assert table_of(renamed_study, "Minus SFT on two")["grpo"][3] == "better"
    assert table_of(renamed_study, "Minus SFT’s mean", 1)["RL"] == table_of(study, "Minus SFT’s mean", 1)["RL"]
    assert "KL spent, nats per completion" in section(renamed_study).tables[0].headers


def own_sequence(kl_budget: float | None = 2.0) -> Study:
    """One method, one seed, one order: what a user's own sequence leaves."""
    whole = study_of({"grpo": LOST["grpo"]})
    of_bases, of_order = pl.col("method") == "base", pl.col("order") == "1"
    table = whole.table.filter((of_order | of_bases) & (pl.col("seed") == 0))
    table = table.with_columns(pl.lit(0.5).alias("score_one more"))
    config = {"target": 0.95, "scored": "sampled", "tasks": [*TASKS, "one more"]}
    told = {**whole.description, "config": config, "kl_budget": kl_budget, "command": "razor continual tasks.yaml"}
    points, bases = table.filter(~of_bases), table.filter(of_bases)
    return replace(whole, name="own-sequence", description=told, table=table, points=points, bases=bases)


def test_a_sequence_of_ones_own_has_a_section_of_its_own() -> None:
    applies = {name: kinds()[name].applies for name in ("continual", "own-sequence")}
    for study, name in (
        (own_sequence(), "own-sequence"),
        (own_sequence(None), "own-sequence"),
        (example(), "continual"),
    ):
        assert [one for one, asks in applies.items() if asks and asks(study)] == [name]
    found = kinds()["own-sequence"].section(own_sequence())
    left, cost = found.tables
    assert left.rows[1] == ["1: parity", "96.0", "80.0", "80.0", "50.0", "68.0"]
    # A stage costs 0.5 nats; from 0.8 to 0.95 no method gets for less than 0.8 ln 0.8/0.95 + 0.2 ln 0.2/0.05 = 0.140.
    assert cost.rows[0] == ["1: parity", "80.0", "96.0", "0.14", "0.14", "0.50", "0.50", "1.50"]
    assert cost.rows[1][3:5] == ["0.14", "0.50"]  # the first one's excess on top of the bound
    assert found.finding.startswith("After 3 of 4 tasks: mean score 91.0 %, earlier tasks −7.5 points")
    assert found.finding.endswith("1.50 nats spent of 2.")
