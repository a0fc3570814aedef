"""Served models on the command line: their options, and `razor compare` where one of the two is an address."""

import argparse
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from rlrazor import bounds
from rlrazor.cli import exits
from rlrazor.cli.early import require_files, require_source, settle_hub
from rlrazor.cli.outputs import check_outputs
from rlrazor.cli.printing import console_for_tables, print_json, steps_shown
from rlrazor.cli.probe import read_probe
from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra
from rlrazor.guard.verdict import Limits
from rlrazor.lm.served import LLAMA, is_served
from rlrazor.lm.served.client import KEY
from rlrazor.lm.task_names import PARAGRAPHS, PRIOR, SELF, WORDS
from rlrazor.system import quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlrazor.guard.compare_served import ServedComparison
    from rlrazor.guard.judgement import Judgement
    from rlrazor.guard.served import Asking

ADDRESS = "http://HOST:PORT#MODEL"
ASKED = 256  # likeliest tokens of a model in this process, which has all of them at hand
WORST = 3  # prompts in the terminal
LINE = 90  # characters of one
NEEDS_BOTH = ("law", "prior", "fail_above", "noise_floor", "recover", "first_tokens", "budget", "on_budget")
"""Options that are about weights, prior tasks or laws, of which a server knows nothing."""


def add_served(group: Any) -> None:
    """Declare the options of served models."""
    group.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="likeliest tokens to ask for (default: 20, as many as vLLM tells unless told otherwise; of "
        "llama.cpp:FILE 256)",
    )
    group.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="a hub id or folder with the served model's tokenizer (default: that of the model that is not served)",
    )


def asking_of(arguments: argparse.Namespace, *sources: str) -> "Asking | None":
    """How servers are asked; None where no model is served. Raises RazorError for options that do not go with that."""
    if not any(map(is_served, sources)):
        for name in ("top_k", "tokenizer"):
            if getattr(arguments, name) is not None:
                raise RazorError(f"--{name.replace('_', '-')} is about served models, and none is an {ADDRESS}.")
        return None
    bounds.check("top_k", arguments.top_k, "--top-k")
    for name in NEEDS_BOTH:
        if getattr(arguments, name, None):
            raise RazorError(
                f"--{name.replace('_', '-')} needs the models themselves, and one is behind a server: leave it out, or "
                "give local models."
            )
    if arguments.generic is None:
        arguments.generic = SELF
    if arguments.generic in (PRIOR, PARAGRAPHS) and arguments.generic in WORDS:
        raise RazorError(
            f"--generic {arguments.generic} is not measured of a served model: give self, or a file of prompts, which "
            "the base completes."
        )
    needs_extra("guard")
    from rlrazor.guard.served import Asking

    of_files = not any(source.lower().startswith("http") for source in sources if is_served(source))
    return Asking(arguments.top_k or (ASKED if of_files else Asking().top), arguments.tokenizer)


def local_sources(asking: "Asking | None", *sources: str) -> list[str]:
    """Those of the models, and of where the tokenizer is, that are no addresses."""
    named = [] if asking is None or asking.tokenizer is None else [asking.tokenizer]
    return [source for source in (*sources, *named) if not is_served(source)]


def compare_served(arguments: argparse.Namespace, asking: "Asking", limits: Limits) -> int:
    """Compare, write the page, print, and judge."""
    check_outputs(arguments, [(arguments.out, "page")])
    require_files(prompts=arguments.prompts, generic=arguments.generic)
    needed = local_sources(asking, arguments.base, arguments.tuned)
    require_source(*needed)
    settle_hub(*needed, data=False)
    from rlrazor.guard import compare_served as comparing
    from rlrazor.guard.comparison import Pair
    from rlrazor.guard.judgement import kl_judgements, worst
    from rlrazor.guard.served_page import write_page
    from rlrazor.lm import compute
    from rlrazor.lm.probes import default_cache
    from rlrazor.system.cores import threads_alone

    compute.prepare_process(threads_alone())
    with quiet.without_advice():
        dtype, on = read_probe(arguments, None, None)
        pair = Pair(arguments.base, arguments.tuned, dtype, arguments.as_given, default_cache())
        with steps_shown(comparing.STEPS) as told:
            found = comparing.compare_served(pair, on, asking, level=arguments.level, told=told)
        found = replace(found, setup=replace(found.setup, sources=_sources(arguments)))
        judged = kl_judgements(found.kl["kl_forward"].estimate.per_completion, found.setup, limits)
        page = write_page(found, arguments.out, judged)
    deciding = worst(judged)
    code = exits.of_verdict(None if deciding is None else deciding.verdict)
    if arguments.json:
        print_json({**_as_json(found, judged), "page": str(arguments.out), "exit_code": code})
    else:
        _print(found, judged, page)
    return code


def _sources(arguments: argparse.Namespace) -> dict[str, str]:
    generic = arguments.generic
    files = {"prompts": str(arguments.prompts), **({} if generic == SELF else {"generic": str(generic)})}
    return {**files, "command": shlex.join(["razor", *arguments.argv])}


def _as_json(found: "ServedComparison", judged: "Sequence[Judgement]") -> dict[str, Any]:
    deciding = judged[0] if judged else None
    return {
        "base": found.pair.base,
        "tuned": found.pair.tuned,
        "kinds": dict(zip(("base", "tuned"), found.kinds, strict=True)),
        "top_k": found.asking.top or None,
        "kl": {name: one.estimate.per_completion._asdict() for name, one in found.kl.items()},
        "per_token": {name: one.estimate.per_token._asdict() for name, one in found.kl.items()},
        "at_least": {name: one.bound.per_completion._asdict() for name, one in found.kl.items()},
        "at_least_per_token": {name: one.bound.per_token._asdict() for name, one in found.kl.items()},
        "at_most": dict.fromkeys(found.kl),  # nothing that is told bounds it
        "gap": {name: one.gap for name, one in found.kl.items()},
        "not_told": {name: list(one.unknown) for name, one in found.kl.items()},
        "judgements": [asdict(one) for one in judged],
        "verdict": None if deciding is None else deciding.verdict.value,
        "prompts": [{"said": one.said, "prompt": one.prompt, "kl_forward": one.total} for one in found.prompts],
        "precision": found.pair.dtype,
        "first_prompt": found.setup.first_prompt,
        "settings": found.setup.as_json(),
        "notes": list(found.notes),
    }


def _print(found: "ServedComparison", judged: "Sequence[Judgement]", page: Path) -> None:
    from rlrazor.guard.base_side import shortened
    from rlrazor.guard.comparison_page import LABELS, told_apart
    from rlrazor.guard.served_page import HEADERS, cells, settings_shown

    console = console_for_tables()
    table = Table(box=box.SIMPLE_HEAD, title=f"{found.pair.tuned} against {found.pair.base}", title_justify="left")
    for number, header in enumerate(HEADERS):
        table.add_column(header, justify="right" if number else "left")
    for name, label in LABELS.items():
        table.add_row(label, *cells(found.kl[name]))
    console.print(table)
    shown = dict(settings_shown(found))
    said = (f"{name} {shown[name]}" for name in ("base", "tuned", "likeliest tokens", "prompts", "generic probe"))
    console.print(Text(f"Settings: {'; '.join(said)}.", style="dim"))
    console.print(Text(f"The first prompt, as measured: {shortened(found.setup.first_prompt)!r}"))
    console.print("Moved most, nats of forward KL:", highlight=False)
    for prompt, line in list(zip(found.prompts, told_apart(found.prompts), strict=True))[:WORST]:
        console.print(Text(f"  {prompt.total:8.3f}  {line[:LINE]}{'…' if len(line) > LINE else ''}"))
    for note in found.notes:
        console.print(Text(note, style="yellow"))
    for one in judged:
        console.print(Text(one.sentence, style="bold"))
    console.print(f"Page: {page}", highlight=False, soft_wrap=True)


HELP = (
    f"or {ADDRESS}: a server of vLLM, SGLang or llama.cpp, whose key is read from {KEY}; or {LLAMA}FILE.gguf, which "
    "llama.cpp itself computes"
)
