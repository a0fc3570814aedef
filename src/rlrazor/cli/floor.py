"""`--noise-floor` of sweeps: how far the base's prior scores are from themselves, kept beside the records."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rlrazor.errors import RazorError
from rlrazor.experiments.language.config import TINY, Config
from rlrazor.runs import floor
from rlrazor.system.terminal import Terminal
from rlrazor.system.writing import Output

if TYPE_CHECKING:
    from rlrazor.experiments.language.experiment import Language


def add_to(parser: argparse.ArgumentParser) -> None:
    """The option."""
    parser.add_argument(
        "--noise-floor",
        action="store_true",
        help="score the base again, in other batches and in the other precision, which no forgetting is; the report "
        "shows it beside every drop",
    )


def check(arguments: argparse.Namespace, config: Config) -> None:
    """Raise RazorError where there is none to measure."""
    if arguments.noise_floor and config.base == TINY:
        raise RazorError(f"The prior tasks of the base {TINY!r} are scored in one way only: leave --noise-floor out.")


def outputs(arguments: argparse.Namespace, out: Path) -> list[Output]:
    """What is written for it."""
    return [(out / floor.FILE, "json")] if arguments.noise_floor else []


def keep(experiment: "Language", config: Config, out: Path, console: Terminal) -> None:
    """Measure it, unless the folder has it of this base and these items, and write it there."""
    from rlrazor.lm import noise_floor
    from rlrazor.lm.probes import content_hash
    from rlrazor.system.progress import doing

    asked = config.asking.as_json()
    of = content_hash(
        [experiment.fingerprint, config.dtype, config.prior, config.prior_limit, *([asked] if asked else [])]
    )
    if (there := floor.read(out)) is not None and there.of == of:
        return
    suite = experiment.prior.tasks(config.prior, config.prior_limit, config.asking)
    with doing(console, "Measuring the noise floor"):
        found = noise_floor.of_base(config.base, config.dtype, suite)
    names = [*next(iter(found.variants.values()), {})]
    floor.write(
        out,
        floor.Floor(
            of=of,
            how=[*found.variants],
            tasks={name: found.of_task(name) for name in names},
            mean=found.of_mean(names) or 0.0,
        ),
    )
