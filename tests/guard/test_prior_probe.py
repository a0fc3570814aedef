"""`--generic prior` from end to end: the monitor, compare, pick, laws and calibrate on the prior tasks' own prompts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from laws import GENERIC, PROMPTS, SETTINGS, changed, law_of, saved_with_generic
from own_tasks import metric, own_task
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.experiments.language import cost, tiny, world
from rlrazor.experiments.language.config import resolve
from rlrazor.experiments.language.setup import PriorSource, TaskSource, probed
from rlrazor.guard import ForgettingMonitor, Measuring, calibrate
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.law_schema import LawProbe
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.lm import probes, sampling
from rlrazor.lm.kl import Sequences
from rlrazor.lm.models import load
from rlrazor.lm.prior import PriorTasks
from rlrazor.lm.prior_prompts import PriorPrompts
from rlrazor.lm.probes import GenericText, ProbeSettings
from rlrazor.report import drawing
from tiny_models import char_tokenizer, saved, tiny_llama
from watching import trainer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
ASKED = GenericText(prompts=tuple(f"ask {letter}" for letter in "abcdefgh"), prior=PriorPrompts(("winogrande",)))
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% endfor %}"


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """Eight rows of a prior task, in the hub's schema."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    rows = [{"sentence": f"a {n} _ b", "option1": "cat", "option2": "dog", "answer": str(1 + n % 2)} for n in range(8)]
    (folder / "winogrande_validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def kl_by_hand(base: Any, tuned: Any, sequences: Sequences) -> float:
    """Nats per completion, from the logits of one prompt with its completion at a time."""
    sums = []
    for prompt, completion in zip(sequences.prompt_of, sequences.completions, strict=True):
        ids = torch.tensor([[*sequences.prompts[prompt], *completion]])
        with torch.no_grad():
            before, after = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (base, tuned))
        each = (before.exp() * (before - after)).sum(-1)
        sums.append(float(each[len(sequences.prompts[prompt]) - 1 : -1].sum()))
    return sum(sums) / len(sums)


def law_on(generic: GenericText) -> LawFile:
    """A law of the tiny Llama whose generic probe is this."""
    law = law_of(tiny_llama(), scale=20.0)
    return changed(law, probe=LawProbe.of(MeasuredOn(PROMPTS, generic, law.settings)))


def test_prompts_are_completed_as_plain_text_whatever_the_new_task_is() -> None:
    settings = ProbeSettings(6, 3, ("x",), chat=True, precision="float32")
    assert ASKED.completed(settings) == ProbeSettings(32, precision="float32", chat=False)
    assert GenericText(prompts=ASKED.prompts).completed(settings) == replace(settings, samples=1)
    tokenizer, base = char_tokenizer(), tiny_llama()
    tokenizer.chat_template = TEMPLATE
    found = probes.of_generic(base, tokenizer, ASKED, settings)
    assert found.prompts == [tokenizer.encode(prompt) for prompt in ASKED.prompts]
    assert max(map(len, found.completions)) == 32
    assert len(found.completions) == len(ASKED.prompts)
    with pytest.raises(RazorError, match=r"No prompt of the generic probe fits.*another probe"):
        probes.of_generic(tiny_llama(max_position_embeddings=16), tokenizer, ASKED, settings)


def test_hashes_and_equality() -> None:
    plain = GenericText(prompts=ASKED.prompts)
    as_asked = GenericText(prompts=ASKED.prompts, prior=PriorPrompts(("a",), max_new_tokens=None))
    # Of what is measured: as the new task's are completed, KL is that of the same prompts, whosever they are.
    assert as_asked.content_hash == plain.content_hash
    others = {replace(ASKED, prior=PriorPrompts(("winogrande",), (), most)).content_hash for most in (8, 32)}
    assert len({plain.content_hash, *others}) == 3
    assert ASKED.cut(3) == GenericText(prompts=ASKED.prompts[:3], prior=ASKED.prior)
    for wrong in ({"tasks": ()}, {"tasks": ("a",), "scored": ("b",)}, {"tasks": ("a",), "max_new_tokens": 0}):
        with pytest.raises(RazorError):
            PriorPrompts(**wrong)
    with pytest.raises(RazorError, match="has prompts, and there are none"):
        GenericText(("a text",), prior=PriorPrompts(("a",)))
    assert tiny.probe().content_hash == GenericText(prompts=tuple(tiny.probe_prompts())).content_hash


def test_a_law_keeps_the_prompts_and_whose_they_are(tmp_path: Path) -> None:
    law, path = law_on(ASKED), tmp_path / "law.json"
    law.save(path)
    stored = json.loads(path.read_text())["probe"]["generic"]
    assert stored["prior"] == {"tasks": ["winogrande"], "scored": [], "max_new_tokens": 32, "without": []}
    again = LawFile.load(path)
    assert again.generic == ASKED
    assert probes.probe_hash(again.settings, again.generic) == probes.probe_hash(law.settings, ASKED)
    assert "KL on the generic probe (the prior tasks' own prompts)" in again.describe()
    # One of before says nothing of them.
    law_on(GenericText(prompts=ASKED.prompts)).save(path)
    assert set(json.loads(path.read_text())["probe"]["generic"]) == {"prompts"}
    assert LawFile.load(path).generic.prior is None
    for wrong, said in (
        ({"prompts": ["a"], "prior": {"tasks": [], "max_new_tokens": 3}}, "tasks that are named"),
        ({"prompts": ["a"], "prior": {"tasks": ["a"], "max_new_tokens": 0}}, "max_new_tokens must be at least 1"),
        ({"prompts": ["a"], "prior": {"tasks": ["a"]}}, "lacks probe.generic.prior.max_new_tokens"),
        ({"texts": ["a"], "prior": {"tasks": ["a"], "max_new_tokens": 3}}, "has prompts, and there are none"),
    ):
        saved_with_generic(law, path, wrong)
        with pytest.raises(RazorError, match=said):
            LawFile.load(path)


def test_a_monitor_measures_on_its_laws_prompts(tmp_path: Path) -> None:
    law, model = law_on(ASKED), tiny_llama()
    with pytest.raises(RazorError, match=r"'prior' is the prior tasks' own prompts.*give a law"):
        ForgettingMonitor(PROMPTS, settings=SETTINGS, generic="prior")
    with pytest.raises(RazorError, match=r"'prior' is the prior tasks' own prompts"):
        ForgettingMonitor(PROMPTS, law_of(tiny_llama()), generic="prior")
    for other in ("self", GENERIC, GenericText(prompts=ASKED.prompts)):
        with pytest.raises(RazorError, match="calibrated with another `generic`"):
            ForgettingMonitor(PROMPTS, law, measuring=Measuring(generic=other))
    monitor = ForgettingMonitor(PROMPTS, law, generic="prior", every=6, cache_dir=tmp_path / "cache")
    trainer = trainer_of(tmp_path, [monitor], model)
    trainer.train()
    assert monitor.base is not None
    expected = probes.of_generic(tiny_llama(), char_tokenizer(), ASKED, law.settings)
    assert monitor.base.probes["kl_probe"].sequences == expected
    measured = monitor.readings[-1].kl["kl_probe"].mean
    assert measured == pytest.approx(kl_by_hand(tiny_llama(), model.eval(), expected), abs=1e-5)
    assert measured > 0.01
    row = json.loads((tmp_path / "razor.jsonl").read_text())
    assert row["probe"] == probes.probe_hash(law.settings, ASKED)


def test_compare_and_pick_measure_the_same(
    tmp_path: Path, mirror: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    saved(tmp_path / "base", tiny_llama(), char_tokenizer())
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    tasks = PriorTasks(("winogrande",), 3, mirror)
    monitor = ForgettingMonitor(PROMPTS, settings=SETTINGS, generic=tasks, every=3, cache_dir=tmp_path / "monitor")
    config = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(tmp_path / "run", [monitor], load(tmp_path / "base").model, **config).train()
    base, tuned = load(tmp_path / "base"), load(tmp_path / "run" / "checkpoint-6").model
    generic = GenericText.of_prior(tasks)
    assert generic.prompts == tuple(f"a {n} cat" for n in range(3, 8))  # none of the three that are scored
    sequences = probes.of_generic(base.model, base.tokenizer, generic, SETTINGS)
    by_hand = kl_by_hand(base.model, tuned, sequences)
    assert monitor.readings[-1].kl["kl_probe"].mean == pytest.approx(by_hand, abs=1e-5)
    prior = ["--prior", "winogrande", "--prior-limit", "3", "--data-mirror", str(mirror)]
    how = ["--prompts", str(tmp_path / "prompts.txt"), "--generic", "prior", "--max-new-tokens", "6", "--no-chat"]
    page = tmp_path / "page.html"
    capfd.readouterr()
    pair = [str(tmp_path / "base"), str(tmp_path / "run" / "checkpoint-6")]
    compared = ["compare", *pair, *how, *prior, "--out", str(page), "--json"]
    assert main(compared) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["kl"]["kl_probe"]["mean"] == pytest.approx(by_hand, abs=1e-5)
    assert found["settings"]["generic_rows"] == 5
    whose = {"tasks": ["winogrande"], "scored": [], "max_new_tokens": 32, "without": []}
    assert found["settings"]["generic_prior"] == whose
    assert found["settings"]["generic_hash"] == generic.content_hash
    assert "5 prompts of winogrande, with at most 32 tokens that the base sampled after each" in page.read_text()
    # The base's completions come from the cache now: only the tuned model is sampled from.
    drawn: list[Any] = []
    sample = sampling.sample

    def counted(model: Any, prompts: Any, *rest: Any) -> Any:
        drawn.append(len(prompts))
        return sample(model, prompts, *rest)

    monkeypatch.setattr(sampling, "sample", counted)
    assert main(compared) == 0
    capfd.readouterr()
    assert drawn == [len(PROMPTS)]
    picked = ["pick", str(tmp_path / "run"), "--metric", "loss", "--base", pair[0], *how]
    assert main([*picked, *prior, "--json"]) == 0
    (_, of_last) = json.loads(capfd.readouterr().out)["candidates"]
    assert of_last["kl"]["kl_probe"]["mean"] == pytest.approx(by_hand, abs=1e-5)
    for command, said in (
        (picked, "--generic prior is the prior tasks' own prompts: name them with --prior."),
        ([*picked, *prior, "--generic", "self"], "--prior names the tasks whose prompts --generic prior is"),
        (["compare", *pair, *how], "--generic prior is the prior tasks' own prompts: name them with --prior."),
        ([*compared, "--generic", "./prior"], "There is no prior, which --generic names"),
        (["pick", str(tmp_path / "run"), *prior], "--prior is about measuring here"),
        (["pick", str(tmp_path / "run"), *prior[2:4]], "--prior-limit is about measuring here"),
        (["pick", str(tmp_path / "run"), *prior[4:]], "--data-mirror is about measuring here"),
        (["pick", str(tmp_path / "run"), "--allow-code-execution"], "--allow-code-execution is about measuring here"),
    ):
        assert main(command) == 2
        assert said in " ".join(capfd.readouterr().err.split())


def test_calibrate_measures_on_them_unless_told_otherwise(
    tmp_path: Path, mirror: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(drawing, "save", lambda *arguments, **options: None)
    world.last_world.clear()
    tokenizer = char_tokenizer()
    tokenizer.chat_template = TEMPLATE
    folder = saved(tmp_path / "base", tiny_llama(len(tokenizer), max_position_embeddings=256), tokenizer)
    rows = [{"prompt": f"{a}{n}=", "completion": a} for n, a in enumerate("abcdefghij" * 4)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = [
        *("--prompts", str(tmp_path / "own.jsonl"), "--prior", "winogrande", "--data-mirror", str(mirror)),
        *("--prior-limit", "4", "--test-prompts", "6", "--max-new-tokens", "4", "--max-steps", "4"),
        *("--checkpoints-per-epoch", "2", "--warmup-steps", "0", "--precision", "float32"),
    ]
    out = tmp_path / "law"
    command = ["calibrate", str(folder), *task, "--lrs", "1e-3,3e-3,1e-2", "--batch-sizes", "4", "--seeds", "0"]
    assert main([*command, "--out", str(out), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    law = LawFile.load(out / "law.json")
    assert law.generic == GenericText(
        prompts=tuple(f"a {n} cat" for n in range(4, 8)), prior=PriorPrompts(("winogrande",))
    )
    # Of one method: the probe's KL alone, unless it is no better than guessing.
    assert len(law.choice.candidates) == 3 or law.forecaster.columns == ("kl_probe",)
    assert not any("items that are scored" in one for one in said["warnings"])
    # A plan needs none of the prior tasks' data.
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(cost, "is_at_hand", lambda base: False)
    assert main([*command, "--data-mirror", str(tmp_path / "empty"), "--dry-run", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["estimate"]["steps"] == 3 * 4
    assert "64 prompts of the prior tasks at most" in (out / "config.json").read_text()
    # KL of a fine-tune by these options is that of the law's own probe, by hand.
    tune = ["finetune", str(folder), *task, "--generic", "prior", "--method", "sft", "--lr", "1e-2"]
    assert main([*tune, "--batch-size", "4", "--out", str(tmp_path / "one"), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    base = load(folder)
    sequences = probes.of_generic(base.model, base.tokenizer, law.generic, law.settings)
    assert max(map(len, sequences.completions)) > law.settings.max_new_tokens
    by_hand = kl_by_hand(base.model, load(found["model"]).model, sequences)
    assert found["records"][-1]["drift"]["kl_probe"] == pytest.approx(by_hand, abs=1e-5)
    of_law = [row for row in law.data if row.lr == 1e-2][-1]
    assert of_law.kl_probe == pytest.approx(by_hand, abs=1e-5)
    assert main([*tune[:-4], "--prior", "none", "--method", "sft", "--lr", "1e-2"]) == 2
    assert "--generic prior is the prior tasks' own prompts, and there are none" in capfd.readouterr().err
    world.last_world.clear()


def test_words_stand_for_what_a_base_has_anyway() -> None:
    """So that runs of before are the runs of now."""
    source = TaskSource("letters")
    large, small = resolve("paper", {"prior": "winogrande", "prior_limit": "7"}), resolve("tiny", {})
    assert probed(replace(source, generic="paragraphs"), large, PriorSource()) == source
    assert probed(replace(source, generic="prior"), small, PriorSource()) == source
    asked = probed(replace(source, generic="prior"), large, PriorSource(Path("m"))).generic
    assert asked == PriorTasks(("winogrande",), 7, Path("m"))
    for generic in (None, "self", Path("prior")):
        assert probed(replace(source, generic=generic), large, PriorSource()).generic == generic
    assert probes.read_generic("paragraphs") == GenericText.built_in()


def test_what_is_wrong_is_said_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    assert main(["calibrate", "tiny", "--task", "letters", "--generic", "paragraphs", "--dry-run"]) == 2
    assert "knows ten letters and no words: leave --generic paragraphs out" in capfd.readouterr().err


def without_prompts(folder: Path, name: str, kind: str, score: str, text: str = "''") -> str:
    """A task of a user's that gives a model nothing to complete, or the same `text`, as YAML has it, each time."""
    path = Path(own_task(folder, metric(score, "true"), name))
    lines = path.read_text().replace("multiple_choice", kind).replace("doc_to_text: '{{q}}'", f"doc_to_text: {text}")
    path.write_text(lines)
    return str(path)


def warnings_of(generic: GenericText) -> str:
    """What is said of a law with this generic probe."""
    law = law_on(generic)
    rows = [{"trajectory": row.run, "method": "sft", **row.model_dump(exclude={"method"})} for row in law.data]
    return " ".join(calibrate.warnings_of(law, pl.DataFrame(rows)))


def test_a_law_on_scored_prompts_says_so() -> None:
    asked = replace(ASKED, prior=PriorPrompts(("winogrande", "arc"), ("arc",)))
    assert "items that are scored of arc" in warnings_of(asked)


def test_a_task_without_a_prompt_is_none_whose_prompts_they_are(tmp_path: Path) -> None:
    """Some text to complete, an empty one, and text that is read whole."""
    some = own_task(tmp_path, metric("acc", "true"), "some")
    empty = without_prompts(tmp_path, "empty", "multiple_choice", "acc")
    whole = without_prompts(tmp_path, "whole", "loglikelihood_rolling", "word_perplexity")
    generic = GenericText.of_prior(PriorTasks([empty, some, whole], 4))
    assert set(generic.prompts) == {f"a{n}:" for n in range(4, 12)}
    assert generic.prior is not None
    assert (generic.prior.tasks, generic.prior.without) == ((some,), (empty, whole))
    (said,) = generic.prior.cautions()
    assert f"no prompt of {empty}, {whole}:" in said
    law = law_on(generic)
    law.save(tmp_path / "law.json")
    assert LawFile.load(tmp_path / "law.json").generic == generic
    assert said in warnings_of(generic)


def test_calibrate_says_what_to_do_where_the_prior_tasks_have_no_prompts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "base", tiny_llama(), char_tokenizer())
    (tmp_path / "own.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{n}=", "completion": "a"}) for n in range(40))
    )
    task = without_prompts(tmp_path, "empty", "multiple_choice", "acc")
    command = ["calibrate", str(folder), "--prompts", str(tmp_path / "own.jsonl"), "--prior", task]
    assert main([*command, "--out", str(tmp_path / "law")]) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert (
        "give a model no prompts to complete: give another generic probe, --generic FILE, self or paragraphs." in said
    )
    assert not (tmp_path / "law").exists()


@pytest.mark.parametrize("wrong", ["N/A", "None", '[{"role": "user", "content": "a"}]'])
def test_what_can_be_no_prompt_is_left_out_before_a_law_is_made_of_it(tmp_path: Path, wrong: str) -> None:
    """Which would refuse it, after all training."""
    with pytest.raises(RazorError, match="Mend it"):
        law_on(GenericText(prompts=(wrong,)))
    some, every = (json.dumps("{{ " + text + " }}") for text in (f"q if label else {wrong!r}", repr(wrong)))
    generic = GenericText.of_prior(PriorTasks([without_prompts(tmp_path, "some", "multiple_choice", "acc", some)], 2))
    assert set(generic.prompts) == {f"a{n}:" for n in range(2, 12) if n % 3}
    assert law_on(generic).generic == generic
    with pytest.raises(RazorError, match="no prompts to complete"):
        GenericText.of_prior(PriorTasks([without_prompts(tmp_path, "none", "multiple_choice", "acc", every)], 2))


def test_a_tiny_generic_probe_is_said_to_be_few() -> None:
    one, enough = (GenericText(tuple(f"text {n}" for n in range(count))) for count in (1, 16))
    (said,) = MeasuredOn(PROMPTS, one, SETTINGS).cautions({"kl_forward": len(PROMPTS), "kl_probe": 1})
    assert said.startswith("1 row of the generic probe is few: KL is uncertain")
    (said,) = MeasuredOn(PROMPTS, ASKED, SETTINGS).cautions({"kl_forward": len(PROMPTS), "kl_probe": 8})
    assert said.startswith("8 rows of the generic probe are few")
    assert MeasuredOn(PROMPTS, enough, SETTINGS).cautions({"kl_forward": len(PROMPTS), "kl_probe": 16}) == []
    assert "The generic probe has 1 row, and" in warnings_of(one)
    assert "The generic probe has" not in warnings_of(enough)
