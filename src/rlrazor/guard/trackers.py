"""The trainer's trackers, given what the monitor measured.

Not by `trainer.log`, which would flush metrics that a trainer is still collecting (GRPO's), but beside it: into the run
that the trainer's own integration has begun, with its own writer. A second file of events in TensorBoard's folder would
end what a reader sees of the first: it goes on to the newest and never back.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler


def beside(callback: Any) -> Sequence[Any]:
    """All callbacks of the trainer that this one is given to; none where it cannot be found.

    A trainer tells its callbacks of everything but each other, so its handler is looked for among all that is alive.
    """
    handlers = (found for found in gc.get_objects() if issubclass(type(found), CallbackHandler))
    return next((one.callbacks for one in handlers if any(of is callback for of in one.callbacks)), ())


def send(args: Any, scalars: Mapping[str, float], step: int, callbacks: Sequence[Any] = ()) -> dict[str, Exception]:
    """Send to each tracker of `args.report_to` that we know, and to TensorBoard by the writer among the `callbacks`.

    One that has no run yet is passed over. What a tracker raises, such as a lost connection, is returned: it must not
    end training.
    """
    failed: dict[str, Exception] = {}
    senders = {name: _SENDERS[name] for name in getattr(args, "report_to", None) or () if name in _SENDERS}
    senders["tensorboard"] = partial(_tensorboard, callbacks)
    for name, sender in senders.items():
        try:
            sender(scalars, step)
        except Exception as error:  # a client library's own, of any type
            failed[name] = error
    return failed


def _tensorboard(callbacks: Sequence[Any], scalars: Mapping[str, float], step: int) -> None:
    for callback in callbacks:
        if not isinstance(callback, TensorBoardCallback) or (writer := callback.tb_writer) is None:
            continue
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        writer.flush()


def _wandb(scalars: Mapping[str, float], step: int) -> None:
    import wandb

    if wandb.run is not None:
        # The step that the trainer's own integration plots against; W&B's own counts the calls.
        wandb.log({**scalars, "train/global_step": step})


def _trackio(scalars: Mapping[str, float], step: int) -> None:
    import trackio

    if trackio.context_vars.current_run.get() is not None:
        trackio.log({**scalars, "train/global_step": step})


def _mlflow(scalars: Mapping[str, float], step: int) -> None:
    import mlflow

    if mlflow.active_run() is not None:
        mlflow.log_metrics(dict(scalars), step=step)


_SENDERS: dict[str, Callable[[Mapping[str, float], int], None]] = {
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
