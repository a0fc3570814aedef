"""What the commands that run an experiment share: options from its settings, a dry run, and how they end."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrazor.cli import exits
from rlrazor.cli.printing import human_bytes, print_plan, print_results, shown
from rlrazor.errors import RazorError
from rlrazor.lm.task_names import AS_TURNS
from rlrazor.system import cores, durations
from rlrazor.system.terminal import Terminal

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rlrazor.report import Results
    from rlrazor.runs.dry_run import DryRun
    from rlrazor.runs.experiment import Experiment
    from rlrazor.runs.ray_cluster import Cluster
    from rlrazor.runs.runner import Done, Options

GRID = "grid (override the preset and the config file)"


def defaults_of(config: Any) -> dict[str, str]:
    """The settings of a preset as a help text shows them."""
    return {name: shown(getattr(config, name)) for name in config.__dataclass_fields__}


ALONE = {"chat_template": AS_TURNS}  # what an option stands for without a value


def add_setting(group: Any, name: str, text: str, default: str) -> None:
    """An option for a setting of a config; what it is given is parsed by the config's `parse_setting`."""
    alone = {"nargs": "?", "const": ALONE[name]} if name in ALONE else {}
    group.add_argument(f"--{name.replace('_', '-')}", help=f"{text} (default: {default})".replace("%", "%%"), **alone)


def add_config(parser: argparse.ArgumentParser) -> None:
    """The option that reads settings from a file."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a preset and settings of the grid as TOML, or a run's config.json"
    )


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """The option that says how many runs go on at a time."""
    parser.add_argument("--jobs", type=int, help="processes (default: the cores)")


def jobs_of(arguments: argparse.Namespace) -> int:
    """The processes of a command whose runs take a core each."""
    return arguments.jobs or cores.available()


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """The options that have runs trained on other machines."""
    group = parser.add_argument_group("on a cluster")
    group.add_argument(
        "--executor",
        choices=("processes", "ray"),
        default="processes",
        help="who trains: processes of this machine, or tasks of a Ray cluster (default: processes)",
    )
    group.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="with ray: the cluster's head, or auto (default: a cluster of this machine alone); --jobs says then how "
        "many runs go on at most, by default all that there is room for",
    )
    group.add_argument("--cpus", type=float, metavar="N", help="with ray: cores of each run (default: 1)")
    group.add_argument("--gpus", type=float, metavar="N", help="with ray: GPUs of each run, 0.5 for half (default: 0)")


def _cluster_of(arguments: argparse.Namespace) -> "Cluster | None":
    """The cluster that the options name; raises RazorError where it cannot be had."""
    given = {name: getattr(arguments, name, None) for name in ("address", "cpus", "gpus")}
    named = {name: value for name, value in given.items() if value is not None}
    if getattr(arguments, "executor", "processes") == "processes":
        if named:
            raise RazorError(f"--{min(named)} goes with --executor ray.")
        return None
    if getattr(arguments, "line", None) is not None:
        raise RazorError("--line trains one run, in its own process: leave --executor ray out.")
    if getattr(arguments, "print_commands", False):
        raise RazorError("--print-commands prints lines, each of a process of its own: leave --executor ray out.")
    from rlrazor.runs.ray_cluster import Cluster

    cluster = Cluster(**named, at_once=arguments.jobs)
    if not arguments.dry_run:
        cluster.check()
    return cluster


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """The option that says where images lie."""
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where the IDX files lie, if you have them")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The option that keeps weights."""
    parser.add_argument(
        "--weights", choices=("none", "final", "all"), default="none", help="checkpoints to keep (default: none)"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that prints for machines."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON instead of tables")


def add_lines(parser: argparse.ArgumentParser) -> None:
    """The options that make a command of each run, for the queue of a cluster."""
    group = parser.add_argument_group("for a queue of jobs").add_mutually_exclusive_group()
    group.add_argument(
        "--print-commands", action="store_true", help="print a command for each run, in waves; train nothing"
    )
    group.add_argument("--line", type=int, metavar="N", help="train only the Nth of these (default: all)")


def print_commands(arguments: argparse.Namespace, experiment: "Experiment", config: Any, options: "Options") -> int:
    """Print a command for each run, wave after wave, and last the one that makes the tables and the report."""
    from rlrazor.report.text import how_many
    from rlrazor.runs.lines import lines

    waves = lines(list(experiment.phases(config, None)), options.weights)
    whole = shlex.join([*_entry(), *(one for one in arguments.argv if one != "--print-commands")])
    print(f"# {how_many(sum(map(len, waves)), 'run')}; all in the folder {shlex.quote(os.getcwd())}")
    for number, wave in enumerate(waves):
        print("# wait for all above" if number else "#")
        print(f"# {wave[0].title}: --line {wave[0].number} to {wave[-1].number}")
        for line in wave:
            print(f"{whole} --line {line.number}  # {line.what}")
    print(f"# wait for all above\n# tables and report\n{whole}")
    return exits.DONE


def _entry() -> list[str]:
    """How this process was started: the script `razor`, or a module of this Python."""
    return [sys.argv[0]] if Path(sys.argv[0]).name == "razor" else [sys.executable, "-m", "rlrazor"]


def given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The settings that the command line names, as text."""
    return {name: value for name in names if (value := getattr(arguments, name, None)) is not None}


def named(arguments: argparse.Namespace, settings: Iterable[str]) -> dict[str, Any]:
    """The settings, and the preset, of the file that --config names; over them those of the command line."""
    from rlrazor.runs.settings import read_settings

    of_file = read_settings(arguments.config) if arguments.config else {}
    return of_file | given(arguments, ("preset", *settings))


def options_of_run(arguments: argparse.Namespace, out: Path, preset: str, **more: Any) -> "Options":
    """How to run, as a command's options say."""
    from rlrazor.runs.runner import Options

    command, line = shlex.join(["razor", *arguments.argv]), getattr(arguments, "line", None)
    return Options(out, preset=preset, command=command, line=line, cluster=_cluster_of(arguments), **more)


def writing(out: Path) -> "AbstractContextManager[None]":
    """Nobody else writes into the folder, from the first run until its report is drawn."""
    from rlrazor.runs.store import RunStore

    return RunStore(out).open_for_writing()


def write_and_load(out: Path, console: Terminal) -> "tuple[Results, Path]":
    """What is in the folder now, analysed and drawn; to be called while nobody else writes into it."""
    from rlrazor.report import load, write_report
    from rlrazor.studies import kinds
    from rlrazor.system.progress import doing

    with doing(console, "Fitting the laws and drawing the report"):
        results = load(out, kinds())
        return results, write_report(results)


def say_done(done: "Done", console: Terminal, *, what: str = "") -> None:
    """The runs that were cut short, and how many there were."""
    for name in done.diverged:
        console.print(f"Diverged, measured up to there: {name}.", style="yellow")
    from rlrazor.report.text import how_many

    took = durations.took(done.seconds)
    console.print(f"{how_many(done.trained, 'run')} trained, {done.kept} kept{what}, in {took}.", highlight=False)


def carry_out(arguments: argparse.Namespace, out: Path, console: Terminal, run: "Callable[[], Done]") -> int:
    """Run, draw the report of the folder, into which nobody else writes meanwhile, and print its tables.

    Of a single line only the former.
    """
    if getattr(arguments, "line", None) is not None:
        say_done(run(), console)
        return exits.DONE
    with writing(out):
        done = run()
        results, page = write_and_load(out, console)
    say_done(done, console)
    print_results(results, page, as_json=arguments.json)
    return exits.DONE


def show_plan(config: Any, found: "DryRun", counts: str, out: Path, *, jobs: int, as_json: bool) -> None:
    """What a dry run prints."""
    print_plan(config, found.as_json(), f"{counts}\n{in_words(found, out, jobs)}", as_json=as_json)


def in_words(found: "DryRun", out: Path, jobs: int = 1) -> str:
    """The time, memory and disk of an estimate, and what was timed for it."""
    if (measured := found.measured) is None:
        return f"Time, memory and disk were not measured: {found.missing.rstrip('.')}."
    text = (
        f"About {durations.took(measured.seconds)}, give or take {100 * measured.error:.0f} %, with {jobs} "
        f"job{'s' if jobs > 1 else ''} on this machine; {human_bytes(measured.memory_bytes)} of memory a job; "
        f"{human_bytes(measured.disk_bytes)} of disk in {out}"
    )
    if measured.passing_bytes:
        text += f", and up to {human_bytes(measured.passing_bytes)} while it trains (--save-every 0: none)"
    return f"{text}.\nTimed: {measured.timed}."


def counts_in_words(found: "DryRun") -> str:
    """How much there is to do."""
    counts = found.counts
    return f"{counts.runs} runs, {counts.steps:,} updates, {counts.checkpoints:,} checkpoints measured."


def with_tiny(defaults: Mapping[str, str], tiny: Mapping[str, str], name: str) -> str:
    """A default, and that of the base 'tiny' where it is another."""
    return defaults[name] + (f"; of 'tiny' {tiny[name]}" if tiny[name] != defaults[name] else "")
