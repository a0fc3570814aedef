"""Rows from JSON Lines files, as people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlrazor.errors import RazorError

Row = dict[str, Any]


def read_rows(path: Path, pattern: str = "*.json*") -> list[Row]:
    """The rows of a JSON Lines file or a JSON array, or of every file in a folder whose name matches `pattern`.

    Raises RazorError for a file that is missing, is not text, or has a line that is not a JSON object, naming the line.
    """
    files = sorted(path.glob(pattern)) if path.is_dir() else [path]
    if not files:
        raise RazorError(f"{path} holds no file named like {pattern}. Give --data the file itself, or its folder.")
    return [row for file in files for row in _read_file(file)]


def _read_file(file: Path) -> list[Row]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RazorError(f"There is no {file}: give a JSON Lines file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RazorError(f"{file} cannot be read as text: {error}. Give a JSON Lines file.") from error
    if text.lstrip().startswith("["):
        rows = [(1, text)]
    else:  # not splitlines: a JSON string may hold characters that it takes for line ends
        rows = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    found: list[Row] = []
    for number, line in rows:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RazorError(f"{file}, line {number}: not JSON ({error}). Every line has to be one object.") from error
        found += value if isinstance(value, list) else [value]
        if not all(isinstance(row, dict) for row in found[-1:]):
            raise RazorError(f"{file}, line {number}: not a JSON object. Every line has to be one object.")
    if not found:
        raise RazorError(f"{file} has no rows.")
    return found
