"""The trainer's trackers, given what the monitor measured.

Not by `trainer.log`, which would flush metrics that a trainer is still collecting (GRPO's), but beside it: into the run
that the trainer's own integration has begun.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def send(args: Any, scalars: Mapping[str, float], step: int) -> dict[str, Exception]:
    """Send to each tracker of `args.report_to` that we know; one that has no run yet is passed over.

    What a tracker raises, such as a lost connection, is returned: it must not end training.
    """
    failed: dict[str, Exception] = {}
    for name in getattr(args, "report_to", None) or ():
        if name in _SENDERS:
            try:
                _SENDERS[name](args, scalars, step)
            except Exception as error:  # a client library's own, of any type
                failed[name] = error
    return failed


def _tensorboard(args: Any, scalars: Mapping[str, float], step: int) -> None:
    """Into the folder of the trainer's own events: TensorBoard shows the files of a folder as one run."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the trainer takes either
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found,no-redef]

    given = os.environ.get("TENSORBOARD_LOGGING_DIR")
    runs = [Path(given).expanduser()] if given else list((Path(args.output_dir) / "runs").glob("*"))
    if not runs:
        return
    newest = max(runs, key=lambda folder: folder.stat().st_mtime if folder.exists() else 0.0)
    with SummaryWriter(log_dir=str(newest), filename_suffix=".razor") as writer:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)


def _wandb(args: Any, scalars: Mapping[str, float], step: int) -> None:
    import wandb

    if wandb.run is not None:
        # The step that the trainer's own integration plots against.
        wandb.log({**scalars, "train/global_step": step})


def _trackio(args: Any, scalars: Mapping[str, float], step: int) -> None:
    import trackio

    if trackio.context_vars.current_run.get() is not None:
        trackio.log({**scalars, "train/global_step": step})


_SENDERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
