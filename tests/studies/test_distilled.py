"""Students that keep more than their teachers, as much, less, or never get there, as planted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrazor.errors import RazorError
from rlrazor.report import drawing, keyed
from rlrazor.report.drawing import Points
from rlrazor.report.study import Study
from rlrazor.studies.distilled import STUDY, students_of, tables_of
from study_tables import BASE_NEW, BASE_PRIOR, check, plus_minus, run, study_of

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


def consistent(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what their prior accuracy has lost."""
    return [{**row, "forgetting": BASE_PRIOR - row["prior"]} for row in rows]


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
    planted = study_of("distilled", [{name: row[name] for name in row if name != "level"} for row in consistent(rows)])
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


def numbers_of(of: Study) -> dict[str, str]:
    return keyed.numbers_of(tables_of(of, students_of(of)))


def again(of: Study, rows: list[dict[str, Any]]) -> Study:
    """The same teachers, other rows."""
    other = study_of("distilled", rows)
    other.description.update(of.description)
    return other


def longer(of: Study, gain: float, further: float = 0.0) -> Study:
    """With runs that start as the shorter ones did, and go on to gain so much prior and new accuracy."""
    rows = of.points.to_dicts()
    more = [{**row, "run_id": f"{row['run_id']}, 6", "epochs": 6} for row in rows if row["method"] != "grpo"]
    ends = [
        {**row, "step": 4, "prior": row["prior"] + gain, "new": row["new"] + further}
        for row in more
        if row["step"] == 3
    ]
    return again(of, consistent([*rows, *more, *ends]))


def example() -> Study:
    """What the paper preset leaves, for the text."""
    return longer(study({PLAIN: flat(-0.04, -0.05, -0.03), MANY: flat(0, 0, 0), CORRECT: flat(0, 0, 0)}), 0.04)


def test_students_are_judged_against_their_own_teachers() -> None:
    less = {0.95: (-0.03, -0.05, -0.04), 0.96: (0.01, -0.03, 0.01), 0.97: (0.03, 0.05, 0.04)}
    planted = study({PLAIN: less, MANY: flat(0.01, -0.02, 0.0)})
    found = numbers_of(planted)
    told = [found[f"rl-distilled.{level}.verdict"] for level in (95, 96, 97)]
    assert told == ["worse", "cannot be told", "better"]
    gaps = [found[f"rl-distilled.{level}.gap"] for level in (95, 97)]
    assert gaps == [f"−{plus_minus([-gap for gap in less[0.95]])}", f"+{plus_minus(less[0.97])}"]
    assert {found[f"rl-distilled.64-labels.{level}.verdict"] for level in (95, 96, 97)} == {"cannot be told"}
    teachers = [teacher_prior(0.95, seed) - 0.002 for seed in range(3)]
    students = [teacher + gap for teacher, gap in zip(teachers, less[0.95], strict=True)]
    assert found["rl-distilled.95.teacher-new"] == "95.1 ± 0.0"
    assert found["rl-distilled.95.teacher-prior"] == found["grpo.at-95"] == plus_minus(teachers)
    assert found["rl-distilled.95.teacher-kl"] == "0.50 ± 0.00"
    assert found["rl-distilled.95.prior"] == plus_minus(students)
    assert found["rl-distilled.95.kl"].startswith("1.9")
    assert found["rl-distilled.95.near.gap"] == gaps[0]
    section = STUDY.section(planted)
    check(section, "distilled")
    assert f"better: RL-distilled SFT, 97% ({gaps[1]} points); worse: RL-distilled SFT, 95% (" in section.finding


def test_what_labels_are_worth_and_where_runs_go() -> None:
    less = {0.95: (-0.03, -0.05, -0.04), 0.96: (0.01, -0.03, 0.01), 0.97: (0.03, 0.05, 0.04)}
    found = numbers_of(study({PLAIN: less, MANY: flat(0.01, -0.02, 0.0)}))
    more = [own - other for own, other in zip((0.01, -0.02, 0.0), less[0.95], strict=True)]
    assert found["rl-distilled.64-labels.95.first.gap"] == f"+{plus_minus(more)}"
    assert found["rl-distilled.64-labels.95.first.verdict"] == "better"
    assert found["rl-distilled.64-labels.97.first.verdict"] == "cannot be told"  # −2, −7 and −4
    assert found["rl-distilled.95.first.new"] == found["rl-distilled.95.first.verdict"] == "—"
    assert found["rl-distilled.95.beyond"] == "0.0 ± 0.0"
    assert found["rl-distilled.95.lowest"] == f"−{plus_minus([0.1 - gap for gap in less[0.95]])}"
    assert found["rl-distilled.95.end.new.1.0e-04"] == found["rl-distilled.95.end.new.1.0e-03"] == "0.0 ± 0.0"
    assert found["rl-distilled.95.end.prior.1.0e-04"] == found["rl-distilled.95.gap"]
    assert found["rl-distilled.95.end.prior.1.0e-03"] == f"−{plus_minus([0.2 - gap for gap in less[0.95]])}"
    # At 95 %, a student of the 97 % teacher keeps what that teacher keeps, far from what RL keeps at 95 %.
    late = [teacher_prior(0.97, seed) - 0.006 + less[0.97][seed] for seed in range(3)]
    assert found["rl-distilled.97.at-97"] == plus_minus(late)
    dipped = plus_minus([kept - 0.1 for kept in late])  # it gets to 96 % on the way, and there it stops
    assert found["rl-distilled.97.at-95"] == found["rl-distilled.97.at-96"] == dipped
    assert (found["best.arm"], found["best.prior"]) == ("RL-distilled SFT, 97%", plus_minus(late))
    assert (found["best.gap"], found["best.verdict"]) == (f"+{plus_minus(less[0.97])}", "better")


@pytest.mark.parametrize(
    ("by_seed", "verdict"),
    [((0.03, 0.05, 0.04), "better"), ((0.01, -0.02, 0.0), "cannot be told"), ((-0.03, -0.05, -0.04), "worse")],
)
def test_verdict_follows_what_is_planted(by_seed: tuple[float, ...], verdict: str) -> None:
    found = numbers_of(study({PLAIN: flat(*by_seed)}))
    assert {found[f"rl-distilled.{level}.verdict"] for level in (95, 96, 97)} == {verdict}
    assert found["best.verdict"] == verdict


def test_a_student_below_its_teachers_accuracy_is_not_compared_even_above_the_level() -> None:
    """0.1 points short: 95.0 %, where the level is 95 %, and not the 95.1 % that the teacher has."""
    planted = study({PLAIN: flat(0.01, 0.02, 0.015)}, short=0.001)
    assert [len(one.matched()) for one in students_of(planted)] == [0, 0, 0]
    assert [len(one.matched(margin=0.001)) for one in students_of(planted)] == [3, 3, 3]
    found = numbers_of(planted)
    names = ("gap", "n", "verdict", "prior", "near.gap", "near.verdict")
    assert [found[f"rl-distilled.95.{name}"] for name in names[:4]] == ["—", "—", "not comparable", "—"]
    assert [found[f"rl-distilled.95.{name}"] for name in names[4:]] == [f"+{plus_minus((0.01, 0.02, 0.015))}", "better"]
    check(STUDY.section(planted), "distilled")
    farther = numbers_of(study({PLAIN: flat(0.0, 0.0, 0.0)}, short=0.003))
    assert farther["rl-distilled.95.near.verdict"] == "not comparable"


def test_students_that_go_on_beyond_their_teachers_are_compared_with_rl() -> None:
    """Students of 95 % that end at 98 % keep what GRPO does at 95 %: 0.3 more than it does at 97 %."""
    planted = study({PLAIN: flat(0.0, 0.0, 0.0), CORRECT: flat(0.0, 0.0, 0.0)})
    of_95 = {f"{of['run_id']}/{of['step']}" for of in planted.description["teachers"] if of["level"] == 0.95}
    rows = planted.points.to_dicts()
    for row in rows:
        if row["method"] == CORRECT[0] and row["teacher"] in of_95 and row["step"] == 3:
            row["new"] = 0.98
    found = numbers_of(again(planted, rows))
    kept = plus_minus([teacher_prior(0.95, seed) - 0.002 for seed in range(3)])
    best = [found[f"best.{name}"] for name in ("arm", "prior", "gap", "verdict")]
    assert best == ["RL-distilled SFT, correct, 95%", kept, "+30.4 ± 0.0", "better"]
    assert [found[f"rl-distilled-correct.95.at-{level}"] for level in (95, 96, 97)] == [kept] * 3
    assert [found[f"rl-distilled.95.at-{level}"] for level in (95, 96, 97)] == [kept, "—", "—"]


def test_seeds_that_get_there_are_counted() -> None:
    """One seed's students end below their teacher's accuracy; they are left out and counted."""
    planted = study({PLAIN: flat(-0.03, -0.05, -0.04)})
    teachers = {of["seed"]: f"{of['run_id']}/{of['step']}" for of in planted.description["teachers"][:3]}
    rows = [row for row in planted.points.to_dicts() if row["teacher"] != teachers[0] or row["step"] < 3]
    found = numbers_of(again(planted, rows))
    told = [found[f"rl-distilled.95.{name}"] for name in ("gap", "n", "verdict")]
    assert told == ["−4.5 ± 6.4", "2 of 3", "not comparable"]
    assert found["rl-distilled.95.prior"].endswith("(2 of 3 seeds)")
    assert found["rl-distilled.96.verdict"] == "worse"
    nobody = again(planted, [row for row in rows if row["method"] == "grpo" or row["step"] < 3])
    best = numbers_of(nobody)
    assert [best[f"best.{name}"] for name in ("arm", "prior", "gap", "verdict")] == ["—", "—", "—", "not comparable"]
    check(STUDY.section(nobody), "distilled")


def test_the_best_checkpoint_is_the_one_a_loop_finds() -> None:
    planted = study({PLAIN: flat(0.01, -0.02, 0.0), CORRECT: flat(0.0, 0.01, 0.02)})
    rows = planted.table.to_dicts()
    best = {(r["method"], r["level"], r["seed"]): r for one in students_of(planted) for r in one.matched().to_dicts()}
    assert len(best) == 2 * 3 * 3
    for (method, level, seed), chosen in best.items():
        (teacher,) = (r for r in rows if (r["method"], r["seed"], r["step"]) == ("grpo", seed, LEVELS[level]))
        own = [r for r in rows if r["method"] == method and r["teacher"] == f"{teacher['run_id']}/{teacher['step']}"]
        kept = max(r["prior"] for r in own if r["new"] >= teacher["new"])
        assert (chosen["prior"], chosen["gap"]) == (kept, pytest.approx(kept - teacher["prior"]))


def test_lowest_on_the_way_looks_at_the_chosen_run_up_to_the_chosen_checkpoint() -> None:
    """All dip by 0.1 at the second of three checkpoints; one that is there already at the first dips by 0.05."""
    planted = study({PLAIN: flat(0.0, 0.0, 0.0)})
    assert [gap for one in students_of(planted) for gap in one.lowest()["gap"]] == pytest.approx([-0.1] * 9)
    rows = planted.points.to_dicts()
    for row in rows:
        if row["method"] != "grpo":
            row["new"] = 0.98 if row["step"] == 1 else 0.9
    assert [gap for one in students_of(again(planted, rows)) for gap in one.lowest()["gap"]] == pytest.approx(
        [-0.05] * 9
    )


def test_a_longer_run_is_a_kind_of_its_own_from_its_first_step_on() -> None:
    """It starts as the shorter one did, and goes on to gain what that one lacked: .1 points of new accuracy."""
    planted = study({PLAIN: flat(-0.04, -0.05, -0.03)}, short=0.001)
    both = longer(planted, gain=0.04, further=0.001)
    assert len(both.points) == len(planted.points) + 2 * 3 * 3  # one observation to any fit
    found = numbers_of(both)
    assert (found["rl-distilled.95.gap"], found["rl-distilled.95.verdict"]) == ("—", "not comparable")
    assert (found["rl-distilled.95.near.gap"], found["rl-distilled.95.near.verdict"]) == ("−4.0 ± 2.5", "worse")
    own = [found[f"rl-distilled.6-epochs.95.{name}"] for name in ("gap", "beyond", "lowest", "first.new", "first.gap")]
    assert own == ["0.0 ± 2.5", "0.0 ± 0.0", "−14.0 ± 2.5", "+0.1 ± 0.0", "—"]


def test_one_teacher_of_two_levels_and_teachers_below_theirs() -> None:
    planted = study({PLAIN: flat(0.0, 0.0, 0.0)})
    teachers = planted.description["teachers"]
    twice = [{**teacher, "level": 0.965} for teacher in teachers if teacher["level"] == 0.97]
    short = [{**teacher, "level": 0.98} for teacher in teachers if teacher["level"] == 0.97]
    planted.description["teachers"] = [*teachers, *twice, *short]
    by_level = {one.level: one.rows.drop("level") for one in students_of(planted)}
    assert list(by_level) == [0.95, 0.96, 0.965, 0.97]
    assert by_level[0.965].equals(by_level[0.97])
    planted.description["teachers"] = short
    nothing = STUDY.section(planted)
    check(nothing, "distilled")
    assert nothing.finding.endswith(": not comparable: there are no runs to compare.")


def test_one_seed_and_damaged_descriptions(tmp_path: Path) -> None:
    one = STUDY.section(study({PLAIN: flat(-0.05)}, seeds=1))
    check(one, "distilled")
    assert "±" not in one.finding
    assert "cannot be told: RL-distilled SFT, 95% (−5.0 points)" in one.finding
    drawing.save(one.figure, tmp_path)
    planted = study({PLAIN: flat(0.0, 0.0, 0.0)})
    planted.description["teachers"][0]["run_id"] = "elsewhere"
    with pytest.raises(RazorError, match="names a teacher that its table lacks"):
        STUDY.section(planted)
    del planted.description["teachers"]
    with pytest.raises(RazorError, match="names no teachers"):
        STUDY.section(planted)


def test_figure_shows_whole_runs_from_the_base_on() -> None:
    planted = study({PLAIN: flat(0.0, 0.0, 0.0), MANY: flat(0.01, 0.0, -0.01)})
    figure = STUDY.section(planted).figure
    assert (len(figure.panels), figure.columns) == (6, 3)  # two planes, three levels
    for panel in figure.panels:
        lines = [layer for layer in panel.layers if isinstance(layer, Points) and layer.marker.line]
        assert [line.label for line in lines] == [*["GRPO, the teachers’ runs"] * 3, NAMES[PLAIN], NAMES[MANY]]
        in_new = panel.x.label == "new accuracy"
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
