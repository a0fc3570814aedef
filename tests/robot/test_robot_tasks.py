"""Which tasks there are, and how one asks for them."""

from rlrazor.experiments.robot.tasks import NEW, PAPER_PRIOR, PRIOR, TASKS


def test_the_new_task_and_eight_prior_ones_are_all() -> None:
    assert {NEW, *PRIOR} == set(TASKS)
    assert len(PRIOR) == 8
    assert NEW not in PRIOR
    assert PAPER_PRIOR == PRIOR[:2] == ("drawer-open", "drawer-close")
    assert all(task.name == name for name, task in TASKS.items())


def test_each_is_asked_for_in_several_ways_that_no_other_shares() -> None:
    said = [paraphrase for task in TASKS.values() for paraphrase in task.paraphrases]
    assert len(set(said)) == len(said)
    assert all(4 <= len(task.paraphrases) <= 6 for task in TASKS.values())
    assert all(one == one.lower().strip() and one.isascii() for one in said)


def test_a_paraphrase_names_its_object_or_its_goal() -> None:
    for name, task in TASKS.items():
        thing = {"pick": "puck", "push": "puck", "drawer": "drawer", "door": "door", "window": "window"}
        wanted = thing.get(name.split("-")[0])
        for paraphrase in task.paraphrases:
            words = set(paraphrase.split())
            assert wanted in words if wanted else words & {"goal", "target"}
            if wanted == "puck":
                assert words & {"goal", "target"}
