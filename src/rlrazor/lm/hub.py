"""The hub: whether it can be reached, and why something did not come from it.

Its HTTP library, and so whose exceptions, differ between its versions.
"""

import os
import socket
import sys
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from ssl import SSLError
from threading import Thread
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from rlrazor.errors import RazorError, chain_of

SECONDS = 3.0  # for the hub to answer at all
_UNREACHABLE = {"ConnectionError", "Timeout", "TimeoutError", "TransportError", "LocalEntryNotFoundError"}
# Where the libraries keep what they have read of the environment.
_SWITCHES = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"),
    ("transformers.utils.hub", "_is_offline_mode"),
)


def is_local(source: str) -> bool:
    """Whether a model can only be a local one, by how it is written: a hub id has at most one slash."""
    return source.endswith(".gguf") or source.startswith(("/", ".", "~")) or source.count("/") > 1


def nowhere(source: str) -> RazorError:
    """The error for a local model that is not there."""
    return RazorError(f"There is no {source}. Give a hub id, a folder with a model, or a .gguf file.")


def answer_in(error: BaseException) -> int | None:
    """The HTTP status that the hub answered with, if an answer is behind an exception."""
    for found in chain_of(error):
        status = getattr(getattr(found, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def is_unreachable(error: BaseException) -> bool:
    """Whether there was no answer: no connection, one that broke or took too long, or one that is switched off."""
    kinds = {kind.__name__ for found in chain_of(error) for kind in type(found).__mro__}
    return answer_in(error) is None and bool(kinds & _UNREACHABLE)


def is_offline() -> bool:
    """Whether this process goes without the hub, with what is in its cache."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def settle() -> None:
    """Go on without the hub where it does not answer at once: the libraries would try for half a minute.

    For the whole process and those that it starts; not where HF_HUB_OFFLINE is set, to 0 or to 1, by who knows better.
    """
    if "HF_HUB_OFFLINE" in os.environ or answers():
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    for module, name in _SWITCHES:
        if hasattr(sys.modules.get(module), name):
            setattr(sys.modules[module], name, True)


def answers() -> bool:
    """Whether there is an answer of any kind within SECONDS; one try, by the proxies of the environment."""
    answer: Future[bool] = Future()
    Thread(target=lambda: answer.set_result(_ask()), daemon=True).start()  # a name may be looked up for a minute
    with suppress(TimeoutError):
        return answer.result(SECONDS)
    return False


def _ask() -> bool:
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=SECONDS).close()
    except HTTPError as error:
        error.close()
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return isinstance(reason, SSLError) or not isinstance(reason, OSError | socket.gaierror)
    return True


def has_data_set(name: str) -> bool:
    """Whether anything of a data set is in the caches of this machine."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    found = (
        Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"datasets--{name.replace('/', '--')}",
        Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets") / name.lower().replace("/", "___"),
        Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets") / name.replace("/", "___"),
    )
    return any(folder.expanduser().exists() for folder in found)
