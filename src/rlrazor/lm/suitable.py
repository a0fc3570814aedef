"""Whether a model can be measured at all: found out by running it on a few tokens, before anything is trained.

KL here is between the distributions of a causal language model's next tokens, and everything that is measured reads
token ids padded on the right and nothing else. No architecture is known by name: a BERT that was made a decoder passes,
and the same BERT without `is_decoder` does not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlrazor.errors import RazorError, cause_of
from rlrazor.lm import compute, forward, kl
from rlrazor.lm.adapters import unwrapped, without_wrapper
from rlrazor.lm.forward import context_length, embedding_rows, read_alone
from rlrazor.lm.sampling import relative_error
from rlrazor.lm.shards import name_of

TOKENS = 6  # of the sequences that are read; the second half is exchanged
# Of the logits' spread. All sequences have one shape, so that only mixtures of experts round differently. In half
# precision that can send a token to another expert, hence there it is the position that changes least that counts.
TOLERANCE, HALF_TOLERANCE = 1e-4, 0.1
CROWD = 7  # rows beside the one that is looked at
BOTH_WAYS = 0.5  # of what goes forwards, also goes backwards: only in an encoder


def require_measurable(model: Any) -> None:
    """Raise RazorError unless `model` is a causal language model that reads token ids alone.

    Costs seven forward passes of six tokens, one of them of eight rows. Modes, gradients and random generators are as
    before afterwards. A model whose logits are not finite is left to what measures it, which raises NotFiniteError.
    """
    model = unwrapped(model)
    require_language_model(model)
    require_embeddings(model)
    name = name_of(without_wrapper(model))
    count = min(TOKENS, context_length(model) or TOKENS)
    rows = embedding_rows(model) or 1000
    ids = [token % rows for token in range(1, 1 + count)]
    half = -(-count // 2)
    others = [*ids[:half], *((token + 1) % rows or 1 for token in ids[half:])]
    padded = [*ids[:half], *(0 for _ in ids[half:])]
    earlier = [*((token + 1) % rows or 1 for token in ids[:half]), *ids[half:]]
    with torch.no_grad(), compute.generators_untouched(), compute.eval_mode(model):
        try:
            read = [read_alone(model, row) for row in (ids, ids, others, padded, earlier)]
            beside = forward.plain_logits(model, _crowded(model, ids))[-1].float()
        except Exception as error:  # an architecture's own, of any type
            if compute.is_out_of_memory(error):
                raise
            raise RazorError(
                f"{name} does not run on token ids alone, so it cannot be measured: {cause_of(error)}"
            ) from error
        if any(logits.dim() != 2 or len(logits) != count for logits, _ in read):
            raise RazorError(f"{name} does not give logits for each token, so it cannot be measured.")
        if not all(bool(logits.isfinite().all()) for logits, _ in read):
            return
        # What an earlier token does to later ones is the measure of what a later one does to earlier ones.
        forwards = relative_error(read[4][0][half:], read[0][0][half:]) if count > half else 0.0
        _require_same(name, [logits[:half] for logits, _ in read[:4]], forwards, in_half=read[0][1])
        _require_alone(name, beside, read[0][0], in_half=read[0][1])
        kl.final_states(model, kl.Sequences([ids[:1]], [ids[1:]], [0]))


def require_language_model(model: Any) -> None:
    """Raise RazorError for an encoder-decoder, and for what has no LM head; costs nothing."""
    name, config = name_of(without_wrapper(model)), getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise RazorError(f"{name} is not a model of transformers, so it cannot be measured.")
    if getattr(config, "is_encoder_decoder", False):
        raise RazorError(
            f"{name} is an encoder-decoder: KL to the base is measured for causal (decoder-only) language models."
        )
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    if head is None:
        raise RazorError(
            f"{name} has no LM head: it is a reward model, a classifier or a bare encoder, not a language model. "
            "Give the language model itself."
        )


def require_embeddings(
    model: Any, tokenizer: Any = None, prompts: Sequence[Sequence[int]] = (), what: str = "Prompt"
) -> None:
    """Raise RazorError for a token of a prompt (token ids) without an embedding, or an output that cannot be read.

    `tokenizer` is asked for the token's name.
    """
    rows = embedding_rows(model)
    if rows is None:
        return
    for number, prompt in enumerate(prompts, 1):
        for token in prompt:
            if not 0 <= token < rows:
                said = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(token)!r})"
                raise RazorError(
                    f"{what} {number} has the token {token}{said}, and the model has embeddings for {rows} tokens: "
                    "give the tokenizer that the model came with, or resize the model's embeddings to the tokenizer."
                )
    outputs = getattr(model.get_output_embeddings(), "out_features", rows)
    if outputs > rows:
        raise RazorError(
            f"The model has outputs for {outputs} tokens and embeddings for {rows}, so it cannot read all that it may "
            "write: resize its embeddings."
        )


def _crowded(model: Any, ids: Sequence[int]) -> Tensor:
    """A batch whose last row is `ids`, behind rows of its first token alone: an expert's, or a norm's, whole capacity.

    So a mixture of experts that drops tokens where too many go to one of them drops the last row's.
    """
    rows = [*([ids[0]] * len(ids) for _ in range(CROWD)), list(ids)]
    return torch.tensor(rows, dtype=torch.long, device=compute.device_of(model))


def _require_alone(name: str, beside_TV: Tensor, alone_TV: Tensor, *, in_half: bool) -> None:
    """Logits of a sequence in a batch of `_crowded`, and alone."""
    counts, tolerance = (min, HALF_TOLERANCE) if in_half else (max, TOLERANCE)
    if counts(relative_error(*position) for position in zip(beside_TV, alone_TV, strict=True)) > tolerance:
        raise RazorError(
            f"{name} gives other logits where a sequence is beside others: what else is in the batch decides, as where "
            "experts drop tokens beyond their capacity, or statistics are the batch's. Such a model has no KL of its "
            "own; turn that off in its config."
        )


def _require_same(name: str, logits: Sequence[Tensor], forwards: float, *, in_half: bool) -> None:
    """Logits of a sequence's first tokens, of the same again, before other tokens, and before zeros.

    In half precision rounding may be as large as what a weak encoder's later tokens do, but is the same for the same
    shape: there it is compared with `forwards`, what earlier tokens do to later ones.
    """
    counts, tolerance = (min, HALF_TOLERANCE) if in_half else (max, TOLERANCE)
    again, others, padded = (
        counts(relative_error(*position) for position in zip(found, logits[0], strict=True)) for found in logits[1:]
    )
    if again > tolerance:
        raise RazorError(f"{name} gives other logits each time that it reads the same tokens, so it has no KL.")
    backwards = relative_error(logits[2], logits[0])
    if others > tolerance or (in_half and backwards > BOTH_WAYS * forwards > 0):
        raise RazorError(
            f"{name} is not causal: a later token changes what it says of earlier ones. An encoder such as BERT is a "
            "language model only with `is_decoder=True` in its config, and if it was trained so."
        )
    if padded > tolerance:
        raise RazorError(
            f"{name} takes token 0 for padding, and reads what comes before it differently, so it cannot be measured."
        )
