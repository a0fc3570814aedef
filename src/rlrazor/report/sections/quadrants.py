"""On-policy data or negative examples: which of the two makes RL forget less? The paper's Fig. 4, on this task."""

from collections.abc import Mapping, Sequence

import polars as pl

from rlrazor.report.drawing import PALETTE, Figure, Layer, Panel, Points, floats
from rlrazor.report.figures import staircase
from rlrazor.report.sections.layers import base, cloud, height, learnt, level, means
from rlrazor.report.sections.statistics import (
    INTERVALS,
    at_accuracy,
    best_checkpoints,
    direction,
    how_many,
    in_all_seeds,
    in_words,
    kept_table,
    nats,
    over_seeds,
    shared_threshold,
    signed,
)
from rlrazor.report.sections.study import Section, Study
from rlrazor.report.tables import THRESHOLDS, Estimate, Table

# Method -> (on-policy, with negative examples).
QUADRANTS = {"grpo": (True, True), "reinforce": (True, False), "sft-2": (False, False), "simpo": (False, True)}
LEVELS = (*reversed(THRESHOLDS), 0.94, 0.93, 0.92)
KL = "kl_forward"
ON_POLICY, NEGATIVES, INTERACTION = "being on-policy", "negative examples", "interaction"

_COLORS = {"grpo": PALETTE[0], "reinforce": PALETTE[5], "sft-2": PALETTE[4], "simpo": PALETTE[1]}
_SYMBOLS = {True: "diamond", False: "circle"}  # with negative examples, without


def section(study: Study) -> Section:
    """The four methods at equal accuracy, and what each of the two factors is worth."""
    points = study.points.filter(pl.col("method").is_in(list(QUADRANTS)))
    levels = _levels(study, points)
    worth = {at: effects(best_checkpoints(points, ["method"], at), "prior") for at in levels}
    names = {(method,): _name(study, method) for method in _present(study)}
    return Section(
        "quadrants",
        "On-policy data or negative examples?",
        "RL differs from SFT in two ways: it learns from its own samples, and from wrong ones too. The paper’s Fig. 4 "
        "takes the two apart with GRPO, 1-0 REINFORCE (no negatives), SFT, and SimPO (offline, negatives of an "
        "external policy). Which of them keeps the prior task?",
        finding(study, worth),
        _figure(study, points, levels),
        [
            kept_table(points, ["method"], names, {*THRESHOLDS, *levels}),
            *([_worth_table(points, worth)] if worth else []),
        ],
        f"{how_many(len(points), 'checkpoint')} of {how_many(points['trajectory'].n_unique(), 'run')}, "
        f"{how_many(len(study.seeds), 'seed')}. Kept: per method and seed, the prior accuracy of the best checkpoint "
        "with at least the new accuracy given. It is chosen on the score shown, for all methods alike, which have the "
        "same learning rates. The verdicts are at the lowest and the highest threshold that all four reach in all "
        "seeds. "
        f"{ON_POLICY.capitalize()}: mean of the two on-policy methods minus mean of the two offline ones. "
        f"{NEGATIVES.capitalize()}: mean of the two with them minus mean of the two without. "
        f"{INTERACTION.capitalize()}: what negatives are worth on-policy minus what they are worth offline. "
        f"{INTERVALS} Lines: frontiers over all seeds. The axes of what is kept fit the means; an interval may reach "
        "beyond.",
    )


def _levels(study: Study, points: pl.DataFrame) -> list[float]:
    """The thresholds above the base's new accuracy that all four reach in all seeds, ascending; none, or one below."""
    highest = shared_threshold(points, study.bases, ["method"], LEVELS)
    if highest is None or len(in_all_seeds(at_accuracy(points, ["method"], highest), points)) < len(QUADRANTS):
        return []
    untuned = max(study.bases["new"])
    return sorted({highest, *(at for at in THRESHOLDS if untuned < at <= highest)})


def effects(kept: pl.DataFrame, column: str) -> Mapping[str, Estimate]:
    """The main effects and the interaction of the 2 x 2, of `column`, over the seeds that all four methods have.

    `kept` has a row per method and seed. Empty where no seed has all four.
    """
    scores: dict[int, dict[tuple[bool, bool], float]] = {}
    for row in kept.sort("seed").to_dicts():
        scores.setdefault(row["seed"], {})[QUADRANTS[row["method"]]] = row[column]
    whole = [of for of in scores.values() if len(of) == len(QUADRANTS)]
    if not whole:
        return {}
    on_policy = [(of[True, True] + of[True, False] - of[False, True] - of[False, False]) / 2 for of in whole]
    negatives = [(of[True, True] + of[False, True] - of[True, False] - of[False, False]) / 2 for of in whole]
    interaction = [of[True, True] - of[True, False] - of[False, True] + of[False, False] for of in whole]
    return {
        ON_POLICY: Estimate.over(on_policy),
        NEGATIVES: Estimate.over(negatives),
        INTERACTION: Estimate.over(interaction),
    }


def finding(study: Study, worth: Mapping[float, Mapping[str, Estimate]]) -> str:
    """What being on-policy is worth against what negative examples are, in prior accuracy: new >= level -> effects."""
    missing = [study.label(method) for method in QUADRANTS if method not in study.methods]
    if missing:
        return f"The four cannot be compared: there are no runs of {in_words(missing)}."
    if not worth:
        return (
            f"The four cannot be compared: at no new accuracy above the base’s, from {min(LEVELS):.0%} to "
            f"{max(LEVELS):.0%}, are there checkpoints of all four in all seeds."
        )
    lowest, highest = min(worth), max(worth)
    seeds = len(study.seeds)
    sizes = {at: [signed(worth[at][name]) for name in (ON_POLICY, NEGATIVES)] for at in (lowest, highest)}
    verdicts = {at: _verdict(worth[at], seeds) for at in (lowest, highest)}
    further = ""
    if lowest < highest:
        same = verdicts[lowest] == verdicts[highest]
        further = (
            f"; at {highest:.0%}, the highest that all four reach, they are worth {' and '.join(sizes[highest])}: "
            f"{'the same' if same else verdicts[highest]}"
        )
    return (
        f"At a new accuracy of at least {lowest:.0%}, {ON_POLICY} is worth {sizes[lowest][0]} points of prior accuracy "
        f"and {NEGATIVES} {sizes[lowest][1]}: {verdicts[lowest]}{further} ({over_seeds(seeds)})."
    )


def _verdict(worth: Mapping[str, Estimate], seeds: int) -> str:
    on_policy, negatives = (direction(worth[name], seeds) for name in (ON_POLICY, NEGATIVES))
    if on_policy > 0 and negatives > 0:
        larger = ON_POLICY if worth[ON_POLICY].mean > worth[NEGATIVES].mean else NEGATIVES
        return f"both keep prior accuracy, {larger} more of it"
    if on_policy == negatives == 0:
        return "neither makes a difference that can be told from chance"
    chance = "no difference that can be told from chance"
    own = {1: "keeps prior accuracy", 0: f"makes {chance}", -1: "costs prior accuracy"}[on_policy]
    others = {1: "keep prior accuracy", 0: f"make {chance}", -1: "cost prior accuracy"}[negatives]
    paper = {1: ", as the paper finds", 0: "", -1: ", against the paper"}[on_policy]
    return f"{ON_POLICY} {own}, {NEGATIVES} {others}{paper}"


def _worth_table(points: pl.DataFrame, worth: Mapping[float, Mapping[str, Estimate]]) -> Table:
    at = max(worth)
    kl = effects(best_checkpoints(points, ["method"], at), KL)
    rows = [
        [name, *(signed(of_level[name]) for of_level in worth.values()), signed(kl[name], nats)]
        for name in (ON_POLICY, NEGATIVES, INTERACTION)
    ]
    headers = ["factor", *(f"prior accuracy at new ≥ {level:.0%}, points" for level in worth)]
    return Table("What each is worth", [*headers, f"forward KL at new ≥ {at:.0%}, nats"], rows)


def _figure(study: Study, points: pl.DataFrame, levels: Sequence[float]) -> Figure:
    new = learnt(study)
    panels = [
        Panel(
            "Learning against drift",
            "forward KL, nats",
            "new accuracy",
            [*(_cloud(study, points, method, KL, "new") for method in _present(study)), base(study, KL, "new")],
            y_range=new,
            x_percent=False,
        ),
        Panel(
            "Trade-off",
            "new accuracy",
            "prior accuracy",
            [
                *(_cloud(study, points, method, "new", "prior") for method in _present(study)),
                *(
                    staircase(_name(study, method), points.filter(pl.col("method") == method), _COLORS[method])
                    for method in _present(study)
                ),
                base(study, "new", "prior"),
            ],
            new,
        ),
    ]
    panels += [_factors(study, points, at) for at in sorted({*levels[:1], *levels[-1:]})]
    return Figure("quadrants", panels, columns=3 if len(panels) == 3 else 2)


def _factors(study: Study, points: pl.DataFrame, at: float) -> Panel:
    """The 2 x 2 itself: what is kept without and with negatives, a line for each kind of data."""
    cells = at_accuracy(points, ["method"], at, ["prior"])
    layers: list[Layer] = []
    texts = []
    for on_policy, color in ((True, PALETTE[0]), (False, PALETTE[1])):
        pair = [method for method in ("reinforce", "sft-2", "grpo", "simpo") if QUADRANTS[method][0] is on_policy]
        rows = pl.concat(cells.filter(pl.col("method") == method) for method in pair)
        # Beside each other, not to hide an interval behind another.
        at_x = [float(QUADRANTS[method][1]) + (-0.02 if on_policy else 0.02) for method in rows["method"]]
        label = "on-policy" if on_policy else "offline"
        layers.append(means(label, rows, at_x, "prior", color, "square"))
        texts += [(x, row["prior"], study.label(row["method"])) for x, row in zip(at_x, rows.to_dicts(), strict=True)]
    prior = float(floats(study.bases, "prior").mean())
    layers.append(level("base’s prior accuracy", prior, (-0.3, 1.5)))
    return Panel(
        f"Kept at new ≥ {at:.0%}",
        "",
        "prior accuracy",
        layers,
        (-0.3, 1.5),
        height(layers),
        x_ticks=[(0.0, "without negatives"), (1.0, "with negatives")],
        texts=[text for text in texts if text[1] is not None],
    )


def _cloud(study: Study, points: pl.DataFrame, method: str, x: str, y: str) -> Points:
    own = points.filter(pl.col("method") == method)
    return cloud(_name(study, method), own, x, y, _COLORS[method], _SYMBOLS[QUADRANTS[method][1]])


def _name(study: Study, method: str) -> str:
    on_policy, negatives = QUADRANTS[method]
    return (
        f"{study.label(method)}: {'on-policy' if on_policy else 'offline'}, {'with' if negatives else 'no'} negatives"
    )


def _present(study: Study) -> list[str]:
    return [method for method in QUADRANTS if method in study.methods]
