"""The one exception the command line turns into a sentence and exit code 2, and what other libraries' say in one."""

import errno
from collections.abc import Iterator

_MOST = 300  # characters of another library's message: some are a page
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


class RazorError(Exception):
    """Something the user can mend: bad input, missing data, a full disk.

    The message is one or a few plain sentences: what is wrong, then what to do about it. Raise it wherever the cause
    is known; anything else that escapes is a bug and keeps its traceback.
    """


def cause_of(error: BaseException) -> str:
    """What an exception says, as one sentence with the cause in it.

    Libraries take several lines, of which the first may do no more than announce the others ("Error(s) in loading
    state_dict for X:"); and where they say nothing, it is what the exception behind them says, or what they are.
    """
    said = " ".join(str(error).split())
    behind = error.__cause__ or error.__context__
    if behind is not None and (not said or said.endswith(":")):
        said = f"{said} {cause_of(behind)}".strip()
    said = said.rstrip(" ,;:")
    if " " not in said:  # a KeyError says the key alone
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    if len(said) > _MOST:
        return said[:_MOST].rpartition(" ")[0].rstrip(" ,;:.(") + " …"
    return said if said.endswith((".", "!", "?", "…")) else f"{said}."


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """An exception and those behind it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def disk_error_in(error: BaseException) -> OSError | None:
    """What the disk would not do, full or not ours to write to, if that is behind an exception."""
    for found in chain_of(error):
        # A connection may be forbidden as well; that error names no file.
        if isinstance(found, OSError) and (
            found.errno in _FULL or (found.errno in _FORBIDDEN and found.filename is not None)
        ):
            return found
    return None


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust, such as tokenizers, has failed where it did not expect to: that is no Exception."""
    return type(error).__name__ == "PanicException"
