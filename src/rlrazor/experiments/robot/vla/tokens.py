"""Which tokens of a vocabulary stand for a robot's actions, as in OpenVLA (arXiv:2406.09246, section 3.2)."""

from typing import Any

import torch
from torch import Tensor

from rlrazor.errors import RazorError


def action_token_ids(tokenizer: Any, bins: int) -> Tensor:
    """The id of the token of each bin (bins,): the last ordinary tokens, which text needs least, the last for bin 0.

    In Llama's vocabulary of 32,000 these are 31,999 down to 31,744, OpenVLA's own. Special and added tokens, such as an
    image's place, are passed over, wherever they lie. Raises RazorError where fewer than `bins` are left.
    """
    taken = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ordinary = sorted((number for number in tokenizer.get_vocab().values() if number not in taken), reverse=True)
    if len(ordinary) < bins:
        raise RazorError(
            f"The model's vocabulary has {len(ordinary)} ordinary tokens, and {bins} have to stand for actions: take a "
            "model with a larger one."
        )
    return torch.tensor(ordinary[:bins])
