"""A task of the user's own: a file of prompts, and a Python function that verifies a completion."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.experiments.language.tasks.rows import held_out
from rlrazor.experiments.language.tasks.task import Form, Item, Splits, Task
from rlrazor.lm.prompts import parts_of, prompt_of
from rlrazor.system.apart.verifier import SECONDS, Verifier
from rlrazor.system.rows import Row, read_located

_OURS = ("prompt", "completion", "rejected")
_loaded: dict[tuple[str, float], tuple[object, Verifier]] = {}  # with what its file was; a sequence has several


@dataclass(frozen=True)
class OwnTask:
    """A task from `prompts`, rows of {prompt, completion?, rejected?, ...}, and `verifier`, which runs apart.

    `verifier` is "FILE.py:function" or "package.module:function". It is called as
    `verify(prompt, completion, **columns) -> float`, a score from 0 to 1, with every other field of the row, in a
    process of its own, where a call may take `seconds`; a row's own `completion` is its demonstration. Without a
    verifier every row needs a `completion`, and a score is whether the policy's is the same text. About a fifth of the
    prompts is held out for measuring, unless `prompts` is a folder with train.jsonl and test.jsonl, or others of those
    names. Small to pickle.
    """

    prompts: Path
    verifier: str | None = None
    form: Form = field(default_factory=Form)
    seconds: float = SECONDS

    def task(self) -> Task:
        """The task, whose `load(path)` reads `path` instead of `prompts` where it is given.

        Raises RazorError where the function cannot be loaded; `load` raises it for rows without a prompt.
        """
        return Task(
            self.prompts.stem,
            self.prompts.stem,
            f"prompts of {self.prompts.name}, verified by {self.verifier or 'their completions'}",
            lambda path: _load(path or self.prompts, with_reference=self.verifier is None),
            _same_text if self.verifier is None else loaded_verifier(self.verifier, self.seconds),
            self.form,
        )

    def code(self) -> str | None:
        """The verifier's source where it is a file's, or else its name; None without one."""
        file = Path((self.verifier or "").rpartition(":")[0])
        return file.read_text(encoding="utf-8", errors="surrogateescape") if file.is_file() else self.verifier


def _same_text(prompt: str, completion: str, *, reference: str, **columns: Any) -> float:
    return float(completion.strip() == reference.strip())


def _load(path: Path, *, with_reference: bool) -> Splits:
    def items(file: Path) -> list[Item]:
        return [_item(row, where, with_reference=with_reference) for where, row in read_located(file)]

    if path.is_dir() and not (path / "state.json").is_file():
        train, test = (items(_of_split(path, split)) for split in ("train", "test"))
        if shared := {item.prompt for item in train} & {item.prompt for item in test}:
            raise RazorError(f"{path}: {len(shared)} prompts are in both train and test. Take them out of one.")
        return Splits(train, test)
    found = items(path)
    try:
        return held_out(found)
    except RazorError as error:
        raise RazorError(f"{path}: {error}") from error


def _of_split(folder: Path, split: str) -> Path:
    """The one file of the folder, or folder that `datasets` saved, that is named so."""
    found = [path for path in sorted(folder.iterdir()) if path.name.partition(".")[0] == split]
    if len(found) != 1:
        raise RazorError(f"{folder} needs one file {split}, such as {split}.jsonl, and has {len(found)}.")
    return found[0]


def _item(row: Row, where: str, *, with_reference: bool) -> Item:
    prompt, template = parts_of(prompt_of(row, where))
    if not isinstance(prompt, str):
        raise RazorError(f"{where}: the prompt is a conversation, and of a task of one's own it has to be text.")
    if template:
        raise RazorError(
            f"{where}: it has {', '.join(template)} for the chat template, which calibration and training here do not "
            "give it: leave them out, or name them otherwise if they are the verifier's."
        )
    for name in _OURS:
        if row.get(name) is not None and not isinstance(row[name], str):
            raise RazorError(f"{where}: its {name} is not text; it has {', '.join(row)}.")
    columns = {name: value for name, value in row.items() if name not in _OURS}
    if with_reference:
        if row.get("completion") is None:
            raise RazorError(
                f"{where}: it has no completion: without a verifier, every row needs one to be compared with."
            )
        columns["reference"] = row["completion"]
    return Item(row["prompt"], columns, row.get("completion"), row.get("rejected"))


def loaded_verifier(name: str, seconds: float = SECONDS) -> Verifier:
    """The verifier, loaded. A command asks for it several times: as long as its file is the same, it is the same.

    Raises RazorError where it cannot be loaded.
    """
    path = Path(name.rpartition(":")[0])
    stat = path.stat() if path.is_file() else None
    stamp = stat and (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    if (name, seconds) not in _loaded or _loaded[name, seconds][0] != stamp:
        _loaded[name, seconds] = (stamp, Verifier(name, seconds))
    verifier = _loaded[name, seconds][1]
    verifier.load()
    return verifier
