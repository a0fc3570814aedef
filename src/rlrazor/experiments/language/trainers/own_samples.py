"""SFT on right samples of the policy itself: rejection sampling, once or in rounds (RAFT, arXiv:2304.06767).

A round's samples are drawn when it begins, from the policy as it then is, and all of its updates train on those. So the
data is on-policy but for a round's updates, and without negatives: in as many rounds as updates it is 1-0 REINFORCE's,
averaged over the right samples alone. In one round it is of the policy that training starts from.

Prompts are asked in an order of their own, in a round once each before any a second time, one sample each, until there
are as many right ones as its updates take, or as many were drawn as may be; what there is then goes round again. So a
prompt is trained on as often as its samples are right. What is trained on are the sampled tokens, not those of their
text.
"""

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.experiments.language.trainers.common import Job, sampled
from rlrazor.experiments.language.trainers.offline import Sft, labelled, sft_trainer
from rlrazor.seeding import seed_of
from rlrazor.system import phases, processes
from rlrazor.system.documents import read_json
from rlrazor.system.schema import Schema
from rlrazor.system.writing import atomic_path


class Round(Schema):
    """Right samples in the order in which they are trained on: where the prompt stands, and the completion's token ids.

    `reward`: the share of all samples that were right. A round that a resumed run is in the midst of is read again.
    """

    reward: float
    positions: list[int]
    completions: list[list[int]]

    def sample(self, place: int) -> tuple[int, list[int]]:
        """The position and completion that stand there, going round as often as it takes."""
        place %= len(self.positions)
        return self.positions[place], self.completions[place]


class _OwnSamples(Sft):
    """The rows of its data set stand for the sequences of a step; what they are, the round says."""

    job: Job
    number: int | None = None  # of the round
    drawn: Round

    def get_batch_samples(self, batches: Iterator[Any], *args: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step, of the round that it is in."""
        step, updates = self.state.global_step, self.job.settings.updates
        number = round_of(step, updates.steps, self.job.settings.samples.rounds)
        if number != self.number:
            self.drawn, self.number = self._begin(number, step), number
            self.measured["reward"] = self.drawn.reward
        return super().get_batch_samples(map(self._micro_batch, count(), batches), *args)

    def _micro_batch(self, place: int, _: Any) -> Any:
        """The rows that this process trains on at that place of its step, in place of those of the data set."""
        step, size = self.state.global_step, self.args.per_device_train_batch_size
        first = first_step(self.number or 0, self.job.settings.updates.steps, self.job.settings.samples.rounds)
        before = (step - first) * self.job.settings.updates.batch_size
        before += (place * processes.count() + processes.rank()) * size
        rows = [self.drawn.sample(at) for at in range(before, before + size)]
        return self.data_collator(
            [labelled(self.job.examples[position].prompt, completion) for position, completion in rows]
        )

    def _begin(self, number: int, step: int) -> Round:
        """Draw the round's samples, or read those of a round that had begun when the run was interrupted."""
        saving, updates, samples = self.job.settings.saving, self.job.settings.updates, self.job.settings.samples
        first, end = (first_step(one, updates.steps, samples.rounds) for one in (number, number + 1))
        path = saving.folder / f"round-{number}.json"

        def begun() -> Round:
            if step > first:
                return _read(path, saving.folder)
            drawn = self._draw(number, first * updates.batch_size, (end - first) * updates.batch_size)
            if saving.at:
                with atomic_path(path) as half:
                    half.write_text(drawn.model_dump_json())
            return drawn

        found = processes.in_first(begun)
        phases.at(phases.TRAINING, step, updates.steps)
        return found

    def _draw(self, number: int, before: int, wanted: int) -> Round:
        """So many right samples, of the prompts from that place of their endless order on.

        Raises RazorError where none was right in as many samples as may be drawn.
        """
        found: list[tuple[int, list[int]]] = []
        asked, tries, reward = 0, self.job.settings.samples.tries, self.job.reward
        assert reward is not None
        for attempt in count():
            if not (missing := min(wanted - len(found), tries * wanted - asked)):
                break
            positions = [self._position(before + asked + place) for place in range(missing)]
            completions = self._sample(positions, f"round/{number}/{attempt}")
            scores = reward(positions, completions)
            drawn = zip(positions, completions, scores, strict=True)
            found += [(position, completion) for position, completion, score in drawn if score == 1]
            asked += missing
        if not found:
            raise RazorError(
                f"None of {asked} samples of the policy is right, and {self.job.method.label} learns from right ones "
                "only: raise --own-tries, begin with a base that gets some right, or take a method that is shown "
                "demonstrations."
            )
        if len(found) < wanted:
            phases.say(
                f"{len(found)} of {asked} samples of the policy are right, where the updates take {wanted}: each is "
                "trained on more than once. A larger --own-tries draws more."
            )
        random.Random(seed_of(self.job.settings.updates.seed, f"round/{number}/order")).shuffle(found)
        positions, completions = map(list, zip(*found, strict=True))
        return Round(reward=len(found) / asked, positions=positions, completions=completions)

    def _position(self, place: int) -> int:
        """The prompt at that place of the order in which they are asked."""
        turn, at = divmod(place, len(self.job.examples))
        return _order(len(self.job.examples), seed_of(self.job.settings.updates.seed, f"prompts/{turn}"))[at]

    def _sample(self, positions: Sequence[int], purpose: str) -> list[list[int]]:
        phases.at(f"sampling for step {self.state.global_step + 1} of {self.job.settings.updates.steps}")
        return sampled(self, self.job.settings, [self.job.examples[position].prompt for position in positions], purpose)


def round_of(step: int, steps: int, rounds: int) -> int:
    """The round that an update is in, from 0 on: all of nearly as many of them."""
    return step * min(rounds, steps) // steps


def first_step(number: int, steps: int, rounds: int) -> int:
    """The update that a round begins with; of one after the last, their number."""
    return -(-number * steps // min(rounds, steps))


@lru_cache(maxsize=2)
def _order(prompts: int, seed: int) -> Sequence[int]:
    return random.Random(seed).sample(range(prompts), prompts)


def _read(path: Path, folder: Path) -> Round:
    try:
        return read_json(path, Round)
    except RazorError as error:
        raise RazorError(f"{error} Delete {folder} to train from the start.") from error


def own_samples(job: Job) -> Any:
    """The trainer of SFT on right samples of the policy itself."""
    size = job.settings.updates.batch_size
    trainer = sft_trainer(_OwnSamples, job, [{"input_ids": [0, 0], "labels": [-100, -100]}] * size)
    trainer.job = job
    return trainer
