"""A vision-language-action model in OpenVLA's form: a policy on `transformers`, with tokens for actions.

    image, "In: What action should the robot take to {instruction}?\\nOut:"  ->  a token for each dimension of an action

The model is any causal one with images that `AutoModelForImageTextToText` loads; the last 256 ordinary tokens of its
vocabulary are the bins of an action, so it needs no new weight (arXiv:2406.09246). What OpenVLA has besides is left
out: its own fused vision encoder, whose code is in no release of `transformers`, and its statistics of the actions of a
data set, for which here is what the world allows.

The policy's distribution is over the bins: what other tokens have is cut off and the bins are scaled to 1, in sampling,
in training and in KL alike. `vocabulary_log_probs` is over all tokens, as OpenVLA trains and decodes; of a trained
policy the two hardly differ. `policy.kl_of_actions` gives the exact KL of an action in either.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlrazor.experiments.robot.policy import Seen, bins_of, choose, middles_of
from rlrazor.experiments.robot.vla.tokens import action_token_ids
from rlrazor.experiments.robot.vla.trained import Trained
from rlrazor.experiments.robot.world import World
from rlrazor.lm.forward import cache_of

BINS = 256
PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
AT_A_TIME = 16  # states
IDLE = "wait"  # what a lane without an episode is asked


class VisionLanguageAction(nn.Module):
    """The policy: `model` and the `processor` that goes with it, in a world of images (height, width, 3).

    Prompts of several lengths are padded on the left and the padding is masked; so no row of a batch depends on another
    with a model whose positions are relative, as rotary ones are. What it gives is on the CPU, wherever the model is.
    """

    action_ids: Tensor

    def __init__(self, model: Any, processor: Any, world: World) -> None:
        super().__init__()
        self.model: Any = model
        self.processor, self.trained = processor, Trained(model)
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.low, self.high = torch.from_numpy(world.action_low), torch.from_numpy(world.action_high)
        ids = action_token_ids(tokenizer, BINS).to(next(model.parameters()).device)
        self.register_buffer("action_ids", ids, persistent=False)

    @property
    def bins(self) -> int:
        """How many each dimension of an action has."""
        return BINS

    @property
    def action_size(self) -> int:
        """How many dimensions an action has."""
        return len(self.low)

    @property
    def module(self) -> nn.Module:
        """See policy.Policy: what is trained, which of a model with an adapter is the adapter."""
        return self.trained

    def tokens_of(self, actions_NA: Tensor) -> Tensor:
        """See policy.Policy."""
        return bins_of(actions_NA, self.low, self.high, BINS)

    def actions_of(self, tokens_NA: Tensor) -> Tensor:
        """See policy.Policy."""
        return middles_of(tokens_NA, self.low, self.high, BINS)

    def log_probs(self, seen: Seen, tokens_NA: Tensor) -> Tensor:
        """See policy.Policy: all tokens in one pass."""
        return self._at_a_time(lambda *given: self._logits(*given)[..., self.action_ids], seen, tokens_NA)

    def vocabulary_log_probs(self, seen: Seen, tokens_NA: Tensor) -> Tensor:
        """The same over the whole vocabulary: (N, A, tokens of it), of which `action_ids` are the bins."""
        return self._at_a_time(self._logits, seen, tokens_NA)

    def remember(self) -> None:
        """See policy.Policy: an instruction is read together with its image, so nothing can be kept."""

    @torch.no_grad()
    def act(self, seen: Seen, noise_NA: Tensor | None, memory: None = None) -> Tensor:
        """See policy.Policy: image and instruction are read once, then a token at a time."""
        step: Mapping[str, Any] = self._inputs(seen)
        mask_NT, tokens = step["attention_mask"], []
        for place in range(self.action_size):
            out = self.model(**step, use_cache=True, logits_to_keep=1)
            logits_NV = out.logits[:, -1].float()[:, self.action_ids]
            noise_N = None if noise_NA is None else noise_NA[:, place].to(logits_NV.device)
            tokens.append(choose(logits_NV, noise_N))
            mask_NT = torch.cat([mask_NT, mask_NT.new_ones(len(mask_NT), 1)], dim=1)
            said_N1 = self.action_ids[tokens[-1]][:, None]
            step = {"input_ids": said_N1, "attention_mask": mask_NT, **cache_of(out)}
        return torch.stack(tokens, dim=1).cpu()

    def represent(self, seen: Seen) -> Tensor:
        """See policy.Policy: the model's last hidden layer at the prompt's last token."""
        out = self.model(**self._inputs(seen), use_cache=False, logits_to_keep=1, output_hidden_states=True)
        hidden_ND: Tensor = out.hidden_states[-1][:, -1].float().cpu()
        return hidden_ND

    def normalise_by(self, history_NHS: Tensor) -> None:
        """See policy.Policy: images are scaled by the processor."""

    def _at_a_time(self, logits_of: Callable[[Seen, Tensor], Tensor], seen: Seen, tokens_NA: Tensor) -> Tensor:
        """Log-probabilities of a few states after another. With gradient each few are computed again in the backward
        pass, since what the model keeps for it is a gigabyte a state.
        """

        def of(rows: Tensor) -> Tensor:
            few = Seen([seen.instructions[row] for row in rows.tolist()], seen.history[rows])
            return logits_of(few, tokens_NA[rows]).log_softmax(dim=-1).cpu()

        parts = torch.arange(len(tokens_NA)).split(AT_A_TIME)
        if not torch.is_grad_enabled():
            return torch.cat([of(rows) for rows in parts])
        return torch.cat([checkpoint(of, rows, use_reentrant=False) for rows in parts])

    def _logits(self, seen: Seen, tokens_NA: Tensor) -> Tensor:
        """At each of an action's tokens, given those before it: (N, A, vocabulary), in float32."""
        inputs = self._inputs(seen)
        before = self.action_ids[tokens_NA.to(self.action_ids.device)[:, :-1]]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], before], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(before)], dim=1)
        logits: Tensor = self.model(**inputs, use_cache=False, logits_to_keep=self.action_size).logits
        return logits.float()

    def _inputs(self, seen: Seen) -> dict[str, Tensor]:
        """What the model takes, of each history (N, H, height, width, 3) the last image: OpenVLA sees no other."""
        images: Sequence[NDArray[np.uint8]] = list(seen.history[:, -1].cpu().numpy().astype(np.uint8))
        place = self.processor.image_token
        texts = [place + PROMPT.format(instruction=instruction or IDLE) for instruction in seen.instructions]
        inputs = self.processor(text=texts, images=[[one] for one in images], return_tensors="pt", padding=True)
        weight = next(self.model.parameters())
        return {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }
