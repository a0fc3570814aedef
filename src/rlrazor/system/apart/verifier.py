"""A user's verifier, run apart."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.system.apart import Answer, Apart, Call, DeadlyError, NotLoadedError

SECONDS = 10.0  # that a call may take, unless the user says otherwise
DEATHS = 5  # calls in a row that end their process, or have to be ended, before razor gives up


class Verifier:
    """`verify(prompt, completion, **columns)` of a file or a module, in a process of its own; see `Apart`.

    `name` is "FILE.py:function" or "package.module:function"; `seconds` is what a call may take. The function is loaded
    when the first call, or `load`, needs it, and keeps what it keeps between calls, until it has to be loaded anew. Its
    process begins with `random` seeded, so that a run has the same scores each time. Pickled, it is its name.
    """

    def __init__(self, name: str, seconds: float = SECONDS) -> None:
        source, _, function = name.rpartition(":")
        if not source:
            raise RazorError(f"The verifier is FILE.py:function or package.module:function, not {name!r}.")
        # The file as it is named from here, wherever the function changes to.
        self.name, self.seconds, self.source = name, seconds, source
        path = str(Path(source).absolute()) if source.endswith(".py") else source
        self._apart = Apart("verifier", (path, function), seconds=seconds, deaths=DEATHS)

    def __reduce__(self) -> tuple[Any, ...]:
        return Verifier, (self.name, self.seconds)

    def load(self) -> None:
        """Load the function, if it is not. Raises RazorError where that fails."""
        try:
            self._apart.start()
        except NotLoadedError as error:
            raise self._not_loaded(error) from error

    def all(self, calls: Sequence[Call]) -> list[Answer]:
        """A score from 0 to 1 for each call, or what the verifier did instead.

        Raises RazorError where it ends its process, or takes too long, `DEATHS` times in a row.
        """
        try:
            return self._apart.call(calls)
        except NotLoadedError as error:
            raise self._not_loaded(error) from error
        except DeadlyError as error:
            raise RazorError(
                f"The verifier {self.name} ended its process or took longer than {self.seconds:g} s on {DEATHS} "
                f"completions in a row; on the last it {error}. Mend it, or give it more time with --verifier-timeout."
            ) from error

    def __call__(self, prompt: str, completion: str, **columns: Any) -> float:
        """The score of one completion. Raises ValueError with what the verifier did instead, RazorError as `all`."""
        [answer] = self.all([((prompt, completion), columns)])
        if answer.failure is not None:
            raise ValueError(f"{os.path.basename(self.name)} {answer.failure}")
        score: float = answer.value
        return score

    def close(self) -> None:
        """End its process."""
        self._apart.close()

    def _not_loaded(self, error: NotLoadedError) -> RazorError:
        return RazorError(f"The verifier's {self.source} cannot be loaded: {error}.")
