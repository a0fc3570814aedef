"""`razor reproduce parity-mnist`, `language`, `continual`, `forecast`, `robot`: whole experiments, data to report."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrazor import studies
from rlrazor.cli import language, robot, running
from rlrazor.cli.outputs import check_run_folder
from rlrazor.cli.printing import Subparsers
from rlrazor.errors import RazorError
from rlrazor.experiments.continual.config import HELP
from rlrazor.experiments.language import sequences as model_sequences
from rlrazor.experiments.language.config import settled
from rlrazor.experiments.parity_mnist import config as parity
from rlrazor.experiments.parity_mnist import sequences
from rlrazor.extras import needs_extra
from rlrazor.runs.settings import help_of
from rlrazor.system import cores
from rlrazor.system.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlrazor.experiments.continual.experiment import Continual
    from rlrazor.experiments.parity_mnist.experiment import ParityMnist
    from rlrazor.runs.runner import Done, Options

SETTINGS = help_of(parity.Config)


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser("reproduce", help="reproduce an experiment of the paper, end to end")
    experiments = parser.add_subparsers(title="experiments", metavar="EXPERIMENT", required=True)
    _add_parity(experiments)
    _add_continual(experiments)
    _add_forecast(experiments)
    robot.add_to(experiments)
    of_models = experiments.add_parser(
        "language",
        help="the same on language models: the tiny one on a CPU, or the paper's grid",
        description="Fine-tune by every method over a grid, measure scores and KL to the base, fit the law, write the "
        "report. The tiny base is pre-trained here, and needs no download; smollm2 and gemma3 are of a package. "
        "Run the same command again to continue.",
    )
    of_models.add_argument("--preset", help="the grid to start from: tiny (the default), smollm2, gemma3 or paper")
    language.add_sweep(of_models, "runs/language-PRESET", language.TINY_DEFAULTS)
    of_models.set_defaults(run=run_language)


def _add_parity(experiments: Subparsers) -> None:
    parser = experiments.add_parser(
        "parity-mnist",
        help="the forgetting law on ParityMNIST",
        description="Pre-train, fine-tune by every method over a grid, measure, fit the law, write the report. "
        "Run the same command again to continue after an interruption.",
    )
    parser.add_argument("--preset", help="the grid to start from: quick (minutes, the default) or paper")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/parity-mnist-PRESET)")
    grid, defaults = parser.add_argument_group(running.GRID), running.defaults_of(parity.PRESETS["quick"])
    for setting, text in SETTINGS.items():
        running.add_setting(grid, setting, text, defaults[setting])
    running.add_config(parser)
    running.add_jobs(parser)
    running.add_data_dir(parser)
    running.add_weights(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the grid, its size and cost; train nothing")
    running.add_json(parser)
    running.add_cluster(parser)
    running.add_lines(parser)
    parser.add_argument(
        "--analysis",
        metavar="NAMES",
        help=f"run these analyses instead of the sweep, comma-separated, or 'all': {', '.join(studies.ANALYSES)}",
    )
    parser.add_argument(
        "--sensitivity", action="store_true", help="also vary batch size, group size and pre-training length"
    )
    parser.set_defaults(run=run)


def _add_continual(experiments: Subparsers) -> None:
    parser = experiments.add_parser(
        "continual",
        help="several new tasks one after another: what is forgotten of the earlier ones, and of the prior task",
        description="Pre-train, choose each method's learning rate on the first task, go through the tasks stage by "
        "stage, each until it is learned, measure, write the report. Run the same command again to continue.",
    )
    parser.add_argument(
        "--preset", help="images: quick (minutes, the default) or paper; a language model: tiny (an hour or more)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/continual-PRESET)")
    (images, of_images), (models, of_models) = (
        (help_of(type(preset)), running.defaults_of(preset))
        for preset in (sequences.PRESETS["quick"], model_sequences.PRESETS["tiny"])
    )
    groups = {
        running.GRID: [name for name in images if name in models],
        "... of images": [name for name in images if name not in models],
        "... of language models": [name for name in models if name not in (*images, "task", "thresholds")],
    }
    defaults = {name: running.with_tiny(of_models | of_images, of_images | of_models, name) for name in images | models}
    texts = models | images | HELP
    texts["tasks"] += f": of images {', '.join(sequences.SPLITS)}; of a language model those of `razor tasks`"
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names:
            running.add_setting(group, name, texts[name], defaults[name])
    running.add_config(parser)
    parser.add_argument("--jobs", type=int, help="processes (default: the cores; of a language model but 'tiny' 1)")
    running.add_data_dir(parser)
    language.add_prior(parser)
    language.add_running(parser)
    running.add_weights(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the grid, its size and cost; train nothing")
    running.add_json(parser)
    running.add_cluster(parser)
    running.add_lines(parser)
    parser.set_defaults(run=run_continual)


def _add_forecast(experiments: Subparsers) -> None:
    parser = experiments.add_parser(
        "forecast",
        help="is the forecast of forgetting true? On methods and tasks that a law was not fitted to",
        description="Three new tasks on the same bases, of digits and of letters, every method at every learning rate; "
        "then coverage, width and error of forecasts of a method, or a task, left out. Run it again to continue.",
    )
    parser.add_argument("--preset", default="quick", help="quick (the default) or full")
    parser.add_argument("--seeds", help="seeds, comma-separated (default: the preset's)")
    parser.add_argument("--families", default="parity-mnist,tiny", help="default: parity-mnist,tiny")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/forecast-PRESET)")
    running.add_jobs(parser)
    running.add_data_dir(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the size and cost of it, measured here; train nothing"
    )
    running.add_json(parser)
    running.add_cluster(parser)
    parser.set_defaults(run=run_forecast)


def run_language(arguments: argparse.Namespace) -> int:
    """Run the sweep of a preset."""
    return language.run_sweep(arguments, "tiny", lambda preset: Path("runs") / f"language-{preset}")


def run_continual(arguments: argparse.Namespace) -> int:
    """Run the stages of a preset."""
    from rlrazor.runs import runner
    from rlrazor.runs.settings import check_preset

    named = running.named(arguments, help_of(sequences.ImageSequences) | help_of(model_sequences.ModelSequences))
    preset = named.pop("preset", None) or "quick"
    family: Any = model_sequences if preset in model_sequences.PRESETS else sequences
    check_preset(preset, [*sequences.PRESETS, *model_sequences.PRESETS])
    other, name = (sequences, "quick") if family is model_sequences else (model_sequences, "tiny")
    theirs, own = (help_of(type(of.PRESETS[one])).keys() for of, one in ((other, name), (family, preset)))
    if foreign := named.keys() & (theirs - own):
        what = "on images" if other is sequences else "of language models"
        raise RazorError(f"{min(foreign)} is a setting of sequences {what}: give --preset {name} with it.")
    config = family.resolve(preset, named)
    out, console = arguments.out or Path("runs") / f"continual-{preset}", Terminal(stderr=True)
    experiment, config, jobs = _family(arguments, config)
    options = running.options_of_run(arguments, out, preset, jobs=jobs, weights=arguments.weights)
    if arguments.dry_run:
        how = {"jobs": options.jobs, "weights": options.weights}
        language.show_plan(arguments, experiment, config, out, note=language.ENDS_EARLY, **how)
        return 0
    if arguments.print_commands:
        return running.print_commands(arguments, experiment, config, options)
    check_run_folder(arguments, out)
    if family is sequences:
        _fetch(arguments.data_dir, console)
    return running.carry_out(arguments, out, console, lambda: runner.run(experiment, config, options, console))


def _family(arguments: argparse.Namespace, config: Any) -> "tuple[Continual, Any, int]":
    """The experiment whose config this is, that as it is settled on this machine, and the processes it takes."""
    if isinstance(config, sequences.ImageSequences):
        from rlrazor.experiments.parity_mnist.stages import Images

        return Images(arguments.data_dir), config, arguments.jobs or cores.available()
    needs_extra("guard", "train", "eval")
    language.require_forgetting(config, "reproduce continual")
    from rlrazor.experiments.language.tasks import find_task

    language.settle(arguments, config, [find_task(name) for name in config.tasks])
    from rlrazor.experiments.language.setup import TaskSource
    from rlrazor.experiments.language.stages import Models

    first, *further = (TaskSource(name) for name in config.tasks)
    jobs = language.jobs_of(arguments, config)
    return Models(config.base, first, *language.how_of(arguments), tuple(further)), settled(config), jobs


def run_forecast(arguments: argparse.Namespace) -> int:
    """Run the sweeps of a preset, and test forecasts on them."""
    needs_extra("guard", "train", "eval")
    from rlrazor.experiments import forecast
    from rlrazor.experiments.language.config import parse_setting
    from rlrazor.lm import compute
    from rlrazor.system.cores import threads_asked

    compute.prepare_process()
    seeds = None if arguments.seeds is None else parse_setting("seeds", arguments.seeds)
    grid = forecast.grid_of(arguments.preset, seeds, threads_asked())
    families = forecast.families_of(grid, arguments.families, arguments.data_dir)
    out = arguments.out or Path("runs") / f"forecast-{arguments.preset}"
    options = running.options_of_run(arguments, out, arguments.preset, jobs=running.jobs_of(arguments))
    console = Terminal(stderr=True)
    if arguments.dry_run:
        found = forecast.estimate(families, options, console)
        names = ", ".join(family.name for family in families)
        what = f"{found.counts.runs} runs, {found.counts.checkpoints:,} checkpoints measured, over {names}."
        running.show_plan(families[-1].config, found, what, out, jobs=options.jobs, as_json=arguments.json)
        return 0
    check_run_folder(arguments, out)
    if any(family.name == forecast.DIGITS for family in families):
        _fetch(arguments.data_dir, console)
    return running.carry_out(arguments, out, console, lambda: forecast.run(families, options, console))


def run(arguments: argparse.Namespace) -> int:
    """Resolve the config, run the sweep or the analyses, print the tables."""
    # Imported here: torch takes seconds that `razor --version` should not.
    from rlrazor.experiments.parity_mnist.experiment import ParityMnist

    analyses = studies.parse_analyses(arguments.analysis) if arguments.analysis is not None else ()
    if analyses and (arguments.print_commands or arguments.line is not None):
        raise RazorError("A command for each run is had of the sweep, not of an analysis: leave --analysis out.")
    config, preset, keep_sweep = _config_of(arguments, analyses)
    out = arguments.out or Path("runs") / f"parity-mnist-{preset}"
    options = running.options_of_run(arguments, out, preset, jobs=running.jobs_of(arguments), weights=arguments.weights)
    experiment, console = ParityMnist(arguments.data_dir, arguments.sensitivity), Terminal(stderr=True)
    if arguments.dry_run:
        _show_plan(arguments, experiment, config, options, analyses)
        return 0
    if arguments.print_commands:
        return running.print_commands(arguments, experiment, config, options)
    check_run_folder(arguments, out)
    if analyses != (studies.THEORY,):  # which needs no image
        _fetch(arguments.data_dir, console)
    return running.carry_out(
        arguments, out, console, lambda: _run(experiment, config, options, analyses, console, keep_sweep=keep_sweep)
    )


def _config_of(arguments: argparse.Namespace, analyses: "Sequence[str]") -> tuple[parity.Config, str, bool]:
    """The config and its preset; and whether a sweep that is in the folder is kept as it is.

    That is so for analyses without settings of a sweep.
    """
    from rlrazor.studies.grids import seeds_of

    settings = running.named(arguments, SETTINGS)
    preset = settings.pop("preset", None) or "quick"
    if not studies.needs_sweep(analyses):
        idle = [name for name in (*settings, *(["sensitivity"] if arguments.sensitivity else [])) if name != "seeds"]
        if idle:
            raise RazorError(
                f"{idle[0]} is a setting of the sweep, which {', '.join(analyses)} does not run: leave it out. "
                "An analysis takes --preset and --seeds."
            )
    keep_sweep = bool(analyses) and not settings
    if analyses:
        settings.setdefault("seeds", seeds_of(preset))
    return parity.resolve(preset, settings), preset, keep_sweep


def _fetch(data_dir: Path | None, console: Terminal) -> None:
    """Have the images here."""
    from rlrazor.experiments.parity_mnist import data

    for name in data.DATASETS:
        data.fetch(name, data_dir, console=console)


def _run(
    experiment: "ParityMnist",
    config: parity.Config,
    options: "Options",
    analyses: "Sequence[str]",
    console: Terminal,
    *,
    keep_sweep: bool,
) -> "Done":
    """The sweep, unless the analyses need none or have it; then the analyses, with the seeds of the config."""
    from rlrazor.runs import runner
    from rlrazor.runs.store import RunStore
    from rlrazor.studies import run as of_studies

    done = runner.Done()
    has_sweep = all((options.out / name).exists() for name in ("config.json", "records.parquet"))
    if studies.needs_sweep(analyses) and not (keep_sweep and has_sweep):
        done += runner.run(experiment, config, options, console)
    else:
        runner.warn_of_another_machine(RunStore(options.out), options, console)
    for name in analyses:
        if name in studies.STUDIES:
            done += of_studies.run_study(name, experiment, config.seeds, options, console)
    if studies.THEORY in analyses:
        of_studies.run_theory(config.seeds, options, console)
    return done


@dataclass(frozen=True)
class _Analyses:
    """What decides the runs of analyses that need no sweep; each has a grid of its own."""

    analysis: tuple[str, ...]
    preset: str
    seeds: tuple[int, ...]


def _show_plan(
    arguments: argparse.Namespace,
    experiment: "ParityMnist",
    config: parity.Config,
    options: "Options",
    analyses: "Sequence[str]",
) -> None:
    """What a dry run prints: the sweep's runs and the analyses', with the sweep's settings where it is run."""
    from rlrazor.runs.dry_run import estimate, planned
    from rlrazor.studies import run as of_studies

    sweeps = studies.needs_sweep(analyses)
    phases = planned(experiment, config) if sweeps else []
    for name in set(analyses) & set(studies.STUDIES):
        phases += of_studies.phases(name, options.preset, config.seeds, "", None)
    found = estimate(experiment, config, phases, jobs=options.jobs, weights=options.weights)
    counts = found.counts
    shared = (
        ""
        if counts.trained == counts.runs
        else (f", {counts.trained} of them trained (a short constant run is the beginning of a longer one)")
    )
    what = f"{counts.runs} runs{shared}, {counts.checkpoints} checkpoints measured."
    grid = config if sweeps else _Analyses(tuple(analyses), options.preset, config.seeds)
    running.show_plan(grid, found, what, options.out, jobs=options.jobs, as_json=arguments.json)
