"""The checkpoints of a trainer whose metrics are not read, verl's or torchtitan's, as `razor watch` has measured them.

There is no new-task score. A run that learns is the better the longer it has learnt, so the step stands for it: of the
checkpoints within a budget the last is taken.
"""

from pathlib import Path

from rlrazor.errors import RazorError
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.metric import FIRST_USUAL, NewScore
from rlrazor.guard.outputs import LOG, STATE
from rlrazor.guard.pick_sources import FoundCheckpoints, logged_in, objection_of, watched_at
from rlrazor.guard.run_folder import rows_in
from rlrazor.guard.scored import Forgetting, ScoredCheckpoint
from rlrazor.guard.verdict import Limits
from rlrazor.guard.watch_layout import model_in, steps_in

STEP = "step"  # the metric


def of_watched(
    folder: Path, log: Path | None, score: NewScore, limits: Limits, law: LawFile | None
) -> FoundCheckpoints | None:
    """Those whose weights are in the log; None where a Trainer saved them, or no row is of `razor watch`.

    Raises RazorError where a metric is asked for, or none of them is there any more.
    """
    path = log or folder / LOG
    if any(folder.glob(f"checkpoint-*/{STATE}")) or not path.is_file():
        return None
    rows = [row for row in rows_in(path) if row.weights is not None]
    if not rows:
        return None
    if score != FIRST_USUAL:
        raise RazorError(f"The metrics of what trained {folder} are not read: leave --metric out, or choose by hand.")
    logged = logged_in(rows, law, path)
    notes = [
        f"No new-task score is known of {folder.name}: of the checkpoints within a budget the last counts as the best."
    ]
    candidates: list[ScoredCheckpoint] = []
    found: list[Forgetting] = []
    try:
        steps = steps_in(folder)
    except OSError as error:
        raise RazorError(f"{folder} cannot be read ({error.strerror or error}).") from error
    for step in steps:
        try:
            model = model_in(step)
            forgetting = None if model is None else watched_at(model, logged)
            why = "`razor watch` has not measured its weights."
        except RazorError as error:
            forgetting, why = None, str(error)
        if forgetting is None:
            notes.append(f"{step.name} is left out: {why}")
            continue
        found.append(forgetting)
        known = forgetting.drop, forgetting.kl, forgetting.prompts
        candidates.append(ScoredCheckpoint(step.name, step.step, float(step.step), *known))
    if not candidates:
        raise RazorError(f"No checkpoint of {folder} can be taken. {' '.join(notes)}")
    return FoundCheckpoints(STEP, candidates, notes, found[-1].level, objection_of(found, law, limits, notes))
