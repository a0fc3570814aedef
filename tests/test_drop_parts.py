"""What a drop is made of: sums by hand, items counted one by one, and what is told where hardly anything is known."""

import numpy as np
import pytest

from rlrazor.analysis.drop_parts import FORMAT, LOST, NO_DROP, RECOVERABLE, REST, UNTOLD, Outcomes, drop_parts
from rlrazor.analysis.lost import FEW_CLUSTERS, cluster_bootstrap
from rlrazor.analysis.paired import Means, tango

RNG = np.random.default_rng(0)


def drawn(share: float, n: int = 200) -> np.ndarray:
    return (RNG.random(n) < share).astype(float)


def both(base: tuple[float, float, float], tuned: tuple[float, float, float]) -> tuple[Outcomes, Outcomes]:
    """Outcomes at random: shares by the strict parser, of the others by the forgiving one, and after recovery."""
    found = []
    for strict, more, after in (base, tuned):
        one = drawn(strict)
        found.append(Outcomes(one, np.maximum(one, drawn(more)), drawn(after)))
    return found[0], found[1]


def test_the_parts_add_up_to_the_drop_whatever_the_outcomes() -> None:
    for taught in (0.9, 0.4):  # the steps taught the base something, or cost it something
        base, tuned = both((0.6, 0.2, taught), (0.2, 0.3, 0.5))
        found = drop_parts(base, tuned, 0.9)
        assert found.format is not None
        assert found.recoverable is not None
        assert found.lost is not None
        shares = [np.asarray(one.strict, float).mean() for one in (base, tuned)]
        assert found.drop.value == pytest.approx(shares[0] - shares[1])
        parts = (found.format.value, found.recoverable.value, found.lost.value)
        assert sum(parts) == pytest.approx(found.drop.value)
        assert found.rest.value == pytest.approx(found.recoverable.value + found.lost.value)
        for part in (found.drop, found.format, found.rest, found.recoverable, found.lost):
            assert part.interval[0] <= part.value <= part.interval[1]


def test_each_part_by_hand() -> None:
    base = Outcomes(np.ones(10), np.ones(10), np.ones(10))
    #                      strict        forgiving              after
    tuned = Outcomes([1.0] * 2 + [0] * 8, [1.0] * 5 + [0] * 5, [1.0] * 8 + [0] * 2)
    found = drop_parts(base, tuned, 0.9)
    assert found.format is not None
    assert found.recoverable is not None
    assert found.lost is not None
    values = [part.value for part in (found.drop, found.format, found.rest, found.recoverable, found.lost)]
    assert values == pytest.approx([0.8, 0.3, 0.5, 0.3, 0.2])
    assert found.drop.interval == pytest.approx(tango(8, 0, 10, 0.9))
    assert found.format.interval == pytest.approx(tango(3, 0, 10, 0.9))
    assert found.lost.interval == pytest.approx(tango(2, 0, 10, 0.9))
    assert found.recoverable.interval == pytest.approx(tango(3, 0, 10, 0.9))  # nothing was taught


def test_what_the_steps_teach_the_base_too_is_not_recovered() -> None:
    """Both gain the same four items, which neither knew: nothing came back, and what was lost still is."""
    base = Outcomes([1, 1, 1, 1, 1, 1, 0, 0, 0, 0], None, [1] * 10)
    tuned = Outcomes([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], None, [1, 1, 1, 0, 0, 0, 1, 1, 1, 1])
    found = drop_parts(base, tuned, 0.9)
    assert found.taught is not None
    assert found.recoverable is not None
    assert found.lost is not None
    assert found.taught.value == pytest.approx(0.4)
    assert (found.recoverable.value, found.lost.value) == pytest.approx((0.0, 0.3))
    # None came back beyond the base's own: a t-interval would have no width; it is that of 0 of 10, in half units.
    assert found.recoverable.interval == pytest.approx(
        tuple(2 * end for end in Means(0.0, 0.0, 10, 0, True).interval(0.9))
    )


def test_damage_to_the_base_is_no_recovery_of_the_tuned_model() -> None:
    base = Outcomes([1.0] * 10, None, [1.0] * 5 + [0] * 5)
    tuned = Outcomes([1.0] * 2 + [0] * 8, None, [1.0] * 3 + [0] * 7)
    found = drop_parts(base, tuned, 0.9)
    assert found.taught is not None
    assert found.recoverable is not None
    assert found.lost is not None
    assert (found.taught.value, found.recoverable.value, found.lost.value) == pytest.approx((-0.5, 0.1, 0.7))


def test_a_base_that_fails_the_form_itself_takes_its_share_off() -> None:
    base = Outcomes([1.0] * 6 + [0] * 4, [1.0] * 8 + [0] * 2)  # two of its own fail by form
    tuned = Outcomes([1.0] * 2 + [0] * 8, [1.0] * 8 + [0] * 2)
    found = drop_parts(base, tuned, 0.9)
    assert found.format is not None
    assert (found.drop.value, found.format.value, found.rest.value) == pytest.approx((0.4, 0.4, 0.0))
    assert (found.recoverable, found.lost, found.taught) == (None, None, None)


@pytest.mark.parametrize(
    ("strict", "robust", "after", "mainly"),
    [
        (0.2, 0.95, 0.95, FORMAT),
        (0.2, 0.2, 0.9, RECOVERABLE),
        (0.2, 0.2, 0.2, LOST),
        (1.0, 1.0, 1.0, NO_DROP),
        (0.2, 0.2, None, REST),
        (0.2, 0.9, None, FORMAT),
    ],
)
def test_what_a_drop_mainly_is(strict: float, robust: float, after: float | None, mainly: str) -> None:
    def hits(share: float) -> list[float]:
        return [float(at < 40 * share) for at in range(40)]

    late = None if after is None else (hits(1.0), hits(after))
    base = Outcomes(hits(1.0), hits(1.0), late and late[0])
    tuned = Outcomes(hits(strict), hits(robust), late and late[1])
    assert drop_parts(base, tuned, 0.9).mainly == mainly


def test_a_drop_of_many_small_parts_cannot_be_told() -> None:
    base = Outcomes([1.0] * 12, [1.0] * 12, [1.0] * 12)
    tuned = Outcomes([0.0] * 3 + [1] * 9, [0, 0, 1.0] + [1] * 9, [0.0] + [1] * 11)
    assert drop_parts(base, tuned, 0.9).mainly == UNTOLD


def test_no_item_that_differs_is_not_no_difference() -> None:
    same = Outcomes(np.ones(20), None, np.ones(20))
    found = drop_parts(same, same, 0.9)
    assert found.recoverable is not None
    assert found.recoverable.interval == pytest.approx(tango(0, 0, 20, 0.9))
    assert found.recoverable.interval[1] > 0.1


def test_groups_count_alike_and_items_of_a_cluster_together() -> None:
    base, tuned = Outcomes([1.0] * 8 + [1.0] * 2), Outcomes([0.0] * 8 + [1.0] * 2)
    groups = ["a"] * 8 + ["b"] * 2
    assert drop_parts(base, tuned, 0.9, groups_N=groups).drop.value == pytest.approx(0.5)
    assert drop_parts(base, tuned, 0.9).drop.value == pytest.approx(0.8)
    clusters = [at // 20 for at in range(20 * FEW_CLUSTERS)]
    fell = np.array([float(cluster % 2) for cluster in clusters])  # whole clusters, or none of one
    ones = np.ones(len(clusters))
    plain = drop_parts(Outcomes(ones), Outcomes(ones - fell), 0.9).drop.interval
    wide = drop_parts(Outcomes(ones), Outcomes(ones - fell), 0.9, clusters_N=clusters).drop.interval
    assert wide == pytest.approx(cluster_bootstrap(fell, np.array(clusters), 0.9))
    assert wide[1] - wide[0] > 2 * (plain[1] - plain[0])


def test_the_interval_of_what_came_back_holds_it_as_often_as_it_says() -> None:
    """Outcomes that depend on each other as those of copies of one model do; 400 draws, so 90 % is +- 3 %."""
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(400):
        ease = rng.random(150)
        b, control, t, after = ((rng.random(150) < np.clip(ease * by, 0, 1)).astype(float) for by in (1, 1.2, 0.5, 0.9))
        found = drop_parts(Outcomes(b, None, control), Outcomes(t, None, after), 0.9)
        truth = np.mean(
            np.clip(0.9 * np.linspace(0, 1, 10001), 0, 1)
            - 0.5 * np.linspace(0, 1, 10001)
            - (np.clip(1.2 * np.linspace(0, 1, 10001), 0, 1) - np.linspace(0, 1, 10001))
        )
        assert found.recoverable is not None
        inside.append(found.recoverable.interval[0] <= truth <= found.recoverable.interval[1])
    assert 0.86 <= np.mean(inside) <= 0.94
