"""What a checkpoint is measured by: on a model whose context is shorter than the texts."""

import pytest

from rlrazor.experiments.language.demonstrations import Prompts
from rlrazor.experiments.language.evaluate import Asked, Reference
from rlrazor.experiments.language.suites import PriorSuite
from rlrazor.experiments.language.tasks import Form, Item, Splits, Task
from rlrazor.lm import kl
from rlrazor.lm.models import LanguageModel
from rlrazor.lm.probes import GenericText
from rlrazor.lm.representation import paragraphs
from rlrazor.lm.scores import Score
from tiny_models import char_tokenizer, tiny_llama


def test_texts_are_cut_to_the_context_in_calibration_as_in_compare() -> None:
    tokenizer = char_tokenizer()
    base = LanguageModel.in_memory(tiny_llama(max_position_embeddings=64), tokenizer, "base")
    moved = tiny_llama(max_position_embeddings=64, seed=1)
    texts = paragraphs()
    suite = PriorSuite(lambda lm: {"prior": Score(0.5, 0.1, 4, "acc", "1")}, GenericText.built_in(), texts, texts)
    task = Task("a", "A", "", lambda path: Splits([], []), lambda prompt, completion: 1.0, Form(4))
    reference = Reference(
        base, [Asked(base, task, Prompts.of(task, [Item("a:"), Item("b:")], base), suite, 1, "greedy")], suite
    )
    record = reference.checkpoint("run", 1, 1.0, moved, frozen=base.model).record
    cut = [tokenizer(text).input_ids[:64] for text in texts]
    assert record.metrics["prior_loss"] == pytest.approx(kl.token_loss(moved, cut).mean)
    expected = kl.forward_kl(kl.Probe(base.model, kl.Sequences.texts(cut)), moved)
    assert record.drift["kl_probe"] == pytest.approx(expected.per_completion.mean)
    assert 0 < record.drift["cknna_on_probe"] < 1
