"""Prior tasks asked of models that read images too, through their text path: scores by one forward a sequence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("lm_eval")

from test_asking import ours, task

from architectures import PROMPTS, logits_alone, moved, tiny
from rlrazor.cli import main
from rlrazor.lm.harness.asking import AS_THE_TASKS_SAY, Asking
from rlrazor.lm.harness.reader import Reader
from tiny_models import char_tokenizer, saved

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
NAMES = [
    "AyaVision", "Gemma3", "Idefics3", "InternVL", "Llava", "Mistral3", "Mllama", "Qwen2_5_VL", "Qwen3VL", "Qwen3_5",
    "SmolVLM",
]  # fmt: skip
FEW = ["Gemma3", "Llava", "Mllama", "Qwen3VL", "SmolVLM"]


def made(name: str) -> Any:
    name = f"{name}ForConditionalGeneration"
    if not hasattr(transformers, name) or int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip(f"this transformers has no {name}, or another layout of it")
    return tiny(name)


def tokenizer_of() -> Any:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def log_likelihood(model: Any, context: list[int], more: list[int]) -> tuple[float, bool]:
    """Of a continuation, in one forward of it alone; and whether it is the likeliest."""
    logp = logits_alone(model, [*context, *more])[len(context) - 1 : -1].double().log_softmax(-1)
    return float(logp[range(len(more)), more].sum()), logp.argmax(-1).tolist() == more


@pytest.mark.parametrize("name", NAMES)
def test_log_likelihoods_are_those_of_a_forward_alone(name: str) -> None:
    """Of sequences that share a beginning, which are read as a tree where the model allows that, and of all lengths."""
    model = made(name)
    ids = [*PROMPTS, [5, 6, 7, 8, 9, 10, 11], [5, 6, 7]]
    pairs = [(list(prompt), more) for prompt in ids for more in ([4], [9, 8], [9, 8, 7, 3])]
    greedy = int(logits_alone(model, PROMPTS[0])[-1].argmax())
    pairs.append((list(PROMPTS[0]), [greedy]))
    reader = Reader(pretrained=model, tokenizer=char_tokenizer(), batch_size=4)
    found = reader._loglikelihood_tokens([(None, *pair) for pair in pairs], disable_tqdm=True)
    expected = [log_likelihood(model, *pair) for pair in pairs]
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in expected]
    assert found[-1][1]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4, abs=1e-4)


def chosen(model: Any, tokenizer: Any, row: dict[str, Any], asking: Asking = AS_THE_TASKS_SAY) -> float:
    """Whether the likeliest choice is the right one."""
    reader = Reader(pretrained=model, tokenizer=tokenizer, batch_size=4)
    context = row["q"]
    if asking.chat_template:
        turns = [{"role": "user", "content": context}]
        context = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    space = "" if asking.chat_template else " "
    pairs = [reader._encode_pair(context, space + choice) for choice in row["choices"]]
    values = [log_likelihood(model, *pair)[0] for pair in pairs]
    return float(max(range(3), key=values.__getitem__) == row["label"])


@torch.no_grad()
def written(model: Any, tokenizer: Any, text: str) -> str:
    """Six tokens, each the likeliest, everything read once more for each; up to a semicolon."""
    ids = tokenizer(text)["input_ids"]
    begun = len(ids)
    while len(ids) < begun + 6 and (len(ids) == begun or ids[-1] != tokenizer.eos_token_id):
        ids = [*ids, int(logits_alone(model, ids)[-1].argmax())]
    return str(tokenizer.decode(ids[begun:], skip_special_tokens=True)).split(";")[0]


@pytest.mark.parametrize("name", [FEW[0], *(pytest.param(one, marks=pytest.mark.slow) for one in FEW[1:])])
def test_choices_and_generations_are_scored_as_by_hand(tmp_path: Path, name: str) -> None:
    model, tokenizer = made(name), tokenizer_of()
    path = task(tmp_path, "choices", name="choices")
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    for asking in (AS_THE_TASKS_SAY, Asking(chat_template=True)):
        score, notes = ours(model, tokenizer, path, asking)
        assert score.value == sum(chosen(model, tokenizer, row, asking) for row in rows) / 8
        assert not notes
    path = task(tmp_path, "generated", name="generated")
    right = [written(model, tokenizer, row["q"]) for row in rows]
    asked = [{**row, "a": answer if row["label"] else f"{answer}x"} for row, answer in zip(rows, right, strict=True)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, asked)))
    score, _ = ours(model, tokenizer, path, AS_THE_TASKS_SAY)
    assert score.value == sum(row["label"] > 0 for row in rows) / 8


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_razor_evaluate_scores_such_a_folder(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    base, tokenizer = made(name), tokenizer_of()
    tuned = moved(base)
    folders = [str(saved(tmp_path / kind, model, tokenizer)) for kind, model in (("base", base), ("tuned", tuned))]
    path = task(tmp_path, "choices", name="choices")
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    capfd.readouterr()
    how = ["--task", "letters", "--test-prompts", "4", "--max-new-tokens", "4", "--prior", path, "--prior-limit", "0"]
    assert main(["evaluate", folders[1], "--base", folders[0], *how, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    for kind, model in (("base", base), ("model", tuned)):
        assert found[kind]["prior"] == {path: sum(chosen(model, tokenizer, row) for row in rows) / 8}
    assert found["model"]["drift"]["kl_forward"] > 0
