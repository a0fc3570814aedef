"""docs/exit-codes.md and the commands: each is there, and what each code means is what the code says."""

import argparse
import re
from pathlib import Path

from rlrazor.cli import build_parser, exits

PAGE = (Path(__file__).parents[1] / "docs" / "exit-codes.md").read_text()


def commands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (
        action.choices for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return dict(choices)


def test_every_code_and_every_command_is_on_the_page() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, flags=re.MULTILINE)}
    assert codes == {
        value for name, value in vars(exits).items() if name.isupper() and value != exits.SIGNALLED
    }  # which is none by itself
    assert set(re.findall(r"^\| `razor (\w+)` \|", PAGE, flags=re.MULTILINE)) == set(commands())


def test_the_commands_that_judge_say_their_codes_in_their_help() -> None:
    rows = dict(re.findall(r"^\| `razor (\w+)` \|(.*)\|$", PAGE, flags=re.MULTILINE))
    judging = {name for name, row in rows.items() if all(cell.strip() for cell in row.split("|"))}
    assert judging == {"compare", "pick", "watch"}
    for name, parser in commands().items():
        said = re.search(r"Exit code: 0 .*1 .*2 .*3 ", " ".join(parser.format_help().split()))
        assert (said is not None) == (name in judging), name
