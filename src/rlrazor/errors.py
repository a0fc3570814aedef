"""The one exception the command line turns into a sentence and exit code 2."""


class RazorError(Exception):
    """Something the user can mend: bad input, missing data, a full disk.

    The message is one or a few plain sentences: what is wrong, then what to do about it. Raise it wherever the cause
    is known; anything else that escapes is a bug and keeps its traceback.
    """
