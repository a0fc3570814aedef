"""`razor calibrate`: a few short fine-tunes of a base, their prior scores, and the law that follows from them."""

import argparse
import json
import math
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrazor.cli import running
from rlrazor.cli.language import (
    DRY_RUN,
    PAPER_DEFAULTS,
    SETTINGS,
    TINY_DEFAULTS,
    add_running,
    add_settings,
    add_source,
    check_early,
    experiment_of,
    jobs_of,
    load,
    require_forgetting,
    settings_given,
    show_plan,
    task_of,
)
from rlrazor.cli.outputs import check_run_folder
from rlrazor.cli.printing import Subparsers, console_for_tables, print_json
from rlrazor.errors import RazorError
from rlrazor.experiments.language.config import TINY, Config, resolve, settled
from rlrazor.extras import needs_extra
from rlrazor.lm.task_names import PRIOR
from rlrazor.system.progress import doing
from rlrazor.system.terminal import Terminal
from rlrazor.system.writing import Output, require_our_folder, write_text

if TYPE_CHECKING:
    import polars as pl

    from rlrazor.experiments.language.experiment import Language
    from rlrazor.experiments.language.tasks import Splits
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
    "warmup_steps": "0.05",
    "precision": "auto",
    "checkpoints_per_epoch": "5",
    "test_prompts": "128",
    "prior_limit": "100",
}
# Six runs allow intervals of 6/7. A third of the updates and of the measuring.
QUICK: dict[str, Any] = {"lrs": "1e-5,6e-5,3e-4", "max_steps": "50", "test_prompts": "64", "prior_limit": "50"}
LEVEL, QUICK_LEVEL = 0.9, 0.85
DEFAULTS = {
    **GRID,
    "epochs": "as many as --max-steps needs",
    "prior": "hellaswag, truthfulqa_mc2, mmlu, ifeval, winogrande",
}
TINY_GRID: dict[str, Any] = {"methods": "sft", "lrs": "3e-5:1e-3:10", "seeds": "0", "rl_lrs": "1e-4"}
TINY_QUICK: dict[str, Any] = {"lrs": "3e-5:1e-3:6", "max_steps": "100"}
_LEFT_OUT = ("base", "task", "thresholds", "scored")


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "calibrate",
        help="make the forgetting law of a base model: law.json",
        description="Fine-tune BASE for a short while at several learning rates, measure what the prior tasks lost and "
        "the KL to the base, and fit the law that the monitor, compare and pick forecast with. Writes OUT/law.json, "
        "OUT/prompts.jsonl, the held-out prompts that KL was measured on, and OUT/train.jsonl, the rest, to train on; "
        "of the base 'tiny' also the model itself, OUT/base. The same command again continues, within a run too.",
    )
    parser.add_argument("base", metavar="BASE", help=SETTINGS["base"])
    parser.add_argument("--task", help=SETTINGS["task"] + " (default: the name of the --prompts file)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs/calibrate"), help="default: runs/calibrate"
    )
    parser.add_argument("--level", type=float, help="of the intervals (default: 0.9, with --quick 0.85)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="six runs of 50 updates, on half of the prompts and of the prior tasks' items: a third of the time. "
        "Intervals are of 85 %% at most and wider, as six runs and noisier scores say less; repeat without it before a "
        "budget stops a training",
    )
    title = "the runs (by default ten: SFT at five learning rates, two seeds)"
    names = [name for name in SETTINGS if name not in _LEFT_OUT]
    add_settings(parser, title, names, {**PAPER_DEFAULTS, **DEFAULTS}, {**TINY_DEFAULTS, **TINY_GRID})
    parser.add_argument("--jobs", type=int, help="processes (default: the cores for the tiny base, else 1)")
    parser.add_argument("--dry-run", action="store_true", help=DRY_RUN)
    running.add_cluster(parser)
    running.add_lines(parser)
    parser.add_argument("--json", action="store_true", help="print the law as JSON instead of tables")
    add_source(parser, generic=PRIOR)
    add_running(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the sweep, fit the law, write it, say what it is worth."""
    needs_extra("guard", "train", "eval")
    if arguments.level is None:
        arguments.level = QUICK_LEVEL if arguments.quick else LEVEL
    config = _config_of(arguments)
    arguments.generic = arguments.generic or PRIOR
    jobs = jobs_of(arguments, config)
    if not arguments.dry_run:
        _check(arguments, tiny=config.base == TINY)
    require_forgetting(config, "calibrate")
    check_early(arguments, config)
    from rlrazor.cli import law_page
    from rlrazor.report import write_report
    from rlrazor.runs import runner

    config = settled(config)
    experiment = experiment_of(arguments, config)
    splits = experiment.task.load()
    if config.base != TINY and arguments.epochs is None and config.max_steps:
        config = replace(config, epochs=(_epochs(config, len(splits.train)),))
    console = Terminal(stderr=True)
    if arguments.dry_run:
        show_plan(arguments, experiment, config, arguments.out, jobs=jobs)
        return 0
    options = running.options_of_run(arguments, arguments.out, "calibrate", jobs=jobs)
    if arguments.print_commands:
        return running.print_commands(arguments, experiment, config, options)
    load(experiment, console)
    if options.line is not None:
        return running.carry_out(
            arguments, arguments.out, console, lambda: runner.run(experiment, config, options, console)
        )
    with running.writing(arguments.out):
        done = runner.run(experiment, config, options, console)
        results, page = running.write_and_load(arguments.out, console)
    with doing(console, "Fitting the law"):
        law, warnings = _write(arguments, config, experiment, splits, options.command)
    write_report(law_page.with_law(results))
    running.say_done(done, console, what=", the base among them")
    if arguments.json:
        said: dict[str, Any] = {
            "law": str(arguments.out / "law.json"),
            "report": str(page),
            "warnings": warnings,
        }
        said |= {"objection": law.objection(), "by_range": [asdict(one) for one in law.by_range]}
        print_json({**said, **law.as_json()})
        return 0
    _show(arguments, law, warnings, page)
    return 0


def _config_of(arguments: argparse.Namespace) -> Config:
    """The runs that the options describe."""
    if arguments.task is not None and arguments.prompts is not None:
        raise RazorError("Name the new task once: --task NAME, or --prompts FILE for one of your own.")
    tiny = arguments.base == TINY
    given = settings_given(arguments) | {"base": arguments.base, "task": task_of(arguments)}
    grid = TINY_GRID if tiny else {**GRID, "epochs": "1"}
    quick = (TINY_QUICK if tiny else QUICK) if arguments.quick else {}
    settings = {**grid, **quick, **given}
    config = resolve("tiny" if tiny else "paper", settings)
    if tiny and len(config.seeds) > 1:
        raise RazorError("Every seed of the tiny base is a base of its own, and a law belongs to one: give one seed.")
    return config


def _write(
    arguments: argparse.Namespace, config: Config, experiment: "Language", splits: "Splits", command: str
) -> "tuple[LawFile, list[str]]":
    """Fit the law to the runs in the folder and write it with its figure and the rows; it, and what is to be said."""
    from rlrazor.cli import law_page
    from rlrazor.experiments.language.evaluate import probe_settings
    from rlrazor.experiments.language.world import calibration_base
    from rlrazor.guard import calibrate
    from rlrazor.guard.law_file import Made
    from rlrazor.guard.measured_on import MeasuredOn
    from rlrazor.report import drawing
    from rlrazor.runs.runner import versions_of
    from rlrazor.runs.store import RunStore
    from rlrazor.runs.tables import read_table

    task, out = experiment.task.task(), arguments.out
    base_spec = config.base_specs(experiment.fingerprint, experiment.data[0])[0]
    own = calibration_base(experiment, base_spec, RunStore(out), out / "base" if config.base == TINY else None)
    # As `probes.read_prompts` will read them.
    prompts = list(dict.fromkeys(item.prompt for item in splits.test[: config.test_prompts]))
    probes = replace(probe_settings(own.limited(task), config.kl_samples), precision=config.dtype)
    on = MeasuredOn(prompts, own.generic, probes)
    base = calibrate.CalibratedBase(config.base, own.digest, own.tokenizer_digest, on, config.asking.as_json())
    table = read_table(out / "records.parquet")
    versions = {**versions_of("transformers", "trl", "lm-eval"), "training precision": config.precision}
    store = RunStore(out)

    def outcomes(run_id: str) -> "pl.DataFrame | None":
        return store.items(run_id) if store.has_items(run_id) else None

    law = calibrate.fit(table, base, level=arguments.level, made=Made(versions, command), outcomes=outcomes)
    _save_law(law, out)
    drawing.save(law_page.figure(law), out)
    chat = task.form.chat and own.has_chat_template
    told = {"chat_template_kwargs": config.told} if chat and config.told else {}
    rest = [_row(item.prompt, item.demonstration, chat=chat) | told for item in splits.train]
    _save_rows([{"prompt": prompt} for prompt in prompts], out / "prompts.jsonl")
    _save_rows(rest, out / "train.jsonl")
    warnings = calibrate.warnings_of(law, table)
    if arguments.quick:
        warnings.append(
            f"Made with --quick, of {len(law.forecaster.left_out)} short runs: calibrate without it before a budget "
            "stops a training."
        )
    return law, warnings


def _say(text: str) -> None:
    Terminal(stderr=True).print(text, soft_wrap=True)


def _save_law(law: "LawFile", out: Path) -> None:
    """As law.json; another one that is there is moved aside."""
    from rlrazor.guard.law_file import LawFile
    from rlrazor.guard.outputs import move_aside

    path, same = out / "law.json", False
    with suppress(RazorError):
        same = LawFile.load(path).is_same(law)
    if path.exists() and not same:
        move_aside(path, _say)
    law.save(path)


def _save_rows(rows: list[dict[str, Any]], target: Path) -> None:
    """As JSON Lines; others that are there are moved aside."""
    from rlrazor.guard.outputs import move_aside

    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    if target.exists() and target.read_text(encoding="utf-8", errors="replace") != text:
        move_aside(target, _say)
    write_text(target, text, "rows")


def _show(arguments: argparse.Namespace, law: "LawFile", warnings: list[str], report: Path) -> None:
    """What the law is worth, and where everything is."""
    from rlrazor.cli import law_page
    from rlrazor.report.tables import to_rich

    printed, out = console_for_tables(), arguments.out
    for shown in (law_page.candidates_table(law), law_page.ranges_table(law)):
        printed.print(to_rich(shown))
    printed.print(law.describe(), highlight=False)
    for warning in warnings:
        printed.print(warning, style="yellow", highlight=False)
    files = {"Law": out / "law.json", "Figure": out / "law.png", "Prompts to measure on": out / "prompts.jsonl"}
    files |= {"Rows to train on": out / "train.jsonl", "Report": report}
    if (out / "base").exists():
        files["Base"] = out / "base"
    for name, file in files.items():
        printed.print(f"{name}: {file}", highlight=False, soft_wrap=True)


def _check(arguments: argparse.Namespace, *, tiny: bool) -> None:
    out = arguments.out
    rows: list[Output] = [(out / "prompts.jsonl", "rows"), (out / "train.jsonl", "rows")]
    check_run_folder(
        arguments, out, [(out / "law.json", "json"), (out / "law.png", "png"), (out / "law.svg", "svg"), *rows]
    )
    if tiny:
        require_our_folder(out / "base")


def _epochs(config: Config, prompts: int) -> int:
    """Passes over the prompts that come to `max_steps` updates."""
    prompts = min(prompts, config.train_prompts or prompts)
    return math.ceil(config.max_steps / max(1, prompts // max(config.batch_sizes)))


def _row(prompt: str, completion: str | None, *, chat: bool) -> dict[str, Any]:
    """As TRL takes it: with turns the trainer uses the chat template, as the runs of the calibration did."""
    columns = {"prompt": ("user", prompt), "completion": ("assistant", completion)}
    return {
        name: [{"role": role, "content": text}] if chat else text
        for name, (role, text) in columns.items()
        if text is not None
    }
