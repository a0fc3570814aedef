"""Prompts with images: KL over the completions given image and text, against one full forward a sequence in float64."""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from rlrazor.cli.compare_output import as_json
from rlrazor.errors import RazorError
from rlrazor.guard.compare import compare
from rlrazor.guard.comparison import Pair
from rlrazor.guard.comparison_page import write_page
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.guard.measuring import ReadBase
from rlrazor.lm import images, kl, models
from rlrazor.lm.probes import GenericText, ProbeSettings, of_prompts, read_generic, read_prompts
from rlrazor.lm.prompts import encode, prompt_of
from tiny_models import char_tokenizer, noisy, saved, tiny_llama

pytest.importorskip("gymnasium")  # which the module of the models imports
from vla_models import ARCHITECTURES, SIDE

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
GENERIC = GenericText(("a text that is read", "and another"))
SETTINGS = ProbeSettings(max_new_tokens=4, samples=2)
TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }}:{% for part in turn.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def picture(folder: Path, name: str, seed: int) -> Path:
    path = folder / name
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(path)
    return path


def made(folder: Path, name: str, *, template: bool = False) -> tuple[Any, Path]:
    """A base, and a file of prompts: a path, what `datasets` has of an image, two images, and none."""
    model, processor = ARCHITECTURES[name]()
    if template:
        processor.chat_template = TEMPLATE
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    picture(folder, "one.png", 1)
    picture(folder, "two.png", 2)
    rows = [
        {"prompt": "what is it?", "images": ["one.png"]},
        {"prompt": "what is it?", "images": [{"path": "two.png", "bytes": None}]},
        {"prompt": [{"role": "user", "content": "which is redder?"}], "images": ["one.png", "two.png"]},
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "no picture"}]}]
            if template
            else "no picture"
        },
    ]
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows if template else [rows[0], rows[1], rows[3]])))
    return model, path


@torch.no_grad()
def brute_force(base: Any, tuned: Any, probe: kl.Sequences) -> float:
    """One full forward of a sequence, with its images, in float64."""
    found = []
    p_model, q_model = (model.double().eval() for model in (base, tuned))
    for place, completion in zip(probe.prompt_of, probe.completions, strict=True):
        prompt = probe.prompts[place]
        ids, beside = torch.tensor([[*prompt, *completion]]), {}
        if (shown := images.seen(prompt)) is not None:
            beside = {name: part.double() if part.is_floating_point() else part for name, part in shown.beside.items()}
        at = slice(len(prompt) - 1, -1)
        p, q = (
            model(input_ids=ids, use_cache=False, **beside).logits[0, at].log_softmax(-1)
            for model in (p_model, q_model)
        )
        found.append(float((p.exp() * (p - q)).sum()))
    return float(np.mean(found))


@pytest.mark.parametrize(("name", "template"), [("idefics3", True), ("llava", False)])
def test_what_is_said_of_an_image_is_compared_given_the_image(tmp_path: Path, name: str, template: bool) -> None:
    base, path = made(tmp_path, name, template=template)
    tuned = noisy(base, 0.01)
    tuned.save_pretrained(tmp_path / "tuned")
    prompts = read_prompts(path)
    lm = models.load(tmp_path / "base")
    sequences = of_prompts(lm.model, lm.tokenizer, prompts, SETTINGS, cache_dir=tmp_path / "cache")
    shown = [images.seen(prompt) for prompt in sequences.prompts]
    assert [one is not None for one in shown] == [True] * (len(prompts) - 1) + [False]
    assert sequences.prompts[0] == sequences.prompts[1]  # the same tokens, of other images
    assert shown[0] is not None
    assert shown[1] is not None
    assert shown[0].digest != shown[1].digest
    assert sequences == of_prompts(lm.model, lm.tokenizer, prompts, SETTINGS, cache_dir=tmp_path / "cache")
    pair = Pair(str(tmp_path / "base"), str(tmp_path / "tuned"))
    found = compare(pair, prompts, settings=SETTINGS, generic=GENERIC)
    drift = kl.forward_kl(kl.Probe(base, sequences), tuned)
    assert found.kl["kl_forward"].mean == pytest.approx(drift.per_completion.mean, rel=1e-5)
    expected = brute_force(base, tuned, sequences)
    assert expected > 1e-3
    exact = kl.forward_kl(kl.Probe(base, sequences), tuned)  # both in float64 by now
    assert exact.per_completion.mean == pytest.approx(expected, rel=1e-5)
    assert drift.per_completion.mean == pytest.approx(expected, rel=1e-3)
    assert json.dumps(as_json(found, []), default=str)
    assert write_page(found, tmp_path / "page.html", []).stat().st_size > 1000


def test_samples_are_greedy_given_the_image(tmp_path: Path) -> None:
    from rlrazor.lm import sampling

    base, path = made(tmp_path, "idefics3", template=True)
    lm = models.load(tmp_path / "base")
    sequences = of_prompts(lm.model, lm.tokenizer, read_prompts(path), SETTINGS)
    drawn = sampling.sample(
        base, sequences.prompts, sampling.Sampling(greedy=True, max_new_tokens=4, stop_ids=[], pad_id=0)
    )
    for prompt, completion in zip(sequences.prompts, drawn, strict=True):
        ids, shown = list(prompt), images.seen(prompt)
        for _ in range(4):
            beside = {} if shown is None else shown.beside
            ids.append(int(base(input_ids=torch.tensor([ids]), use_cache=False, **beside).logits[0, -1].argmax()))
        assert completion == ids[len(prompt) :]


def test_rows_with_one_image_and_with_none_are_read_as_trl_has_them(tmp_path: Path) -> None:
    one = picture(tmp_path, "one.png", 1).read_bytes()
    path = tmp_path / "prompts.jsonl"
    columns: list[dict[str, Any]] = [
        {"images": ["one.png"]}, {"image": "one.png"}, {"image": {"path": "one.png", "bytes": None}},
        {"images": []}, {"images": [None]}, {"images": None, "image": None}, {},
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps({"prompt": f"what is {at}?", **row}) for at, row in enumerate(columns)))
    found = read_prompts(path)
    for prompt in found[:3]:
        assert isinstance(prompt, dict)
        assert [image.content for image in prompt["images"]] == [one]
    assert found[3:] == [f"what is {at}?" for at in range(3, 7)]
    with pytest.raises(RazorError, match="`images` are not read yet"):
        prompt_of({"prompt": "what is it?", "image": "one.png"})


def test_images_are_read_by_the_processor_that_was_given(tmp_path: Path) -> None:
    _, path = made(tmp_path, "llava", template=True)
    prompts = read_prompts(path)[:1]
    lm = models.load(tmp_path / "base")

    def mean() -> float:
        shown = images.seen(encode(lm.tokenizer, prompts, chat=False)[0])
        assert shown is not None
        return float(shown.beside["pixel_values"].mean())

    processor = AutoProcessor.from_pretrained(tmp_path / "base")
    processor.tokenizer = lm.tokenizer
    processor.image_processor.rescale_factor /= 2
    processor.image_processor.do_normalize = False
    of_folder = mean()
    images.read_with(lm.tokenizer)  # which is no processor
    assert mean() == of_folder
    images.read_with(processor)
    with Image.open(tmp_path / "one.png") as opened:
        assert mean() == pytest.approx(np.asarray(opened).mean() / 510, rel=1e-3)
    assert mean() != of_folder
    del processor
    gc.collect()
    assert mean() == of_folder


def test_what_is_wrong_with_images_is_a_sentence(tmp_path: Path) -> None:
    picture(tmp_path, "one.png", 1)
    (tmp_path / "text.png").write_text("no picture")
    path = tmp_path / "prompts.jsonl"
    for value, said in (
        (["missing.png"], r"line 1: the image missing.png cannot be read \(.*No such file"),
        (["text.png"], r"line 1: the image text.png cannot be read \(cannot identify image"),
        ([3], r"cannot be read \(it is of type int"),
    ):
        path.write_text(json.dumps({"prompt": "what is it?", "images": value}))
        with pytest.raises(RazorError, match=said):
            read_prompts(path)
    path.write_text(json.dumps({"prompt": "what is it?", "images": ["one.png"]}))
    with pytest.raises(RazorError, match="A generic probe with images is not measured: leave the column out"):
        read_generic(path)
    folder = saved(tmp_path / "text", tiny_llama(), char_tokenizer())
    lm = models.load(folder)
    with pytest.raises(RazorError, match="The prompts have images, and the model has no processor for them"):
        of_prompts(lm.model, lm.tokenizer, read_prompts(path), SETTINGS)
    two = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "which?"}]
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": two}], "images": ["one.png"]}))
    made(tmp_path, "llava", template=True)
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": two}], "images": ["one.png"]}))
    lm = models.load(tmp_path / "base")
    with pytest.raises(RazorError, match=r"Prompt 1: the model's processor .* places for 2 images, and 1"):
        of_prompts(lm.model, lm.tokenizer, read_prompts(path), SETTINGS)


def test_a_checkpoint_whose_processor_reads_images_otherwise_is_noted(tmp_path: Path) -> None:
    """The base's makes of an image what both models see; a base's folder with the other's files is the way out."""
    base, path = made(tmp_path, "llava", template=True)
    prompts = read_prompts(path)[:1]
    for name in ("same", "other"):
        noisy(base, 0.01).save_pretrained(tmp_path / name)
        processor = AutoProcessor.from_pretrained(tmp_path / "base")
        if name == "other":
            processor.image_processor.image_mean = [0.1, 0.2, 0.3]
        processor.save_pretrained(tmp_path / name)
    said = "The tuned model's processor has other settings than the base's (image_mean: "
    on = MeasuredOn(prompts, GENERIC, SETTINGS)
    for name, found in (("same", False), ("other", True)):
        compared = compare(
            Pair(str(tmp_path / "base"), str(tmp_path / name)), prompts, settings=SETTINGS, generic=GENERIC
        )
        assert any(note.startswith(said) for note in compared.notes) == found
        notes: list[str] = []
        read = ReadBase.of_source(str(tmp_path / "base"), "float32", on, None, tmp_path / "cache")
        for _ in range(2):
            kls = read.measured(tmp_path / name, notes)
        assert [note.startswith(said) for note in notes] == [True] * found
        assert kls["kl_forward"].per_completion.mean == pytest.approx(compared.kl["kl_forward"].mean, rel=1e-6)
    without = compare(
        Pair(str(tmp_path / "base"), str(tmp_path / "other")), ["what?"], settings=SETTINGS, generic=GENERIC
    )
    assert not any("processor" in note for note in without.notes)
    shutil.copytree(tmp_path / "base", tmp_path / "mended")
    for file in (tmp_path / "other").glob("*processor_config.json"):
        shutil.copy(file, tmp_path / "mended")
    shown = [
        images.seen(encode(models.load(tmp_path / name).tokenizer, prompts, chat=True)[0])
        for name in ("base", "mended", "other")
    ]
    means = [float(one.beside["pixel_values"].mean()) for one in shown if one is not None]
    assert means[0] != means[1] == means[2]
