"""YAML as users write it, and what is no YAML, or more than that."""

import json
import time

import pytest

from rlrazor.errors import RazorError
from rlrazor.system.yaml_text import parse_yaml

VALUES = {
    "1e-4": 1e-4, "3E5": 3e5, "-2.5": -2.5, ".5": 0.5, "7": 7, "-3": -3, "0": 0, "true": True, "False": False,
    "null": None, "~": None, "": None, "on": "on", "no": "no", "010": "010", "12:30": "12:30", "1_000": "1_000",
    "2024-01-01": "2024-01-01", ".inf": ".inf", ".nan": ".nan", "'1e-4'": "1e-4", '"a\\nb"': "a\nb", "0x10": "0x10",
    "1e-4 # note": 1e-4, "[a, 2]": ["a", 2], "{b: .5}": {"b": 0.5}, "= x": "= x", "<<": "<<", "org/model": "org/model",
}  # fmt: skip


@pytest.mark.parametrize(("text", "meant"), VALUES.items())
def test_a_value_is_what_it_looks_like(text: str, meant: object) -> None:
    found = parse_yaml(f"a: {text}", "f.yaml")["a"]
    assert found == meant
    assert type(found) is type(meant)


def test_json_is_yaml() -> None:
    value = {"a": [1, 2.5, {"b": None}], "c": "text: with a colon", "d": [True, False]}
    assert parse_yaml(json.dumps(value), "f.yaml") == value
    assert parse_yaml(json.dumps(value, indent=2), "f.yaml") == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "as it has a key twice in the part that begins in line 1."),
        ("a: &x [1]\nb: *x", "as it has an alias in line 2: write it out."),
        ("a: [1, 2", "as it is not YAML (expected ',' or ']', but got '<stream end>' in line 1)."),
        ("a: b: c", "as it is not YAML (mapping values are not allowed here in line 1)."),
        ("\ta: 1", "as it is not YAML (found character '\\t' that cannot start any token in line 1)."),
        ("a: !!python/object/apply:os.system ['true']", "as it is not YAML (could not determine a constructor for"),
        ("a: !!timestamp 2024-01-01", "as it is not YAML (Object of type date is not JSON serializable)."),
        ("a: !!float .nan", "as it holds NaN, which is no number in JSON."),
        ("a: 1" + "0" * 6000, "cannot be read, as"),
        ("a: 12345678901234567890123", "as it holds a number that is too large (12345678901234567890"),
        ("a: 1e999", "as it holds"),
        ("a: \x07", "as it is not YAML (unacceptable character #x0007"),
        ("--- 1\n--- 2", "as it is not YAML (but found another document in line 2)."),
        ("? [1]\n: 2", "as it is not YAML (found unhashable key in line 1)."),
        ("[" * 5000, "cannot be read, as it is nested too deeply."),
        ("[" * 150 + "]" * 150, "cannot be read, as it is nested too deeply."),
        ("1: a\n'1': b", "as it has the key \"1\" twice in one object."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(RazorError) as error:
        parse_yaml(text, "f.yaml")
    assert str(error.value).startswith("f.yaml cannot be read, as")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_what_would_take_forever_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]" for n in range(1, 12))]
    begun = time.monotonic()
    for text in ("\n".join(lines), "- a\n" * 300_000):
        with pytest.raises(RazorError, match=r"an alias in line 2|more than 1,000,000 characters"):
            parse_yaml(text, "f.yaml")
    assert time.monotonic() - begun < 5
