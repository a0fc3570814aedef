"""`--generic self` from end to end: the monitor, compare, pick, laws, calibrate and finetune on what a base writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from laws import GENERIC, PROMPTS, SETTINGS, changed, law_of, saved_with_generic
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.experiments.language import world
from rlrazor.guard import ForgettingMonitor, Measuring
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.law_schema import LawProbe
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.lm import kl, own_texts, probes
from rlrazor.lm.models import load
from rlrazor.lm.probes import GenericText, ProbeSettings
from rlrazor.report import drawing
from tiny_models import char_tokenizer, saved, tiny_llama
from watching import trainer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
OWN = GenericText.of_base(samples=20, max_new_tokens=9, seed=3)
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% endfor %}"


def law_on(generic: GenericText) -> LawFile:
    """A law of the tiny Llama whose generic probe is this."""
    law = law_of(tiny_llama(), scale=20.0)
    return changed(law, probe=LawProbe.of(MeasuredOn(PROMPTS, generic, law.settings)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a run that was watched on what the base writes: a log, and its last checkpoint."""
    root = tmp_path_factory.mktemp("own")
    saved(root / "base", tiny_llama(), char_tokenizer())
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    monitor = ForgettingMonitor(PROMPTS, settings=SETTINGS, generic="self", every=3, cache_dir=root / "cache")
    config = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(root / "run", [monitor], load(root / "base").model, **config).train()
    return root


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "run" / "razor.jsonl").read_text().splitlines()]


def test_monitor_compare_and_pick_measure_the_same(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (first, last), base = logged(run), load(run / "base")
    own = probes.of_generic(base.model, base.tokenizer, GenericText.of_base(), SETTINGS)
    assert max(map(len, own.completions)) == 63  # what the context holds
    by_hand = kl.forward_kl(kl.Probe(base.model, own), load(run / "run" / "checkpoint-6").model).per_completion
    assert (last["kl_probe"], last["kl_probe_stderr"]) == pytest.approx(by_hand, rel=1e-4)
    assert last["prompts"]["kl_probe"] == 64
    assert 0 < first["kl_probe"] < last["kl_probe"]
    how = ["--prompts", str(run / "prompts.txt"), "--generic", "self", "--max-new-tokens", "6", "--no-chat"]
    page = tmp_path / "page.html"
    compared = ["compare", str(run / "base"), str(run / "run" / "checkpoint-6"), *how, "--out", str(page)]
    assert main([*compared, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["kl"]["kl_probe"]["mean"] == pytest.approx(by_hand.mean, rel=1e-4)
    assert found["settings"]["generic_rows"] == 64
    assert found["settings"]["generic_own"] == {"samples": 64, "max_new_tokens": 128, "seed": 0}
    assert "64 texts of at most 128 tokens, which the base wrote from nothing, seed 0" in page.read_text()
    # A second time they come from the cache, and so they do for pick.
    monkeypatch.setattr(own_texts, "draw", None)
    assert main(compared) == 0
    assert "which the base wrote from nothing" in " ".join(capfd.readouterr().out.split())
    picked = ["pick", str(run / "run"), "--metric", "loss", "--base", str(run / "base"), *how, "--json"]
    assert main(picked) == 0
    (_, of_last) = json.loads(capfd.readouterr().out)["candidates"]
    assert of_last["kl"]["kl_probe"]["mean"] == pytest.approx(by_hand.mean, rel=1e-4)
    for command in (compared, picked):
        assert main([*command, "--generic", "./self"]) == 2
        assert "There is no self, which --generic names" in capfd.readouterr().err


def test_a_law_keeps_how_the_texts_are_drawn(tmp_path: Path) -> None:
    law, path = law_on(OWN), tmp_path / "law.json"
    law.save(path)
    assert json.loads(path.read_text())["probe"]["generic"] == {"own": {"samples": 20, "max_new_tokens": 9, "seed": 3}}
    again = LawFile.load(path)
    assert again == law
    assert again.generic == OWN
    assert probes.probe_hash(again.settings, again.generic) == probes.probe_hash(law.settings, OWN)
    # One of before has texts and no more.
    law_of(tiny_llama()).save(path)
    assert set(json.loads(path.read_text())["probe"]["generic"]) == {"texts"}
    assert LawFile.load(path).generic == GENERIC
    for wrong, said in (
        ({"own": {"samples": 0, "max_new_tokens": 9, "seed": 3}}, "samples must be at least 1"),
        ({"own": {"samples": 20, "max_new_tokens": 0, "seed": 3}}, "max_new_tokens must be at least 1"),
        ({"own": {"samples": 20, "max_new_tokens": 9}}, "lacks probe.generic.own.seed"),
        ({"own": {"samples": 20, "max_new_tokens": 9, "seed": "3"}}, "seed"),
        ({"own": {"samples": 20, "max_new_tokens": 9, "seed": 3}, "texts": ["a"]}, "one of the three"),
        ({}, "one of the three"),
    ):
        saved_with_generic(law, path, wrong)
        with pytest.raises(RazorError, match=said):
            LawFile.load(path)


def test_a_law_says_what_a_monitor_has_the_base_write(tmp_path: Path) -> None:
    law, model = law_on(OWN), tiny_llama()
    for other in ("self", GenericText.of_base(samples=20, max_new_tokens=9, seed=4), GENERIC):
        with pytest.raises(RazorError, match="calibrated with another `generic`"):
            ForgettingMonitor(PROMPTS, law, measuring=Measuring(generic=other))
    monitor = ForgettingMonitor(PROMPTS, law, generic=OWN, every=6, cache_dir=tmp_path / "cache")
    trainer_of(tmp_path, [monitor], model).train()
    assert monitor.base is not None
    expected = probes.of_generic(tiny_llama(), char_tokenizer(), OWN, law.settings)
    assert monitor.base.probes["kl_probe"].sequences == expected
    assert monitor.readings[-1].kl["kl_probe"].mean > 0
    # What it has logged is of that law's probe, and of no other's.
    row = json.loads((tmp_path / "razor.jsonl").read_text())
    assert row["probe"] == probes.probe_hash(law.settings, OWN)
    assert row["probe"] != probes.probe_hash(law.settings, GenericText.of_base(samples=20, max_new_tokens=9))


def test_texts_that_say_little_are_told_of(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a base that has one token to say."""
    model = tiny_llama(max_position_embeddings=128)
    with torch.no_grad():
        embedded = model.model.embed_tokens.weight
        embedded.zero_()
        embedded[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[9, 0] = 20.0
    monitor = ForgettingMonitor(PROMPTS, settings=SETTINGS, generic="self", every=6, cache_dir=tmp_path / "cache")
    trainer_of(tmp_path / "run", [monitor], model).train()
    out, err = capfd.readouterr()
    said = " ".join((out + err).split())
    assert "The 64 texts that the base wrote for the generic probe are one and the same, and all loop" in said
    assert "KL on it says little of what the base can do." in said


@pytest.fixture
def task(tmp_path: Path) -> list[str]:
    """Options of a user's own task, with one prior task from a mirror."""
    rows: list[dict[str, Any]] = [{"prompt": f"{a}{n}=", "completion": a} for n, a in enumerate("abcdefghij" * 4)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mirror").mkdir()
    rows = [{"sentence": f"a {n} _ b", "option1": "cat", "option2": "dog", "answer": str(1 + n % 2)} for n in range(6)]
    (tmp_path / "mirror" / "winogrande_validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        *("--prompts", str(tmp_path / "own.jsonl"), "--generic", "self", "--prior", "winogrande"),
        *("--data-mirror", str(tmp_path / "mirror"), "--test-prompts", "6", "--max-new-tokens", "4"),
        *("--max-steps", "4", "--checkpoints-per-epoch", "2", "--warmup-steps", "0", "--precision", "float32"),
    ]


def test_finetune_and_calibrate(
    task: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(drawing, "save", lambda *arguments, **options: None)
    world.last_world.clear()
    tokenizer = char_tokenizer()
    tokenizer.chat_template = TEMPLATE
    folder = saved(tmp_path / "base", tiny_llama(len(tokenizer), max_position_embeddings=256), tokenizer)
    tune = ["finetune", str(folder), *task, "--method", "sft", "--lr", "1e-2", "--batch-size", "4", "--json"]
    assert main([*tune, "--out", str(tmp_path / "one")]) == 0
    found = json.loads(capfd.readouterr().out)
    base = load(folder)
    settings = ProbeSettings(4)
    own = probes.of_generic(base.model, base.tokenizer, GenericText.of_base(), settings)
    assert len({*map(tuple, own.prompts)}) == 2  # the beginning of a text, and an empty turn
    tuned = load(found["model"]).model
    expected = kl.forward_kl(kl.Probe(base.model, own), tuned).per_completion
    last = found["records"][-1]
    assert last["drift"]["kl_probe"] == pytest.approx(expected.mean, rel=1e-4)
    assert last["metrics"]["kl_probe_stderr"] == pytest.approx(expected.stderr, rel=1e-4)
    out = tmp_path / "law"
    calibrate = ["calibrate", str(folder), *task, "--lrs", "1e-3,3e-3,1e-2", "--batch-sizes", "4", "--out", str(out)]
    assert main([*calibrate, "--seeds", "0", "--json"]) == 0
    law = LawFile.load(out / "law.json")
    assert law.generic == GenericText.of_base()
    assert {row.kl_probe for row in law.data} - {None}
    # The law's probe is the runs': the monitor's KL of the same model would be the same number.
    again = probes.of_generic(base.model, base.tokenizer, law.generic, law.settings)
    assert again == own
    # What reports of these runs say of the probe.
    said = (out / "config.json").read_text()
    assert "64 texts of at most 128 tokens that the base wrote from nothing" in said
    assert "sixty paragraphs on everyday topics that come" not in said
    world.last_world.clear()
