"""Does a KL penalty make SFT forget as little as RL? SFT and RL with penalties of several strengths."""

from typing import Any

import polars as pl

from rlrazor.analysis.statistics import with_params
from rlrazor.report.study import Study
from rlrazor.studies import panels
from rlrazor.studies.engine import KL, Against, Arm, Arms, ArmStudy, Compared, Style
from rlrazor.studies.grids import MIDDLE, ONE, Grid
from rlrazor.studies.tables import ArmGroup, best_table

PENALISED = "+kl"
SFT, RL = "sft-2", "grpo"

# From no penalty to the strongest.
SHADES = {
    SFT: ("#FDAE6B", "#FD8D3C", "#E6550D", "#A63603", "#5C1E02"),
    RL: ("#9ECAE1", "#6BAED6", "#3182BD", "#08519C", "#08244D"),
}
SYMBOLS = {SFT: "square", RL: "circle"}


def grids(quick: bool) -> list[Grid]:
    """All coefficients at the same learning rates."""
    lrs = ONE if quick else MIDDLE
    penalised = (SFT + PENALISED, RL + PENALISED)
    coefficients = (0.1, 1.0) if quick else (0.1, 0.3, 1.0)
    return [Grid((SFT, RL), lrs), *(Grid(penalised, lrs, settings={"kl_coef": value}) for value in coefficients)]


def prepare(points: pl.DataFrame) -> pl.DataFrame:
    """SFT and RL, with `family`, the method without its penalty, and `kl_coef`, 0 for none."""
    rows = with_params(points, kl_coef=0.0).with_columns(family=pl.col("method").str.strip_suffix(PENALISED))
    return rows.filter(pl.col("family").is_in([SFT, RL]))


def label(study: Study, arm: Arm) -> str:
    """Family and coefficient."""
    return f"{study.label(arm[0])}, c = {arm[1]:g}"


def style(compared: Compared, arm: Arm) -> Style:
    """The stronger the penalty, the darker the family's colour."""
    family, coefficient = arm
    coefficients, shades = sorted(compared.values(-1)), SHADES[family]
    place = coefficients.index(coefficient) * (len(shades) - 1) / max(len(coefficients) - 1, 1)
    return shades[round(place)], SYMBOLS[family]


def line(compared: Compared, family: Any) -> tuple[str, Style]:
    """A family's line over the coefficients."""
    return compared.study.label(family), (SHADES[family][2], SYMBOLS[family])


def best_of(family: str, name: str) -> ArmGroup:
    """The coefficient above 0 with which a family, called `name`, keeps most."""
    return ArmGroup(f"best-{family}", f"{name} with a penalty", lambda arm: arm[0] == family and arm[1] > 0)


COEFFICIENT = "coefficient c of the KL penalty"

STUDY = ArmStudy(
    "kl-penalty",
    grids,
    Arms(("family", "kl_coef"), label, prepare, style),
    against=[
        Against("GRPO’s without a penalty", {"family": RL, "kl_coef": 0.0}, only={"family": SFT}),
        Against("that of the same method without a penalty", {"kl_coef": 0.0}, "none"),
        Against("GRPO’s with the same penalty", {"family": RL}, "same"),
    ],
    panels=[panels.along("prior", COEFFICIENT, line), panels.along(KL, COEFFICIENT, line), panels.trade_off],
    tables=[
        best_table(
            [best_of(SFT, "SFT-2"), best_of(RL, "GRPO")],
            {"SFT-2 without": (SFT, 0.0), "GRPO without": (RL, 0.0)},
        )
    ],
)
