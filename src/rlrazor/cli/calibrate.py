"""`razor calibrate`: a few short fine-tunes of a base, their prior scores, and the law that follows from them."""

import argparse
import json
import math
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from rlrazor import cores
from rlrazor.cli.language import SETTINGS, add_running, add_source, check_early, settings_given, trainer_of
from rlrazor.cli.printing import Subparsers, console_for_tables, human_seconds, options_of, print_plan
from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra

if TYPE_CHECKING:
    from rlrazor.experiments.language.config import Config
    from rlrazor.guard.law_file import LawFile
    from rlrazor.report.drawing import Figure

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
    from rlrazor.experiments.language.config import TINY, parse_setting, resolve

    if (arguments.task is None) == (arguments.prompts is None):
        raise RazorError("Name the new task: --task NAME, or --prompts FILE for one of your own.")
    if not 0 < arguments.level < 1:
        raise RazorError(f"--level is a fraction of 1, such as 0.9, not {arguments.level}.")
    tiny = arguments.base == TINY
    given = settings_given(arguments)
    given |= {"base": arguments.base, "task": arguments.task or arguments.prompts.stem}
    settings = {**(TINY_GRID if tiny else {**GRID, "epochs": "1"}), **given}
    config = resolve(
        "tiny" if tiny else "paper", {name: parse_setting(name, value) for name, value in settings.items()}
    )
    if tiny and len(config.seeds) > 1:
        raise RazorError("Every seed of the tiny base is a base of its own, and a law belongs to one: give one seed.")
    jobs = arguments.jobs if arguments.jobs is not None else (cores.available() if tiny else 1)
    if jobs < 1:
        raise RazorError(f"--jobs must be at least 1, not {jobs}.")
    check_early(arguments, config)
    from rlrazor.experiments.language.evaluate import probe_settings
    from rlrazor.experiments.language.reproduce import Options, estimate, plan, reproduce
    from rlrazor.experiments.language.train import calibration_base
    from rlrazor.experiments.work import versions_of
    from rlrazor.guard import calibrate
    from rlrazor.guard.outputs import move_aside
    from rlrazor.report import drawing
    from rlrazor.report.tables import read_table
    from rlrazor.store import RunStore, atomic_path

    trainer = trainer_of(arguments, config)
    splits = trainer.task.load()
    if not tiny and "epochs" not in given and config.max_steps:
        config = replace(config, epochs=(_epochs(config, len(splits.train)),))
    if arguments.dry_run:
        found = estimate(config, trainer.task)
        what = f"{found.runs} runs, {found.steps:,} updates, {found.checkpoints:,} checkpoints measured."
        print_plan(config, found, what, as_json=arguments.json)
        return 0
    console = Console(stderr=True)
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
    drawing.save(_figure(law), arguments.out)
    rest = [_row(item.prompt, item.demonstration, chat=task.chat and own.has_chat_template) for item in splits.train]
    for name, rows in (("prompts", [{"prompt": prompt} for prompt in prompts]), ("train", rest)):
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        target = arguments.out / f"{name}.jsonl"
        if target.exists() and target.read_text(encoding="utf-8", errors="replace") != text:
            move_aside(target, say)
        with atomic_path(target) as written:
            written.write_text(text, encoding="utf-8")
    warnings = calibrate.warnings_of(law, table)
    if arguments.json:
        print(
            json.dumps({"law": str(path), "report": str(done.report), "warnings": warnings, **law.as_json()}, indent=2)
        )
        return 0
    console.print(f"{done.trained} runs trained, {done.kept} kept, in {human_seconds(done.seconds)}.", highlight=False)
    printed = console_for_tables()
    printed.print(candidates_table(law))
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


def _figure(law: "LawFile") -> "Figure":
    """The law through its runs; and what it forecast of each run when that was left out, against what was measured."""
    import numpy as np

    from rlrazor.guard.law_file import NAMES
    from rlrazor.report.drawing import INK, PALETTE, Curve, Figure, Layer, Panel, Points

    fitted, weights = law.forecaster.law, np.array(law.forecaster.law.weights)
    # Of one KL its nats; of two their weighted sum, in nats of the first that counts.
    lead = int(np.argmax(weights > 0))
    unit = weights / weights[lead]
    methods = {row["run"]: str(row["method"]) for row in law.data}
    colors = {method: PALETTE[index % len(PALETTE)] for index, method in enumerate(dict.fromkeys(methods.values()))}
    through: list[Layer] = []
    left_out: list[Layer] = []
    for one in law.forecaster.left_out:
        rows = [row for row in law.data if row["run"] == one.run]
        kls_ND = np.array([[row[name] for name in fitted.columns] for row in rows])
        drop_N = 100 * np.array([row["forgetting"] for row in rows])
        label = methods[one.run]
        through.append(Points(label, kls_ND @ unit, drop_N, colors[label], line=True))
        left_out.append(Points(label, 100 * one.law.predict(kls_ND), drop_N, colors[label]))
    x_N = np.linspace(0, max(float(layer.x.max()) for layer in through), 200)
    through.append(Curve("law", x_N, 100 * fitted.predict(np.outer(x_N, np.eye(len(unit))[lead])), INK))
    values_M = np.concatenate([np.concatenate([layer.x, layer.y]) for layer in left_out])
    ends = np.array([min(0.0, values_M.min()), values_M.max()])
    left_out.append(Curve("measured as forecast", ends, ends, INK, dashed=True))
    weighed = zip(fitted.columns, unit, strict=True)
    x_label = " + ".join(f"{weight:.3g} {NAMES[name]}" if weight != 1 else NAMES[name] for name, weight in weighed)
    measured = "measured drop of the prior score, points"
    panels = [
        Panel("The law", f"{x_label}, nats", measured, through, x_percent=False, y_percent=False),
        Panel("Each run, by a law of the others", "forecast drop, points", measured, left_out, x_percent=False,
              y_percent=False),
    ]  # fmt: skip
    return Figure("law", panels, columns=2)


def _row(prompt: str, completion: str | None, *, chat: bool) -> dict[str, Any]:
    """As TRL takes it: with turns the trainer uses the chat template, as the runs of the calibration did."""
    columns = {"prompt": ("user", prompt), "completion": ("assistant", completion)}
    return {
        name: [{"role": role, "content": text}] if chat else text
        for name, (role, text) in columns.items()
        if text is not None
    }


def candidates_table(law: "LawFile") -> Table:
    """What each candidate's forecasts were worth on what was left out."""
    table = Table(title=f"Mean error on a {law.choice.by} left out, points", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("forecast by")
    table.add_column("error", justify="right")
    table.add_column("")
    for candidate in law.choice.candidates:
        chosen = "chosen" if candidate == law.choice.best else ""
        table.add_row(" + ".join(candidate.columns), f"{100 * candidate.error:.1f}", chosen)
    table.add_row("guessing the mean", f"{100 * law.choice.guess:.1f}", "")
    return table
