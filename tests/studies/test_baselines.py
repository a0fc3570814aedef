"""Today's methods above and below RL, as planted, and how their strengths pool."""

from rlrazor.analysis import frontier
from rlrazor.report.drawing import Curve
from rlrazor.report.study import Study
from rlrazor.runs.records import RunSpec
from rlrazor.studies.baselines import STUDY
from study_tables import NEWS, check, numbers_of, planted

KEPT = {"grpo": 0.6, "kl-dpg": 0.65, "oracle": 0.7, "sft-2": 0.3, "replay": 0.63, "dft": 0.31, "lora": 0.4}
KEPT |= {"ewc": 0.5, "lwf": 0.45, "dft+kl": 0.35}
JITTER = (0.0, 0.01, -0.01)


def study(kept: dict[str, float], low: tuple[str, ...] = (), unlucky: str = "") -> Study:
    """Method -> prior accuracy at 95 %, a little more with more strength, and a little other in every method."""

    def prior(spec: RunSpec) -> float:
        own = 0.001 * len(spec.method) * (spec.seed - 1)
        strength: float = spec.params.get("strength", 0.0)
        return kept[spec.method] + 1e-6 * strength + JITTER[spec.seed] + own

    def news(spec: RunSpec) -> tuple[float, ...]:
        return (0.92, 0.94) if spec.method in low or (spec.method == unlucky and spec.seed) else NEWS

    return planted("baselines", prior, news=news, drift=lambda spec: 2 - kept[spec.method])


def test_the_best_with_and_without_prior_data_against_rl() -> None:
    found = numbers_of(study(KEPT))
    assert found["with-data.arm"] == "replay *"
    assert found["with-data.grpo.verdict"] == "better"
    assert found["with-data.kl-dpg.verdict"] == found["with-data.oracle.verdict"] == "worse"
    assert found["with-data.prior"] == found["replay.prior"]
    assert (found["ewc.1000.lrs"], found["ewc.1000.budget"]) == ("3", "3")
    assert found["without-data.arm"] == "lwf, λ = 1"
    assert found["without-data.grpo.verdict"] == "worse"
    assert found["ewc.1000.verdict"] == "worse"
    assert found["sft-2.verdict"] == "worse"
    assert found["ranks.correlation"] == "−0.99"  # not −1: strengths differ in what they keep, not in KL


def test_the_opposite() -> None:
    found = numbers_of(study({**KEPT, "lora": 0.75, "ewc": 0.72}))
    assert (found["with-data.arm"], found["with-data.grpo.verdict"]) == ("ewc, λ = 10000 *", "better")
    assert (found["without-data.arm"], found["without-data.oracle.verdict"]) == ("lora, rank 8", "better")


def test_lucky_seeds_lead_nothing() -> None:
    """A method that gets there in one seed of three is not the best, however much it keeps."""
    found = numbers_of(study({**KEPT, "replay": 0.77}, unlucky="replay"))
    assert found["replay.n"] == "1 of 3"
    assert found["replay.verdict"] == "not comparable"
    assert found["with-data.arm"] == "ewc, λ = 10000 *"


def test_section_pools_strengths_and_ranks_arms() -> None:
    planted_study = study(KEPT, low=("dft",))
    section = STUDY.section(planted_study)
    check(section, "baselines")
    assert "not comparable: dft." in section.finding
    trade_off, kept, forgotten, reached = section.figure.panels
    assert forgotten.title.startswith("Forgotten at new ≥ ")
    assert reached.title == "How far each learning rate gets"
    [line] = [layer for layer in trade_off.layers if isinstance(layer, Curve) and layer.label == "ewc"]
    own = planted_study.points.filter(method="ewc")
    new, prior = (own[name].to_numpy() for name in ("new", "prior"))
    best = frontier.pareto_set(new, prior)
    assert sorted(zip(line.x, line.y, strict=True)) == sorted(zip(new[best], prior[best], strict=True))
    names = [name for _, name in kept.y.ticks or ()]
    assert names[-2:] == ["kl-dpg", "oracle"]  # who keeps most on top
    assert names[0] == "dft"
    assert len(names) == 15
