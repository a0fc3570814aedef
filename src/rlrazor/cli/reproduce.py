"""`razor reproduce parity-mnist`, `language` and `forecast`: whole experiments, from the data to the report."""

import argparse
import shlex
from dataclasses import replace
from pathlib import Path

from rlrazor.cli import language
from rlrazor.cli.outputs import check_run_folder
from rlrazor.cli.printing import Subparsers, human_seconds, options_of, print_plan, print_results
from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra
from rlrazor.system import cores
from rlrazor.system.terminal import Terminal

# The settings of the grid, which a config file can hold too; parsed by config.parse_setting.
SETTINGS = {
    "methods": "methods, comma-separated, or 'paper' (five), 'core' (ten) or 'all'",
    "lrs": "learning rates, comma-separated, or LOW:HIGH:COUNT log-spaced",
    "schedules": "learning-rate schedules: constant, cosine",
    "epochs": "run lengths in epochs",
    "seeds": "seeds; each pre-trains a base policy of its own",
    "checkpoints_per_epoch": "checkpoints measured per epoch",
    "batch_size": "images per step",
    "group_size": "labels sampled per image by on-policy methods",
    "kl_coef": "weight of KL(pi || pi0) in the methods named ...+kl",
    "pretrain_epochs": "length of the base policy's pre-training",
    "pretrain_size": "images of each task in pre-training",
}
# What the quick preset has, as a help text shows it: to look it up there takes the seconds that importing torch does.
DEFAULTS = {
    "methods": "sft-1, sft-2, oracle, rl-distilled, simpo, reinforce, grpo, dr-grpo, kl-dpg, grpo+kl",
    "lrs": "2e-05, 5.32e-05, 0.000141, 0.000376, 0.001",
    "schedules": "constant",
    "epochs": "1",
    "seeds": "0",
    "checkpoints_per_epoch": "5",
    "batch_size": "128",
    "group_size": "64",
    "kl_coef": "0.1",
    "pretrain_epochs": "20",
    "pretrain_size": "500",
}


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser("reproduce", help="reproduce an experiment of the paper, end to end")
    experiments = parser.add_subparsers(title="experiments", metavar="EXPERIMENT", required=True)
    parity = experiments.add_parser(
        "parity-mnist",
        help="the forgetting law on ParityMNIST",
        description="Pre-train, fine-tune by every method over a grid, measure, fit the law, write the report. "
        "Run the same command again to continue after an interruption.",
    )
    parity.add_argument("--preset", help="the grid to start from: quick (minutes, the default) or paper")
    parity.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/parity-mnist-PRESET)")
    grid = parity.add_argument_group("grid (override the preset and the config file)")
    for name, text in SETTINGS.items():
        grid.add_argument(f"--{name.replace('_', '-')}", help=f"{text} (default: {DEFAULTS[name]})")
    parity.add_argument(
        "--config", type=Path, metavar="FILE", help="a preset and settings of the grid as TOML, or a run's config.json"
    )
    parity.add_argument("--jobs", type=int, default=cores.available(), help="processes (default: the cores)")
    parity.add_argument("--data-dir", type=Path, metavar="DIR", help="where the IDX files lie, if you have them")
    parity.add_argument(
        "--weights", choices=("none", "final", "all"), default="none", help="checkpoints to keep (default: none)"
    )
    parity.add_argument(
        "--analysis",
        metavar="NAMES",
        help="run these analyses instead of the sweep, comma-separated, or 'all': predictors, precision, "
        "representation, dynamics, theory, quadrants, off-policy, optimizers, kl-penalty, unrelated-prior, kl-minimal, "
        "baselines, distilled",
    )
    parity.add_argument(
        "--sensitivity", action="store_true", help="also vary batch size, group size and pre-training length"
    )
    parity.add_argument("--dry-run", action="store_true", help="print the grid, its size and cost; train nothing")
    parity.add_argument("--json", action="store_true", help="print the findings as JSON instead of tables")
    parity.set_defaults(run=run, options=options_of(parity))
    of_forecasts = experiments.add_parser(
        "forecast",
        help="is the forecast of forgetting true? On methods and tasks that a law was not fitted to",
        description="Three new tasks on the same bases, of digits and of letters, every method at every learning rate; "
        "then coverage, width and error of forecasts of a method, or a task, left out. Run it again to continue.",
    )
    of_forecasts.add_argument("--preset", default="quick", help="quick (the default) or full")
    of_forecasts.add_argument("--seeds", help="seeds, comma-separated (default: the preset's)")
    of_forecasts.add_argument("--families", default="parity-mnist,tiny", help="default: parity-mnist,tiny")
    of_forecasts.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/forecast-PRESET)")
    of_forecasts.add_argument("--jobs", type=int, default=cores.available(), help="processes (default: the cores)")
    of_forecasts.add_argument("--data-dir", type=Path, metavar="DIR", help="where the IDX files lie, if you have them")
    of_forecasts.add_argument(
        "--dry-run", action="store_true", help="print the size and cost of it, measured here; train nothing"
    )
    of_forecasts.add_argument("--json", action="store_true", help="print the findings as JSON instead of tables")
    of_forecasts.set_defaults(run=run_forecast, options=options_of(of_forecasts))
    of_models = experiments.add_parser(
        "language",
        help="the same on language models: the tiny one on a CPU, or the paper's grid",
        description="Fine-tune by every method over a grid, measure scores and KL to the base, fit the law, write the "
        "report. The tiny base is pre-trained here, and needs no download. Run the same command again to continue.",
    )
    of_models.add_argument("--preset", default="tiny", help="the grid to start from: tiny (the default) or paper")
    language.add_sweep(of_models, "runs/language-PRESET", language.TINY_DEFAULTS)
    of_models.set_defaults(run=run_language, options=options_of(of_models))


def run_language(arguments: argparse.Namespace) -> int:
    """Run the sweep of a preset."""
    out = arguments.out or Path("runs") / f"language-{arguments.preset}"
    return language.run_sweep(arguments, arguments.preset, out)


def run_forecast(arguments: argparse.Namespace) -> int:
    """Run the sweeps of a preset, and test forecasts on them."""
    needs_extra("guard", "train", "eval")
    from rlrazor.experiments.forecast import TASKS, Options, estimate, grid_of, reproduce
    from rlrazor.experiments.language.config import parse_setting
    from rlrazor.lm import compute
    from rlrazor.system.cores import threads_asked

    compute.prepare_process()
    seeds = None if arguments.seeds is None else parse_setting("seeds", arguments.seeds)
    grid = grid_of(arguments.preset, seeds)
    if (threads := threads_asked()) is not None:
        grid = replace(grid, letters=replace(grid.letters, threads=threads))
    families = tuple(name.strip() for name in arguments.families.split(","))
    unknown = [name for name in families if name not in TASKS]
    if unknown:
        raise RazorError(f"Unknown family {unknown[0]!r:.60}. Families: {', '.join(TASKS)}.")
    options = Options(
        out=arguments.out or Path("runs") / f"forecast-{arguments.preset}",
        families=tuple(name for name in TASKS if name in families),
        jobs=arguments.jobs,
        data_dir=arguments.data_dir,
        preset=arguments.preset,
        command=shlex.join(["razor", *arguments.argv]),
    )
    console = Terminal(stderr=True)
    if not arguments.dry_run:
        check_run_folder(arguments, options.out)
    if arguments.dry_run:
        found = estimate(grid, options, console)
        shown = grid.digits if families == ("parity-mnist",) else grid.letters
        what = f"{found.runs} runs, {found.checkpoints:,} checkpoints measured, over {', '.join(options.families)}.\n"
        what += language.measured_in_words(found, options.out, options.jobs)
        print_plan(shown, found, what, as_json=arguments.json)
        return 0
    done = reproduce(grid, options, console)
    for name in done.diverged:
        console.print(f"Diverged, measured up to there: {name}.", style="yellow")
    console.print(f"{done.trained} runs trained, {done.kept} kept, in {human_seconds(done.seconds)}.", highlight=False)
    print_results(done.results, done.report, as_json=arguments.json)
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Resolve the config, run the experiment, print its tables."""
    # Imported here: torch takes seconds that `razor --version` should not.
    from rlrazor.experiments.parity_mnist.config import parse_setting, resolve
    from rlrazor.experiments.parity_mnist.reproduce import Options, estimate, reproduce
    from rlrazor.experiments.parity_mnist.studies import needs_sweep, parse_analyses, seeds_of
    from rlrazor.runs.settings import read_settings

    analyses = parse_analyses(arguments.analysis) if arguments.analysis is not None else ()
    settings = read_settings(arguments.config) if arguments.config else {}
    settings |= {name: value for name in ("preset", *SETTINGS) if (value := getattr(arguments, name)) is not None}
    preset = settings.pop("preset", None) or "quick"
    if not needs_sweep(analyses):
        idle = [name for name in (*settings, *(["sensitivity"] if arguments.sensitivity else [])) if name != "seeds"]
        if idle:
            raise RazorError(
                f"{idle[0]} is a setting of the sweep, which {', '.join(analyses)} does not run: leave it out. "
                "An analysis takes --preset and --seeds."
            )
    keep_sweep = bool(analyses) and not settings
    if analyses:
        settings.setdefault("seeds", seeds_of(preset))
    config = resolve(preset, {name: parse_setting(name, value) for name, value in settings.items()})
    options = Options(
        out=arguments.out or Path("runs") / f"parity-mnist-{preset}",
        jobs=arguments.jobs,
        data_dir=arguments.data_dir,
        weights=arguments.weights,
        sensitivity=arguments.sensitivity,
        preset=preset,
        command=shlex.join(["razor", *arguments.argv]),
        keep_sweep=keep_sweep,
    )
    if not arguments.dry_run:
        check_run_folder(arguments, options.out)
    if arguments.dry_run:
        found = estimate(config, options, analyses)
        what = (
            f"{found.runs} runs, {found.trained} of them trained (a short constant run is the beginning of a longer "
            f"one), {found.checkpoints} checkpoints measured.\n"
        ) + language.measured_in_words(found, options.out, options.jobs)
        print_plan(config, found, what, as_json=arguments.json)
        return 0
    console = Terminal(stderr=True)
    done = reproduce(config, options, console, analyses)
    for name in done.diverged:
        console.print(f"Diverged, measured up to there: {name}.", style="yellow")
    console.print(f"{done.trained} runs trained, {done.kept} kept, in {human_seconds(done.seconds)}.", highlight=False)
    print_results(done.results, done.report, as_json=arguments.json)
    return 0
