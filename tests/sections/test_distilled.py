"""Students that keep more than their teachers, as much, less, or never get there, as planted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrazor.errors import RazorError
from rlrazor.report import drawing
from rlrazor.report.drawing import Points
from rlrazor.report.study import Study
from rlrazor.studies.distilled import at_teachers_accuracy, lowest_on_the_way, section, taught_by_level
from study_tables import BASE_NEW, BASE_PRIOR, cells, check, plus_minus, run, study_of

PLAIN, MANY, CORRECT = ("rl-distilled", 1), ("rl-distilled", 64), ("rl-distilled-correct", 1)
NAMES = {PLAIN: "RL-distilled SFT", MANY: "RL-distilled SFT, 64 labels an image", CORRECT: "RL-distilled SFT, correct"}
LABELS = {"grpo": "GRPO", PLAIN[0]: NAMES[PLAIN], CORRECT[0]: NAMES[CORRECT]}
LEVELS = {0.95: 2, 0.96: 4, 0.97: 6}  # of teachers, and their steps
RL_NEWS = (0.94, 0.951, 0.954, 0.961, 0.963, 0.971, 0.973)
RL_PRIORS = {0.95: 0.7, 0.96: 0.55, 0.97: 0.4}  # GRPO forgets more the farther it goes
JITTER = (0.0, 0.01, -0.02)

Arm = tuple[str, int]
Gaps = Mapping[float, Sequence[float]]


def teacher_prior(level: float, seed: int) -> float:
    return RL_PRIORS[level] + JITTER[seed]


def rl_run(seed: int) -> list[dict[str, Any]]:
    """Prior accuracy in steps: a checkpoint keeps what the teacher of the level that it has reached does."""
    rows = run("grpo", seed, news=RL_NEWS, kl=0.5)
    for row in rows:
        reached = [level for level in LEVELS if row["new"] >= level]
        row["prior"] = teacher_prior(max(reached), seed) - 0.001 * row["step"] if reached else 0.75
    return rows


def study(gaps: Mapping[Arm, Gaps], seeds: int = 3, short: float = 0.0) -> Study:
    """Arm -> level -> student's minus teacher's prior accuracy, by seed.

    Students dip by 0.1 on the way, and end `short` below their teacher's new accuracy; a worse learning rate keeps 0.2
    less.
    """
    rows = [row for seed in range(seeds) for row in rl_run(seed)]
    by_step = {(row["seed"], row["step"]): row for row in rows}
    for (method, labels), of_level in gaps.items():
        for level, by_seed in of_level.items():
            for seed in range(seeds):
                teacher = by_step[seed, LEVELS[level]]
                news = (0.93, teacher["new"] - 0.01, teacher["new"] - short)
                params = {"teacher": f"{teacher['run_id']}/{teacher['step']}", "labels_per_image": labels}
                for lr, loss in ((1e-4, 0.0), (1e-3, 0.2)):
                    own = run(method, seed, lr=lr, news=news, params={**params, "level": level}, kl=2 * level)
                    for row, dip in zip(own, (0.05, 0.1, 0.0), strict=True):
                        row["prior"] = teacher["prior"] + by_seed[seed] - loss - dip
                    rows += own
    planted = study_of("distilled", [{name: row[name] for name in row if name != "level"} for row in rows])
    planted.description["labels"] = LABELS
    planted.description["teachers"] = [
        {"level": level, "seed": seed, "run_id": by_step[seed, step]["run_id"], "step": step, "student": method}
        for level, step in LEVELS.items()
        for seed in range(seeds)
        for method, _ in gaps
    ]
    return planted


def flat(*by_seed: float) -> Gaps:
    return dict.fromkeys(LEVELS, by_seed)


def test_students_are_judged_against_their_own_teachers() -> None:
    less = {0.95: (-0.03, -0.05, -0.04), 0.96: (0.01, -0.03, 0.01), 0.97: (0.03, 0.05, 0.04)}
    late = [teacher_prior(0.97, seed) - 0.006 + less[0.97][seed] for seed in range(3)]
    found = section(study({PLAIN: less, MANY: flat(0.01, -0.02, 0.0)}))
    check(found, "distilled")
    assert found.finding == (
        "Prior accuracy of a student minus that of its own teacher, at the teacher’s new accuracy, in points: "
        f"RL-distilled SFT −{plus_minus([-gap for gap in less[0.95]])} at 95%, "
        f"−{plus_minus([-gap for gap in less[0.96]])} at 96%, +{plus_minus(less[0.97])} at 97%, "
        "which keeps less at 95%, cannot be told from its teacher at 96% and keeps more at 97%; "
        "RL-distilled SFT, 64 labels an image −0.3 ± 3.8 at 95%, −0.3 ± 3.8 at 96%, −0.3 ± 3.8 at 97%, "
        "which cannot be told from its teacher at 95%, 96% and 97%. "
        f"At 97%, whoever their teacher, RL-distilled SFT keeps most where teachers are at 97%, {plus_minus(late)} %: "
        f"more than GRPO (+{plus_minus(less[0.97])}) (3 seeds)."
    )
    matched, differences, by_rate, judged = map(cells, found.tables)
    teachers = [teacher_prior(0.95, seed) - 0.002 for seed in range(3)]
    students = [teacher + gap for teacher, gap in zip(teachers, less[0.95], strict=True)]
    row = matched["RL-distilled SFT, 95%"]
    assert row[0] == "95.1 ± 0.0"
    assert row[1].startswith(f"{plus_minus(teachers)} / 0.50")
    assert row[2].startswith(f"{plus_minus(students)} / 1.9")
    assert row[3] == row[4] == f"−{plus_minus([-gap for gap in less[0.95]])}"
    more = [own - other for own, other in zip((0.01, -0.02, 0.0), less[0.95], strict=True)]
    assert differences["RL-distilled SFT, 64 labels an image, 95%"][-1] == f"+{plus_minus(more)}"
    assert differences["RL-distilled SFT, 95%"][2:] == ["—", "—"]
    dips = [gap - 0.1 for gap in less[0.95]]
    assert differences["RL-distilled SFT, 95%"][:2] == ["0.0 ± 0.0", f"−{plus_minus([-dip for dip in dips])}"]
    worse = plus_minus([0.2 - gap for gap in less[0.95]])  # of the second learning rate
    assert by_rate["RL-distilled SFT, 95%"] == [f"0.0 ± 0.0 / {row[3]}", f"0.0 ± 0.0 / −{worse}"]
    # At 95 %, a student of the 97 % teacher keeps what that teacher keeps, far from what RL keeps at 95 %.
    assert judged["RL-distilled SFT, 97%"] == [plus_minus(late)] * 3
    assert judged["GRPO"][0] == plus_minus(teachers)


@pytest.mark.parametrize(
    ("by_seed", "verdict"),
    [
        ((0.03, 0.05, 0.04), "which keeps more at 95%, 96% and 97%"),
        ((0.01, -0.02, 0.0), "which cannot be told from its teacher at 95%, 96% and 97%"),
        ((-0.03, -0.05, -0.04), "which keeps less at 95%, 96% and 97%"),
    ],
)
def test_verdict_follows_what_is_planted(by_seed: tuple[float, ...], verdict: str) -> None:
    assert verdict in section(study({PLAIN: flat(*by_seed)})).finding


def test_a_student_below_its_teachers_accuracy_is_not_compared_even_above_the_level() -> None:
    """0.1 points short: 95.0 %, where the level is 95 %, and not the 95.1 % that the teacher has."""
    planted = study({PLAIN: flat(0.0, 0.0, 0.0)}, short=0.001)
    taught = taught_by_level(planted)
    assert at_teachers_accuracy(taught).is_empty()
    assert len(at_teachers_accuracy(taught, margin=0.001)) == 3 * 3
    found = section(planted)
    check(found, "distilled")
    assert "none gets there (within 0.2 points 0.0 ± 0.0) at 95%" in found.finding
    assert "which does not get to its teacher’s accuracy in most seeds at 95%, 96% and 97%" in found.finding
    farther = section(study({PLAIN: flat(0.0, 0.0, 0.0)}, short=0.003))
    assert "points: RL-distilled SFT none gets there at 95%, none gets there at 96%" in farther.finding
    row = cells(found.tables[0])["RL-distilled SFT, 95%"]
    assert row[2:4] == ["—", "—"]
    assert row[4] == "0.0 ± 0.0"  # within 0.2 points


def test_students_that_go_on_beyond_their_teachers_are_compared_with_rl() -> None:
    """Students of 95 % that end at 98 % keep what GRPO does at 95 %: 0.3 more than it does at 97 %."""
    planted = study({PLAIN: flat(0.0, 0.0, 0.0), CORRECT: flat(0.0, 0.0, 0.0)})
    of_95 = {f"{of['run_id']}/{of['step']}" for of in planted.description["teachers"] if of["level"] == 0.95}
    rows = planted.points.to_dicts()
    for row in rows:
        if row["method"] == CORRECT[0] and row["teacher"] in of_95 and row["step"] == 3:
            row["new"] = 0.98
    far = study_of("distilled", rows)
    far.description.update(planted.description)
    found = section(far)
    check(found, "distilled")
    kept = plus_minus([teacher_prior(0.95, seed) - 0.002 for seed in range(3)])
    assert found.finding.endswith(
        f"At 97%, whoever their teacher, RL-distilled SFT, correct keeps most where teachers are at 95%, {kept} %: "
        "more than GRPO (+30.4 ± 0.0) (3 seeds)."
    )
    judged = cells(found.tables[3])
    assert judged["RL-distilled SFT, correct, 95%"] == [kept] * 3
    assert judged["RL-distilled SFT, 95%"] == [kept, "—", "—"]


def test_seeds_that_get_there_are_counted() -> None:
    """One seed's students end below their teacher's accuracy; they are left out and counted."""
    planted = study({PLAIN: flat(-0.03, -0.05, -0.04)})
    teachers = {of["seed"]: f"{of['run_id']}/{of['step']}" for of in planted.description["teachers"][:3]}
    rows = [row for row in planted.points.to_dicts() if row["teacher"] != teachers[0] or row["step"] < 3]
    short = study_of("distilled", rows)
    short.description.update(planted.description)
    found = section(short)
    check(found, "distilled")
    assert found.finding.count("(2 of 3 seeds; within 0.2 points −4.5 ± 6.4 (2 of 3 seeds)) at 95%") == 1
    assert cells(found.tables[0])["RL-distilled SFT, 95%"][3] == "−4.5 ± 6.4 (2 of 3 seeds)"
    rows = [row for row in rows if row["teacher"] != teachers[1] or row["step"] < 3]
    fewer = study_of("distilled", rows)
    fewer.description.update(planted.description)
    finding = section(fewer).finding
    assert "does not get to its teacher’s accuracy in most seeds at 95% and keeps less" in finding
    nobody = study_of("distilled", [row for row in rows if row["method"] == "grpo" or row["step"] < 3])
    nobody.description.update(planted.description)
    assert "None of the students gets to 97% in all seeds" in section(nobody).finding


def test_the_best_checkpoint_is_the_one_a_loop_finds() -> None:
    planted = study({PLAIN: flat(0.01, -0.02, 0.0), CORRECT: flat(0.0, 0.01, 0.02)})
    rows = planted.table.to_dicts()
    best = {(r["method"], r["level"], r["seed"]): r for r in at_teachers_accuracy(taught_by_level(planted)).to_dicts()}
    assert len(best) == 2 * 3 * 3
    for (method, level, seed), chosen in best.items():
        (teacher,) = (r for r in rows if (r["method"], r["seed"], r["step"]) == ("grpo", seed, LEVELS[level]))
        own = [r for r in rows if r["method"] == method and r["teacher"] == f"{teacher['run_id']}/{teacher['step']}"]
        kept = max(r["prior"] for r in own if r["new"] >= teacher["new"])
        assert (chosen["prior"], chosen["gap"]) == (kept, pytest.approx(kept - teacher["prior"]))


def test_lowest_on_the_way_looks_at_the_chosen_run_up_to_the_chosen_checkpoint() -> None:
    taught = taught_by_level(study({PLAIN: flat(0.0, 0.0, 0.0)}))
    chosen = at_teachers_accuracy(taught)
    assert lowest_on_the_way(taught, chosen)["gap"].to_list() == pytest.approx([-0.1] * 9)
    early = chosen.with_columns(step=chosen["step"] - 2)  # before the dip, which is at the second of three
    assert lowest_on_the_way(taught, early)["gap"].to_list() == pytest.approx([-0.05] * 9)


def test_a_longer_run_is_an_arm_of_its_own_from_its_first_step_on() -> None:
    """It starts as the shorter one did, and goes on to gain what that one lacked."""
    planted = study({PLAIN: flat(-0.04, -0.05, -0.03)})
    rows = planted.points.to_dicts()
    longer = [{**row, "run_id": f"{row['run_id']}, 6", "epochs": 6} for row in rows if row["method"] != "grpo"]
    ends = [{**row, "step": 4, "prior": row["prior"] + 0.04} for row in longer if row["step"] == 3]
    both = study_of("distilled", [*rows, *longer, *ends])
    both.description.update(planted.description)
    assert len(both.points) == len(rows) + len(ends)  # one observation to any fit
    found = section(both)
    check(found, "distilled")
    matched, differences = cells(found.tables[0]), cells(found.tables[1])
    assert matched["RL-distilled SFT, 95%"][3] == "−4.0 ± 2.5"
    assert matched["RL-distilled SFT, 6 epochs, 95%"][3] == "0.0 ± 2.5"
    assert differences["RL-distilled SFT, 6 epochs, 95%"] == ["0.0 ± 0.0", "−14.0 ± 2.5", "0.0 ± 0.0", "+4.0 ± 0.0"]


def test_one_teacher_of_two_levels_and_teachers_below_theirs() -> None:
    planted = study({PLAIN: flat(0.0, 0.0, 0.0)})
    teachers = planted.description["teachers"]
    twice = [{**teacher, "level": 0.965} for teacher in teachers if teacher["level"] == 0.97]
    short = [{**teacher, "level": 0.98} for teacher in teachers if teacher["level"] == 0.97]
    planted.description["teachers"] = [*teachers, *twice, *short]
    taught = taught_by_level(planted)
    assert sorted(set(taught["level"])) == [0.95, 0.96, 0.965, 0.97]
    both = [taught.filter(taught["level"] == level).drop("level") for level in (0.965, 0.97)]
    assert both[0].equals(both[1])
    planted.description["teachers"] = short
    nothing = section(planted)
    check(nothing, "distilled")
    assert nothing.finding == "Students and teachers cannot be compared: no teacher reaches its level of new accuracy."


def test_one_seed_and_damaged_descriptions(tmp_path: Path) -> None:
    one = section(study({PLAIN: flat(-0.05)}, seeds=1))
    check(one, "distilled")
    assert "±" not in one.finding
    assert one.finding.endswith("(1 seed, which leaves it open).")
    drawing.save(one.figure, tmp_path)
    planted = study({PLAIN: flat(0.0, 0.0, 0.0)})
    planted.description["teachers"][0]["run_id"] = "elsewhere"
    with pytest.raises(RazorError, match="names a teacher that its table lacks"):
        section(planted)
    del planted.description["teachers"]
    with pytest.raises(RazorError, match="names no teachers"):
        section(planted)


def test_figure_shows_whole_runs_from_the_base_on() -> None:
    planted = study({PLAIN: flat(0.0, 0.0, 0.0), MANY: flat(0.01, 0.0, -0.01)})
    figure = section(planted).figure
    assert (len(figure.panels), figure.columns) == (6, 3)  # two planes, three levels
    for panel in figure.panels:
        lines = [layer for layer in panel.layers if isinstance(layer, Points) and layer.line]
        assert [line.label for line in lines] == [*["GRPO, the teachers’ runs"] * 3, NAMES[PLAIN], NAMES[MANY]]
        in_new = panel.x_label == "new accuracy"
        for line in lines:
            assert (line.x[0], line.y[0]) == (BASE_NEW if in_new else 0.0, pytest.approx(BASE_PRIOR))
            assert len(line.x) == 1 + (len(RL_NEWS) if line.label.startswith("GRPO") else 3)
        (teachers,) = (layer for layer in panel.layers if layer.label == "teacher")
        assert len(teachers.x) == 3
        # Students end where their teachers are, but for what is planted, which is 0 in the mean; on the way they dip.
        for line in lines[3:]:
            assert line.y[1:] - np.mean(teachers.y) == pytest.approx([-0.05, -0.1, 0.0])
    levels = [float(np.mean(panel.layers[-2].x)) for panel in figure.panels[:3]]
    assert levels == pytest.approx([0.951, 0.961, 0.971])
