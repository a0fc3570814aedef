"""The whole path in the tiny world: a base, two arms, records, films, report; broken off, it ends at the same bits."""

import base64
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image
from rich.console import Console
from scipy.stats import binomtest  # type: ignore[attr-defined]  # scipy exports it dynamically

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.base import load_policy
from rlrazor.experiments.robot.config import Config
from rlrazor.experiments.robot.evaluate import HELD_OUT_SEED
from rlrazor.experiments.robot.experiment import Robot
from rlrazor.experiments.robot.policy import Acting
from rlrazor.experiments.robot.rollout import roll_out
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.world import episodes_of
from rlrazor.report import load, write_report
from rlrazor.report.results import Results
from rlrazor.runs import runner
from rlrazor.runs.records import RunSpec
from rlrazor.runs.store import Checkpoint, RunStore
from rlrazor.studies import kinds
from robot_worlds import Points

CONFIG = Config(
    methods=("sft", "reinforce"),
    lrs=(1e-3,),
    rl_lrs=(5e-4,),
    seeds=(0,),
    checkpoints_per_epoch=2,
    new_task="carry",
    prior_tasks=("reach", "touch"),
    updates=30,
    grid=4,
    per_start=2,
    rl_updates=4,
    starts=8,
    group_size=4,
    demonstrations=200,
    new_demonstrations=20,
    noise=0.1,
    bc_updates=200,
    bc_lr=3e-3,
    width=64,
    layers=2,
    heads=2,
    episodes=20,
    kl_episodes=6,
    thresholds=(0.3, 0.5),
    world="points",
)


class BrokenOffError(Exception):
    """Somebody pulled the plug."""


@dataclass(frozen=True)
class Fragile(Robot):
    """Breaks off in the middle of the runs by this method, once something was measured."""

    method: str = ""

    def train(self, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
        for checkpoint in super().train(spec, store):
            yield checkpoint
            if spec.method == self.method:
                raise BrokenOffError


def run(experiment: Robot, out: Path, config: Config = CONFIG) -> runner.Done:
    options = runner.Options(out, weights="final", preset="quick", command="razor reproduce robot")
    return runner.run(experiment, config, options, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("robot")
    assert run(Robot(cache=out / "cache", world=Points()), out / "run").trained == 3
    return out


@pytest.fixture(scope="module")
def table(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "run" / "records.parquet")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return load(folder / "run", kinds())


def records_of(out: Path) -> Mapping[str, str]:
    return {path.parent.name: path.read_text() for path in out.glob("runs/*/records.jsonl")}


def test_both_arms_learn_and_the_base_has_not_moved(table: pl.DataFrame) -> None:
    base = table.filter(method="base").row(0, named=True)
    assert 0.0 < base["new"] < 0.4
    assert base["prior"] > 0.7
    assert base["kl_forward"] == base["kl_forward_on_prior"] == base["forgetting"] == 0.0
    last = {name: table.filter(method=name).sort("step").row(-1, named=True) for name in CONFIG.methods}
    assert [last[name]["step"] for name in CONFIG.methods] == [30, 4]
    assert last["sft"]["new"] > base["new"]
    assert last["sft"]["prior"] < last["reinforce"]["prior"]
    for column in ("kl_forward", "kl_forward_on_prior"):
        assert 0.001 < last["reinforce"][column] < last["sft"][column]
    for row in last.values():
        assert row["forgetting"] == pytest.approx(base["prior"] - row["prior"])
        assert row["prior"] == pytest.approx((row["prior_reach"] + row["prior_touch"]) / 2)
        assert row["new"] == row["sampled_new"]
    demonstrated = table.filter(method="sft")["interactions"].unique().to_list()
    assert len(demonstrated) == 1  # all of it before the first update
    sampled = table.filter(method="reinforce")["interactions"].to_list()
    assert 2 * 8 * 4 * 5 < sampled[0] < sampled[1] <= 4 * 8 * 4 * Points().horizon


def test_scores_are_those_of_the_stored_policy_one_episode_after_another(folder: Path, table: pl.DataFrame) -> None:
    """By another path than the experiment's: a lane alone, one episode at a time, greedy, which needs no noise."""
    store, world = RunStore(folder / "run"), Points()
    (spec,) = (one for one in CONFIG.specs("points", ["reinforce"]))
    row = table.filter(run_id=spec.run_id).sort("step").row(-1, named=True)
    policy = load_policy(spec.root.params, world, store.load_weights(spec, row["step"]))
    for task, column in (("carry", "greedy_new"), ("touch", "greedy_touch")):
        episodes = episodes_of(world, task, CONFIG.episodes, seed=HELD_OUT_SEED, purpose="held out")
        with Simulators(world) as simulators:
            won = [roll_out(simulators, [one], Acting(policy), sampled=False, lanes=1)[0].success for one in episodes]
        assert np.mean(won) == pytest.approx(row[column], abs=1.5 / CONFIG.episodes)  # the last digits of a batch


def test_broken_off_it_goes_on_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    """In the middle of the second arm: the base and the first are kept, and nothing is trained twice."""
    world = Points()
    with pytest.raises(BrokenOffError):
        run(Fragile(cache=folder / "cache", world=world, method="reinforce"), tmp_path / "run")
    kept = records_of(tmp_path / "run")
    assert len(kept) == 2
    assert not (tmp_path / "run" / "records.parquet").exists()
    again = run(Robot(workers=1, cache=tmp_path / "another", world=world), tmp_path / "run")
    assert (again.trained, again.kept) == (1, 2)
    assert records_of(tmp_path / "run") == records_of(folder / "run")
    for run_id in kept:
        weights = [sorted((out / "run/runs" / run_id).glob("weights/*")) for out in (folder, tmp_path)]
        assert weights[0]
        assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]


def test_the_report_shows_success_with_wilsons_intervals(results: Results, table: pl.DataFrame) -> None:
    section = next(one for one in results.sections if one.name == "successes")
    assert section.warning.startswith("Success was measured on 20 episodes of each task, which tells it to within 20.1")
    cells = dict(zip(section.tables[0].headers, section.tables[0].rows[0], strict=True))
    base = table.filter(method="base").row(0, named=True)
    for mode in ("sampled", "greedy"):
        count = round(base[f"{mode}_new"] * CONFIG.episodes)
        found = binomtest(count, CONFIG.episodes).proportion_ci(method="wilson")
        assert (
            cells[f"new, {mode}, %"]
            == f"{100 * base[f'{mode}_new']:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
        )
    assert [panel.title for panel in section.figure.panels] == ["carry", "reach", "touch"]
    assert f"The base solves the new task in {100 * base['sampled_new']:.1f} % of the sampled episodes" in section.note


def test_the_report_has_prices_and_both_laws(results: Results, table: pl.DataFrame) -> None:
    found = {one.name: one for one in results.sections}
    assert {"successes", "interactions", "states", "predictors"} <= set(found)
    price = next(table for table in found["interactions"].tables if "steps of the environment" in table.title)
    reinforce = dict(zip(price.headers, price.rows[1], strict=True))
    rows = table.filter(method="reinforce").sort("step")
    last = list(reinforce.values())[-1]
    assert last == f"{100 * rows['new'][-1]:.1f} / {100 * rows['prior'][-1]:.1f}"
    errors = found["states"].tables[-1]
    sft = table.filter(method="sft").sort("step").row(-1, named=True)
    on_prior = dict(zip(errors.headers, errors.rows[0], strict=True))["the prior tasks’ states"]
    shown = {f"{sft['kl_forward_on_prior']:.3f} ± {sft['kl_forward_on_prior_stderr']:.3f}"}
    shown |= {f"{row['kl_forward_on_prior']:.3f} ± {row['kl_forward_on_prior_stderr']:.3f}" for row in table.to_dicts()}
    assert on_prior in shown
    titles = [panel.title for panel in found["states"].figure.panels]
    assert titles[:2] == ["KL on the new task’s states", "KL on the prior tasks’ states"]
    assert results.sweep is not None
    assert results.sweep.study.kl_unit == "nats per action"


def test_the_page_holds_films_before_and_after(folder: Path, results: Results) -> None:
    page = write_report(results).read_text()
    films = re.findall(r"data:image/gif;base64,([A-Za-z0-9+/=]+)", page)
    assert len(films) == 6  # of new and prior task: base, SFT, REINFORCE
    film = Image.open(io.BytesIO(base64.b64decode(films[0])))
    assert film.format == "GIF"
    film.seek(3)  # which raises EOFError where there is none
    assert len(re.findall("data:image/png;base64,", page)) >= 3
    assert "REINFORCE: carry, after, seed 0" in page


def test_without_a_way_to_draw_the_report_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: Any, **__: Any) -> Any:
        raise RazorError("Nothing can be rendered here: neither EGL nor OSMesa works.")

    monkeypatch.setattr("rlrazor.experiments.robot.films.frames_of", cannot)
    small = replace(CONFIG, methods=("sft",), updates=2, checkpoints_per_epoch=1)
    done = run(Robot(cache=folder / "cache", world=Points()), tmp_path, small)
    assert done.trained == 2
    section = next(one for one in load(tmp_path, kinds()).sections if one.name == "successes")
    assert section.figure.pictures == []
    assert "There are no films: Nothing can be rendered here: neither EGL nor OSMesa works." in section.note


def test_what_is_written_is_what_was_asked_for(folder: Path) -> None:
    described = json.loads((folder / "run" / "config.json").read_text())
    assert described["prior_tasks"] == ["reach", "touch"]
    assert described["families"] == {"RL": ["reinforce"], "SFT": ["sft"]}
    assert described["data"] == "points"
    assert described["config"]["rl_lrs"] == [5e-4]
