"""Why something did not come from the hub: whose HTTP library, and so whose exceptions, differ between its versions."""

from rlrazor.errors import chain_of

_UNREACHABLE = {"ConnectionError", "Timeout", "TimeoutError", "TransportError", "LocalEntryNotFoundError"}


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
