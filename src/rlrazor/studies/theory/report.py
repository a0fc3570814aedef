"""The section of the report: the verdicts, the numbers behind them, the figure, and the text of theory.md."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import polars as pl

from rlrazor.analysis.statistics import Estimate, over
from rlrazor.report.keyed import Keyed
from rlrazor.report.prose import read_prose
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import Table
from rlrazor.report.text import NEVER, written
from rlrazor.studies.theory.claims import Claim, by_seed, claims_of, in_nats
from rlrazor.studies.theory.figure import figure
from rlrazor.studies.theory.parts import (
    AGREE,
    CORRECT,
    FIRST_CHECK,
    FIRST_TIME,
    KINDS,
    LR,
    M_STEP_LR,
    MIDDLE,
    OUTCOMES,
    UNTIL,
)
from rlrazor.studies.theory.study import NAME, RL_METHODS

TEXT = Path(__file__).with_name("theory.md")
HEADLINES = ("held", "gradient", "natural", "sampling")

Rows = pl.DataFrame
Cell = Callable[[Rows], str]


def section(study: Study) -> Section:
    """The study as a part of the report; raises KeyError for a description without its tables."""
    found = study.description["tables"]
    tables = {name: pl.DataFrame(rows, infer_schema_length=None) for name, rows in found.items()}
    claims = claims_of(tables)
    verdicts = verdicts_of(claims)
    prose = read_prose(TEXT, {**verdicts.numbers, **_settings(study.seeds), **_at_time(tables["first_check"])}, None)
    headlines = (claims[key] for key in HEADLINES)
    return Section(
        NAME,
        prose.title,
        prose.question,
        "; ".join(f"{claim.text}: {claim.verdict} ({claim.value})" for claim in headlines) + ".",
        figure(NAME, tables),
        [verdicts.table, *_tables(tables)],
        prose.note,
    )


def verdicts_of(claims: Mapping[str, Claim]) -> Keyed:
    """Claim by claim, as a table and for the text."""
    rows = {
        key: (claim.text, {"verdict": claim.verdict, "value": claim.value, "count": f"{claim.count:,}"})
        for key, claim in claims.items()
    }
    columns = {"verdict": "verdict", "value": "largest miss, or mean difference", "count": "cases or seeds"}
    return Keyed("What holds", "claim", columns, rows)


def _settings(seeds: Sequence[int]) -> dict[str, str]:
    """What the study was computed with, for the text."""
    return {
        "seeds": ", ".join(map(str, seeds)),
        "outcomes": str(OUTCOMES),
        "correct": str(CORRECT.sum()),
        "until": f"{UNTIL:.0%}",
        "rate": f"{LR:g}",
        "agree": f"{AGREE:g}",
    }


def _at_time(first_check: Rows) -> dict[str, str]:
    """Where the flow from three outcomes is at FIRST_TIME, for the text."""
    row = first_check.filter((pl.col("time") - FIRST_TIME).abs() < 1).row(0, named=True)
    return {
        "first.start": f"{FIRST_CHECK[0] / FIRST_CHECK[1]:g}",
        "first.time": f"{FIRST_TIME:,.0f}",
        "first.ratio": f"{row['ratio']:.0f}",
        "first.accuracy": f"{row['accuracy']:.2%}",
    }


# Cells: from the rows that a row of a table stands for


def _mean(form: Callable[[Estimate | None], str], value: str | pl.Expr, **where: str | float) -> Cell:
    return lambda rows: form(over(by_seed(rows.filter(**where), value)))


_nats, _percents = partial(_mean, in_nats), partial(_mean, written)


def _one(column: str, form: str) -> Cell:
    return lambda rows: format(rows[column][0], form)


def _count(rows: Rows) -> str:
    return str(len(rows))


def _table(title: str, name: str, groups: Iterable[tuple[str, Rows]], columns: Mapping[str, Cell]) -> Table:
    """A row per group that has rows, of which `name` is what the groups are."""
    shown = [[label, *(cell(rows) for cell in columns.values())] for label, rows in groups if not rows.is_empty()]
    return Table(title, [name, *columns], shown)


def _grouped(rows: Rows, *by: str, label: Callable[..., str] = str) -> Iterable[tuple[str, Rows]]:
    return ((label(*key), group) for key, group in rows.group_by(*by, maintain_order=True))


# Tables


def _tables(tables: Mapping[str, Rows]) -> Sequence[Table]:
    parity = [_parity(tables["parity"])] if not tables["parity"].is_empty() else []
    return [
        _alternation(tables["alternation"]),
        _table(
            "Inexact M-steps: total variation from the KL-minimal policy",
            "error of round t",
            _grouped(tables["inexact"], "what", "schedule", "anchored", label=_error_label),
            {
                "sum of all errors": _one("sum", ".3f"),
                "after 10 rounds": _nats("after_10"),
                "after 100": _nats("after_100"),
                "at the end": _nats("end"),
                "foretold by the sum": _nats("foretold"),
            },
        ),
        _table(
            "Where SFT ends",
            "labels",
            _grouped(tables["sft"], "labels", "policy", label="{} ({})".format),
            {"KL above the minimum, nats": _nats("excess"), "total variation from q*": _nats("total_variation")},
        ),
        _first_check(tables["first_check"]),
        _gradients(tables["gradients"]),
        _table(
            "From policy gradient to the projection",
            f"gradient steps (rate {M_STEP_LR:g}) per M-step",
            _grouped(tables["m_steps"], "gradient_steps", label="{:,}".format),
            {"excess KL, nats": _nats("excess"), "% of its KL": _percents("share")},
        ),
        _networks(tables["networks"]),
        *parity,
    ]


def _error_label(what: str, schedule: str, anchored: bool) -> str:
    return f"{what}: {schedule}{', base projected' if anchored else ''}"


def _alternation(rows: Rows) -> Table:
    there, moving = pl.col("distance") <= AGREE, pl.col("moving")

    def gap(group: Rows) -> str:
        away = group.filter(~there & ~moving)["kl_gap"].to_numpy()
        return f"{away.mean():.3f}" if len(away) else NEVER

    return _table(
        "Alternation against a convex solver",
        "policy class",
        ((name, rows.filter(kind=kind)) for kind, name in KINDS.items()),
        {
            "drawn": _count,
            "largest distance": lambda group: f"{max(group['distance'].to_list()):.0e}",
            "rounds to 1e-6": lambda group: (
                NEVER if group["rounds"].has_nulls() else str(max(group["rounds"].to_list()))
            ),
            "at the argmin, %": _percents(there),
            "at rest elsewhere, %": _percents(~there & ~moving),
            "still moving, %": _percents(~there & moving),
            "KL above the argmin's there, nats": gap,
        },
    )


def _first_check(rows: Rows) -> Table:
    return _table(
        "Policy gradient from (.2, .1 | .7): the ratio of the two correct outcomes, 2 at the base",
        "accuracy",
        _grouped(rows, "accuracy", label=lambda accuracy: f"{100 * accuracy:.6g} %"),
        {
            "π_a/π_b": _one("ratio", ".4g"),
            "time": _one("time", ",.0f"),
            "time, GRPO": _one("time_normalised", ",.0f"),
            "excess reverse KL": _one("excess", ".3f"),
            "excess forward KL": _one("excess_forward", ".3f"),
            "closed form − solver": _one("solver_difference", ".0e"),
            "error of the derivative": _one("derivative_error", ".0e"),
        },
    )


def _gradients(rows: Rows) -> Table:
    accuracies = rows["accuracy"].unique().sort().to_list()
    return _table(
        f"Excess KL at {UNTIL:.0%} accuracy, nats, by the base: its correct outcomes and accuracy",
        "algorithm",
        _grouped(rows, "algorithm"),
        {
            **{
                f"{base}, {accuracy:.0%}": _nats("excess", base=base, accuracy=accuracy)
                for base in ("uneven", "even")
                for accuracy in (accuracies[0], MIDDLE, accuracies[-1])
            },
            **{
                f"% of its KL, {base}, {MIDDLE:.0%}": _percents("share", base=base, accuracy=MIDDLE)
                for base in ("uneven", "even")
            },
            f"excess forward KL, uneven, {MIDDLE:.0%}": _nats("excess_forward", base="uneven", accuracy=MIDDLE),
        },
    )


def _networks(rows: Rows) -> Table:
    return _table(
        "Where the policies are small networks: KL(π ‖ π₀), nats",
        "network",
        _grouped(rows, "hidden", label="{} hidden units".format),
        {
            "drawn": _count,
            "fewest rounds": lambda group: str(min(group["rounds"].to_list())),
            "most rounds": lambda group: str(max(group["rounds"].to_list())),
            "accuracy reached, %": _percents("accuracy"),
            "best network − nearest policy": _nats("gap_class"),
            "alternation − best network": _nats("gap_alternation"),
            "excess, alternation": _nats("excess_alternation"),
            "excess, policy gradient": _nats("excess_gradient"),
            "accuracy of that, %": _percents("gradient_accuracy"),
        },
    )


def _parity(rows: Rows) -> Table:
    cells: dict[str, Cell] = {"seeds": _count, "checkpoints": lambda group: f"{group['checkpoints'].sum():,}"}
    for way in ("reverse", "forward"):
        cells[f"{way} KL"] = _nats(f"kl_{way}")
        cells[f"{way} within correct"] = _nats(f"kl_{way}_within_correct")
        cells[f"{way} share, %"] = _percents(f"share_{way}")
    groups = ((label, rows.filter(method=method)) for method, label in RL_METHODS.items())
    return _table(f"ParityMNIST: the checkpoints with at least {UNTIL:.0%} on the new task", "method", groups, cells)
