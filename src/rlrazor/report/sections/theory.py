"""Does alternating the paper's two projections end at the KL-minimal policy, and does RL? The paper's Fig. 5."""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from rlrazor import projection
from rlrazor.analysis.statistics import Estimate, floats
from rlrazor.errors import RazorError
from rlrazor.projection import Floats
from rlrazor.report.drawing import INK, PALETTE, Axis, Curve, Figure, Interval, Layer, Marker, Panel, Points
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import Table
from rlrazor.report.text import NEVER, percent
from rlrazor.theory import (
    AGREE,
    FIRST_CHECK,
    FIRST_CORRECT,
    FIRST_TIME,
    FLOWS,
    LR,
    M_STEP_LR,
    NAME,
    RL_METHODS,
    SAMPLED,
    UNTIL,
)

_COLORS = {
    "policy gradient": PALETTE[0],
    "GRPO": PALETTE[1],
    "natural gradient": PALETTE[2],
    "KL-DPG": PALETTE[3],
    "SFT": PALETTE[4],
    "1-0 REINFORCE": PALETTE[6],
}
_SYMBOLS = {"policy gradient": "circle", "GRPO": "square", "1-0 REINFORCE": "triangle-up", "KL-DPG": "diamond"}
_KINDS = {
    "softmax": "softmax, a logit per outcome",
    "R + 1": "exponential family, R and 1 more statistic",
    "R + 2": "exponential family, R and 2 more",
    "R + 4": "exponential family, R and 4 more",
    "graded": "exponential family, a grade of three levels",
    "random": "exponential family, 2 random statistics",
}
_CURVES = {
    "none": ("alternation, R a statistic", INK),
    "graded": ("alternation, graded statistic", PALETTE[9]),
    "random": ("alternation, random statistics", PALETTE[10]),
    "0.3/t²": ("M-step errors 0.3/t²", PALETTE[5]),
    "0.3/t": ("M-step errors 0.3/t", PALETTE[8]),
    "0.3/t, base projected": ("errors 0.3/t, base projected", PALETTE[11]),
}

_TABLES = (
    *("first_check", "paths", "alternation", "convergence", "inexact", "sft", "gradients", "m_steps", "networks"),
    "parity",
)


def section(study: Study) -> Section:
    """The study as a part of the report; raises RazorError for a description without its tables."""
    found = study.description.get("tables", {})
    missing = [name for name in _TABLES if name not in found]
    if missing:
        raise RazorError(f"The study {NAME!r} lacks {', '.join(missing)}: run the same command again.")
    tables = {name: pl.DataFrame(rows, infer_schema_length=None) for name, rows in found.items()}
    shown = [
        _alternation_table(tables["alternation"]),
        _inexact_table(tables["inexact"]),
        _sft_table(tables["sft"]),
        _first_table(tables["first_check"]),
        _gradient_table(tables["gradients"]),
        _m_step_table(tables["m_steps"]),
        _network_table(tables["networks"]),
    ]
    if not tables["parity"].is_empty():
        shown.append(_parity_table(tables["parity"]))
    return Section(
        NAME,
        "Is RL a projection?",
        "RL's Razor explains RL's small KL by a projection: keep the correct samples, fit the policy to them, repeat. "
        "Does that end at the correct policy nearest to the base, and is policy gradient that?",
        _finding(tables),
        figure(tables),
        shown,
        _note(study.seeds, tables),
    )


def _finding(tables: Mapping[str, pl.DataFrame]) -> str:
    """One sentence, from the numbers."""
    held = tables["alternation"].filter("realised")
    worst = float(held["distance"].to_numpy().max())
    sentence = (
        f"Exact alternation {'ends' if worst <= AGREE else 'does not end'} at the KL-minimal correct policy where the "
        f"policy class can hold it (largest distance from a convex solver's {worst:.0e})"
    )
    gradients = tables["gradients"]
    middle = _middle(gradients)
    plain = _of(gradients, "uneven", middle, FLOWS["policy-gradient"])
    natural = _of(gradients, "uneven", middle, FLOWS["natural-gradient"])
    even = _of(gradients, "even", middle, f"GRPO, groups of {_smallest_group(gradients)}")
    other = _estimate(plain, "excess").mean > max(AGREE, 10 * _estimate(natural, "excess").mean)
    sentence += (
        f"; a policy-gradient step is {'not ' if other else ''}that projection: from {100 * middle:.0f} to "
        f"{100 * UNTIL:.0f} % accuracy it pays {_nats(_estimate(plain, 'excess'))} nats above the minimum, "
        f"{_percents(_estimate(plain, 'share'))} % of its KL, natural gradient {_nats(_estimate(natural, 'excess'))}, "
        f"and where the base's correct outcomes tie, sampling noise costs GRPO {_nats(_estimate(even, 'excess'))}"
    )
    return sentence + "."


def _note(seeds: Sequence[int], tables: Mapping[str, pl.DataFrame]) -> str:
    at_time = tables["first_check"].filter((pl.col("time") - FIRST_TIME).abs() < 1).row(0, named=True)
    return (
        f"Seeds {', '.join(map(str, seeds))}: ± is half the 95 % t-interval over them, and so are the error bars. "
        "Excess KL: KL(π ‖ π₀) minus the least that any policy of the same accuracy pays; by the chain rule, the KL "
        "among correct and among wrong outcomes. "
        "Three outcomes: from the base (.2, .1 | .7 wrong). Along the exact gradient of a softmax "
        "d/dt log(π_a/π_b) = (π_a − π_b)(1 − E[R]), so the likelier correct outcome gains; the flow never stops "
        f"(ratio {at_time['ratio']:.0f} at time {FIRST_TIME:.0f} and {100 * at_time['accuracy']:.2f} % accuracy) and "
        "ends on the likelier outcome alone. GRPO's normalisation takes the same path at another speed, prompt by "
        "prompt; natural gradient and exact alternation go straight to the KL-minimal policy. "
        "Alternation: every correct policy is a fixed point, so an M-step's error along the correct outcomes stays, "
        "and the limit is off by the sum of the errors, summable or not, unless every round projects the base again; "
        "errors in accuracy alone only have to vanish. The solver is good to about 1e-8. "
        "Lower panels: softmaxes over ten outcomes, five correct, with logits of their own for every prompt, prompts' "
        f"accuracies spread around the base's, stopped at a mean accuracy of {100 * UNTIL:.0f} %; groups learn at "
        f"rate {LR:g}. "
        "Natural gradient, at 0, is not shown, nor are exact gradients where the base's correct outcomes tie: a tie "
        "stays a tie." + _beyond_the_figure(tables)
    )


def _beyond_the_figure(tables: Mapping[str, pl.DataFrame]) -> str:
    """What is in the tables alone: families that cannot hold the KL-minimal policy, and the share on ParityMNIST."""
    said = ""
    others = tables["alternation"].filter(~pl.col("realised") & (pl.col("kind") == "random"))
    if not others.is_empty():
        away = others["distance"].to_numpy() > AGREE
        moving = float(np.mean(away & others["moving"].to_numpy()))
        there = percent(float(np.mean(~away)))
        said += f" Of families with random statistics {there} % end at the nearest that they hold"
        said += f" ({percent(moving)} % are still on their way)." if moving else "."
    parity = tables["parity"]
    if not parity.is_empty():
        present = [name for name in RL_METHODS if name in parity["method"].to_list()]
        shares = [
            f"{_percents(_estimate(rows, 'share_reverse'))} % of {RL_METHODS[name]}'s"
            for name in dict.fromkeys((present[0], present[-1]))  # GRPO, and KL-DPG where there is one
            for rows in [parity.filter(pl.col("method") == name)]
        ]
        said += f" On ParityMNIST, {' and '.join(shares)} reverse KL above 97 % is among correct outputs."
    return said


def _of(table: pl.DataFrame, base: str, accuracy: float, algorithm: str) -> pl.DataFrame:
    return table.filter(pl.col("base") == base, pl.col("accuracy") == accuracy, pl.col("algorithm") == algorithm)


def _smallest_group(gradients: pl.DataFrame) -> int:
    return int(gradients["group"].drop_nulls().to_numpy().min())


def _middle(gradients: pl.DataFrame) -> float:
    accuracies = gradients["accuracy"].unique().sort().to_list()
    return float(accuracies[len(accuracies) // 2])


def _estimate(rows: pl.DataFrame, column: str) -> Estimate:
    """Over the seeds, of the mean over each seed's rows."""
    return Estimate.over(rows.group_by("seed", maintain_order=True).agg(pl.col(column).mean())[column].to_list())


def _nats(estimate: Estimate) -> str:
    """To three decimals, small values to two digits; 0 is what rounding leaves of it."""
    if abs(estimate.mean) < 1e-12:
        return "0"
    if abs(estimate.mean) < 5e-4:
        return f"{estimate.mean:.0e}"
    half = "" if estimate.half is None else f" ± {estimate.half:.3f}"
    return f"{estimate.mean:.3f}{half}"


def _percents(estimate: Estimate) -> str:
    return percent(estimate.mean) + ("" if estimate.half is None else f" ± {percent(estimate.half)}")


def _alternation_table(rows: pl.DataFrame) -> Table:
    shown = []
    for kind, name in _KINDS.items():
        of_kind = rows.filter(pl.col("kind") == kind)
        if of_kind.is_empty():
            continue
        there = pl.col("distance") <= AGREE
        flags = of_kind.with_columns(
            there=there, elsewhere=~there & ~pl.col("moving"), moving=~there & pl.col("moving")
        )
        away = flags.filter("elsewhere")
        shown.append(
            [
                name,
                str(len(of_kind)),
                f"{of_kind['distance'].to_numpy().max():.0e}",
                NEVER if of_kind["rounds"].is_null().any() else str(of_kind["rounds"].max()),
                *(percent(float(flags[column].to_numpy().mean())) for column in ("there", "elsewhere", "moving")),
                NEVER if away.is_empty() else f"{away['kl_gap'].to_numpy().mean():.3f}",
            ]
        )
    headers = [
        "policy class",
        "drawn",
        "largest distance",
        "rounds to 1e-6",
        "at the argmin, %",
        "at rest elsewhere, %",
    ]
    headers += ["still moving, %", "KL above the argmin's there, nats"]
    return Table("Alternation against a convex solver", headers, shown)


def _inexact_table(rows: pl.DataFrame) -> Table:
    shown = []
    for (what, schedule, anchored), group in rows.group_by("what", "schedule", "anchored", maintain_order=True):
        foretold = NEVER if group["foretold"].is_null().all() else _nats(_estimate(group, "foretold"))
        total = {"none": "0", "0.3/t²": "finite", "0.3(−1)ᵗ/t": "finite"}.get(str(schedule), "infinite")
        shown.append(
            [
                f"{what}: {schedule}{', base projected' if anchored else ''}",
                total,
                *(_nats(_estimate(group, column)) for column in ("after_10", "after_100", "end")),
                foretold,
            ]
        )
    headers = ["error of round t", "sum of errors", "after 10 rounds", "after 100", "at the end", "foretold by the sum"]
    return Table("Inexact M-steps: total variation from the KL-minimal policy", headers, shown)


def _sft_table(rows: pl.DataFrame) -> Table:
    shown = [
        [
            " ".join((str(labels), f"({policy!s})")),
            _nats(_estimate(group, "excess")),
            _nats(_estimate(group, "total_variation")),
        ]
        for (policy, labels), group in rows.group_by("policy", "labels", maintain_order=True)
    ]
    headers = ["labels", "KL above the minimum, nats", "total variation from q*"]
    return Table("Where SFT ends", headers, shown)


def _first_table(rows: pl.DataFrame) -> Table:
    shown = [
        [
            f"{100 * row['accuracy']:.6g} %",
            f"{row['ratio']:.4g}",
            f"{row['time']:,.0f}",
            f"{row['time_normalised']:,.0f}",
            f"{row['excess']:.3f}",
            f"{row['excess_forward']:.3f}",
            f"{row['solver_difference']:.0e}",
            f"{row['derivative_error']:.0e}",
        ]
        for row in rows.to_dicts()
    ]
    headers = ["accuracy", "π_a/π_b", "time", "time, GRPO", "excess reverse KL", "excess forward KL"]
    headers += ["closed form − solver", "error of the derivative"]
    return Table(
        "Policy gradient from (.2, .1 | .7): the ratio of the two correct outcomes, 2 at the base", headers, shown
    )


def _gradient_table(rows: pl.DataFrame) -> Table:
    accuracies = rows["accuracy"].unique().sort().to_list()
    columns = [
        (kind, accuracy) for kind in ("uneven", "even") for accuracy in (accuracies[0], _middle(rows), accuracies[-1])
    ]
    middle = _middle(rows)
    shown = []
    for algorithm in rows["algorithm"].unique(maintain_order=True):
        cells = [_nats(_estimate(_of(rows, *column, algorithm), "excess")) for column in columns]
        shares = [_percents(_estimate(_of(rows, kind, middle, algorithm), "share")) for kind in ("uneven", "even")]
        forward = [_nats(_estimate(_of(rows, "uneven", middle, algorithm), "excess_forward"))]
        shown.append([str(algorithm), *cells, *shares, *forward])
    headers = ["algorithm", *(f"{kind}, {accuracy:.0%}" for kind, accuracy in columns)]
    headers += [f"% of its KL, {kind}, {middle:.0%}" for kind in ("uneven", "even")]
    headers.append(f"excess forward KL, uneven, {middle:.0%}")
    return Table(
        f"Excess KL at {UNTIL:.0%} accuracy, nats, by the base: its correct outcomes and accuracy", headers, shown
    )


def _m_step_table(rows: pl.DataFrame) -> Table:
    shown = [
        [f"{steps:,}", _nats(_estimate(group, "excess")), _percents(_estimate(group, "share"))]
        for (steps,), group in rows.group_by("gradient_steps", maintain_order=True)
    ]
    headers = [f"gradient steps (rate {M_STEP_LR:g}) per M-step", "excess KL, nats", "% of its KL"]
    return Table("From policy gradient to the projection", headers, shown)


def _network_table(rows: pl.DataFrame) -> Table:
    shown = []
    for (hidden,), group in rows.group_by("hidden", maintain_order=True):
        rounds = sorted(group["rounds"].to_list())
        shown.append(
            [
                f"{hidden} hidden units",
                str(len(group)),
                str(rounds[0]) if rounds[0] == rounds[-1] else f"{rounds[0]} to {rounds[-1]}",
                _percents(_estimate(group, "accuracy")),
                *(_nats(_estimate(group, f"gap_{name}")) for name in ("class", "alternation")),
                *(_nats(_estimate(group, f"excess_{name}")) for name in ("alternation", "gradient")),
                _percents(_estimate(group, "gradient_accuracy")),
            ]
        )
    headers = ["network", "drawn", "rounds", "accuracy reached, %", "best network − nearest policy"]
    headers += ["alternation − best network", "excess, alternation", "excess, policy gradient", "accuracy of that, %"]
    return Table("Where the policies are small networks: KL(π ‖ π₀), nats", headers, shown)


def _parity_table(rows: pl.DataFrame) -> Table:
    shown = []
    for method, label in RL_METHODS.items():
        group = rows.filter(pl.col("method") == method)
        if group.is_empty():
            continue
        cells = []
        for way in ("reverse", "forward"):
            cells += [_nats(_estimate(group, column)) for column in (f"kl_{way}", f"kl_{way}_within_correct")]
            cells.append(_percents(_estimate(group, f"share_{way}")))
        shown.append([label, str(len(group)), f"{group['checkpoints'].sum():,}", *cells])
    headers = ["method", "seeds", "checkpoints"]
    headers += [f"{way} {what}" for way in ("reverse", "forward") for what in ("KL", "within correct", "share, %")]
    return Table(f"ParityMNIST: the checkpoints with at least {100 * UNTIL:.0f} % on the new task", headers, shown)


# The figure


def figure(tables: Mapping[str, pl.DataFrame]) -> Figure:
    """The paper's Fig. 5 on the simplex, the excess KL from either kind of base, and the alternation's convergence."""
    gradients = tables["gradients"]
    return Figure(
        NAME,
        [
            _simplex_panel(tables["paths"]),
            _convergence_panel(tables["convergence"]),
            _excess_panel(gradients, "uneven", "Excess KL: the base prefers some correct outcomes"),
            _excess_panel(gradients, "even", "Excess KL: the base's correct outcomes tie"),
        ],
        columns=2,
        height=1000,
    )


def _on_simplex(points: Floats) -> tuple[Floats, Floats]:
    """Barycentric to plane: a at (0, 0), b at (1, 0), c on top."""
    return points[:, 1] + points[:, 2] / 2, points[:, 2] * np.sqrt(3) / 2


def _simplex_panel(paths: pl.DataFrame) -> Panel:
    corners = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    layers: list[Layer] = [Curve("", *_on_simplex(corners), "#999999")]
    names = {
        "policy-gradient": (FLOWS["policy-gradient"], _COLORS["policy gradient"], False),
        "grpo": (FLOWS["grpo"], _COLORS["GRPO"], True),
        "natural-gradient": ("natural gradient, exact alternation", _COLORS["natural gradient"], False),
        "kl-dpg": (FLOWS["kl-dpg"], _COLORS["KL-DPG"], False),
        "sft": ("SFT on labels (.1, .9)", _COLORS["SFT"], False),
    }
    for path in paths["path"].unique(maintain_order=True):
        points = paths.filter(pl.col("path") == path).select("a", "b", "c").to_numpy()
        if path in names:
            name, color, dashed = names[path]
            layers.append(Curve(name, *_on_simplex(points), color, dashed=dashed))
        else:
            x, y = _on_simplex(points)
            layers.insert(
                1,
                Points("GRPO, groups of 8", x, y, Marker(_COLORS["GRPO"], "square", size=1.5, opacity=0.4, line=True)),
            )
    for name, point, symbol in (
        ("base", FIRST_CHECK, "circle"),
        ("KL-minimal correct policy", projection.i_projection(FIRST_CHECK, FIRST_CORRECT), "star"),
    ):
        layers.append(Points(name, *_on_simplex(point[None]), Marker(INK, symbol, size=12 if symbol == "star" else 7)))
    texts = [(-0.13, -0.09, "a, correct"), (0.93, -0.09, "b, correct"), (0.51, 0.86, "c, wrong")]
    return Panel(
        "Three outcomes",
        Axis("", (-0.2, 1.2), percent=False),
        Axis("", (-0.12, 0.95), percent=False),
        layers,
        equal=True,
        texts=texts,
    )


def _convergence_panel(curves: pl.DataFrame) -> Panel:
    layers: list[Layer] = []
    for curve, (name, color) in _CURVES.items():
        rows = curves.filter(pl.col("curve") == curve)
        layers.append(Curve(name, floats(rows, "round"), np.maximum(floats(rows, "distance"), 1e-9), color))
    return Panel(
        "Alternation",
        Axis("rounds", percent=False, log=True),
        Axis("total variation from the nearest correct policy", (5e-10, 2), percent=False, log=True),
        layers,
    )


def _excess_panel(gradients: pl.DataFrame, kind: str, title: str) -> Panel:
    layers: list[Layer] = []
    group = _smallest_group(gradients)
    accuracies = gradients["accuracy"].unique().sort().to_list()
    for name, flow in ((name, flow) for name, flow in FLOWS.items() if name != "natural-gradient"):
        estimates = [_estimate(_of(gradients, kind, accuracy, flow), "excess") for accuracy in accuracies]
        means = np.array([estimate.mean for estimate in estimates])
        if means.max() > AGREE:  # a tie stays a tie, and 0 is on no logarithmic axis
            color = _COLORS[flow.removesuffix(", exact")]
            layers.append(Curve(flow, np.array(accuracies), means, color, dashed=name == "grpo"))
    for index, method in enumerate(SAMPLED.values()):
        algorithm = f"{method}, groups of {group}"
        estimates = [_estimate(_of(gradients, kind, accuracy, algorithm), "excess") for accuracy in accuracies]
        means = np.array([estimate.mean for estimate in estimates])
        halves = np.array([np.nan if estimate.half is None else estimate.half for estimate in estimates])
        layers.append(
            Points(
                algorithm,
                np.array(accuracies) + 0.012 * (index - 1.5),
                means,
                Marker(_COLORS[method], _SYMBOLS[method], line=kind == "even"),
                interval=Interval(np.maximum(means - halves, 1e-3), means + halves),
            )
        )
    return Panel(
        title,
        Axis("accuracy of the base", (0.0, 1.0)),
        Axis(f"excess KL at {UNTIL:.0%} accuracy, nats", (1e-3, 3), percent=False, log=True),
        layers,
    )
