"""What people use today against forgetting, beside a penalty: replay of old examples, EWC, and LwF.

Old examples are those of the user's file or, of the tiny base, of its pre-training text; and in a sequence the
demonstrations of the stages before. Each prior task of the tiny base, the file, and each stage are drawn from evenly.
Where there are none, as in the first stage of a sequence whose file names none, a run is plain SFT. Of self-replay, and
of LwF without a file, they are what the policy that a run starts from writes itself: see `rehearsal`.
"""

import random
from collections.abc import Callable, Sequence
from itertools import chain, cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from rlrazor.errors import RazorError
from rlrazor.experiments.continual.measures import earlier_of
from rlrazor.experiments.language import rehearsal, tiny
from rlrazor.experiments.language.config import TINY, replayed
from rlrazor.experiments.language.lesson import Lesson
from rlrazor.experiments.language.methods import EWC, LWF, SELF_REPLAY, Method
from rlrazor.experiments.language.old import OldText, read_old
from rlrazor.experiments.language.setup import Setup
from rlrazor.experiments.language.tasks import Form, letters
from rlrazor.experiments.language.world import World
from rlrazor.lm import encoding
from rlrazor.lm.forward import context_length
from rlrazor.lm.models import LanguageModel
from rlrazor.lm.prompts import encode
from rlrazor.lm.representation import ids_of_texts
from rlrazor.runs.records import RunSpec
from rlrazor.seeding import seed_of
from rlrazor.system import phases

if TYPE_CHECKING:
    from rlrazor.experiments.language.trainers import Example, Part

FISHER_EXAMPLES = 256  # that the Fisher information of EWC is averaged over
MEASURING = "measuring which weights old examples need"
LWF_EXAMPLES, LWF_AT_A_TIME = 128, 8  # that LwF goes round, and that an update holds to

Term = Callable[[Any, "Part"], Tensor]
"""(model, part of a step) -> a scalar; their sum over the parts is added to the loss of the step."""


def count_of(method: Method, spec: RunSpec, examples: int) -> int:
    """How many old examples a run with so many of its own takes, where there are any."""
    return {EWC: FISHER_EXAMPLES, LWF: LWF_EXAMPLES}.get(method.protection or "") or replayed(spec, examples)


def writes(setup: Setup, method: Method) -> bool:
    """Whether the policy that a run starts from writes its old examples itself."""
    return method.protection == SELF_REPLAY or (method.protection == LWF and setup.task.old is None)


def has_old(setup: Setup, spec: RunSpec, method: Method) -> bool:
    """Whether there are any for this run: not in the first stage of a sequence that has none of its own."""
    known = setup.task.old is not None or setup.base == TINY
    return method.protection is not None and (known or writes(setup, method) or bool(earlier_of(spec)))


def old_examples(
    setup: Setup, world: World, spec: RunSpec, method: Method, start: LanguageModel, examples: int
) -> "tuple[list[Example], dict[str, float]]":
    """Those that a run with so many of its own replays, measures weights by or is held to; and counts to record."""
    if method.protection is None:
        return [], {}
    count = count_of(method, spec, examples)
    count = min(count, setup.prior.texts or count)  # fewer for a trial
    if writes(setup, method):
        return rehearsal.written(setup, world, spec, start, count)
    known, too_long = _known(setup, world)
    stages = [Lesson.of(world, [task], spec).examples(method, start, None, spec.seed)[0] for task in earlier_of(spec)]
    drawn = draw([*known, *stages], count, random.Random(seed_of(spec.seed, "old examples")))
    return drawn, {"old_examples": float(len(drawn)), "old_too_long": float(too_long)}


def draw(sources: "Sequence[Sequence[Example]]", count: int, rng: random.Random) -> "list[Example]":
    """So many of the sources, in turn; each in an order of its own, and again in another once it is used up."""

    def endless(source: "Sequence[Example]") -> "chain[Example]":
        return chain.from_iterable(rng.sample(source, len(source)) for _ in iter(int, 1))

    turns = cycle([endless(source) for source in sources if source])
    return [next(of) for of, _ in zip(turns, range(count), strict=False)]


def _known(setup: Setup, world: World) -> "tuple[list[list[Example]], int]":
    """The examples of what came before all tasks, by source, and how many the context has no room for."""
    base = world.base
    if setup.task.old is not None:
        form = world.tasks[setup.task.name].form
        kept, too_long = _encoded(read_old(setup.task.old), base, form)
        if not kept:
            raise RazorError(
                f"{setup.task.old}: none of the old examples has two tokens and fits into the "
                f"{context_length(base.model)} tokens of the model's context: there is nothing to protect."
            )
        return [kept], too_long
    if setup.base != TINY:
        return [], 0
    texts = [[OldText(answer, prompt) for prompt, answer in found] for found in tiny.old_examples().values()]
    return [_encoded(of, base, Form(stop=(letters.EOS,), chat=False))[0] for of in texts], 0


def _encoded(texts: Sequence[OldText], lm: LanguageModel, form: Form) -> "tuple[list[Example], int]":
    """As token ids; of a text without a prompt all tokens after the first count, and what is too long is cut off."""
    from rlrazor.experiments.language.trainers import Example  # TRL takes seconds to import

    asked = [text for text in texts if text.prompt is not None]
    prompts = encode(lm.tokenizer, [text.prompt or "" for text in asked], form.chat, form.chat_template_kwargs)
    answers = [encoding.completion_ids(lm.tokenizer, text.completion, form.stop) for text in asked]
    limit = context_length(lm.model) or float("inf")
    pairs = [Example(ids, answer) for ids, answer in zip(prompts, answers, strict=True)]
    kept = [pair for pair in pairs if len(pair.prompt) + len(pair.completion) <= limit]
    whole = ids_of_texts(lm.model, lm.tokenizer, [text.completion for text in texts if text.prompt is None])
    return kept + [Example(ids[:1], ids[1:]) for ids in whole if len(ids) > 1], len(pairs) - len(kept)


def term_of(spec: RunSpec, method: Method, model: Any, before: Any, old: "Sequence[Example]") -> Term | None:
    """What is added to the loss of a run that trains this model, and began as `before`; None for nothing."""
    if method.protection == EWC and old:
        return elastic(model, old, spec.params["ewc_strength"], seed_of(spec.seed, "fisher"))
    if method.protection == LWF and old:
        return without_forgetting(before, old, spec.params["lwf_strength"])
    return None


def without_forgetting(before: Any, old: "Sequence[Example]", strength: float) -> Term:
    """LwF: strength * KL(before || model) on old examples, exact at each of their positions (arXiv:1606.09282).

    The mean over the tokens of so many examples as an update takes, in nats, which are gone round in their order.
    LwF's old task is answered on the new task's inputs, by an output layer of its own; a language model has one output
    for all, and on the new task's inputs it is meant to move. So the inputs are old ones. On what `before` has written
    it is self-replay with the whole distribution in place of the token that was drawn, at temperature 1, not LwF's 2:
    by the chain rule the KL between distributions of texts, over their length. `before` None: without the adapter.
    """
    from rlrazor.experiments.language.trainers.offline import penalty  # TRL takes seconds to import

    def term(model: Any, part: "Part") -> Tensor:
        taken = [old[(part.step * LWF_AT_A_TIME + at) % len(old)] for at in range(LWF_AT_A_TIME)]
        device, own = next(model.parameters()).device, taken[part.place :: part.of]
        if not own:
            return torch.zeros((), device=device)
        ids_BT, mask_BT, labels_BT = (padded.to(device) for padded in _batch(own))
        tokens = sum(len(one.completion) for one in taken)
        return strength * penalty(model, before, ids_BT, mask_BT, labels_BT, tokens, forward=True)

    return term


def _batch(examples: "Sequence[Example]") -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (B, T), padded behind, where they are none of it, and the completions' as labels, -100 elsewhere."""
    from rlrazor.experiments.language.trainers.offline import labelled  # TRL takes seconds to import

    rows = [labelled(one.prompt, one.completion) for one in examples]
    ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
    return (
        pad_sequence(ids, batch_first=True),
        pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=-100),
    )


def elastic(model: Any, old: "Sequence[Example]", strength: float, seed: int) -> Term:
    """EWC: strength / 2 * sum F (theta - theta0)^2, F `diagonal_fisher`, theta0 the weights now (arXiv:1612.00796)."""
    fisher = diagonal_fisher(model, old, seed)
    anchor = {name: weight.detach().clone() for name, weight in model.named_parameters() if name in fisher}

    def term(model: Any, part: "Part") -> Tensor:
        moved = [
            (fisher[name] * (weight.float() - anchor[name].float()).square()).sum()
            for name, weight in model.named_parameters()
            if name in fisher
        ]
        return strength / 2 * torch.stack(moved).sum() / part.of

    return term


def diagonal_fisher(model: Any, examples: "Sequence[Example]", seed: int) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of what a model says to old contexts, by the names of its parameters.

    It is the mean over the examples of sum_t E_{y~pi} (d log pi(y | x, y_<t) / d theta)^2, in float32. The expectation
    is estimated by a token drawn at each position, given the example's own tokens before it: as these draws are
    independent and a score's mean is 0, the square of the sum over positions is unbiased for the sum of the squares.
    The examples' own tokens in their place would give the empirical Fisher, which is another thing (arXiv:1905.12558).
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    fisher = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    device, training = next(model.parameters()).device, model.training
    rng = torch.Generator(device).manual_seed(seed)
    model.eval()
    for number, example in enumerate(examples, 1):
        phases.at(MEASURING, number, len(examples))
        ids = torch.tensor([[*example.prompt, *example.completion]], device=device)
        logits_TV = model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1].float()
        drawn_T = torch.multinomial(logits_TV.detach().softmax(dim=-1), 1, generator=rng)[:, 0]
        log_prob = -F.cross_entropy(logits_TV, drawn_T, reduction="sum")
        slopes = torch.autograd.grad(log_prob, list(weights.values()), allow_unused=True)
        for total, slope in zip(fisher.values(), slopes, strict=True):
            if slope is not None:
                total += slope.float().square() / len(examples)
    model.train(training)
    return fisher
