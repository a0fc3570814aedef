"""How lm-eval puts its items to a model: as plain text or in the model's chat template, after how many examples.

By default as plain text, after as many examples as a task says itself: then a score is named by the task and its
version alone. What is said otherwise is part of that version (`Asking.of_version`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlrazor import bounds
from rlrazor.errors import RazorError
from rlrazor.lm import encoding
from rlrazor.lm.prompts import Prompt, check_template_kwargs
from rlrazor.lm.task_names import CHAT_FORMS, IN_ONE_TURN, NOT_IN

TRIED = 16  # items of a task on which a template is tried before it is used on all


@dataclass(frozen=True)
class Asking:
    """As lm-eval's `apply_chat_template`, `num_fewshot`, `fewshot_as_multiturn` and `chat_template_args` say.

    `fewshot`: so many examples before each question; None: as many as the task says. A task that says 0 has none in any
    case, as lm-eval has it. `multiturn`: in the chat template each example is a turn of the user's and one of the
    assistant's; else all of them stand in the user's one turn. `chat_template_kwargs`: what the template is told.

    Raises RazorError for what makes no sense.
    """

    chat_template: bool = False
    fewshot: int | None = None
    multiturn: bool = True
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.fewshot is not None:
            bounds.check_whole("fewshot", self.fewshot)
            if self.fewshot < 0:
                raise RazorError(f"fewshot is how many examples there are, 0 or more, not {self.fewshot}.")
        check_template_kwargs(self.chat_template_kwargs, "The")
        if not self.chat_template and (not self.multiturn or self.chat_template_kwargs):
            what = "one turn" if not self.multiturn else "`chat_template_kwargs`"
            raise RazorError(f"Prior tasks are asked as plain text, for which {what} means nothing: add chat_template.")

    @classmethod
    def of(cls, form: str, fewshot: int | None, told: Mapping[str, Any]) -> "Asking":
        """As options say it: one of CHAT_FORMS, a number of examples or None, and what the template is told if used."""
        if form not in CHAT_FORMS:
            raise RazorError(
                f"The prior tasks are put into the chat template as {', '.join(CHAT_FORMS)}, not {form!r:.60}."
            )
        used = form != NOT_IN
        return cls(used, fewshot, form != IN_ONE_TURN, told if used else {})

    def as_json(self) -> dict[str, Any]:
        """What is not as by default, by name."""
        usual: dict[str, Any] = {"chat_template": False, "fewshot": None, "multiturn": True, "chat_template_kwargs": {}}
        found = {name: getattr(self, name) for name in usual}
        return {name: value for name, value in found.items() if value != usual[name]}

    @property
    def words(self) -> str:
        """The same for a reader: "in the chat template, after 5 examples"; as plain text by default."""
        said = ["in the chat template" if self.chat_template else "as plain text"]
        if self.fewshot is not None:
            said.append(f"after {self.fewshot} example{'s' * (self.fewshot != 1)}")
        if not self.multiturn:
            said.append("examples in one turn")
        return ", ".join([*said, *(f"{name} = {value}" for name, value in self.chat_template_kwargs.items())])

    def of_version(self, version: str) -> str:
        """A task's version with what is not as by default."""
        return f"{version} ({self.words})" if self.as_json() else version

    def examples(self, own: int | None) -> int:
        """How many a task shows that says itself how many, or nothing."""
        return (own or 0) if self.fewshot is None or own == 0 else self.fewshot

    def requests(self, leaf: Any, doc: Any, examples: int) -> list[Any]:
        """What lm-eval asks a model about a row, after so many examples; in the chat template contexts are turns."""
        told = {"apply_chat_template": True, "chat_template": _as_turns} if self.chat_template else {}
        several = {"fewshot_as_multiturn": self.multiturn} if self.chat_template else {}
        prefix = leaf.doc_to_prefix(doc)
        context = leaf.fewshot_context(doc, num_fewshot=examples, gen_prefix=prefix, **told, **several)
        made = leaf.construct_requests(doc=doc, ctx=context, **told)
        return list(made) if isinstance(made, list) else [made]

    def prompt(self, context: Any) -> Prompt:
        """What a request has a model read, as a prompt for the tokenizer."""
        if isinstance(context, str):
            return context
        told = dict(self.chat_template_kwargs)
        return {"prompt": context, "chat_template_kwargs": told} if told else list(context)

    def check(self, tokenizer: Any, conversations: Sequence[Sequence[Mapping[str, Any]]] = ()) -> None:
        """Raise RazorError where the tokenizer has no chat template, or one that does not end on a conversation."""
        if not self.chat_template:
            return
        if not getattr(tokenizer, "chat_template", None):
            raise RazorError(
                "The prior tasks are to be asked in the chat template, and the tokenizer has none: leave "
                "--chat-template out, or give a tokenizer with a template."
            )
        encoding.try_turns(tokenizer, [(turns, self.chat_template_kwargs) for turns in conversations])

    @property
    def of_lm_eval(self) -> dict[str, Any]:
        """The arguments of its `evaluate`."""
        if not self.chat_template:
            return {}
        return {"apply_chat_template": True, "fewshot_as_multiturn": self.multiturn}


def _as_turns(turns: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[dict[str, Any]]:
    """In place of a template: the conversation as it is, which says by its last turn whether the assistant goes on."""
    return [dict(turn) for turn in turns]


AS_THE_TASKS_SAY = Asking()
