"""JSON and TOML that this process did not write: read whole, at the door, and what is wrong with it is one sentence.

Nothing of a file is used before all of it was checked. What a file may hold is a `schema.Schema`.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rlrazor.errors import RazorError
from rlrazor.system.files import LARGEST, read_bytes

if TYPE_CHECKING:
    from pydantic import ValidationError

    from rlrazor.system.schema import Schema

DEEPEST = 100  # lists and objects within one another: ours nest six, and walking through them is recursive
_LARGEST_WHOLE = 2**63  # of a number that JSON writes without a point: what a 64-bit integer holds
_SHOWN = 60  # characters of a value in a sentence
_NESTED = "it is nested too deeply"

T = TypeVar("T", bound="Schema")


def read_text(path: Path, *, mend: str = "", missing: str | None = None) -> str:
    """A UTF-8 file, without a byte-order mark. Raises RazorError as `read_whole`."""
    try:
        return read_whole(path, mend=mend, missing=missing).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise unreadable(path, f"it is not text in UTF-8 (byte {error.start})", mend) from error


def read_whole(path: Path, largest: int = LARGEST, *, mend: str = "", missing: str | None = None) -> bytes:
    """What a file holds, of no more than `largest` bytes.

    Raises RazorError, which ends with what to do, `mend`; where there is no such file it is `missing`.
    """
    try:
        return read_bytes(path, largest)
    except FileNotFoundError as error:
        raise RazorError(missing or f"There is no {path}{_ending(mend)}") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        if isinstance(error, OSError) and error.strerror:
            raise RazorError(f"{path} cannot be read ({error.strerror}){_ending(mend)}") from error
        raise unreadable(path, error, mend) from error


def read_json(path: Path, schema: type[T]) -> T:
    """A JSON file of this schema. Raises RazorError as `read_text`, and where the file is anything else."""
    return checked(schema, parse_json(read_text(path), path), path)


def parse_toml(text: str, where: Path | str) -> dict[str, Any]:
    """What a text is in TOML. Raises RazorError as `parse_json` does."""
    try:
        found = tomllib.loads(text)
        _check(found, finite=True)
    except RecursionError as error:
        raise unreadable(where, _NESTED) from error
    except NotReadableError as error:
        raise unreadable(where, error) from error
    except ValueError as error:
        raise unreadable(where, f"it is not TOML ({error})") from error
    return found


def parse_json(text: str, where: Path | str, *, mend: str = "", nan_as_text: bool = False) -> Any:
    """What a text is in JSON. Raises RazorError where it is not JSON, or holds what few readers agree on (`loads`)."""
    try:
        return loads(text, nan=str if nan_as_text else None)
    except NotReadableError as error:
        raise unreadable(where, error, mend) from error


class NotReadableError(ValueError):
    """Why a text cannot be read: "it is ...", "it holds ..."."""


class NotJSONError(NotReadableError):
    """The same where it is no JSON at all."""


def loads(text: str, *, nan: Callable[[str], Any] | None = None, lenient: bool = False) -> Any:
    """What a text is in JSON.

    Raises NotReadableError where it is not JSON, and for a key twice in an object, a number beyond what 64 bits hold,
    half a character, more than DEEPEST levels, NaN and infinity. Where `nan` makes something of their names, these are
    taken: a Trainer writes them, and so do tables. A `lenient` reader is like most others, where a library reads the
    file as well: the last of a key counts, and a whole number beyond 64 bits is a float.
    """
    try:
        found = json.loads(
            text,
            parse_constant=nan or _refuse_constant,
            parse_float=_finite,
            parse_int=_whole_or_float if lenient else _whole,
            object_pairs_hook=None if lenient else _without_repeats,
        )
    except RecursionError as error:
        raise NotReadableError(_NESTED) from error
    except NotReadableError:
        raise
    except ValueError as error:
        raise NotJSONError(f"it is not JSON ({error})") from error
    _check(found, finite=nan is None)
    return found


def checked(schema: type[T], value: Any, where: Path | str, *, mend: str = "", by_hand: bool = False) -> T:
    """The value as its schema has it. Raises RazorError with the place of what is wrong, what is there, what should.

    What a user wrote `by_hand` is wrong, not damaged.
    """
    from pydantic import ValidationError

    try:
        return schema.model_validate(value)
    except ValidationError as error:
        said = _wrong(error, "is wrong" if by_hand else "is damaged")
        raise RazorError(f"{where} {said}{_ending(mend)}") from error


def unreadable(where: Path | str, why: object, mend: str = "") -> RazorError:
    """The error for what cannot be read, and what to do about it."""
    said = str(why)
    return RazorError(f"{where} cannot be read, as {said[:1].lower()}{said[1:]}{_ending(mend)}")


def _ending(mend: str) -> str:
    return f": {mend}." if mend else "."


def _refuse_constant(name: str) -> NoReturn:
    raise NotReadableError(f"it holds {name}, which is no number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise NotReadableError(f"it holds a number that is too large ({text[:_SHOWN]})")
    return number


def _whole(text: str) -> int:
    if len(text) > 20 or not -_LARGEST_WHOLE <= (number := int(text)) < _LARGEST_WHOLE:
        raise NotReadableError(f"it holds a number that is too large ({text[:20]}{'…' if len(text) > 20 else ''})")
    return number


def _whole_or_float(text: str) -> float:
    return int(text) if len(text) < 19 else _finite(text)


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise NotReadableError(f"it has the key {_shown(twice)} twice in one object")
    return found


def _check(value: Any, *, finite: bool) -> None:
    """Raise NotReadableError for what a parser lets through, and whoever walks, writes or prints it does not."""
    level = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.keys()
                inner += one.values()
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str) and not is_utf8(one):
                raise NotReadableError(f"the text is not valid Unicode ({ascii(one)[:_SHOWN]})")
            elif finite and isinstance(one, int | float) and not _is_number(one):
                raise NotReadableError("it holds a number that is infinite, NaN or too large")
        level = inner
        if not level:
            return
    raise NotReadableError(_NESTED)


def is_utf8(text: str) -> bool:
    """Whether a text has UTF-8: half of a surrogate pair has not, nor a name with other bytes in it."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_number(number: float) -> bool:
    """TOML has infinity, NaN, and whole numbers of any length."""
    return math.isfinite(number) if isinstance(number, float) else -_LARGEST_WHOLE <= number < _LARGEST_WHOLE


_SAID = {  # by what pydantic calls it
    "bool_type": "and should be true or false",
    "int_type": "and should be a whole number",
    "float_type": "and should be a number",
    "finite_number": "and should be a finite number",
    "string_type": "and should be text",
    "list_type": "and should be a list",
    "dict_type": "and should be an object",
    "model_type": "and should be an object",
    "literal_error": "and should be {expected}",
    "greater_than": "and should be above {gt}",
    "greater_than_equal": "and should be at least {ge}",
    "less_than": "and should be below {lt}",
    "less_than_equal": "and should be at most {le}",
    "string_too_short": "and should not be empty",
    "string_too_long": "and should have at most {max_length} characters",
    "too_short": "and should have at least {min_length} entries",
    "too_long": "and should have at most {max_length} entries",
    "string_pattern_mismatch": "which is not of its form",
}


def _wrong(error: ValidationError, verdict: str) -> str:
    """What is wrong first: other things may follow from it. Of what is missing, all that is in that place."""
    errors = error.errors(include_url=False)
    first = errors[0]
    place = _place(first["loc"])
    if first["type"] == "missing":
        holder = first["loc"][:-1]
        names = [_place(one["loc"]) for one in errors if one["type"] == "missing" and one["loc"][:-1] == holder]
        return f"lacks {', '.join(names)}"
    if first["type"] == "extra_forbidden":
        return f"{verdict}, as {place} is not known here"
    if first["type"] == "value_error":  # a validator of ours, which says all of it
        said = str(first["ctx"]["error"]).rstrip(".")
        return f"{verdict}, as {f'in {place} ' if place else ''}{said[:1].lower()}{said[1:]}"
    said = first["msg"].replace("Input should", "and should")
    if first["type"] in _SAID:
        said = _SAID[first["type"]].format(**{name: _written(value) for name, value in first.get("ctx", {}).items()})
    return f"{verdict}, as {place or 'it'} is {_shown(first['input'])}, {said}"


def _place(parts: Sequence[str | int]) -> str:
    """As one would write it: runs[3].law.a, counted from 0."""
    found = ""
    for part in parts:
        if isinstance(part, int):
            found += f"[{part}]"
        elif part != "[key]":
            found += f".{_cut(part)}" if found else _cut(part)
    return found


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return _cut(json.dumps(value, ensure_ascii=True, default=repr))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _written(bound: Any) -> str:
    if isinstance(bound, float):
        return f"{bound:g}"
    return f"{bound:,}" if isinstance(bound, int) else str(bound)
