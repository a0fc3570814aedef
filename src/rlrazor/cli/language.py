"""What `razor finetune`, `razor sweep` and `razor reproduce language` share: their options, and how they run."""

import argparse
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrazor import cores
from rlrazor.apart.verifier import DEATHS, SECONDS
from rlrazor.cli import early
from rlrazor.cli.outputs import check_run_folder
from rlrazor.cli.printing import human_seconds, print_plan, print_results
from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra
from rlrazor.lm.encoding import check_stop
from rlrazor.terminal import Terminal

if TYPE_CHECKING:
    from rlrazor.experiments.language.config import Config
    from rlrazor.experiments.language.train import TaskSource, Trainer

# The settings of the grid, which a config file can hold too; parsed by config.parse_setting.
SETTINGS = {
    "base": "the model to start from: a hub id, a folder, a .gguf file, or 'tiny'",
    "task": "the new task; `razor tasks` lists them",
    "methods": "methods, comma-separated, or 'paper' or 'tiny'",
    "lrs": "learning rates of SFT and SimPO, comma-separated, or LOW:HIGH:COUNT log-spaced",
    "rl_lrs": "learning rates of on-policy methods",
    "schedules": "learning-rate schedules of SFT and SimPO: constant, cosine",
    "epochs": "passes over the prompts, of SFT and SimPO",
    "batch_sizes": "sequences per step, of SFT and SimPO",
    "rl_prompts": "prompts per step, of on-policy methods",
    "group_size": "samples of each of them",
    "iterations": "updates per batch of samples",
    "seeds": "seeds",
    "checkpoints_per_epoch": "checkpoints measured per epoch, or with max_steps per run",
    "max_steps": "updates at most; 0: as many as the epochs have",
    "warmup_steps": "updates of warm-up",
    "kl_coef": "weight of KL(pi || pi0) in the methods named ...+kl",
    "lora_rank": "train an adapter of this rank; 0: all weights",
    "max_new_tokens": "tokens of a completion at most; 0: as the task says",
    "dtype": "of the base's weights, in which everything is measured: float32 or bfloat16, half the memory",
    "precision": "of matrix products in training: float32, or bf16 by autocast",
    "train_prompts": "prompts trained on at most; 0: all",
    "test_prompts": "held-out prompts that scores and KL are measured on, at most",
    "kl_samples": "completions of each of them",
    "scored": "new-task score: greedy, or sampled",
    "prior": "prior tasks, comma-separated names of lm-eval",
    "prior_limit": "items of each prior task at most; 0: all",
    "thresholds": "new-task scores at which the report compares methods",
    "pretrain_steps": "updates of the tiny base's pre-training",
    "threads": "of each process, on a CPU; another number changes the last digits",
}


def add_source(parser: argparse.ArgumentParser) -> None:
    """The options that say where prompts and prior tasks come from."""
    source = parser.add_argument_group("data")
    source.add_argument(
        "--data", type=Path, metavar="PATH", help="local file or folder of the task, in the hub's schema"
    )
    source.add_argument("--demonstrations", type=Path, metavar="FILE", help="rows of prompt, completion and rejected")
    source.add_argument("--prompts", type=Path, metavar="FILE", help="a task of your own: rows with prompt ...")
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
        type=Path,
        metavar="FILE",
        help="text, or prompts, that stand for what must not change: rows with text or prompt, or a text a line",
    )
    source.add_argument("--data-mirror", type=Path, metavar="DIR", help="local JSONL files of the prior tasks")
    source.add_argument(
        "--allow-code-execution", action="store_true", help="run code that the model writes (HumanEval), unsandboxed"
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """The options that say how to run, none of which changes a result."""
    running = parser.add_argument_group("running")
    running.add_argument("--micro-batch", type=int, metavar="N", help="sequences at a time: less memory")
    running.add_argument("--save-every", type=int, metavar="STEPS", help="states that an interrupted run resumes from")
    running.add_argument("--report-to", default="none", metavar="TRACKER", help="tensorboard, wandb, trackio, ...")


def add_sweep(parser: argparse.ArgumentParser, out: str) -> None:
    """The options of a sweep."""
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"run folder (default: {out})")
    grid = parser.add_argument_group("grid (override the preset and the config file)")
    for name, text in SETTINGS.items():
        grid.add_argument(f"--{name.replace('_', '-')}", help=text)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a preset and settings of the grid as TOML, or a run's config.json"
    )
    parser.add_argument("--jobs", type=int, help="processes (default: the cores for the tiny base, else 1)")
    parser.add_argument("--weights", choices=("none", "final", "all"), default="none", help="checkpoints to keep")
    parser.add_argument("--dry-run", action="store_true", help="print the grid and its size; train nothing")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON instead of tables")
    add_source(parser)
    add_running(parser)


def source_of(arguments: argparse.Namespace, task: str) -> "TaskSource":
    """Where the new task comes from."""
    if arguments.verifier and not arguments.prompts:
        raise RazorError("--verifier goes with --prompts FILE, a task of your own.")
    if not 0 < arguments.verifier_timeout < float("inf"):
        raise RazorError(f"--verifier-timeout is a number of seconds, such as 10, not {arguments.verifier_timeout:g}.")
    for name in ("data", "demonstrations", "prompts", "data_mirror", "generic"):
        path = getattr(arguments, name, None)
        if path is not None and not path.exists():
            raise RazorError(f"There is no {path}, which --{name.replace('_', '-')} names.")
        if path is not None and not (path.is_file() or path.is_dir()):
            raise RazorError(f"--{name.replace('_', '-')} is read more than once, and {path} is a pipe: give a file.")
    if arguments.no_chat and not arguments.prompts:
        raise RazorError("--no-chat goes with --prompts FILE: the other tasks say themselves how they are asked.")
    if arguments.stop and not arguments.prompts:
        raise RazorError("--stop goes with --prompts FILE: the other tasks say themselves what ends a completion.")
    from rlrazor.experiments.language.train import TaskSource

    return TaskSource(
        task,
        data=arguments.data,
        demonstrations=arguments.demonstrations,
        prompts=arguments.prompts,
        verifier=arguments.verifier,
        verifier_timeout=arguments.verifier_timeout,
        stop=stop_of(arguments),
        generic=arguments.generic,
        chat=not arguments.no_chat,
    )


def check_early(arguments: argparse.Namespace, config: "Config", *models: str) -> None:
    """Raise RazorError for names and files that do not exist, before torch, and then TRL, are imported for seconds.

    `models`: others than the base. Settles whether the hub can be reached, where something may have to come from it,
    and how this process computes.
    """
    from rlrazor.experiments.language.tasks import find_task
    from rlrazor.lm import hub

    base, models = config.base, (config.base, *models)
    early.require_files(
        data=arguments.data, demonstrations=arguments.demonstrations, prompts=arguments.prompts,
        data_mirror=arguments.data_mirror, generic=arguments.generic,
    )  # fmt: skip
    own = find_task(config.task) if arguments.prompts is None else None
    early.require_prior(config.prior)
    fetched = own is not None and own.from_hub and arguments.data is None
    scored = early.TINY not in (base, *config.prior) and arguments.data_mirror is None
    early.settle_hub(*models, data=fetched or scored)
    if fetched and own is not None and hub.is_offline():
        own.load(None)  # which says at once what is missing
    from rlrazor.lm import compute

    compute.prepare_process(config.threads)
    if not getattr(arguments, "dry_run", False):  # which loads no model
        early.require_source(*models)


def stop_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The stop strings of --stop, in which \\n, \\r, \\t and \\\\ are a line end, a return, a tab and a backslash."""
    meant = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    stop = tuple(re.sub(r"\\([nrt\\])", lambda found: meant[found[1]], text) for text in arguments.stop)
    check_stop(stop)
    return stop


def settings_given(arguments: argparse.Namespace, names: Iterable[str] = SETTINGS) -> dict[str, Any]:
    """The settings that the command line names, as text; `threads` also from RLRAZOR_THREADS."""
    given = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    if (threads := cores.threads_asked()) is not None:
        given.setdefault("threads", str(threads))
    return given


def trainer_of(arguments: argparse.Namespace, config: "Config") -> "Trainer":
    """The trainer of a config that a command's options describe; this process computes as its workers will."""
    from rlrazor.experiments.language.train import Trainer
    from rlrazor.lm import compute

    compute.prepare_process(config.threads)
    for name in ("micro_batch", "save_every"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise RazorError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
    return Trainer(
        config.base,
        source_of(arguments, config.task),
        data_mirror=arguments.data_mirror,
        allow_code_execution=arguments.allow_code_execution,
        micro_batch=arguments.micro_batch,
        save_every=arguments.save_every,
        report_to=arguments.report_to,
    )


def run_sweep(arguments: argparse.Namespace, preset: str, out: Path) -> int:
    """Resolve the config, run the sweep, print its tables."""
    needs_extra("guard", "train", "eval")
    # Imported here: torch and TRL take seconds that `razor --version` should not.
    from rlrazor.experiments.grid import read_settings
    from rlrazor.experiments.language.config import TINY, parse_setting, resolve

    given = read_settings(arguments.config) if arguments.config else {}
    given |= settings_given(arguments)
    preset = given.pop("preset", None) or preset
    config = resolve(preset, {name: parse_setting(name, value) for name, value in given.items()})
    jobs = arguments.jobs if arguments.jobs is not None else (cores.available() if config.base == TINY else 1)
    if jobs < 1:
        raise RazorError(f"--jobs must be at least 1, not {jobs}.")
    if not arguments.dry_run:
        check_run_folder(arguments, out)
    check_early(arguments, config)
    from rlrazor.experiments.language.reproduce import Options, estimate, reproduce

    trainer = trainer_of(arguments, config)
    if arguments.dry_run:
        found = estimate(config, trainer.task)
        what = (
            f"{found.runs} runs, {found.steps:,} updates, {found.checkpoints:,} checkpoints measured, with {jobs} "
            f"job{'s' if jobs > 1 else ''}."
        )
        print_plan(config, found, what, as_json=arguments.json)
        return 0
    command = shlex.join(["razor", *arguments.argv])
    console = Terminal(stderr=True)
    done = reproduce(config, trainer, Options(out, jobs, arguments.weights, preset, command), console)
    for name in done.diverged:
        console.print(f"Diverged, measured up to there: {name}.", style="yellow")
    console.print(f"{done.trained} runs trained, {done.kept} kept, in {human_seconds(done.seconds)}.", highlight=False)
    print_results(done.results, done.report, as_json=arguments.json)
    return 0
