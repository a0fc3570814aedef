"""The two readers of JSON Lines, against rows that were written by json itself."""

import json

import pytest

from rlrazor.errors import RazorError
from rlrazor.system import jsonl

ROWS = [{"step": 1, "text": "a\u2028b\x85c"}, {"step": 2, "text": ""}, {"step": 3}]
TEXT = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_a_row_is_found_with_its_line(end: str) -> None:
    found = list(jsonl.strict(TEXT.replace("\n", "\n\n") + end, "log"))
    assert [row for _, row in found] == ROWS
    assert [where for where, _ in found] == ["log, line 1", "log, line 3", "log, line 5"]


@pytest.mark.parametrize("line", ["{", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": 1e999}', "[" * 1000])
@pytest.mark.parametrize("torn", [False, True])
def test_what_cannot_be_read_is_named_wherever_it_is(line: str, torn: bool) -> None:
    for text, number in ((f"{line}\n{TEXT}", 1), (f"{TEXT}\n{line}\n", 4)):
        with pytest.raises(RazorError, match=f"^log, line {number} cannot be read, as it "):
            list(jsonl.strict(text, "log", torn=torn))


def test_half_of_a_last_line_is_none_where_a_process_may_have_been_killed() -> None:
    for length in range(1, len('{"step": 4}')):
        text = TEXT + "\n" + '{"step": 4}'[:length]
        assert [row for _, row in jsonl.strict(text, "log", torn=True)] == ROWS
        with pytest.raises(RazorError, match="line 4"):
            list(jsonl.strict(text, "log"))


def test_a_whole_last_line_that_says_two_things_is_no_half() -> None:
    with pytest.raises(RazorError, match="line 4"):
        list(jsonl.strict(TEXT + '\n{"step": 4, "step": 5}', "log", torn=True))


def test_the_lenient_reader_takes_what_others_would_and_nothing_stops_it() -> None:
    content = b'{"a": 1, "a": 2}\n{"a": NaN\n\xff\n\n[3]'
    assert list(jsonl.lenient(content)) == [{"a": 2}, None, None, None, [3]]
