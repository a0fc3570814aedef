"""The policy: one small transformer that reads an instruction and the last states, and writes an action bin by bin.

As in OpenVLA (arXiv:2406.09246): each dimension of an action is cut into 256 bins between its bounds, and each bin is a
token; the tokens of an action are predicted one after another. Left out: the images, for which here are the states of
the simulator, and a language model behind the words. No part belongs to a task: which is asked for is told by the
instruction alone.

    words of the instruction (attend to each other) | states, oldest first | tokens of the action
                                                     (attend to all before them)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.policy import Seen, bins_of, choose, middles_of
from rlrazor.experiments.robot.rollout import HISTORY
from rlrazor.experiments.robot.world import World

BINS = 256
FARTHEST = 10.0  # standard deviations from the demonstrations' mean that a state's number may have
FREQUENCY = 8.0  # deviation of the frequencies of bins' first embeddings, over an action range of 2

KeysValues = tuple[Tensor, Tensor]
"""Of one layer: (N, heads, tokens, width / heads) each."""


@dataclass(frozen=True)
class Size:
    """How large the transformer is; by default 1.1 million parameters."""

    width: int = 160
    layers: int = 3
    heads: int = 4
    bins: int = BINS


class Layer(nn.Module):
    """Attention, then an MLP four times as wide, each after a normalisation and around a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def project(self, x_NTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (N, heads, T, width / heads)."""
        shape = (*x_NTD.shape[:2], 3, self.heads, -1)
        queries, keys, values = self.attention_in(self.before_attention(x_NTD)).view(shape).permute(2, 0, 3, 1, 4)
        return queries, keys, values

    def finish(self, x_NTD: Tensor, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """The layer's output: `mask` is added to the attention's logits."""
        logits = queries @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5 + mask
        attended = (logits.softmax(dim=-1) @ values).transpose(1, 2).flatten(2)
        x_NTD = x_NTD + self.attention_out(attended)
        processed: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.before_mlp(x_NTD))))
        return x_NTD + processed


@dataclass(frozen=True)
class Instructions:
    """The words' side of each layer, of some instructions: keys and values (U, ...), and their mask (U, words)."""

    place: Mapping[str, int]
    layers: Sequence[KeysValues]
    mask: Tensor

    def of(self, instructions: Sequence[str]) -> Tensor:
        """The places (N,) of instructions; a lane without an episode has none, and gets the first."""
        return torch.tensor([self.place.get(one, 0) if not one else self.place[one] for one in instructions])


class ActionTransformer(nn.Module):
    """The policy of one world, whose instructions, states and actions decide its inputs and outputs.

    States are normalised by `mean` and `std` (S,), which are kept with the weights: see `normalise_by`.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor
    words: Tensor
    mask: Tensor

    def __init__(self, world: World, size: Size = Size()) -> None:
        super().__init__()
        (state_size,) = world.observation_shape
        self.size = size
        low, high = torch.from_numpy(world.action_low), torch.from_numpy(world.action_high)
        self.known = sorted({text for task in world.tasks.values() for text in task.paraphrases})
        vocabulary, words = _read(self.known)
        for name, value in {"mean": torch.zeros(state_size), "std": torch.ones(state_size)}.items():
            self.register_buffer(name, value)
        # What the world decides is not kept with the weights.
        attended = torch.zeros(words.shape).masked_fill(words == 0, -torch.inf)
        for name, value in {"low": low, "high": high, "words": words, "mask": attended}.items():
            self.register_buffer(name, value, persistent=False)
        width = size.width
        self.word = nn.Embedding(vocabulary, width)
        self.state = nn.Sequential(nn.Linear(state_size, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.bin = nn.Embedding(size.bins, width)
        self.position = nn.Embedding(words.shape[1] + HISTORY + len(low) - 1, width)
        self.layers = nn.ModuleList(Layer(width, size.heads) for _ in range(size.layers))
        self.last_norm, self.head = nn.LayerNorm(width), nn.Linear(width, size.bins)
        self._initialise()

    @property
    def bins(self) -> int:
        """How many each dimension of an action has."""
        return self.size.bins

    @property
    def action_size(self) -> int:
        """How many dimensions an action has."""
        return len(self.low)

    @property
    def module(self) -> nn.Module:
        """See policy.Policy."""
        return self

    def normalise_by(self, history: Tensor) -> None:
        """Take mean and deviation from these states (N, H, S); what never changes is only moved."""
        states = history.flatten(0, 1).double()
        std = states.std(dim=0)
        self.mean.copy_(states.mean(dim=0))
        self.std.copy_(torch.where(std > 1e-4, std, 1.0))

    def tokens_of(self, actions_NA: Tensor) -> Tensor:
        """See policy.Policy; an action beyond the bounds is in the outermost bin."""
        return bins_of(actions_NA, self.low, self.high, self.bins)

    def actions_of(self, tokens_NA: Tensor) -> Tensor:
        """See policy.Policy."""
        return middles_of(tokens_NA, self.low, self.high, self.bins)

    def log_probs(self, seen: Seen, tokens_NA: Tensor) -> Tensor:
        """See policy.Policy: all tokens in one pass."""
        told, rows = self._told(seen.instructions)
        states_NHD, bins_NAD = self._states(seen.history), self._bins(tokens_NA[:, :-1])
        x_NTD = torch.cat([states_NHD, bins_NAD], dim=1)
        mask = _mask(told.mask[rows], x_NTD.shape[1])
        for layer, (keys, values) in zip(self.layers, told.layers, strict=True):
            assert isinstance(layer, Layer)
            queries, own_keys, own_values = layer.project(x_NTD)
            keys, values = torch.cat([keys[rows], own_keys], dim=2), torch.cat([values[rows], own_values], dim=2)
            if layer is self.layers[-1]:  # nothing is predicted from the states before the last
                x_NTD, queries, mask = x_NTD[:, HISTORY - 1 :], queries[:, :, HISTORY - 1 :], mask[:, :, HISTORY - 1 :]
            x_NTD = layer.finish(x_NTD, queries, keys, values, mask)
        return self._logits(x_NTD).log_softmax(dim=-1)

    def represent(self, seen: Seen) -> Tensor:
        """See policy.Policy."""
        told, rows = self._told(seen.instructions)
        hidden_ND: Tensor = self.last_norm(_Decoding(self, told, rows).read(self._states(seen.history)))
        return hidden_ND

    def remember(self) -> Instructions:
        """All instructions that there are, read."""
        return self._read_words(range(len(self.known)))

    def act(self, seen: Seen, noise_NA: Tensor | None, memory: Instructions) -> Tensor:
        """See policy.Policy: keys and values of what is there are kept from token to token."""
        decoding = _Decoding(self, memory, memory.of(seen.instructions))
        x_ND = decoding.read(self._states(seen.history))
        tokens: list[Tensor] = []
        while True:
            logits_NV = self._logits(x_ND)
            tokens.append(choose(logits_NV, None if noise_NA is None else noise_NA[:, len(tokens)]))
            if len(tokens) == self.action_size:
                return torch.stack(tokens, dim=1)
            x_ND = decoding.read(self._bins(tokens[-1][:, None], len(tokens) - 1))

    def _initialise(self) -> None:
        """Normal, of the deviation width ** -0.5. Bins begin as waves, in and out, so that near ones are alike."""
        std = self.size.width**-0.5
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            for last in (layer.attention_out, layer.mlp_out):
                nn.init.normal_(last.weight, std=std / math.sqrt(2 * self.size.layers))
        for linear in (self.state[0], self.state[2]):
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        middles = (torch.arange(self.bins) + 0.5) / self.bins * 2 - 1
        for embedding in (self.bin, self.head):
            phases = torch.rand(self.size.width) * 2 * math.pi
            waves = (middles[:, None] * torch.randn(self.size.width) * FREQUENCY + phases).cos()
            embedding.weight.data.copy_(waves * math.sqrt(2) * std)

    def _states(self, history_NHS: Tensor) -> Tensor:
        normal = ((history_NHS - self.mean) / self.std).clamp(-FARTHEST, FARTHEST)
        places = self.position.weight[self.words.shape[1] :][:HISTORY]
        states_NHD: Tensor = self.state(normal) + places
        return states_NHD

    def _bins(self, tokens_NT: Tensor, first: int = 0) -> Tensor:
        places = self.position.weight[self.words.shape[1] + HISTORY + first :][: tokens_NT.shape[1]]
        bins_NTD: Tensor = self.bin(tokens_NT) + places
        return bins_NTD

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.last_norm(x))
        return logits

    def _told(self, instructions: Sequence[str]) -> tuple[Instructions, Tensor]:
        """The instructions that are among these, read, with gradient; and which of them each is."""
        place = {text: index for index, text in enumerate(self.known)}
        unknown = next((one for one in instructions if one not in place), None)
        if unknown is not None:
            raise RazorError(f"The policy does not know the instruction {unknown!r:.60}: use one of its world's tasks.")
        told = self._read_words(sorted({place[one] for one in instructions}))
        return told, told.of(instructions)

    def _read_words(self, chosen: Sequence[int]) -> Instructions:
        rows = torch.tensor(list(chosen))
        x_UTD = self.word(self.words[rows]) + self.position.weight[: self.words.shape[1]]
        mask, layers = self.mask[rows], []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            queries, keys, values = layer.project(x_UTD)
            layers.append((keys, values))
            if layer is not self.layers[-1]:
                x_UTD = layer.finish(x_UTD, queries, keys, values, mask[:, None, None])
        return Instructions({self.known[one]: index for index, one in enumerate(chosen)}, layers, mask)


class _Decoding:
    """An action on its way: room for the keys and values of all tokens, of which those of the words are there."""

    def __init__(self, policy: ActionTransformer, told: Instructions, rows: Tensor) -> None:
        self.policy, self.mask, self.length = policy, told.mask[rows], 0
        self.words = self.mask.shape[1]
        self.layers = [(self._room(keys[rows]), self._room(values[rows])) for keys, values in told.layers]

    def read(self, x_NTD: Tensor) -> Tensor:
        """Go on by these T tokens; the output (N, D) at the last."""
        start, length = self.words + self.length, x_NTD.shape[1]
        end, self.length = start + length, self.length + length
        mask = _mask(self.mask, self.length)[:, :, -length:]
        for layer, (keys, values) in zip(self.policy.layers, self.layers, strict=True):
            assert isinstance(layer, Layer)
            queries, keys[:, :, start:end], values[:, :, start:end] = layer.project(x_NTD)
            if layer is self.policy.layers[-1]:
                x_NTD, queries, mask = x_NTD[:, -1:], queries[:, :, -1:], mask[:, :, -1:]
            x_NTD = layer.finish(x_NTD, queries, keys[:, :, :end], values[:, :, :end], mask)
        return x_NTD[:, -1]

    def _room(self, words: Tensor) -> Tensor:
        count, heads, length, width = words.shape
        room = words.new_empty(count, heads, length + HISTORY + self.policy.action_size - 1, width)
        room[:, :, :length] = words
        return room


def _mask(words_NW: Tensor, length: int) -> Tensor:
    """What T tokens after the words may attend to, (N, 1, T, words + T): the words, and no token behind them."""
    causal = torch.full((length, length), -torch.inf).triu(1)
    shape = (len(words_NW), 1, length)
    return torch.cat([words_NW[:, None, None].expand(*shape, -1), causal.expand(*shape, -1)], dim=-1)


def _read(sentences: Sequence[str]) -> tuple[int, Tensor]:
    """How many words there are, and each sentence's (U, words), from 1 on; behind its end there is 0."""
    split = [sentence.split() for sentence in sentences]
    vocabulary = {word: index for index, word in enumerate(sorted({word for words in split for word in words}), 1)}
    longest = max(map(len, split))
    rows = [[vocabulary[word] for word in words] + [0] * (longest - len(words)) for words in split]
    return len(vocabulary) + 1, torch.tensor(rows)
