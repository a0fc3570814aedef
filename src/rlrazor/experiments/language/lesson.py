"""What a run learns from: the prompts of its task, or of several at once, with their demonstrations and rewards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlrazor.experiments.language.demonstrations import Prompts, Source
from rlrazor.experiments.language.methods import Method
from rlrazor.experiments.language.tasks import Item, Scores, Task, score
from rlrazor.experiments.language.world import World
from rlrazor.lm.models import LanguageModel
from rlrazor.runs.records import RunSpec

if TYPE_CHECKING:
    from rlrazor.experiments.language.trainers import Example


@dataclass(frozen=True, eq=False)
class Lesson:
    """Tasks with their prompts, one after another."""

    parts: Sequence[tuple[Task, Prompts]]

    @classmethod
    def of(cls, world: World, tasks: Sequence[str], spec: RunSpec) -> "Lesson":
        """Of these tasks of the world, as many prompts of each as the run takes."""
        count = spec.params["train_prompts"] or None
        return cls(
            [
                (world.tasks[name], Prompts.of(world.tasks[name], world.splits[name].train[:count], world.base))
                for name in tasks
            ]
        )

    @property
    def max_new_tokens(self) -> int:
        """Of the task with the longest completions."""
        return max(task.form.max_new_tokens for task, _ in self.parts)

    @property
    def stop(self) -> tuple[str, ...]:
        """What ends a completion of every task; what ends one of some is cut off before that is scored."""
        first, *others = (task.form.stop for task, _ in self.parts)
        return tuple(text for text in first if all(text in other for other in others))

    def examples(
        self, method: Method, start: LanguageModel, teacher: Any, seed: int
    ) -> "tuple[list[Example], dict[str, float]]":
        """What the method trains on, of demonstrations by `start` or the teacher; and counts for the record."""
        examples: list[Example] = []
        counts = {"prompts_too_long": float(sum(prompts.too_long for _, prompts in self.parts))}
        for task, prompts in self.parts:
            own, counted = Source(task, prompts, start, teacher, seed).examples(method)
            examples += own
            counts |= {name: counts.get(name, 0.0) + value for name, value in counted.items()}
        return examples, counts

    def score(self, positions: Sequence[int], texts: Sequence[str]) -> Scores:
        """Of completions of the prompts at these positions, each by its own task's verifier."""
        places: list[list[int]] = [[] for _ in self.parts]
        asked: list[list[Item]] = [[] for _ in self.parts]
        for place, position in enumerate(positions):
            part = 0
            while position >= len(self.parts[part][1].items):
                position -= len(self.parts[part][1].items)
                part += 1
            places[part].append(place)
            asked[part].append(self.parts[part][1].items[position])
        values: list[float | None] = [None] * len(texts)
        failures: dict[int, str] = {}
        for (task, _), own, items in zip(self.parts, places, asked, strict=True):
            found = score(task, items, [texts[place] for place in own])
            for place, value in zip(own, found.values, strict=True):
                values[place] = value
            failures |= {own[at]: said for at, said in found.failures.items()}
        return Scores(values, failures)
