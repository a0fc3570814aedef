"""`razor calibrate`: a few short fine-tunes of a base, their prior scores, and the law that follows from them."""

import argparse
import json
import math
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrazor import cores
from rlrazor.cli.language import SETTINGS, add_running, add_source, check_early, settings_given, trainer_of
from rlrazor.cli.outputs import check_run_folder
from rlrazor.cli.printing import Subparsers, console_for_tables, human_seconds, options_of, print_plan
from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra
from rlrazor.terminal import Terminal
from rlrazor.writing import Output, require_our_folder, write_text

if TYPE_CHECKING:
    from rlrazor.experiments.language.config import Config
    from rlrazor.guard.law_file import LawFile

# Short runs, gentle to ruinous, so that the law sees both ends; ten of them, so that intervals of 90 % exist.
GRID: dict[str, Any] = {
    "methods": "sft",
    "lrs": "3e-6,1e-5,3e-5,1e-4,3e-4",
    "rl_lrs": "1e-6,1e-5",
    "schedules": "constant",
    "iterations": "1",
    "batch_sizes": "16",
    "seeds": "0,1",
    "max_steps": "100",
    "warmup_steps": "5",
    "checkpoints_per_epoch": "5",
    "test_prompts": "128",
    "prior_limit": "100",
}
DEFAULTS = {
    **GRID,
    "epochs": "as many as --max-steps needs",
    "prior": "hellaswag, truthfulqa_mc2, mmlu, ifeval, winogrande",
}
TINY_GRID: dict[str, Any] = {"methods": "sft", "lrs": "3e-5:1e-3:10", "seeds": "0", "rl_lrs": "1e-4"}
_LEFT_OUT = ("base", "task", "thresholds", "scored")


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "calibrate",
        help="make the forgetting law of a base model: law.json",
        description="Fine-tune BASE for a short while at several learning rates, measure what the prior tasks lost and "
        "the KL to the base, and fit the law that the monitor, compare and pick forecast with. Writes OUT/law.json, "
        "OUT/prompts.jsonl, the held-out prompts that KL was measured on, and OUT/train.jsonl, the rest, to train on; "
        "of the base 'tiny' also the model itself, OUT/base. The same command again continues.",
    )
    parser.add_argument("base", metavar="BASE", help=SETTINGS["base"])
    parser.add_argument("--task", help=SETTINGS["task"] + "; or --prompts")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/calibrate"), help="run folder")
    parser.add_argument("--level", type=float, default=0.9, help="of the intervals (default: 0.9)")
    grid = parser.add_argument_group("the runs (by default ten: SFT at five learning rates, two seeds)")
    for name in (name for name in SETTINGS if name not in _LEFT_OUT):
        default = f" (default: {DEFAULTS[name]})" if name in DEFAULTS else ""
        grid.add_argument(f"--{name.replace('_', '-')}", help=SETTINGS[name] + default)
    parser.add_argument("--jobs", type=int, help="processes (default: the cores for the tiny base, else 1)")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and what they take; train nothing")
    parser.add_argument("--json", action="store_true", help="print the law as JSON instead of tables")
    add_source(parser)
    add_running(parser)
    parser.set_defaults(run=run, options=options_of(parser))


def run(arguments: argparse.Namespace) -> int:
    """Run the sweep, fit the law, write it, say what it is worth."""
    needs_extra("guard", "train", "eval")
    from rlrazor.cli import law_page
    from rlrazor.experiments.language.config import TINY, parse_setting, resolve

    if (arguments.task is None) == (arguments.prompts is None):
        raise RazorError("Name the new task: --task NAME, or --prompts FILE for one of your own.")
    if not 0 < arguments.level < 1:
        raise RazorError(f"--level is a fraction of 1, such as 0.9, not {arguments.level}.")
    tiny = arguments.base == TINY
    given = settings_given(arguments)
    given |= {"base": arguments.base, "task": arguments.prompts.stem if arguments.task is None else arguments.task}
    settings = {**(TINY_GRID if tiny else {**GRID, "epochs": "1"}), **given}
    config = resolve(
        "tiny" if tiny else "paper", {name: parse_setting(name, value) for name, value in settings.items()}
    )
    if tiny and len(config.seeds) > 1:
        raise RazorError("Every seed of the tiny base is a base of its own, and a law belongs to one: give one seed.")
    jobs = arguments.jobs if arguments.jobs is not None else (cores.available() if tiny else 1)
    if jobs < 1:
        raise RazorError(f"--jobs must be at least 1, not {jobs}.")
    if not arguments.dry_run:
        _check(arguments, tiny=tiny)
    check_early(arguments, config)
    from rlrazor.experiments.language.evaluate import probe_settings
    from rlrazor.experiments.language.reproduce import Options, estimate, plan, reproduce
    from rlrazor.experiments.language.train import calibration_base
    from rlrazor.experiments.work import versions_of
    from rlrazor.guard import calibrate
    from rlrazor.guard.outputs import move_aside
    from rlrazor.report import drawing, write_report
    from rlrazor.report.tables import read_table, to_rich
    from rlrazor.store import RunStore

    trainer = trainer_of(arguments, config)
    splits = trainer.task.load()
    if not tiny and "epochs" not in given and config.max_steps:
        config = replace(config, epochs=(_epochs(config, len(splits.train)),))
    if arguments.dry_run:
        found = estimate(config, trainer.task)
        what = f"{found.runs} runs, {found.steps:,} updates, {found.checkpoints:,} checkpoints measured."
        print_plan(config, found, what, as_json=arguments.json)
        return 0
    console = Terminal(stderr=True)
    command = shlex.join(["razor", *arguments.argv])
    done = reproduce(config, trainer, Options(arguments.out, jobs, preset="calibrate", command=command), console)
    for name in done.diverged:
        console.print(f"Diverged, measured up to there: {name}.", style="yellow")
    with console.status("Fitting the law"):
        task = trainer.task.task()
        folder = arguments.out / "base" if tiny else None
        own = calibration_base(trainer, plan(config, trainer.task).bases[0], RunStore(arguments.out), folder)
        # As `probes.read_prompts` will read them.
        prompts = list(dict.fromkeys(item.prompt for item in splits.test[: config.test_prompts]))
        probes = replace(probe_settings(own.limited(task), config.kl_samples), precision=config.dtype)
        base = calibrate.Base(config.base, own.digest, own.tokenizer_digest, prompts, own.generic, probes)
        table = read_table(arguments.out / "records.parquet")
        versions = versions_of("transformers", "trl", "lm-eval")
        law = calibrate.fit(table, base, level=arguments.level, versions=versions, command=command)
    path, say = arguments.out / "law.json", partial(console.print, highlight=False, markup=False, soft_wrap=True)
    if path.exists() and not _is_same(path, law):
        move_aside(path, say)
    law.save(path)
    drawing.save(law_page.figure(law), arguments.out)
    write_report(law_page.with_law(done.results))
    rest = [_row(item.prompt, item.demonstration, chat=task.chat and own.has_chat_template) for item in splits.train]
    for name, rows in (("prompts", [{"prompt": prompt} for prompt in prompts]), ("train", rest)):
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        target = arguments.out / f"{name}.jsonl"
        if target.exists() and target.read_text(encoding="utf-8", errors="replace") != text:
            move_aside(target, say)
        write_text(target, text, "rows")
    warnings = calibrate.warnings_of(law, table)
    if arguments.json:
        said = {"law": str(path), "report": str(done.report), "warnings": warnings, "objection": law.objection()}
        print(json.dumps({**said, "by_range": law_page.ranges_as_json(law), **law.as_json()}, indent=2))
        return 0
    console.print(
        f"{done.trained} runs trained, {done.kept} kept, the base among them, in {human_seconds(done.seconds)}.",
        highlight=False,
    )
    printed = console_for_tables()
    for shown in (law_page.candidates_table(law), law_page.ranges_table(law)):
        printed.print(to_rich(shown))
    printed.print(law.describe(), highlight=False)
    for warning in warnings:
        printed.print(warning, style="yellow", highlight=False)
    files = {"Law": path, "Figure": path.with_suffix(".png"), "Prompts to measure on": path.with_name("prompts.jsonl")}
    files |= {"Rows to train on": path.with_name("train.jsonl"), "Report": done.report}
    if folder is not None:
        files["Base"] = folder
    for name, file in files.items():
        printed.print(f"{name}: {file}", highlight=False, soft_wrap=True)
    return 0


def _check(arguments: argparse.Namespace, *, tiny: bool) -> None:
    out = arguments.out
    rows: list[Output] = [(out / "prompts.jsonl", "rows"), (out / "train.jsonl", "rows")]
    check_run_folder(
        arguments, out, [(out / "law.json", "json"), (out / "law.png", "png"), (out / "law.svg", "svg"), *rows]
    )
    if tiny:
        require_our_folder(out / "base")


def _epochs(config: "Config", prompts: int) -> int:
    """Passes over the prompts that come to `max_steps` updates."""
    prompts = min(prompts, config.train_prompts or prompts)
    return math.ceil(config.max_steps / max(1, prompts // max(config.batch_sizes)))


def _is_same(path: Path, law: "LawFile") -> bool:
    """Whether this is the law of the file, whatever command and versions made it."""
    from rlrazor.guard.law_file import LawFile

    try:
        found = LawFile.load(path)
    except RazorError:
        return False
    return replace(found, command="", versions={}) == replace(law, command="", versions={})


def _row(prompt: str, completion: str | None, *, chat: bool) -> dict[str, Any]:
    """As TRL takes it: with turns the trainer uses the chat template, as the runs of the calibration did."""
    columns = {"prompt": ("user", prompt), "completion": ("assistant", completion)}
    return {
        name: [{"role": role, "content": text}] if chat else text
        for name, (role, text) in columns.items()
        if text is not None
    }
