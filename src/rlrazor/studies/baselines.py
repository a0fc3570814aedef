"""What people use today against forgetting, beside on-policy RL: all on one frontier."""

import polars as pl

from rlrazor.analysis.statistics import threshold_most_reach, with_params
from rlrazor.report.study import Study
from rlrazor.report.tables import THRESHOLDS
from rlrazor.studies import panels
from rlrazor.studies.engine import Against, Arm, Arms, ArmStudy, At, Compared, by_method
from rlrazor.studies.grids import MIDDLE, ONE, Grid
from rlrazor.studies.tables import ArmGroup, best_table, rank_table

TODAY = ("ewc", "lwf", "replay", "lora", "dft", "dft+kl")
NEED_PRIOR_DATA = ("ewc", "replay")
SETTINGS = {"ewc": ", λ = {:g}", "lwf": ", λ = {:g}", "lora": ", rank {:g}", "dft+kl": ", weight {:g}"}
GRPO, KL_DPG, ORACLE, PLAIN = ((name, 0.0) for name in ("grpo", "kl-dpg", "oracle", "sft-2"))


def grids(quick: bool) -> list[Grid]:
    """Each method at one or more strengths."""
    lrs = ONE if quick else MIDDLE
    return [
        Grid(("sft-2", "oracle", "grpo", "kl-dpg", "dft"), lrs),
        Grid(("replay",), lrs),
        *(Grid(("ewc",), lrs, {"strength": strength}) for strength in ((1e3,) if quick else (1e2, 1e3, 1e4))),
        *(Grid(("lwf",), lrs, {"strength": strength}) for strength in ((1.0,) if quick else (0.3, 1.0))),
        *(Grid(("dft+kl",), lrs, settings={"kl_coef": weight}) for weight in ((0.1,) if quick else (0.1, 1.0))),
        *(Grid(("lora",), (1e-3,) if quick else (3e-4, 1e-3, 3e-3), {"strength": rank}) for rank in (2, 8)),
    ]


def prepare(points: pl.DataFrame) -> pl.DataFrame:
    """With `setting`, what tells a method's arms apart: its strength, or the weight of its penalty; 0 for neither."""
    both = with_params(points, strength=0.0, kl_coef=0.0)
    several = pl.col("method").is_in(list(SETTINGS))
    return both.with_columns(setting=pl.when(several).then(pl.col("strength") + pl.col("kl_coef")).otherwise(0.0))


def label(study: Study, arm: Arm) -> str:
    """Method and strength; a star for one that needs data of the prior task."""
    star = " *" if arm[0] in NEED_PRIOR_DATA else ""
    return study.label(arm[0]) + SETTINGS.get(arm[0], "").format(arm[1]) + star


def height(compared: Compared) -> int:
    """A line for each arm."""
    return 250 + 24 * max(len(compared.arms), 14)


STUDY = ArmStudy(
    "baselines",
    grids,
    Arms(("method", "setting"), label, prepare, by_method),
    against=[
        Against("GRPO’s", {"method": "grpo", "setting": 0.0}),
        Against("SFT-2’s", {"method": "sft-2", "setting": 0.0}, "sft-2"),
    ],
    panels=[panels.trade_off_of_methods, panels.ranked],
    tables=[
        best_table(
            [
                ArmGroup(
                    "with-data",
                    "today’s methods with prior data",
                    lambda arm: arm[0] in TODAY and arm[0] in NEED_PRIOR_DATA,
                ),
                ArmGroup(
                    "without-data",
                    "today’s methods without",
                    lambda arm: arm[0] in TODAY and arm[0] not in NEED_PRIOR_DATA,
                ),
            ],
            {"SFT-2": PLAIN, "GRPO": GRPO, "KL-DPG": KL_DPG, "oracle SFT": ORACLE},
        ),
        rank_table,
    ],
    at=At(THRESHOLDS, threshold_most_reach),
    height=height,
)
