"""On-policy data or negative examples: which of the two makes RL forget less? The paper's Fig. 4, on this task."""

from collections.abc import Mapping, Sequence

import polars as pl

from rlrazor.analysis.statistics import (
    Estimate,
    at_accuracy,
    best_checkpoints,
    direction,
    floats,
    in_all_seeds,
    shared_threshold,
)
from rlrazor.errors import RazorError
from rlrazor.report.drawing import PALETTE, Axis, Figure, Layer, Panel, Points
from rlrazor.report.figures import staircase
from rlrazor.report.layers import base, cloud, height, learnt, level, means
from rlrazor.report.sections.statistics import kept_table, over_seeds
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import Table
from rlrazor.report.text import INTERVALS, how_many, in_words, nats, signed
from rlrazor.studies.engine import PlainStudy
from rlrazor.studies.grids import LRS, Grid

# Method -> (on-policy, with negative examples), unless the config says otherwise.
Quadrants = Mapping[str, tuple[bool, bool]]
QUADRANTS: Quadrants = {
    "grpo": (True, True),
    "reinforce": (True, False),
    "sft-2": (False, False),
    "simpo": (False, True),
}
KL = "kl_forward"
ON_POLICY, NEGATIVES, INTERACTION = "being on-policy", "negative examples", "interaction"

_COLORS = {(True, True): PALETTE[0], (True, False): PALETTE[5], (False, False): PALETTE[4], (False, True): PALETTE[1]}
_SYMBOLS = {True: "diamond", False: "circle"}  # with negative examples, without


def applies(study: Study) -> bool:
    """Whether the sweep's config says which methods the four are, and it has runs of them all."""
    return "quadrants" in study.description and len(_present(study)) == len(QUADRANTS)


def quadrants_of(study: Study) -> Quadrants:
    """The four methods, one for each quadrant.

    Those of the config's `quadrants`: method -> [on-policy, with negatives]. Where it names several for a quadrant, the
    first that the study has runs of. Raises RazorError where it leaves a quadrant without a method.
    """
    named: Mapping[str, Sequence[bool]] = study.description.get("quadrants", QUADRANTS)
    first: dict[tuple[bool, bool], str] = {}
    for method in sorted(named, key=lambda name: name not in study.methods):
        own, wrong = named[method]
        first.setdefault((bool(own), bool(wrong)), method)
    if len(first) < len(QUADRANTS):
        raise RazorError(
            "The config's quadrants leave one of the four without a method: on-policy or offline, each with and "
            "without negatives."
        )
    return {method: of for of, method in first.items()}


def section(study: Study) -> Section:
    """The four methods at equal accuracy, and what each of the two factors is worth."""
    four = quadrants_of(study)
    points = study.points.filter(pl.col("method").is_in(list(four)))
    levels = _levels(study, points)
    worth = {at: effects(best_checkpoints(points, ["method"], at), "prior", four) for at in levels}
    grids = points.group_by("method").agg(pl.col("lr").unique().sort())["lr"].n_unique()
    names = {(method,): _name(study, method) for method in _present(study)}
    return Section(
        "quadrants",
        "On-policy data or negative examples?",
        "RL differs from SFT in two ways: it learns from its own samples, and from wrong ones too. The paper’s Fig. 4 "
        f"takes the two apart. Here {_label(study, four, True, True)} is on-policy with negatives, "
        f"{_label(study, four, True, False)} on-policy without, {_label(study, four, False, True)} offline with those "
        f"of another policy, and {_label(study, four, False, False)} offline without. Which of them keeps the prior "
        "task?",
        finding(study, worth),
        _figure(study, points, levels),
        [
            kept_table(points, ["method"], names, {*study.thresholds, *levels}, study.kl_unit),
            *([_worth_table(study, points, worth)] if worth else []),
        ],
        f"{how_many(len(points), 'checkpoint')} of {how_many(points['trajectory'].n_unique(), 'run')}, "
        f"{how_many(len(study.seeds), 'seed')}. Kept: per method and seed, the prior accuracy of the best checkpoint "
        "with at least the new accuracy given. It is chosen on the score shown, for all methods alike"
        f"{', which have the same learning rates' if grids == 1 else ', whose learning rates differ'}. "
        "The verdicts are at the lowest and the highest threshold that all four reach in all seeds. "
        f"{ON_POLICY.capitalize()}: mean of the two on-policy methods minus mean of the two offline ones. "
        f"{NEGATIVES.capitalize()}: mean of the two with them minus mean of the two without. "
        f"{INTERACTION.capitalize()}: what negatives are worth on-policy minus what they are worth offline. "
        f"{INTERVALS} Lines: frontiers over all seeds. The axes of what is kept fit the means; an interval may reach "
        "beyond.",
    )


def _levels(study: Study, points: pl.DataFrame) -> list[float]:
    """The thresholds above the base's new accuracy that all four reach in all seeds, ascending; none, or one below."""
    highest = shared_threshold(points, study.bases, ["method"], _ladder(study))
    if highest is None or len(in_all_seeds(at_accuracy(points, ["method"], highest), points)) < len(QUADRANTS):
        return []
    untuned = max(study.bases["new"])
    return sorted({highest, *(at for at in study.thresholds if untuned < at <= highest)})


def _ladder(study: Study) -> list[float]:
    """The thresholds, and three points below the lowest: where the four can be compared at all."""
    return [*(round(study.thresholds[0] - point / 100, 4) for point in (3, 2, 1)), *study.thresholds]


def effects(kept: pl.DataFrame, column: str, quadrants: Quadrants = QUADRANTS) -> Mapping[str, Estimate]:
    """The main effects and the interaction of the 2 x 2, of `column`, over the seeds that all four methods have.

    `kept` has a row per method and seed. Empty where no seed has all four.
    """
    scores: dict[int, dict[tuple[bool, bool], float]] = {}
    for row in kept.sort("seed").to_dicts():
        scores.setdefault(row["seed"], {})[quadrants[row["method"]]] = row[column]
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
    missing = [study.label(method) for method in quadrants_of(study) if method not in study.methods]
    if missing:
        return f"The four cannot be compared: there are no runs of {in_words(missing)}."
    if not worth:
        return (
            f"The four cannot be compared: at no new accuracy above the base’s, from {_ladder(study)[0]:.0%} to "
            f"{_ladder(study)[-1]:.0%}, are there checkpoints of all four in all seeds."
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


def _worth_table(study: Study, points: pl.DataFrame, worth: Mapping[float, Mapping[str, Estimate]]) -> Table:
    at = max(worth)
    kl = effects(best_checkpoints(points, ["method"], at), KL, quadrants_of(study))
    rows = [
        [name, *(signed(of_level[name]) for of_level in worth.values()), signed(kl[name], nats)]
        for name in (ON_POLICY, NEGATIVES, INTERACTION)
    ]
    headers = ["factor", *(f"prior accuracy at new ≥ {level:.0%}, points" for level in worth)]
    return Table("What each is worth", [*headers, f"forward KL at new ≥ {at:.0%}, {study.kl_unit}"], rows)


def _figure(study: Study, points: pl.DataFrame, levels: Sequence[float]) -> Figure:
    new, four = learnt(study), quadrants_of(study)
    panels = [
        Panel(
            "Learning against drift",
            Axis(f"forward KL, {study.kl_unit}", percent=False),
            Axis("new accuracy", new),
            [*(_cloud(study, points, method, KL, "new") for method in _present(study)), base(study, KL, "new")],
        ),
        Panel(
            "Trade-off",
            Axis("new accuracy", new),
            Axis("prior accuracy"),
            [
                *(_cloud(study, points, method, "new", "prior") for method in _present(study)),
                *(
                    staircase(_name(study, method), points.filter(pl.col("method") == method), _COLORS[four[method]])
                    for method in _present(study)
                ),
                base(study, "new", "prior"),
            ],
        ),
    ]
    panels += [_factors(study, points, at) for at in sorted({*levels[:1], *levels[-1:]})]
    return Figure("quadrants", panels, columns=3 if len(panels) == 3 else 2)


def _factors(study: Study, points: pl.DataFrame, at: float) -> Panel:
    """The 2 x 2 itself: what is kept without and with negatives, a line for each kind of data."""
    cells = at_accuracy(points, ["method"], at, ["prior"])
    four = quadrants_of(study)
    layers: list[Layer] = []
    texts = []
    for on_policy, color in ((True, PALETTE[0]), (False, PALETTE[1])):
        pair = sorted((method for method in four if four[method][0] is on_policy), key=lambda name: four[name][1])
        rows = pl.concat(cells.filter(pl.col("method") == method) for method in pair)
        # Beside each other, not to hide an interval behind another.
        at_x = [float(four[method][1]) + (-0.02 if on_policy else 0.02) for method in rows["method"]]
        label = "on-policy" if on_policy else "offline"
        layers.append(means(label, rows, at_x, "prior", color, "square"))
        texts += [(x, row["prior"], study.label(row["method"])) for x, row in zip(at_x, rows.to_dicts(), strict=True)]
    prior = float(floats(study.bases, "prior").mean())
    layers.append(level("base’s prior accuracy", prior, (-0.3, 1.5)))
    return Panel(
        f"Kept at new ≥ {at:.0%}",
        Axis("", (-0.3, 1.5), ticks=[(0.0, "without negatives"), (1.0, "with negatives")]),
        Axis("prior accuracy", height(layers)),
        layers,
        texts=[text for text in texts if text[1] is not None],
    )


def _cloud(study: Study, points: pl.DataFrame, method: str, x: str, y: str) -> Points:
    own = points.filter(pl.col("method") == method)
    of = quadrants_of(study)[method]
    return cloud(_name(study, method), own, x, y, _COLORS[of], _SYMBOLS[of[1]])


def _name(study: Study, method: str) -> str:
    on_policy, negatives = quadrants_of(study)[method]
    return (
        f"{study.label(method)}: {'on-policy' if on_policy else 'offline'}, {'with' if negatives else 'no'} negatives"
    )


def _present(study: Study) -> list[str]:
    return [method for method in quadrants_of(study) if method in study.methods]


def _label(study: Study, four: Quadrants, on_policy: bool, negatives: bool) -> str:
    return next(study.label(method) for method, of in four.items() if of == (on_policy, negatives))


def grids(quick: bool) -> list[Grid]:
    """Its runs."""
    return [Grid(("grpo", "reinforce", "sft-2", "simpo"), LRS[1:4] if quick else LRS)]


STUDY = PlainStudy(grids, section)
