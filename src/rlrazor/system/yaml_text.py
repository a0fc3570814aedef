"""YAML that a user wrote. What it may say is what JSON can say: the rest of the language surprises whoever reads it.

`1e-4` is a number, `on`, `010` and `12:30` are text, as in YAML 1.2; a name that stands for another part of the file is
an error, as is a key that is there twice.
"""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from rlrazor.system.documents import NotReadableError, parse_json, unreadable

LARGEST = 1_000_000  # characters: PyYAML reads some hundred thousand in a second


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    def compose_node(self, parent: Any, index: int) -> Any:
        """Without aliases: a few lines of them stand for more than memory holds."""
        if self.check_event(yaml.AliasEvent):
            raise NotReadableError(f"it has an alias in {_line(self.peek_event().start_mark)}: write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Without a key that hides another."""
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise NotReadableError(f"it has a key twice in the part that begins in {_line(node.start_mark)}")
        return found


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in (
    ("null", r"~|null|Null|NULL|"),
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?(0|[1-9][0-9]*)"),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"({_pattern})\Z"), None)


def parse_yaml(text: str, where: Path | str) -> Any:
    """What a text is in YAML. Raises RazorError where it is not YAML, or holds what `parse_json` refuses."""
    try:
        if len(text) > LARGEST:
            raise NotReadableError(f"it has more than {LARGEST:,} characters")
        found = yaml.load(text, _Loader)
        return parse_json(json.dumps(found), where)
    except RecursionError as error:
        raise unreadable(where, "it is nested too deeply") from error
    except NotReadableError as error:
        raise unreadable(where, error) from error
    except yaml.MarkedYAMLError as error:
        at = f" in {_line(error.problem_mark)}" if error.problem_mark else ""
        raise unreadable(where, f"it is not YAML ({error.problem}{at})") from error
    except (yaml.YAMLError, TypeError, ValueError) as error:  # a control character, a date by its tag, a long number
        raise unreadable(where, f"it is not YAML ({str(error).splitlines()[0]})") from error


def _line(mark: Any) -> str:
    return f"line {mark.line + 1}"
