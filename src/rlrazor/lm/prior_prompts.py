"""The prior tasks' own prompts as a generic probe: as near to the prior scores as text without answers can be.

They are prompts as lm-eval gives them to a model, as many of each task, of items that are not scored where there are
any (`PriorTasks.prompts`). The base completes each once, by sampling, as plain text, which is how lm-eval asks.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlrazor import bounds
from rlrazor.errors import RazorError

PROMPTS, TOKENS = 64, 32  # of all tasks together at most, and of what the base says to each


@dataclass(frozen=True)
class PriorPrompts:
    """Whose prompts a generic probe has, and how the base completes them.

    `tasks`: by name. `scored`: those of them whose prompts are of items that are scored, as no others are left.
    `max_new_tokens`: of a completion of plain text; None: prompts are completed as the new task's are. `without`: other
    prior tasks, which have no prompt here.
    """

    tasks: tuple[str, ...]
    scored: tuple[str, ...] = ()
    max_new_tokens: int | None = TOKENS
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.tasks or not set(self.scored) <= set(self.tasks):
            raise RazorError("Prompts of prior tasks are of tasks that are named, and so are those that are scored.")
        if both := [name for name in self.without if name in self.tasks]:
            raise RazorError(f"The prior tasks' prompts are of {', '.join(both)}, and then again they are not.")
        if self.max_new_tokens is not None:
            bounds.check_whole("max_new_tokens", self.max_new_tokens)
            if self.max_new_tokens < 1:
                raise RazorError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")

    def cautions(self) -> list[str]:
        """Sentences where a prior task has no prompt among them, and where some are of items that are scored."""
        said = []
        if self.without:
            said.append(
                f"The generic probe has no prompt of {', '.join(self.without)}: what is lost there, KL on it may not "
                "show."
            )
        if self.scored:
            said.append(
                f"The prior tasks' prompts are of items that are scored of {', '.join(self.scored)}, where no others "
                "are left: KL on them may say more of these scores than of what was not asked. With --prior-limit "
                "there are others."
            )
        return said
