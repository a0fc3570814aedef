"""`razor reproduce robot`: a robot arm in a simulator, from demonstrations to report."""

import argparse
from pathlib import Path
from typing import Any

from rlrazor.cli import running
from rlrazor.cli.outputs import check_run_folder
from rlrazor.errors import RazorError
from rlrazor.experiments.robot import config as configs
from rlrazor.extras import needs_extra
from rlrazor.runs.settings import help_of
from rlrazor.system import cores
from rlrazor.system.terminal import Terminal

SETTINGS = help_of(configs.Config)
OF_MODELS = ("world", "policy", "dtype", "lora_rank")
NOTE = "Demonstrations and bases are kept for the next time, and may be there already."


def add_to(experiments: Any) -> None:
    """Declare the command."""
    parser = experiments.add_parser(
        "robot",
        help="a robot arm in a simulator: picking and placing against drawers, doors and windows",
        description="Clone scripted experts into a base policy, teach it to pick and place by every method, measure "
        "success on all tasks and KL on their states, write the report. Not the paper's OpenVLA: its question, on a "
        "small policy in Meta-World. Run the same command again to continue after an interruption.",
    )
    parser.add_argument("--preset", help="the grid to start from: quick (minutes, the default) or paper (hours)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/robot-PRESET)")
    grid, defaults = parser.add_argument_group(running.GRID), running.defaults_of(configs.PRESETS["quick"])
    models = parser.add_argument_group("... of vision-language-action models, in LIBERO or SimplerEnv")
    for setting, text in SETTINGS.items():
        running.add_setting(models if setting in OF_MODELS else grid, setting, text, defaults[setting])
    models.add_argument(
        "--recordings", type=Path, metavar="DIR", help="recorded episodes, DIR/TASK/*.npz (default: none)"
    )
    running.add_config(parser)
    running.add_jobs(parser)
    parser.add_argument(
        "--workers", type=int, help="processes that simulate, of each run (default: the cores that jobs leave; 0: none)"
    )
    running.add_weights(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the grid, its size and cost; train nothing")
    running.add_json(parser)
    running.add_cluster(parser)
    running.add_lines(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the sweep of a preset."""
    from rlrazor.runs import runner

    named = running.named(arguments, SETTINGS)
    preset = named.pop("preset", None) or "quick"
    config = configs.resolve(preset, named)
    experiment = experiment_of(arguments, config)
    out, console = arguments.out or Path("runs") / f"robot-{preset}", Terminal(stderr=True)
    options = running.options_of_run(arguments, out, preset, jobs=running.jobs_of(arguments), weights=arguments.weights)
    if arguments.dry_run:
        _show_plan(arguments, experiment, config, options)
        return 0
    if arguments.print_commands:
        return running.print_commands(arguments, experiment, config, options)
    check_run_folder(arguments, out)
    return running.carry_out(arguments, out, console, lambda: runner.run(experiment, config, options, console))


def experiment_of(arguments: argparse.Namespace, config: configs.Config) -> Any:
    """The experiment, on this machine. Raises MissingExtraError where its simulator is not installed."""
    from rlrazor.experiments.robot.worlds import world_of

    if config.world == configs.META_WORLD:
        needs_extra("robot")
        if arguments.recordings:
            raise RazorError(f"{configs.META_WORLD} has scripted experts: leave --recordings out.")
    workers = (
        arguments.workers
        if arguments.workers is not None
        else workers_for(running.jobs_of(arguments), cores.available())
    )
    tasks = world_of(config.world, arguments.recordings).tasks
    unknown = next((name for name in (config.new_task, *config.prior_tasks) if name not in tasks), None)
    if unknown is not None:
        raise RazorError(f"{config.world} has no task {unknown!r:.60}. Tasks: {', '.join(tasks)}.")
    from rlrazor.experiments.robot.experiment import Robot

    return Robot(workers, arguments.recordings)


def workers_for(jobs: int, available: int) -> int:
    """Processes that simulate, of each run: the cores that the runs leave; none of two, where they only cost."""
    return max(0, available - jobs) // jobs if available > 2 else 0


def _show_plan(arguments: argparse.Namespace, experiment: Any, config: configs.Config, options: Any) -> None:
    """What a dry run prints."""
    from rlrazor.runs.dry_run import estimate, planned

    found = estimate(experiment, config, planned(experiment, config), jobs=options.jobs, weights=options.weights)
    what = f"{running.counts_in_words(found)} {NOTE}"
    running.show_plan(config, found, what, options.out, jobs=options.jobs, as_json=arguments.json)
