"""The options that say how KL is measured, and what on, which compare and pick share."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrazor.cli.early import generic_source, needs_no_prior, prior_names
from rlrazor.cli.language import stop_of
from rlrazor.errors import RazorError
from rlrazor.lm.task_names import AS_TURNS, CHAT_FORMS, NOT_IN, PARAGRAPHS, PRIOR, TURNS

if TYPE_CHECKING:
    from rlrazor.guard.law_file import LawFile
    from rlrazor.guard.measured_on import MeasuredOn
    from rlrazor.lm.prior import PriorTasks


def add_probe(group: Any) -> None:
    """Declare them, in a parser or a group of its options."""
    group.add_argument(
        "--generic",
        type=generic_source,
        metavar="FILE|prior|self|paragraphs",
        help="text that stands for what must not change; prior: the own prompts of the tasks that --prior names; self: "
        "what the base writes from nothing; paragraphs: sixty built-in ones (a file of such a name is ./self) "
        f"(default: {PARAGRAPHS}; self where a model is served)",
    )
    group.add_argument("--max-new-tokens", type=int, help="of a completion (default: 128)")
    group.add_argument("--samples", type=int, help="completions of each prompt (default: 1)")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="what ends one, \\n being a line end; may be repeated (default: the end of text alone)",
    )
    group.add_argument("--no-chat", action="store_true", help="do not put prompts into the chat template")
    group.add_argument(
        "--turns",
        choices=TURNS,
        help="which of the assistant's turns in a conversation are measured: the last, which the base completes, or "
        "all, the earlier ones as they are (default: last)",
    )
    add_template_kwargs(group)
    group.add_argument(
        "--dtype", help="float32, or bfloat16 or float16 for half the memory (default: the law's, or float32)"
    )


def add_template_kwargs(group: Any) -> None:
    """Declare what chat templates are told."""
    group.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="what the chat template is told of every prompt, such as '{\"enable_thinking\": false}'; a prompt's own "
        "column chat_template_kwargs goes before it (default: nothing)",
    )


def add_prior_tasks(group: Any, what: str) -> None:
    """Declare the options that say which prior tasks there are, and where; `what` they are for."""
    group.add_argument("--prior", metavar="TASKS", help=f"{what}: lm-eval names, comma-separated (default: none)")
    group.add_argument("--prior-limit", type=int, metavar="N", help="items of each at most (default: 0, all)")
    group.add_argument(
        "--chat-template",
        nargs="?",
        const=AS_TURNS,
        choices=CHAT_FORMS,
        help="ask them in the tokenizer's chat template, as lm-eval's --apply_chat_template: turns, each example a "
        "turn of the conversation, which the option alone stands for, or one-turn, all in the user's (default: no)",
    )
    group.add_argument(
        "--fewshot", type=int, metavar="N", help="examples before each of their questions (default: as each task says)"
    )
    group.add_argument("--data-mirror", type=Path, metavar="DIR", help="local JSONL files of the prior tasks")
    group.add_argument("--allow-code-execution", action="store_true", help="run code that the model writes (HumanEval)")


def suite_of(arguments: argparse.Namespace) -> "PriorTasks | None":
    """The prior tasks; None without any."""
    from rlrazor.lm.harness.asking import Asking
    from rlrazor.lm.prior import PriorTasks
    from rlrazor.lm.prompts import template_kwargs

    told = template_kwargs(arguments.chat_template_kwargs)
    asking = Asking.of(arguments.chat_template or NOT_IN, arguments.fewshot, told)
    if arguments.prior is None or needs_no_prior(arguments.prior):
        if asking.as_json():
            raise RazorError("--chat-template and --fewshot are about prior tasks: name them with --prior.")
        return None
    names, limit = tuple(prior_names(arguments.prior)), arguments.prior_limit or None
    return PriorTasks(names, limit, arguments.data_mirror, arguments.allow_code_execution, asking)


def read_probe(
    arguments: argparse.Namespace, law: "LawFile | None", suite: "PriorTasks | None", *, asks_prior: bool = False
) -> "tuple[str, MeasuredOn]":
    """What models are loaded in, and what they are measured on; `suite`: the prior tasks, if any are named.

    `asks_prior`: they are asked, where other commands take their prompts alone.
    Raises RazorError for what is unreadable, and where a law says how to measure, and so does an option.
    """
    from rlrazor.guard.measured_on import MeasuredOn
    from rlrazor.lm.probes import GenericText, ProbeSettings, read_generic, read_prompts

    in_template = (suite is not None and suite.asking.chat_template) if asks_prior else None
    given, dtype = probe_without_law(arguments, law, prior_in_template=in_template), dtype_of(arguments.dtype, law)
    settings, prompts = ProbeSettings(**given), read_prompts(arguments.prompts)
    if law is not None:
        return dtype, MeasuredOn(prompts, law.generic, law.settings)
    source = arguments.generic
    if source == PRIOR:
        if suite is None:
            raise RazorError(f"--generic {PRIOR} is the prior tasks' own prompts: name them with --prior.")
        source = suite
    generic = GenericText.built_in() if source is None else read_generic(source)
    return dtype, MeasuredOn(prompts, generic, replace(settings, precision=dtype))


def probe_given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of the probes that were given, by their names in `ProbeSettings`."""
    from rlrazor.lm.prompts import template_kwargs

    own = {
        "max_new_tokens": arguments.max_new_tokens,
        "samples": arguments.samples,
        "stop": stop_of(arguments) or None,
        "chat": False if arguments.no_chat else None,
        "turns": arguments.turns,
        "chat_template_kwargs": template_kwargs(arguments.chat_template_kwargs) or None,
    }
    return {name: value for name, value in own.items() if value is not None}


def probe_without_law(
    arguments: argparse.Namespace, law: "LawFile | None", *, prior_in_template: bool | None = None
) -> dict[str, Any]:
    """The same. Raises RazorError where a law says how to measure, and an option says otherwise.

    `prior_in_template`: what chat templates are told is told of prior tasks as well, which a law does not decide on.
    None: of a command that asks none.
    """
    given = probe_given(arguments)
    if law is not None and given.keys() <= {"chat_template_kwargs"} and not arguments.generic:
        own, told = law.settings.chat_template_kwargs, given.pop("chat_template_kwargs", None)
        if told not in (None, own) and not prior_in_template:
            says = f"tells the chat template {json.dumps(own)}" if own else "tells the chat template nothing"
            other = "; or, to tell it of prior tasks alone, name these with --prior and add --chat-template"
            raise RazorError(
                f"With --law, prompts are measured as the law says, which {says} of them: leave --chat-template-kwargs "
                f"out{'' if prior_in_template is None else other}."
            )
    if law is not None and (given or arguments.generic):
        raise RazorError("With --law, the law's own probe and settings are used: leave the others out.")
    return given


def dtype_of(given: str | None, law: "LawFile | None") -> str:
    """What models are loaded in: what was asked for, else what the law was calibrated in."""
    return given or (law.settings.precision if law is not None else None) or "float32"
