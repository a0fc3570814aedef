"""docs/architecture.md says who may import whom: every import of the package is held against that page's picture.

Imports inside functions and under TYPE_CHECKING count as well, and modules named in texts, for `import_module`.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
GROUND = frozenset({"errors", "bounds", "extras", "seeding"})
TOP = frozenset({"__init__", "__main__"})  # the public API and `python -m rlrazor`, which may import all


def arrows(page: str) -> set[tuple[str, str]]:
    """The arrows of the page's picture."""
    (picture,) = re.findall(r"```mermaid\n(.*?)```", page, flags=re.DOTALL)
    return set(re.findall(r"(\w+) --> (\w+)", picture))


def allowed(page: str) -> dict[str, set[str]]:
    """For each package all that its arrows lead to."""
    edges = arrows(page)
    reached = {name: {name} for edge in edges for name in edge}
    for _ in reached:
        for source, target in edges:
            reached[source] |= reached[target]
    return reached


def package(module: str) -> str:
    """The part of the picture that a module lies in."""
    name = [*module.split("."), "__init__"][1]
    return "ground" if name in GROUND else name


def module_of(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    place = SOURCE.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").exists()


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in the tree, by its whole name, or named there as a text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno} imports by a relative name, which is not read here"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole.startswith("rlrazor.") and is_module(whole) else str(node.module)
        elif isinstance(node, ast.Constant) and str(node.value).startswith("rlrazor."):
            name = str(node.value).rstrip(".")  # for import_module, perhaps the beginning of an f-string
            yield from [name] if is_module(name) else []


def imports() -> set[tuple[str, str]]:
    """(importing module, imported module) of the whole package, its own and foreign ones."""
    found = set()
    for file in SOURCE.rglob("*.py"):
        found |= {(module_of(file), name) for name in imported(ast.parse(file.read_text(encoding="utf-8")))}
    return found


IMPORTS = imports()
OWN = {(module, name) for module, name in IMPORTS if re.match(r"rlrazor\.", name)}


def violations(pairs: set[tuple[str, str]], page: str) -> set[tuple[str, str]]:
    may = allowed(page)
    return {
        (module, name)
        for module, name in pairs
        if package(module) not in TOP and package(name) not in may.get(package(module), ())
    }


def test_nobody_imports_what_the_picture_does_not_allow() -> None:
    found = violations(OWN, PAGE)
    assert not found, f"docs/architecture.md does not allow: {sorted(found)}"


def test_every_module_lies_in_a_package_of_the_picture() -> None:
    modules = {package(module_of(file)) for file in SOURCE.rglob("*.py")} - TOP
    assert modules <= set(allowed(PAGE))


def test_the_table_has_the_packages_of_the_picture() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert sorted(rows) == sorted(allowed(PAGE))
    (ground,) = re.findall(r"^\| `ground` \|(.*)\|$", PAGE, flags=re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", ground)) == GROUND


def test_nothing_imports_in_a_circle() -> None:
    may = allowed(PAGE)
    assert not [(one, other) for one in may for other in may[one] - {one} if one in may[other]]


def test_analysis_imports_no_torch() -> None:
    foreign = {name.split(".")[0] for module, name in IMPORTS if package(module) == "analysis"}
    assert {"numpy", "polars"} <= foreign
    assert not foreign & {"torch", "transformers", "trl"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def late():\n    from rlrazor.report import tables", "rlrazor.report.tables"),
        ("if TYPE_CHECKING:\n    import rlrazor.report.page", "rlrazor.report.page"),
        ("from rlrazor import report", "rlrazor.report"),
        ("from rlrazor.report import write_report", "rlrazor.report"),
        ('import_module("rlrazor.report.tables")', "rlrazor.report.tables"),
        ('import_module(f"rlrazor.report.{name}")', "rlrazor.report"),
    ],
)
def test_every_way_to_import_is_seen(text: str, found: str) -> None:
    assert found in set(imported(ast.parse(text)))
    assert violations({("rlrazor.runs.invented", found)}, PAGE)


def test_a_relative_import_is_not_passed_over() -> None:
    with pytest.raises(AssertionError, match="relative"):
        list(imported(ast.parse("from ..report import tables")))
