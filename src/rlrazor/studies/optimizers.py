"""Does the optimiser matter? AdamW, SGD with momentum and Muon at equal new-task accuracy, for RL and for SFT."""

import polars as pl

from rlrazor.analysis.statistics import with_params
from rlrazor.studies import panels
from rlrazor.studies.engine import Against, Arms, ArmStudy
from rlrazor.studies.grids import MIDDLE, ONE, Grid
from rlrazor.studies.tables import law_table

DEFAULT = "adamw"
NAMES = {DEFAULT: "AdamW", "sgd": "SGD", "muon": "Muon"}
METHODS = ("grpo", "sft-2")


def grids(quick: bool) -> list[Grid]:
    """Each optimiser at learning rates of its own."""
    return [
        Grid(METHODS, ONE if quick else MIDDLE),
        Grid(METHODS, (0.1,) if quick else (0.03, 0.1, 0.3), {"optimizer": "sgd"}),
        Grid(METHODS, (0.003,), {"optimizer": "muon"}),
    ]


def prepare(points: pl.DataFrame) -> pl.DataFrame:
    """With `optimizer` in every row."""
    return with_params(points, optimizer=DEFAULT)


def name_of(optimizer: str) -> str:
    """The optimiser's name for people."""
    return NAMES.get(optimizer, optimizer)


STUDY = ArmStudy(
    "optimizers",
    grids,
    Arms(
        ("method", "optimizer"),
        label=lambda study, arm: f"{study.label(arm[0])}, {name_of(arm[1])}",
        prepare=prepare,
    ),
    against=[
        Against("AdamW’s", {"optimizer": DEFAULT}),
        Against("that of SFT-2 with the same optimiser", {"method": "sft-2"}, "sft-2"),
    ],
    panels=[panels.kept(name_of), panels.trade_off, panels.learning, panels.forgetting_law],
    tables=[law_table("optimizer", name_of)],
)
