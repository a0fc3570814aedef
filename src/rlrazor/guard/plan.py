"""When a monitor measures, on how much of the probes, and what that costs; in words, before the first step.

It is decided from counts of tokens, not from clocks, so that the same run is measured at the same steps on any machine.
The unit is a step of training: what a measurement is `worth` is how many steps cost as much. Seconds are only said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlrazor import bounds
from rlrazor.guard.base_side import ProbeSizes
from rlrazor.system import durations

OVERHEAD = 0.05  # of training, at the default setting; half of it is for the last measurement
FEWEST = 4  # measurements of a run, whatever they cost: with one, at its end, there is nothing left to stop
WANTED, MOST = 10, 50  # a probe too large for ten is thinned; more than fifty tell nothing more
ROUNDING = 1.1  # of what is aimed at: no more than that is said to be more
_NAMED = 6  # steps that are named one by one

Worth = Callable[[float], float]


@dataclass(frozen=True)
class Plan:
    """Measure every so many steps and at the last one: on a `fraction` of each probe, at the last on `last_fraction`.

    `asked`: the user chose the steps.
    """

    every: int
    fraction: float = 1.0
    last_fraction: float = 1.0
    asked: bool = False

    def steps(self, of: int, after: int = 0) -> list[int]:
        """Those at which a run of so many is measured, from the one after `after` on."""
        return [step for step in range(after + 1, of + 1) if step % self.every == 0 or step == of]

    def fraction_at(self, step: int, of: int) -> float:
        """Of each probe that is measured there."""
        return self.last_fraction if step == of else self.fraction

    def as_json(self) -> dict[str, float]:
        """What a row of the log says of it."""
        return {"every": self.every, "probe_fraction": self.fraction, "last_probe_fraction": self.last_fraction}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Plan | None:
        """The plan that a row was measured by, also an older version's; None where it has none."""
        names = (("every", "every"), ("probe_fraction", "share"), ("last_probe_fraction", "last_share"))
        found = [row.get(name, row.get(older)) for name, older in names]
        return None if None in found else cls(*found)


def check_every(every: int | None) -> None:
    """Raise RazorError for what is no number of steps."""
    if every is not None:
        bounds.check_whole("every", every)


def choose(steps: int, worth: Worth | None) -> Plan:
    """As often as OVERHEAD pays for, WANTED times if that can be had by thinning, and FEWEST times in any case.

    `worth`: steps of training that cost as much as a measurement with a fraction of the probes; None: not known.
    """
    rare = _fewest_apart(steps)
    wanted = min(max(1, steps // WANTED), rare)
    if worth is None:
        return Plan(wanted)
    half, whole = OVERHEAD / 2, max(worth(1.0), 1e-12)
    fraction = min(1.0, wanted * half / whole)
    affordable = max(math.ceil(worth(fraction) / half), math.ceil(steps / MOST))
    return Plan(min(affordable, rare), fraction, min(1.0, steps * half / whole))


def _fewest_apart(steps: int) -> int:
    """The most steps between measurements that leave FEWEST of them, or one at each step of a run with fewer."""
    every = max(1, math.ceil(steps / FEWEST))
    return every if math.ceil(steps / every) >= min(FEWEST, steps) else every - 1


@dataclass(frozen=True)
class Costs:
    """What a plan costs in a run of `steps`, of which `after` are behind it.

    `sizes`: of the probes; `pace`: seconds for each token that is read, by how long the base took. `worth`: as `choose`
    takes it, None where it is not known. `step_seconds`: of training, None until a step has been timed.
    """

    steps: int
    after: int
    sizes: ProbeSizes
    pace: float
    worth: Worth | None = None
    step_seconds: float | None = None

    def due(self, plan: Plan) -> list[int]:
        """The steps to come at which it measures."""
        return plan.steps(self.steps, self.after)

    def seconds(self, plan: Plan, at: int) -> float:
        """Of the measurement at a step."""
        return self.pace * self.sizes.read(plan.fraction_at(at, self.steps))

    def of_training(self, plan: Plan) -> float | None:
        """All that are due, as a fraction of the training to come: by the clock once it can be, until then by tokens.

        None where neither is known.
        """
        due, left = self.due(plan), max(self.steps - self.after, 1)
        if self.step_seconds:
            return sum(self.seconds(plan, at) for at in due) / (self.step_seconds * left)
        worth = self.worth
        return None if worth is None else sum(worth(plan.fraction_at(at, self.steps)) for at in due) / left


def described(plan: Plan, costs: Costs) -> str:
    """What is said before the first step."""
    due = costs.due(plan)
    if not due:
        return "plan: no step is left to measure after."
    first, last = (costs.sizes.described(plan.fraction_at(at, costs.steps)) for at in (due[0], due[-1]))
    on = f"on {first}" + (f", the last on {last}" if last != first else "")
    number = "1 reading" if len(due) == 1 else f"{len(due)} readings"
    return f"plan: {number}, {_when(plan, due)}, {on}. {_cost(plan, costs)}"


def undecided(costs: Costs) -> str:
    """What is said before the first step where its tokens have to be counted first."""
    once = durations.about(costs.pace * costs.sizes.read(1.0))
    return (
        f"plan: a reading, on {costs.sizes.described(1.0)}, takes about {once}. How often is decided "
        f"after the first step, when its tokens have been counted: as often as {OVERHEAD:.0%} of training pays for, on "
        f"a part of the prompts if need be, and at least every {_steps(_fewest_apart(costs.steps))}, "
        f"which is {min(FEWEST, costs.steps)} times or more."
    )


def timed(plan: Plan, costs: Costs) -> str:
    """The costs again, now that a step has been timed."""
    return f"plan: a step of training takes {durations.about(costs.step_seconds or 0.0)}. {_cost(plan, costs)}"


def _when(plan: Plan, due: Sequence[int]) -> str:
    if len(due) == 1:
        when = f"after step {due[0]}"
    elif len(due) <= _NAMED:
        when = f"after steps {', '.join(map(str, due[:-1]))} and {due[-1]}"
    else:
        when = f"every {_steps(plan.every)} and after the last, {due[-1]}"
    return f"{when}, as `every` says" if plan.asked else when


def _cost(plan: Plan, costs: Costs) -> str:
    due = costs.due(plan)
    each, last = (durations.about(costs.seconds(plan, at)) for at in (due[0], due[-1]))
    text = f"Measuring takes about {durations.about(sum(costs.seconds(plan, at) for at in due))}"
    if len(due) > 1:
        text += f" in all, {each} each time" + (f" and {last} the last" if last != each else "")
    share = costs.of_training(plan)
    if share is None:
        return f"{text}; what share of training that is, is said once a step has been timed."
    text += f", which is {_percent(share)} of training" + (
        " by the clock" if costs.step_seconds else " by the tokens that are read"
    )
    if plan.asked or (costs.step_seconds and share <= OVERHEAD * ROUNDING):
        return f"{text}."
    if share <= OVERHEAD * ROUNDING:
        return f"{text}: as often as {OVERHEAD:.0%} pays for."
    why = f", as a run is measured at least {FEWEST} times" if plan.every == _fewest_apart(costs.steps) else ""
    return f"{text}, more than the {OVERHEAD:.0%} aimed at{why}; `every` sets how often."


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share < 0.1 else f"{100 * share:.0f}%"


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"
