"""Rows of files as people have them. What a file is, is told by what is in it, whatever its name.

JSON Lines, a JSON array, CSV and TSV with a header, Parquet, a folder of these, and what `datasets` has saved to disk.
Where texts are wanted, a file of lines is what remains. A file that looks like one of those and cannot be read as it is
refused, never taken for lines of text: JSON that is measured as a prompt is a wrong number that nobody sees.
"""

import codecs
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import polars as pl

from rlrazor.errors import RazorError, cause_of
from rlrazor.system import jsonl
from rlrazor.system.documents import NotJSONError, NotReadableError, loads, read_whole

Row = dict[str, Any]
Located = tuple[str, Row]
"""A row, and where it is: "prompts.jsonl, line 3"."""

LARGEST = 2**30  # bytes of a file of rows, which is read whole
KINDS = "JSON Lines, a JSON array, CSV or TSV with a header, or Parquet"
_JSON_NAMES, _TABLE_NAMES = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv", ".tab")
_FOLDER_NAMES = (*_JSON_NAMES, *_TABLE_NAMES, ".parquet", ".txt")  # of the files that a folder is read for
_SPLIT = re.compile(r"(train|test|valid|validation|val|dev|eval)(?![a-z])")
_PARQUET = b"PAR1"
_ENCODINGS = {  # by the mark that begins a file; that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NOT_TEXT = {
    b"\x1f\x8b": "compressed by gzip",
    b"PK\x03\x04": "a zip archive, as .xlsx is too",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow file",
    b"%PDF": "a PDF",
    b"{\\rtf": "rich text",
    b"version https://git-lfs": "a pointer to a file that Git LFS has not fetched",
}
# As JSON begins; not "[INST] a prompt" nor "{name} went home".
_JSON = re.compile(r"""\s*(\{\s*(["']|\w+\s*:|\}?\s*$)|\[\s*([{"']|\]?\s*$))""", re.MULTILINE)
# As other formats begin: XML and HTML; YAML, a list or a mapping of lists; TOML and INI; a table of Markdown.
_OTHER = re.compile(
    r"\s*((?i:<\?xml|<!doctype|<(html|body|rows?|root|data|dataset|items?)>)|---[ \t]*\n|- +\w+ *:|\w+:[ \t]*\n\s+- |"
    r"\[\[?[\w.-]+\]\]?[ \t]*\n+\s*[\w.-]+\s*=|\|.*\|[ \t]*\n\s*\|[ :|-]+\|[ \t]*\n)"
)
_OTHER_NAMES = (".yaml", ".yml", ".toml", ".ini", ".xml", ".html", ".htm", ".parquet", ".xlsx", ".md", ".py")
_DELIMITERS = ",\t;|"
_COLUMNS = {"prompt", "messages"}  # what makes a first line a header, alone or among others
_USUAL = {  # ... and among others that could be names, or where every line has as many cells
    *("answer", "chosen", "completion", "content", "context", "conversations", "id", "input", "instruction", "label"),
    *("output", "query", "question", "rejected", "response", "role", "target", "text"),
}  # fmt: skip


def read_located(path: Path, pattern: str | None = None, *, line: str | None = None) -> list[Located]:
    """The rows of a file of any of the KINDS, or of every such file in a folder, those whose name matches `pattern`.

    `line`: the column that a line of a text file is; None: such a file is refused. Each file is read once, so it may be
    a pipe. Raises RazorError for a file that is missing, damaged or of another kind, and for a row that is none, naming
    it.
    """
    try:
        saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    except OSError as error:
        raise RazorError(f"{path} cannot be read: {error.strerror}. Give {KINDS}.") from error
    if saved:
        return _saved_by_datasets(path)
    return [row for file in _files(path, pattern) for row in _read_file(file, line)]


def _files(path: Path, pattern: str | None) -> list[Path]:
    if not path.is_dir():
        return [path]
    shown = sorted(file for file in path.glob(pattern or "*") if file.name[0] != ".")
    files = shown if pattern else [file for file in shown if file.suffix.lower() in _FOLDER_NAMES]
    splits = {found[1] for file in files if (found := _SPLIT.match(file.name))}
    if len(splits) > 1 and not pattern:
        raise RazorError(f"{path} holds files of {' and '.join(sorted(splits))}: give one of them, not the folder.")
    if not files:
        named = pattern or " or ".join(f"*{name}" for name in _FOLDER_NAMES)
        raise RazorError(f"{path} holds no file named like {named}. Give the file itself, or its folder.")
    return files


def _read_file(file: Path, line: str | None) -> list[Located]:
    wanted = KINDS + (f", or one {line} a line" if line else "")
    data = read_whole(file, LARGEST, mend=f"give {wanted}")
    if data.startswith(_PARQUET):
        return _parquet(file, data)
    text, name = _decoded(file, data, wanted), file.suffix.lower()
    delimiter = _delimiter(name, text)
    if _JSON.match(text) or name in _JSON_NAMES:
        found = _json(file, _one_newline(text), line)
    elif delimiter is not None:
        found = _table(file, text, delimiter)
    elif line is not None and name not in _OTHER_NAMES and not _OTHER.match(text):
        found = _lines(file, _one_newline(text), line)
    else:
        raise RazorError(f"{file} is none of what can be read: give {wanted}.")
    if not found:
        raise RazorError(f"{file} is empty: it has no rows.")
    return found


def _decoded(file: Path, data: bytes, wanted: str) -> str:
    """The text of a file, without byte-order marks, those of files that were put one after the other too."""
    kind = next((kind for beginning, kind in _NOT_TEXT.items() if data.startswith(beginning)), None)
    try:
        text = data.decode(next((name for mark, name in _ENCODINGS.items() if data.startswith(mark)), "utf-8"))
    except UnicodeDecodeError as error:
        kind = kind or f"not UTF-8 ({error})"
        text = ""
    if kind is None and "\0" in text:
        kind = "binary"
    if kind is not None:
        raise RazorError(f"{file} cannot be read as text: it is {kind}. Give {wanted}.")
    return re.sub(r"^\ufeff+", "", text, flags=re.MULTILINE)


def _one_newline(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json(file: Path, text: str, line: str | None) -> list[Located]:
    """JSON Lines; or else one array, or one object over several lines."""
    begins = text.lstrip()
    if begins.startswith("[") or begins.partition("\n")[0].strip() == "{":
        try:
            value = loads(text, nan=float)
        except NotReadableError as error:
            raise _no_row(str(file), error) from error
        values = value if isinstance(value, list) else [value]
        rows = [(f"{file}, row {number}", row) for number, row in enumerate(values, 1)]
    else:
        rows = list(jsonl.strict(text, file, say=_no_row, nan=float))
    if line is not None and all(isinstance(row, str) for _, row in rows):
        return [(where, {line: row}) for where, row in rows]
    for where, row in rows:
        if not isinstance(row, dict):
            raise RazorError(f"{where}: not a JSON object. Every row has to be one object.")
    return rows


def _no_row(where: str, error: NotReadableError) -> RazorError:
    if isinstance(error, NotJSONError):
        why = error.__cause__
        return RazorError(f"{where}: not JSON ({why}). Every line has to be one object, or the file one array.")
    return RazorError(f"{where}: {error}. Mend it, or leave it out.")


def _delimiter(name: str, text: str) -> str | None:
    """Of a table: its first line names columns, or its suffix says that it does. None: it is no table."""
    first = text.lstrip().partition("\n")[0].strip("\r")[:10_000]
    if first.startswith("|"):  # a table of Markdown's
        return None
    for delimiter in sorted(_DELIMITERS, key=lambda one: one != "\t") if name in _TABLE_NAMES[1:] else _DELIMITERS:
        cells = [cell.strip().casefold() for cell in next(csv.reader([first], delimiter=delimiter), [])]
        if _COLUMNS & set(cells) or cells == ["text"]:
            return delimiter
        usual = len(cells) > 1 and _USUAL & set(cells)
        if usual and (all(re.fullmatch(r"[\w-]*", cell) for cell in cells) or _is_even(text, delimiter)):
            return delimiter
    if name not in _TABLE_NAMES:
        return None
    return max(_DELIMITERS, key=first.count) if name == ".csv" else "\t"


def _is_even(text: str, delimiter: str) -> bool:
    """Whether every line has as many cells as the first."""
    try:
        counts = {len(cells) for cells in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if cells}
    except csv.Error:
        return False
    return len(counts) == 1


def _table(file: Path, text: str, delimiter: str) -> list[Located]:
    """CSV or TSV: the first line names the columns; a cell in quotation marks may hold line ends."""
    limit = csv.field_size_limit(max(len(text), 1))  # of the whole process: put back
    found: list[Located] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    begins = 1
    try:
        for cells in reader:
            where, begins = f"{file}, line {begins}", reader.line_num + 1
            if len(cells) < 2 and not "".join(cells).strip():  # a blank line
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                # As people write them: Prompt, TEXT.
                header = [name.casefold() if name.casefold() in _COLUMNS | _USUAL else name for name in header]
                if len(set(header)) < len(header):
                    raise RazorError(f"{where}: two columns have one name ({', '.join(header)}). Rename one.")
            elif len(cells) != len(header):
                raise RazorError(
                    f"{where}: {len(cells)} cells under {len(header)} columns. A text that holds {delimiter!r}, a line "
                    "end or a quotation mark has to be in quotation marks."
                )
            else:
                found.append((where, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise RazorError(f"{file}, line {begins}: not a row of a table ({error}). Mend its quotation marks.") from error
    finally:
        csv.field_size_limit(limit)
    return found


def _lines(file: Path, text: str, column: str) -> list[Located]:
    """A text a line. One that is a JSON object among others that are not could be either, so it is refused."""
    found = []
    for number, one in enumerate(text.split("\n"), 1):
        where, content = f"{file}, line {number}", one.strip()
        if _JSON.match(content) and _is_json(content):
            raise RazorError(f"{where}: a JSON object, and the file begins as text. Give it all as {KINDS}.")
        if content:
            found.append((where, {column: content}))
    if found and all(row[column][0] == '"' and _is_json(row[column]) for _, row in found):
        raise RazorError(
            f"{file}: every line is in quotation marks, which may or may not belong to the {column}: give "
            f'{{"{column}": "..."}} a line.'
        )
    return found


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parquet(file: Path, data: bytes) -> list[Located]:
    try:
        rows = pl.read_parquet(io.BytesIO(data)).to_dicts()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        why = cause_of(error)
        raise RazorError(f"{file} is damaged: it begins as Parquet and cannot be read as such ({why}).") from error
    if not rows:
        raise RazorError(f"{file} is empty: it has no rows.")
    return [(f"{file}, row {number}", row) for number, row in enumerate(rows, 1)]


def _saved_by_datasets(path: Path) -> list[Located]:
    """What `save_to_disk` of a Dataset has left, or of a DatasetDict with one split."""
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise RazorError(
            f"{path} was saved by the library datasets, which is missing: pip install datasets."
        ) from error
    try:
        dataset = load_from_disk(str(path.absolute()))  # not of a home, which ~ is to it
    except Exception as error:  # whatever a library of files raises
        raise RazorError(f"{path} was saved by the library datasets and cannot be read: {error}") from error
    if isinstance(dataset, DatasetDict):
        if len(dataset) != 1:
            raise RazorError(
                f"{path} holds {' and '.join(dataset)}: give one of them, such as {path / next(iter(dataset), '')}."
            )
        (dataset,) = dataset.values()
    rows = [(f"{path}, row {number}", dict(row)) for number, row in enumerate(dataset.with_format(None), 1)]
    if not rows:
        raise RazorError(f"{path} is empty: it has no rows.")
    return rows
