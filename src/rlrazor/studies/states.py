"""What `which_probe` asks, of robots: KL on the states of which tasks? For sweeps that measured it on both."""

from rlrazor.analysis.forecast import FORWARD
from rlrazor.report.study import Kind, Section, Study
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
    return "kl_forward_per_episode_on_prior" in study.table.columns


def protects(method: str) -> bool:
    """Whether a method holds the policy to its base: by a penalty."""
    return "+" in method


def section(study: Study) -> Section:
    """The laws side by side."""
    probes = ProbeColumns(MEASURES, (FORWARD, ON_PRIOR), protects)
    found = examined(study, probes)
    held = ", ".join(study.label(method) for method in study.methods if protects(method)) or "none"
    numbers = {"held": held, "unit": study.kl_unit}
    return section_of(study, NAME, finding(found), figure(study, found, probes), tables(study, found), numbers=numbers)


KIND = Kind(section, applies)
