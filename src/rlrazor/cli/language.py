"""What `razor finetune`, `razor sweep` and `razor reproduce language` share: their options, and how they run."""

import argparse
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrazor.cli import early
from rlrazor.cli.outputs import check_run_folder
from rlrazor.cli.printing import human_bytes, human_seconds, print_plan, print_results
from rlrazor.errors import RazorError
from rlrazor.experiments.language.methods import SETTINGS_OF
from rlrazor.extras import needs_extra
from rlrazor.lm.encoding import check_stop
from rlrazor.system import cores
from rlrazor.system.apart.verifier import DEATHS, SECONDS
from rlrazor.system.terminal import Terminal

if TYPE_CHECKING:
    from rlrazor.experiments.language.config import Config
    from rlrazor.experiments.language.reproduce import Estimate
    from rlrazor.experiments.language.train import TaskSource, Trainer

DRY_RUN = "print the runs and what they take, measured here within a minute or two; train nothing"
# The settings of the grid, which a config file can hold too; parsed by config.parse_setting.
SETTINGS = {
    "base": "the model to start from: a hub id, a folder, a .gguf file, or 'tiny'",
    "task": "the new task, which `razor tasks` lists; of --prompts a name for it",
    "methods": "methods, comma-separated, or 'paper' or 'tiny'",
    "seeds": "seeds",
    "checkpoints_per_epoch": "checkpoints measured per epoch, or with max_steps per run",
    "max_steps": "updates at most; 0: as many as the epochs have",
    "warmup_steps": "updates in which the learning rate rises: below 1 a share of the run's, else so many, or 5 %% "
    "where max_steps, or an epoch, has no more",
    "lora_rank": "train an adapter of this rank; 0: all weights",
    "max_new_tokens": "tokens of a completion at most; 0: as the task says",
    "dtype": "of the base's weights, in which everything is measured: float32 or bfloat16, half the memory",
    "precision": "of matrix products in training: float32, bf16 by autocast, or auto, bf16 on a GPU that has it",
    "train_prompts": "prompts trained on at most; 0: all",
    "test_prompts": "held-out prompts that scores and KL are measured on, at most",
    "kl_samples": "completions of each of them",
    "scored": "new-task score: greedy, or sampled",
    "prior": "prior tasks, comma-separated names of lm-eval; none (finetune, evaluate): forgetting is not measured",
    "prior_limit": "items of each prior task at most; 0: all",
    "thresholds": "new-task scores at which the report compares methods",
    "threads": "of each process, on a CPU; another number changes the last digits",
    "lrs": "learning rates, comma-separated, or LOW:HIGH:COUNT log-spaced",
    "schedules": "learning-rate schedules: constant, cosine",
    "epochs": "passes over the prompts",
    "batch_sizes": "sequences per step",
    "rl_lrs": "learning rates, as above",
    "rl_prompts": "prompts per step",
    "group_size": "samples of each of them",
    "iterations": "updates per batch of samples",
    "kl_coef": "weight of KL(pi || pi0)",
    "pretrain_steps": "updates of its pre-training",
}
# What the presets have, as a help text shows it: to look it up there takes the seconds that importing torch does.
PAPER_DEFAULTS = {
    "base": "Qwen/Qwen2.5-3B-Instruct",
    "task": "math",
    "methods": "sft, simpo, reinforce, dr-grpo",
    "seeds": "0",
    "checkpoints_per_epoch": "1",
    "max_steps": "0",
    "warmup_steps": "50",
    "lora_rank": "0",
    "max_new_tokens": "0",
    "dtype": "float32",
    "precision": "bf16",
    "train_prompts": "0",
    "test_prompts": "256",
    "kl_samples": "1",
    "scored": "greedy",
    "prior": "hellaswag, truthfulqa_mc2, mmlu, ifeval, winogrande, humaneval",
    "prior_limit": "0",
    "thresholds": "0.3, 0.4, 0.5, 0.6",
    "threads": "4",
    "lrs": "1e-05, 3e-05, 5e-05, 7e-05, 9e-05",
    "schedules": "constant, cosine",
    "epochs": "1, 2",
    "batch_sizes": "16, 32, 64, 128",
    "rl_lrs": "1e-05, 2e-05, 3e-05, 4e-05, 5e-05",
    "rl_prompts": "8",
    "group_size": "64",
    "iterations": "1, 2",
    "kl_coef": "0.1",
    "pretrain_steps": "1200",
}
TINY_DEFAULTS = {
    **PAPER_DEFAULTS,
    "base": "tiny",
    "task": "letters",
    "methods": "sft-one, sft-two, sft-uniform, oracle, rl-distilled, simpo, reinforce, grpo, dr-grpo, dr-grpo+kl, "
    "kl-dpg",
    "checkpoints_per_epoch": "8",
    "max_steps": "200",
    "warmup_steps": "0.05",
    "precision": "float32",
    "kl_samples": "4",
    "scored": "sampled",
    "prior": "tiny",
    "thresholds": "0.9, 0.95, 0.98",
    "threads": "1",
    "lrs": "5e-05, 0.0001, 0.0002, 0.0004",
    "schedules": "constant",
    "epochs": "3",
    "batch_sizes": "64",
    "rl_lrs": "5e-05, 0.0001, 0.0002, 0.0004",
    "rl_prompts": "16",
    "group_size": "16",
    "iterations": "1",
}


def add_settings(
    parser: argparse.ArgumentParser,
    title: str,
    names: Iterable[str],
    defaults: Mapping[str, str],
    tiny: Mapping[str, str],
) -> None:
    """Options for these settings, by the methods that use them, with their defaults, and those of the base 'tiny'."""
    groups = [(title, [name for name in names if name not in _USED_BY])]
    groups += [(f"used by {who}", [name for name in own if name in names]) for who, own in _BY_USER.items()]
    for heading, own in groups:
        group = parser.add_argument_group(heading) if own else None
        for name in own:
            default = defaults[name] + (f"; of 'tiny' {tiny[name]}" if tiny[name] != defaults[name] else "")
            assert group is not None
            group.add_argument(f"--{name.replace('_', '-')}", help=f"{SETTINGS[name]} (default: {default})")


_BY_USER = {**SETTINGS_OF, "the base 'tiny'": ("pretrain_steps",)}
_USED_BY = {name for names in _BY_USER.values() for name in names}


def add_source(parser: argparse.ArgumentParser) -> None:
    """The options that say where prompts and prior tasks come from."""
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
    add_settings(parser, "grid (override the preset and the config file)", SETTINGS, defaults, defaults)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a preset and settings of the grid as TOML, or a run's config.json"
    )
    parser.add_argument("--jobs", type=int, help="processes (default: the cores for the tiny base, else 1)")
    parser.add_argument(
        "--weights", choices=("none", "final", "all"), default="none", help="checkpoints to keep (default: none)"
    )
    parser.add_argument("--dry-run", action="store_true", help=DRY_RUN)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON instead of tables")
    add_source(parser)
    add_running(parser)


def task_of(arguments: argparse.Namespace) -> str:
    """The new task's name: --task, or of --prompts FILE without one that of the file. Raises RazorError for neither."""
    if arguments.prompts is None:
        if arguments.task is None:
            raise RazorError("Name the new task: --task NAME, or --prompts FILE for one of your own.")
        return str(arguments.task)
    return str(arguments.prompts.stem if arguments.task is None else arguments.task)


def _check_source(arguments: argparse.Namespace) -> None:
    """Raise RazorError for options of the new task that do not go together, and a verifier that cannot be loaded."""
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
    if arguments.verifier:
        from rlrazor.experiments.language.tasks.own import loaded_verifier

        loaded_verifier(arguments.verifier, arguments.verifier_timeout)


def source_of(arguments: argparse.Namespace, task: str) -> "TaskSource":
    """Where the new task comes from. Raises RazorError as `check_early` does."""
    _check_source(arguments)
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
    _check_source(arguments)
    own = find_task(config.task) if arguments.prompts is None else None
    early.require_prior(config.prior)
    if not getattr(arguments, "dry_run", False):  # which loads no model
        early.require_source(*models)
    fetched = own is not None and own.from_hub and arguments.data is None
    scored = base != early.TINY and config.has_prior and arguments.data_mirror is None
    early.settle_hub(*models, data=fetched or scored)
    if fetched and own is not None and hub.is_offline():
        own.load(None)  # which says at once what is missing
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
    given = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    if (threads := cores.threads_asked()) is not None:
        given.setdefault("threads", str(threads))
    return given


def trainer_of(arguments: argparse.Namespace, config: "Config") -> "Trainer":
    """The trainer of a config that a command's options describe; this process computes as its workers will."""
    from rlrazor.experiments.language.train import Trainer
    from rlrazor.lm import compute

    compute.prepare_process(config.threads)
    return Trainer(
        config.base,
        source_of(arguments, config.task),
        data_mirror=arguments.data_mirror,
        allow_code_execution=arguments.allow_code_execution,
        micro_batch=arguments.micro_batch,
        save_every=arguments.save_every,
        report_to=arguments.report_to,
    )


def in_words(found: "Estimate", out: Path, jobs: int = 1) -> str:
    """What a dry run says of an estimate."""
    counts = f"{found.runs} runs, {found.steps:,} updates, {found.checkpoints:,} checkpoints measured."
    if found.seconds is None:
        return f"{counts}\nTime, memory and disk were not measured: {found.missing.rstrip('.')}."
    return f"{counts}\n{measured_in_words(found, out, jobs)}"


def measured_in_words(found: Any, out: Path, jobs: int) -> str:
    """The time, memory and disk of an experiment's estimate, and what was timed for it."""
    measured = (
        f"About {human_seconds(found.seconds)}, give or take {100 * found.error:.0f} %, with {jobs} "
        f"job{'s' if jobs > 1 else ''} on this machine; {human_bytes(found.memory_bytes)} of memory a job; "
        f"{human_bytes(found.disk_bytes)} of disk in {out}"
    )
    if getattr(found, "passing_bytes", None):
        measured += f", and up to {human_bytes(found.passing_bytes)} while it trains (--save-every 0: none)"
    return f"{measured}.\nTimed: {found.timed}."


def run_sweep(arguments: argparse.Namespace, preset: str, out: Path) -> int:
    """Resolve the config, run the sweep, print its tables."""
    needs_extra("guard", "train", "eval")
    # Imported here: torch and TRL take seconds that `razor --version` should not.
    from rlrazor.experiments.language.config import TINY, parse_setting, resolve, settled
    from rlrazor.runs.settings import read_settings

    given = read_settings(arguments.config) if arguments.config else {}
    given |= settings_given(arguments)
    if arguments.prompts is not None:
        given["task"] = task_of(arguments)
    preset = given.pop("preset", None) or preset
    config = resolve(preset, {name: parse_setting(name, value) for name, value in given.items()})
    jobs = arguments.jobs if arguments.jobs is not None else (cores.available() if config.base == TINY else 1)
    if not arguments.dry_run:
        check_run_folder(arguments, out)
    require_forgetting(config, arguments.argv[0])
    check_early(arguments, config)
    from rlrazor.experiments.language.reproduce import Options, estimate, reproduce

    config = settled(config)
    trainer = trainer_of(arguments, config)
    console = Terminal(stderr=True)
    if arguments.dry_run:
        found = estimate(config, trainer, console, jobs=jobs, weights=arguments.weights)
        print_plan(config, found, in_words(found, out, jobs), as_json=arguments.json)
        return 0
    command = shlex.join(["razor", *arguments.argv])
    done = reproduce(config, trainer, Options(out, jobs, arguments.weights, preset, command), console)
    for name in done.diverged:
        console.print(f"Diverged, measured up to there: {name}.", style="yellow")
    console.print(f"{done.trained} runs trained, {done.kept} kept, in {human_seconds(done.seconds)}.", highlight=False)
    print_results(done.results, done.report, as_json=arguments.json)
    return 0
