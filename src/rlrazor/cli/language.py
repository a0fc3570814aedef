"""What `razor finetune`, `razor sweep` and `razor reproduce language` share: their options, and how they run."""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrazor.cli import early, floor, running
from rlrazor.cli.outputs import check_run_folder
from rlrazor.errors import RazorError
from rlrazor.experiments.language.config import PRESETS, TINY, Config, resolve, settled
from rlrazor.experiments.language.methods import SETTINGS_OF
from rlrazor.extras import needs_extra
from rlrazor.lm.encoding import check_stop
from rlrazor.lm.task_names import PARAGRAPHS, PRIOR
from rlrazor.runs.settings import help_of
from rlrazor.system import cores
from rlrazor.system.apart.verifier import DEATHS, SECONDS
from rlrazor.system.terminal import Terminal

if TYPE_CHECKING:
    from rlrazor.experiments.language.experiment import Language
    from rlrazor.experiments.language.setup import PriorSource, Running, TaskSource
    from rlrazor.experiments.language.stages import Models
    from rlrazor.experiments.language.tasks import Task
    from rlrazor.runs.dry_run import Timed
    from rlrazor.runs.runner import Done

DRY_RUN = "print the runs and what they take, measured here within a minute or two; train nothing"
SETTINGS = help_of(Config)
ASKED = ("chat_template", "fewshot", "chat_template_kwargs")  # how prior tasks are, which a single model has too
ENDS_EARLY = "At most, as a stage ends when its task is learned: "
LACKS_PRIOR = {"prior": "; none: forgetting is not measured"}  # of commands that do without
PAPER_DEFAULTS, TINY_DEFAULTS = (running.defaults_of(PRESETS[name]) for name in ("paper", "tiny"))


def add_settings(
    parser: argparse.ArgumentParser,
    title: str,
    names: Iterable[str],
    defaults: Mapping[str, str],
    tiny: Mapping[str, str],
    more: Mapping[str, str] = {},
) -> None:
    """Options for these settings, by the methods that use them, with their defaults, and those of the base 'tiny'.

    `more`: what this command's help says of a setting besides.
    """
    groups = [(title, [name for name in names if name not in _USED_BY])]
    groups += [(f"used by {who}", [name for name in own if name in names]) for who, own in _BY_USER.items()]
    for heading, own in groups:
        group = parser.add_argument_group(heading) if own else None
        for name in own:
            default = running.with_tiny(defaults, tiny, name)
            running.add_setting(group, name, SETTINGS[name] + more.get(name, ""), default)


_BY_USER = {**SETTINGS_OF, "the base 'tiny'": ("pretrain_steps",)}
_USED_BY = {name for names in _BY_USER.values() for name in names}


def add_source(
    parser: argparse.ArgumentParser, *, trains: bool = True, generic: str = f"{PARAGRAPHS}; of tiny {PRIOR}"
) -> None:
    """The options that say where prompts and prior tasks come from; `trains`: of a command that does.

    `generic`: the default of --generic, in words.
    """
    source = parser.add_argument_group("data")
    source.add_argument(
        "--data", type=Path, metavar="PATH", help="local file or folder of the task, in the hub's schema"
    )
    source.add_argument("--demonstrations", type=Path, metavar="FILE", help="rows of prompt, completion and rejected")
    source.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a task of your own, in place of --task: rows with prompt ..."
    )
    source.add_argument(
        "--verifier",
        metavar="FILE.py:FUNCTION",
        help="... and what scores a completion; it is run, in a process of its own. Without it, only a row's own "
        "completion is right",
    )
    source.add_argument(
        "--verifier-timeout",
        type=float,
        default=SECONDS,
        metavar="SECONDS",
        help=f"... for one completion (default: {SECONDS:g}); one that takes longer, or ends its process, is counted "
        f"and left out, and {DEATHS} of them in a row end the command",
    )
    source.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="... and what ends one; may be repeated, \\n is a line end",
    )
    source.add_argument("--no-chat", action="store_true", help="... and do not put prompts into the chat template")
    source.add_argument(
        "--generic",
        type=early.generic_source,
        metavar="FILE|prior|self|paragraphs",
        help="text, or prompts, that stand for what must not change: rows with text or prompt, or a text a line; "
        "prior: the prior tasks' own prompts; self: what the base writes from nothing; paragraphs: sixty built-in ones "
        f"(a file of such a name is ./self) (default: {generic})",
    )
    if trains:
        source.add_argument(
            "--old-examples",
            type=Path,
            metavar="FILE",
            help="examples of what must not be lost, for the methods replay, ewc and lwf: rows with prompt and "
            "completion, or with text, or a text a line (default: of the tiny base its pre-training text, else none)",
        )
    else:
        parser.set_defaults(old_examples=None)
    add_prior(source)


def add_prior(group: Any) -> None:
    """The options that say where prior tasks come from, in a parser or a group of its options."""
    group.add_argument("--data-mirror", type=Path, metavar="DIR", help="local JSONL files of the prior tasks")
    group.add_argument(
        "--allow-code-execution", action="store_true", help="run code that the model writes (HumanEval), unsandboxed"
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """The options that say how to run, none of which changes a result."""
    running = parser.add_argument_group("running")
    running.add_argument(
        "--micro-batch", type=int, metavar="N", help="sequences at a time: less memory (default: all of a step)"
    )
    running.add_argument(
        "--save-every",
        type=int,
        metavar="STEPS",
        help="keep what an interrupted run goes on from, three times the weights on disk while it trains; 0: never "
        "(default: at each checkpoint that is measured)",
    )
    running.add_argument(
        "--report-to", default="none", metavar="TRACKER", help="tensorboard, wandb, trackio, ... (default: none)"
    )


def add_sweep(parser: argparse.ArgumentParser, out: str, defaults: Mapping[str, str]) -> None:
    """The options of a sweep."""
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"run folder (default: {out})")
    add_settings(parser, running.GRID, SETTINGS, defaults, defaults)
    running.add_config(parser)
    parser.add_argument("--jobs", type=int, help="processes (default: the cores for the tiny base, else 1)")
    running.add_weights(parser)
    parser.add_argument("--dry-run", action="store_true", help=DRY_RUN)
    running.add_json(parser)
    running.add_cluster(parser)
    running.add_lines(parser)
    floor.add_to(parser)
    add_source(parser)
    add_running(parser)


def task_of(arguments: argparse.Namespace) -> str:
    """The new task's name: --task, or of --prompts FILE without one that of the file. Raises RazorError for neither."""
    if arguments.prompts is None:
        if arguments.task is None:
            raise RazorError("Name the new task: --task NAME, or --prompts FILE for one of your own.")
        return str(arguments.task)
    return str(arguments.prompts.stem if arguments.task is None else arguments.task)


def check_source(arguments: argparse.Namespace) -> None:
    """Raise RazorError for options of the new task that do not go together, and a verifier that cannot be loaded."""
    if arguments.verifier and not arguments.prompts:
        raise RazorError("--verifier goes with --prompts FILE, a task of your own.")
    if not 0 < arguments.verifier_timeout < float("inf"):
        raise RazorError(f"--verifier-timeout is a number of seconds, such as 10, not {arguments.verifier_timeout:g}.")
    names = ("data", "demonstrations", "prompts", "data_mirror", "generic", "old_examples")
    files = {name: getattr(arguments, name) for name in names}
    early.require_files(**files)
    for name, path in files.items():
        if isinstance(path, Path) and path.exists() and not (path.is_file() or path.is_dir()):
            raise RazorError(f"--{name.replace('_', '-')} is read more than once, and {path} is a pipe: give a file.")
    if arguments.no_chat and not arguments.prompts:
        raise RazorError("--no-chat goes with --prompts FILE: the other tasks say themselves how they are asked.")
    if arguments.stop and not arguments.prompts:
        raise RazorError("--stop goes with --prompts FILE: the other tasks say themselves what ends a completion.")
    if arguments.verifier:
        from rlrazor.experiments.language.tasks.own import loaded_verifier

        loaded_verifier(arguments.verifier, arguments.verifier_timeout)


def source_of(arguments: argparse.Namespace, task: str) -> "TaskSource":
    """Where the new task comes from. Raises RazorError as `check_early` does."""
    check_source(arguments)
    from rlrazor.experiments.language.setup import TaskSource
    from rlrazor.experiments.language.tasks import Form, OwnTask

    own = None
    if arguments.prompts is not None:
        length = getattr(arguments, "own_max_new_tokens", None) or Form().max_new_tokens
        form = Form(length, stop_of(arguments), not arguments.no_chat)
        own = OwnTask(arguments.prompts, arguments.verifier, form, arguments.verifier_timeout)
    return TaskSource(
        task,
        data=arguments.data,
        demonstrations=arguments.demonstrations,
        own=own,
        generic=arguments.generic,
        old=arguments.old_examples,
    )


def check_early(arguments: argparse.Namespace, config: Config, *models: str) -> None:
    """Raise RazorError for names and files that do not exist; see `settle`."""
    from rlrazor.experiments.language.old import check_old
    from rlrazor.experiments.language.tasks import find_task

    check_source(arguments)
    check_generic(arguments.generic, config)
    check_old(arguments.old_examples, config.methods, config.base, alone=True)
    tasks = [] if arguments.prompts is not None else [find_task(config.task)]
    settle(arguments, config, tasks if arguments.data is None else [], *models)


def check_generic(generic: str | Path | None, config: Config) -> None:
    """Raise RazorError for a word of --generic that there is nothing to make of."""
    if generic == PRIOR and not config.has_prior:
        raise RazorError(f"--generic {PRIOR} is the prior tasks' own prompts, and there are none: leave it out.")
    if generic == PARAGRAPHS and config.base == TINY:
        raise RazorError(f"The base {TINY!r} knows ten letters and no words: leave --generic {PARAGRAPHS} out.")


def settle(arguments: argparse.Namespace, config: Any, tasks: "Iterable[Task]", *models: str) -> None:
    """Settle what can be before torch, and then TRL, are imported for seconds, and how this process computes.

    That is whether the prior tasks, the base and the other `models` are there, and whether the hub can be reached,
    where one of them, or of `tasks`, has to come from it. Raises RazorError for what cannot be had.
    """
    from rlrazor.experiments.language.tasks import FROM_HUB
    from rlrazor.lm import hub

    early.require_prior(config.prior)
    if not getattr(arguments, "dry_run", False):  # which loads no model
        early.require_source(config.base, *models)
    fetched = [task for task in tasks if task.name in FROM_HUB]
    scored = config.base != early.TINY and config.has_prior and arguments.data_mirror is None
    early.settle_hub(config.base, *models, data=bool(fetched) or scored)
    for task in fetched if hub.is_offline() else ():
        task.load(None)  # which says at once what is missing
    from rlrazor.lm import compute

    compute.prepare_process(config.threads)


def require_forgetting(config: "Config", command: str) -> None:
    """Raise RazorError for a command of which what the prior tasks lose is the subject, without any."""
    if not config.has_prior:
        raise RazorError(
            f"razor {command} is about what the prior tasks lose, so it takes at least one: name some with --prior. "
            "`razor finetune` trains and measures KL with --prior none."
        )


def stop_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The stop strings of --stop, in which \\n, \\r, \\t and \\\\ are a line end, a return, a tab and a backslash."""
    meant = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    stop = tuple(re.sub(r"\\([nrt\\])", lambda found: meant[found[1]], text) for text in arguments.stop)
    check_stop(stop)
    return stop


def settings_given(arguments: argparse.Namespace, names: Iterable[str] = SETTINGS) -> dict[str, Any]:
    """The settings that the command line names, as text; `threads` also from RLRAZOR_THREADS."""
    given = running.given(arguments, names)
    if (threads := cores.threads_asked()) is not None:
        given.setdefault("threads", str(threads))
    return given


def experiment_of(arguments: argparse.Namespace, config: Config, *, keep_models: bool = False) -> "Language":
    """The experiment that a command's options describe."""
    from rlrazor.experiments.language.experiment import Language
    from rlrazor.experiments.language.setup import probed

    prior, how = how_of(arguments, keep_models=keep_models)
    return Language(config.base, probed(source_of(arguments, config.task), config, prior), prior, how)


def how_of(arguments: argparse.Namespace, *, keep_models: bool = False) -> "tuple[PriorSource, Running]":
    """Where the prior tasks are, and how to train, as a command's options say."""
    from rlrazor.experiments.language.setup import PriorSource, Running

    how = Running(arguments.micro_batch, arguments.save_every, keep_models, arguments.report_to)
    return PriorSource(arguments.data_mirror, arguments.allow_code_execution), how


def show_plan(
    arguments: argparse.Namespace, experiment: "Timed", config: Config, out: Path, *, note: str = "", **options: Any
) -> None:
    """What a dry run prints, after a `note`; `options`: jobs and weights."""
    from rlrazor.runs.dry_run import estimate, planned
    from rlrazor.system.progress import doing

    with doing(Terminal(stderr=True), "Timing a few updates and one measurement"):
        found = estimate(experiment, config, planned(experiment, config), **options)
    jobs = options.get("jobs", 1)
    what = note + running.counts_in_words(found)
    running.show_plan(config, found, what, out, jobs=jobs, as_json=arguments.json)


def jobs_of(arguments: argparse.Namespace, config: Config) -> int:
    """The processes of a command: small models share the cores."""
    if arguments.jobs is not None:
        return int(arguments.jobs)
    return cores.available() if config.base == TINY else 1


def run_sweep(arguments: argparse.Namespace, default: str, out_of: Callable[[str], Path]) -> int:
    """Resolve the config, run the sweep, print its tables; `default` is the preset, `out_of` it the folder."""
    needs_extra("guard", "train", "eval")

    given = running.named(arguments, ()) | settings_given(arguments)
    if arguments.prompts is not None:
        given["task"] = task_of(arguments)
    preset = given.pop("preset", None) or default
    config, out = resolve(preset, given), arguments.out or out_of(preset)
    if not arguments.dry_run:
        check_run_folder(arguments, out, floor.outputs(arguments, out))
    require_forgetting(config, arguments.argv[0])
    floor.check(arguments, config)
    check_early(arguments, config)
    # Imported here: torch and TRL take seconds that `razor --version` should not.
    from rlrazor.runs import runner

    config = settled(config)
    experiment, console = experiment_of(arguments, config), Terminal(stderr=True)
    how: dict[str, Any] = {"jobs": jobs_of(arguments, config), "weights": arguments.weights}
    if arguments.dry_run:
        show_plan(arguments, experiment, config, out, **how)
        return 0
    options = running.options_of_run(arguments, out, preset, **how)
    if arguments.print_commands:
        return running.print_commands(arguments, experiment, config, options)
    load(experiment, console)

    def run() -> "Done":
        done = runner.run(experiment, config, options, console)
        if arguments.noise_floor and options.line is None:
            floor.keep(experiment, config, out, console)
        return done

    return running.carry_out(arguments, out, console, run)


def load(experiment: "Language | Models", console: Terminal) -> None:
    """Take the fingerprints of the base and of the task, which the specs hold: saying so, as it may take a minute."""
    from rlrazor.system.progress import doing

    with doing(console, "Loading the base and the task"):
        assert experiment.fingerprint
        assert experiment.data
