"""Where the items of a task come from: JSON files, the hub, and the share that is held out for measuring."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlrazor.errors import RazorError, cause_of, disk_error_in
from rlrazor.experiments.language.tasks.task import Item, Splits
from rlrazor.extras import MissingExtraError, installing
from rlrazor.lm import hub
from rlrazor.system.rows import Located, Row, read_located

T = TypeVar("T")

TEST_SHARE = 0.2  # of a source that has no test split of its own


def rows_of(path: Path | None, pattern: str, dataset: str, split: str, config: str | None = None) -> list[Located]:
    """The rows of local files, those named like `pattern` where `path` is a folder; without a path the hub's."""
    return hub_rows(dataset, split, config) if path is None else read_located(path, pattern)


def hub_rows(dataset: str, split: str, config: str | None = None) -> list[Located]:
    """The rows of a data set on the Hugging Face hub, through `datasets` (which caches them), by their numbers.

    Raises RazorError where the hub cannot be reached or the extra [language] is missing, saying what to do instead.
    """
    if hub.is_offline() and not hub.has_data_set(dataset):
        raise RazorError(
            f"The data set {dataset} is not on this machine and the hub cannot be reached. Try again with a "
            "connection, or download it where there is one, and give --data FILE."
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError(f"The hub's data sets need the extra [language]: {installing('language')}.") from error
    try:
        rows = load_dataset(dataset, config, split=split)
        return [(f"{dataset}, {split}, row {number}", dict(row)) for number, row in enumerate(rows, 1)]
    except Exception as error:  # offline, gated, renamed: each library below raises its own kind
        if (disk := disk_error_in(error)) is not None:
            raise RazorError(
                f"The data set {dataset} cannot be kept in its cache: {cause_of(disk)} Free some space, or give --data "
                "FILE."
            ) from error
        raise RazorError(
            f"The data set {dataset} could not be loaded from the hub ({type(error).__name__}): {cause_of(error)} "
            "Download it where there is a network, and give --data FILE."
        ) from error


def held_out(items: Sequence[Item], groups: Sequence[str] | None = None) -> Splits:
    """Split off about a fifth for measuring, by the hash of the prompt, or of `groups` (one name per item).

    So an item stays on its side whatever the file's order or length. Repeated prompts are dropped. Raises RazorError
    where a side would be empty.
    """
    names = [item.prompt for item in items] if groups is None else groups
    unique = {item.prompt: (item, name) for item, name in zip(items, names, strict=True)}
    train: list[Item] = []
    test: list[Item] = []
    for item, name in unique.values():
        fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        (test if fraction < TEST_SHARE else train).append(item)
    if not train or not test:
        raise RazorError(f"Too few different prompts to train on some and measure on others: {len(unique)}.")
    return Splits(train, test)


def field_of(row: Row, *keys: str | int) -> Any:
    """`row[key][key]...`; raises RazorError naming the field where the row has another schema."""
    value: Any = row
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError) as error:
            name = ".".join(map(str, keys))
            has = ", ".join(map(str, row))
            raise RazorError(f"A row has no field {name}; it has {has:.200}. Is it the right file?") from error
    return value


def text_of(row: Row, *keys: str | int) -> str:
    """The same of what has to be text that says something."""
    found = field_of(row, *keys)
    if not isinstance(found, str) or not found.strip():
        raise RazorError(f"Its {'.'.join(map(str, keys))} is {found!r:.40}, and has to be text.")
    return found


def list_of(row: Row, *keys: str | int) -> list[Any]:
    """The same of what has to be a list."""
    found = field_of(row, *keys)
    if not isinstance(found, list | tuple):
        raise RazorError(f"Its {'.'.join(map(str, keys))} is {found!r:.40}, and has to be a list.")
    return list(found)


def of_rows(rows: Iterable[Located], make: Callable[[Row], T]) -> list[T]:
    """What `make` makes of each row; where it raises RazorError, that says which row it is."""
    found = []
    for where, row in rows:
        try:
            found.append(make(row))
        except RazorError as error:
            raise RazorError(f"{where}: {error}") from error
    return found


def with_demonstrations(items: Sequence[Item], file: Path) -> list[Item]:
    """The items with the demonstrations of `file`, rows of {prompt, completion, rejected (optional)}.

    They replace the items' own where the prompt is the same, and leave the other items as they are. Of rows with the
    same prompt the last counts. Raises RazorError where a row lacks its text, or no prompt is the task's.
    """
    rows: dict[str, Row] = {}
    for where, row in read_located(file):
        if not all(isinstance(row.get(key), str) for key in ("prompt", "completion")):
            raise RazorError(f"{where}: it lacks the text of prompt or completion; it has {', '.join(row)}.")
        if not isinstance(row.get("rejected", ""), str | None):
            raise RazorError(f"{where}: its rejected is {row['rejected']!r:.40}, and has to be text.")
        rows[row["prompt"]] = row
    if not any(item.prompt in rows for item in items):
        raise RazorError(f"{file} has none of the task's prompts: they have to be the same to the letter.")
    return [
        dataclasses.replace(
            item,
            demonstration=rows[item.prompt]["completion"],
            rejected=rows[item.prompt].get("rejected", item.rejected),
        )
        if item.prompt in rows
        else item
        for item in items
    ]
