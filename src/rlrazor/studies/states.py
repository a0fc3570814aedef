"""What `which_probe` asks, of robots: KL on the states of which tasks? For sweeps that measured it on both."""

import math
from collections.abc import Callable

from rlrazor.analysis.forecast import FORWARD
from rlrazor.report.keyed import Column, Keyed, table_of
from rlrazor.report.sections import successes
from rlrazor.report.sections.successes import Arm, arms_of, threshold_of
from rlrazor.report.study import Kind, Section, Study
from rlrazor.runs.records import BASE
from rlrazor.studies.engine import section_of
from rlrazor.studies.which_probe import ProbeColumns, examined, figure, finding, tables

NAME = "states"
ON_PRIOR = "kl_forward_on_prior"
MEASURES = {
    FORWARD: "the new task’s states",
    ON_PRIOR: "the prior tasks’ states",
    "kl_reverse": "the new task’s states, reverse",
    "kl_reverse_on_prior": "the prior tasks’ states, reverse",
    "kl_forward_per_episode": "the new task’s states, of an episode",
    "kl_forward_per_episode_on_prior": "the prior tasks’ states, of an episode",
}


def applies(study: Study) -> bool:
    """Whether KL was measured on the states of episodes."""
    return "kl_forward_per_episode_on_prior" in study.table.columns and successes.applies(study)


def protects(method: str) -> bool:
    """Whether a method holds the policy to its base: by a penalty."""
    return "+" in method


def section(study: Study) -> Section:
    """The laws side by side."""
    probes = ProbeColumns(MEASURES, (FORWARD, ON_PRIOR), protects)
    found = examined(study, probes)
    held = ", ".join(study.label(method) for method in study.methods if protects(method)) or "none"
    numbers = {"held": held, "unit": study.kl_unit}
    shown = [*tables(study, found), error_table(study)]
    return section_of(study, NAME, finding(found), figure(study, found, probes), shown, numbers=numbers)


def error_table(study: Study) -> Keyed:
    """`METHOD.at-COLUMN`: each KL where the method is shown, with its standard error over episodes."""

    def cell(column: str) -> Callable[[Arm], str]:
        def of(arm: Arm) -> str:
            mean = sum(float(row[column]) for row in arm.rows) / len(arm.rows)
            known = [float(error) for row in arm.rows if (error := row.get(f"{column}_stderr")) is not None]
            if len(known) < len(arm.rows):
                return f"{mean:.3f}"
            return f"{mean:.3f} ± {math.hypot(*known) / len(known):.3f}"

        return of

    measured = {column: name for column, name in MEASURES.items() if column in study.table.columns}
    columns = [Column[Arm](f"at-{column}", name, cell(column)) for column, name in measured.items()]
    at = threshold_of(study)
    rows = {method: (arm.label, arm) for method, arm in arms_of(study, at).items() if method != BASE}
    return table_of(f"KL at a new score of {at:.0%}, or at the end, ± standard error", "method", rows, columns)


KIND = Kind(section, applies)
