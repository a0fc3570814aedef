"""The model as lm-eval asks it for log-likelihoods: what sequences share is read once, where the model allows that.

Not every architecture takes an attention mask of any shape: some see in a window only, others keep a state. So of all
sequences the longest, and the last of the tree that holds the most beside it, are read once more, alone. Where one of
them has other logits then, or the model cannot do it, lm-eval reads the sequences as it would, padded. No architecture
is known by name here. Left to lm-eval as well are sequences that are longer than the model's context, which it cuts
and warns of, and those that are longer than a window in which the model sees.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from rlrazor.lm import compute, content_parts, forward
from rlrazor.lm.harness.packed import Pack, packs
from rlrazor.lm.sampling import CHECKED, HALF_TOLERANCE, TOLERANCE, relative_error

TOKENS = 64  # of a tree, for each input that is to be read together

Request = tuple[Any, list[int], list[int]]  # what was asked as text, or None; the context; its continuation
Answer = tuple[float, bool]  # log-likelihood in nats, and whether the continuation is the likeliest at each place


class Reader(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's own, but for how it reads continuations of contexts, and for templates that take parts alone."""

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], *arguments: Any, **options: Any) -> str:
        """As lm-eval has it, of turns in parts where the template wants them."""
        turns = content_parts.as_shown(self.tokenizer, chat_history)
        return str(super().apply_chat_template(turns, *arguments, **options))

    def _loglikelihood_tokens(self, requests: Sequence[Request], *arguments: Any, **options: Any) -> list[Answer]:
        window = forward.window(self.model) or int(self.max_length)  # the mask of a tree would undo a shorter one
        most = min(int(self.max_length), window) + 1  # the last token is not read
        short = [place for place, (_, context, more) in enumerate(requests) if len(context) + len(more) <= most]
        inputs = [[*requests[place][1], *requests[place][2]][:-1] for place in short]
        found = in_trees(self.model, inputs, [requests[place][2] for place in short], TOKENS * self.batch_size)
        answers = {} if found is None else dict(zip(short, found, strict=True))
        left = [place for place in range(len(requests)) if place not in answers]
        padded = super()._loglikelihood_tokens([requests[place] for place in left], *arguments, **options)
        answers |= dict(zip(left, padded, strict=True))
        return [answers[place] for place in range(len(requests))]


@torch.no_grad()
def in_trees(
    model: Any, inputs: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], most: int
) -> list[Answer] | None:
    """What follows each input's beginning, read in trees of at most `most` tokens; None where the model cannot do it.

    The tokens of a continuation are those behind the last so many positions of its input.
    """
    trees = list(packs(inputs, most))
    if not trees:
        return []
    deepest = max(trees, key=lambda tree: len(tree.paths[tree.longest]))  # shows an amiss window or position
    fullest = max(trees, key=lambda tree: len(tree.ids) - len(tree.paths[tree.last]))  # shows an amiss mask
    answers: dict[int, Answer] = {}
    for tree in dict.fromkeys((deepest, fullest, *trees)):
        asked = {place: path[-len(continuations[place]) :] for place, path in tree.paths.items()}
        kept = sorted({node for nodes in asked.values() for node in nodes})
        row_of = {node: row for row, node in enumerate(kept)}
        rows = {place: [row_of[node] for node in nodes] for place, nodes in asked.items()}
        try:
            logits_KV = _logits(model, tree, kept)
            checked = {tree.longest} if tree is deepest else set()
            checked |= {tree.last} if tree is fullest else set()
            if not all(_is_right(model, inputs[place], logits_KV[rows[place]]) for place in checked):
                return None
        except Exception as error:  # an architecture's own, of any type
            if compute.is_out_of_memory(error):
                raise
            return None
        answers |= _answers(logits_KV, rows, continuations)
    return [answers[place] for place in range(len(inputs))]


def _answers(
    logits_KV: Tensor, rows: Mapping[int, Sequence[int]], continuations: Sequence[Sequence[int]]
) -> dict[int, Answer]:
    """By place, of continuations that follow these rows."""
    likeliest_K, total_K = logits_KV.argmax(dim=-1), logits_KV.logsumexp(dim=-1)
    answers = {}
    for place, of in rows.items():
        tokens = torch.tensor(continuations[place], device=logits_KV.device)
        logp = logits_KV[of, tokens] - total_K[of]
        answers[place] = float(logp.sum()), bool((likeliest_K[of] == tokens).all())
    return answers


def _is_right(model: Any, sequence: Sequence[int], logits_TV: Tensor) -> bool:
    """Whether a sequence read alone has these logits at its end."""
    logits_TV = logits_TV[-CHECKED:]
    alone_TV, in_half = forward.read_alone(model, sequence, len(logits_TV))
    return relative_error(logits_TV, alone_TV) <= (HALF_TOLERANCE if in_half else TOLERANCE)


def _logits(model: Any, tree: Pack, kept: Iterable[int]) -> Tensor:
    """Float32 logits of some of the nodes (K, V)."""
    device, dtype = compute.device_of(model), next(model.parameters()).dtype
    hidden_NN = ~torch.from_numpy(tree.sees).to(device)
    mask_NN = torch.zeros(hidden_NN.shape, dtype=dtype, device=device).masked_fill(hidden_NN, torch.finfo(dtype).min)
    return forward.masked_logits(
        model,
        torch.from_numpy(tree.ids).to(device)[None],
        mask_NN[None, None],
        torch.from_numpy(tree.depths).to(device)[None],
        torch.tensor(list(kept), device=device),
    )
