"""What other libraries' exceptions become in a sentence."""

import errno

import pytest
import torch

from rlrazor.errors import cause_of, disk_error_in
from tiny_models import tiny_llama


def raised(error: Exception, behind: Exception | None = None) -> Exception:
    try:
        raise error from behind
    except Exception as caught:
        return caught


def test_the_cause_is_in_the_sentence_and_not_after_a_colon() -> None:
    weights = tiny_llama().state_dict()
    weights["lm_head.weight"] = torch.zeros(3, 5)
    with pytest.raises(RuntimeError) as caught:
        tiny_llama().load_state_dict(weights)
    assert str(caught.value).splitlines()[0].endswith(":")  # which says nothing of the cause
    said = cause_of(caught.value)
    assert "size mismatch for lm_head.weight" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one of: \n(1) a file, \n(2) another"), "one of: (1) a file, (2) another."),
        (ValueError("Is it there?"), "Is it there?"),
        (KeyError("weight"), "KeyError: 'weight'."),
        (ValueError(""), "ValueError."),
        (ValueError("It failed:\n\n"), "It failed."),
        (raised(OSError(""), ValueError("not a number")), "not a number."),
        (raised(OSError("It failed:"), ValueError("not a number")), "It failed: not a number."),
    ],
)
def test_it_is_one_sentence(error: Exception, said: str) -> None:
    assert cause_of(error) == said


def test_a_page_is_cut() -> None:
    said = cause_of(ValueError("first " + "word " * 1000 + "last"))
    assert len(said) < 310
    assert said.startswith("first word")
    assert said.endswith("word …")


def test_a_full_disk_is_found_behind_what_a_library_says() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert disk_error_in(raised(RuntimeError("download failed"), raised(ValueError("x"), full))) is full
    closed = PermissionError(errno.EACCES, "Permission denied", "/cache/blobs")
    assert disk_error_in(raised(RuntimeError("download failed"), closed)) is closed
    # Sockets may be forbidden too, and name no file.
    assert disk_error_in(PermissionError(errno.EACCES, "Permission denied")) is None
    assert disk_error_in(ConnectionRefusedError(errno.ECONNREFUSED, "refused")) is None
