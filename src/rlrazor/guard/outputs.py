"""What a monitor leaves on disk beside its log: whose a checkpoint is, and the last model within the budget.

Before training, a file that is in the way is an error. During training nothing is: neither is worth the run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.lm.shards import inside, plain
from rlrazor.system.documents import loads
from rlrazor.system.writing import atomic_path, require_our_folder

LOG = "razor.jsonl"  # in the trainer's output folder
STATE = "trainer_state.json"  # of a Trainer, in a checkpoint
MARK = "razor.json"  # in a checkpoint: whose it is; in a kept model: what was measured of it
Say = Callable[[str], None]


@dataclass(eq=False)
class OutputClaim:
    """What one monitor writes, so that no other of the same trainer writes it too; `run` is the id of the training run.

    The monitors of a trainer share the id; each time that it trains anew is another run.
    """

    paths: frozenset[Path]
    trainer: str
    run: str = ""
    trainings: int = 0

    @classmethod
    def of(cls, control: Any, *paths: Path | None) -> OutputClaim:
        """For the trainer whose `control` this is. Raises RazorError where another of its monitors writes there."""
        own = frozenset(path.absolute() for path in paths if path is not None)
        _claims[:] = [(of, claim) for of, claim in _claims if of() is not None and claim() is not None]
        others = [there for of, claim in _claims if control is not None and of() is control and (there := claim())]
        if shared := sorted(path.name for other in others for path in own & other.paths):
            raise RazorError(
                f"Two monitors of this trainer write to {shared[0]}: give one of them a log of its own "
                '(log="runs/other.jsonl", which `razor pick --log` reads), and on_budget="keep" to one of them only.'
            )
        claim = cls(own, others[0].trainer if others else uuid.uuid4().hex[:12])
        if control is not None:
            _claims.append((weakref.ref(control), weakref.ref(claim)))
        return claim

    def begin(self, resumed: str | None) -> None:
        """Training begins, or goes on with the run of that id."""
        self.trainings += 1
        self.run = resumed or (self.trainer if self.trainings == 1 else f"{self.trainer}-{self.trainings}")


_claims: list[tuple[weakref.ref[Any], weakref.ref[OutputClaim]]] = []


def mark_checkpoint(folder: Path, run: str, step: int) -> None:
    """Leave the id of the run in a checkpoint, for `pick`, with the hash of the state that the trainer saved there.

    By that it is seen whether another run has written over it. Where it cannot be written, the log has the id as well.
    """
    with suppress(OSError, RazorError):
        label = {"run": run, "step": step, "state": hash_of(folder / STATE)}
        with atomic_path(folder / MARK) as partial:
            partial.write_text(json.dumps(label) + "\n", encoding="utf-8")


def hash_of(path: Path) -> str:
    """SHA-256 of a file: 16 hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class KeptModel:
    """A folder with a model, or an adapter, its tokenizer, and what was measured of it in razor.json."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder, self.say = folder, say
        self._partial = folder.with_name(f".{folder.name}.tmp")
        self._old = folder.with_name(f".{folder.name}.old")

    @property
    def step(self) -> int | None:
        """Of the model that is kept; None where none is."""
        try:
            return int(loads((self.folder / MARK).read_text(encoding="utf-8"))["step"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def begin(self, *, fresh: bool) -> None:
        """A model that another run kept is not this one's.

        Raises RazorError where it cannot be moved away, or what is there is no such model.
        """
        try:
            self._recover()
        except OSError as error:
            raise _in_the_way(self._old, error) from error
        require_our_folder(self.folder, MARK)
        if fresh and self.folder.exists():
            move_aside(self.folder, self.say)

    def save(
        self, model: Any, processing_class: Any, measured: Mapping[str, Any], weights: Mapping[str, Any] | None = None
    ) -> None:
        """Whole, or what was kept before stays. `weights`: the model's, where it has not got all of them itself."""
        failure: Exception | None = None
        try:
            self._tidy()
            state = {} if weights is None else {"state_dict": dict(weights)}
            with _as_one_process(model):
                model.save_pretrained(self._partial, safe_serialization=True, **state)
            if processing_class is not None:
                processing_class.save_pretrained(self._partial)
            (self._partial / MARK).write_text(json.dumps(measured, allow_nan=False, indent=1) + "\n")
            if self.folder.exists():
                self.folder.rename(self._old)
            self._partial.rename(self.folder)
        except Exception as error:  # of a full disk safetensors and tokenizers raise types of their own, or none
            failure = error
        finally:
            with suppress(OSError):
                self._tidy()
        if failure is not None:
            there = "no model" if self.step is None else f"the model of step {self.step}"
            self.say(
                f"[razor] step {measured['step']}: the model within the budget could not be written to {self.folder} "
                f"({failure}); {there} is there, and training goes on."
            )

    def _tidy(self) -> None:
        """Nothing but what is kept; what is the only copy is not removed, as recovering it raises."""
        shutil.rmtree(self._partial, ignore_errors=True)
        self._recover()
        shutil.rmtree(self._old, ignore_errors=True)

    def _recover(self) -> None:
        """Finish what a killed process began."""
        if self._old.exists() and not self.folder.exists():
            self._old.rename(self.folder)


@contextmanager
def _as_one_process(model: Any) -> Iterator[None]:
    """Without what has transformers wait for other processes, where it sharded the model as it loaded it.

    And by the names that weights have without FSDP1's wrappers, since PEFT saves only what it finds by name.
    """
    config, own = vars(getattr(model, "config", None) or SimpleNamespace()), inside(model)
    kept = {name: config.pop(name) for name in ("distributed_config",) if name in config}
    if own is not model:
        found = type(own).named_modules
        own.named_modules = lambda *given, **named: ((plain(name), one) for name, one in found(own, *given, **named))
    try:
        yield
    finally:
        config.update(kept)
        if own is not model:
            del own.named_modules


def move_aside(path: Path, say: Say) -> None:
    """Give what another run left a name that nothing has. Raises RazorError where that cannot be done."""
    names = (path.with_name(f"{path.stem}-of-earlier-run-{number}{path.suffix}") for number in itertools.count(1))
    earlier = next(name for name in names if not name.exists())
    try:
        path.rename(earlier)
    except OSError as error:
        raise _in_the_way(path, error) from error
    say(f"[razor] {path.name} is an earlier run's: it is in {earlier.name} now.")


def _in_the_way(path: Path, error: OSError) -> RazorError:
    return RazorError(f"{path} is an earlier run's and cannot be renamed ({error.strerror}): move it away.")
