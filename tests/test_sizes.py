"""No file, no function and no constructor of the package is larger than what one reads at a time."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, ARGUMENTS = 450, 60, 8
COMMAND_LINES = {
    f"rlrazor.experiments.{experiment}.config.Config" for experiment in ("language", "parity_mnist", "robot")
}
"""A field of these, and of what derives from them, is an option of a command."""
DOCUMENTS = {"rlrazor.system.schema.Schema", "rlrazor.system.schema.Open"}
"""What derives from these is made of a file's contents, whose keys are its fields."""


def texts() -> dict[str, str]:
    """Module -> its text, of the whole package."""
    found = {}
    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file.read_text(encoding="utf-8")
    return found


def too_long(text: str) -> list[str]:
    """The functions of a file that are too long, and the file itself where it is."""
    functions = (one for one in ast.walk(ast.parse(text)) if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef))
    found = [one.name for one in functions if (one.end_lineno or 0) - one.lineno >= LINES_OF_A_FUNCTION]
    return found + ["the file"] * (len(text.splitlines()) > LINES_OF_A_FILE)


class Classes(dict[str, ast.ClassDef]):
    """All classes by their whole names, and what each derives from."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        super().__init__()
        self.imported: dict[str, str] = {}  # module.name -> the whole name of what it means there
        for module, text in texts.items():
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ClassDef):
                    self[f"{module}.{node.name}"] = node
                elif isinstance(node, ast.ImportFrom):
                    own = {f"{module}.{one.asname or one.name}": f"{node.module}.{one.name}" for one in node.names}
                    self.imported.update(own)

    def line(self, name: str) -> Iterator[str]:
        """A class and all that it derives from, as far as they are among these."""
        while name in self.imported:
            name = self.imported[name]
        if name in self:
            yield name
            for base in self[name].bases:
                yield from self.line(f"{name.rpartition('.')[0]}.{ast.unparse(base)}")

    def arguments(self, name: str) -> int:
        """How many its constructor takes; of a dataclass the fields of those that it derives from too."""
        line = [self[above] for above in self.line(name)]
        for part in (part for above in line for part in above.body):
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                return len([*part.args.posonlyargs, *part.args.args, *part.args.kwonlyargs]) - 1
        of_data = [above for above in line if any("dataclass" in ast.unparse(mark) for mark in above.decorator_list)]
        fields = [part for above in of_data for part in above.body if isinstance(part, ast.AnnAssign)]
        return len({ast.unparse(part.target) for part in fields if _is_argument(ast.unparse(part))})


def _is_argument(field: str) -> bool:
    return "ClassVar" not in field and "init=False" not in field


def test_no_file_and_no_function_is_too_long() -> None:
    assert {module: found for module, text in texts().items() if (found := too_long(text))} == {}


def test_no_constructor_takes_too_much() -> None:
    classes = Classes(texts())
    assert {*classes} > COMMAND_LINES | DOCUMENTS
    taken = {
        name: count
        for name in classes
        if (count := classes.arguments(name)) > ARGUMENTS and not {*classes.line(name)} & (COMMAND_LINES | DOCUMENTS)
    }
    assert taken == {}


def test_what_is_too_large_is_seen() -> None:
    assert too_long("def f():\n" + "    1\n" * LINES_OF_A_FUNCTION) == ["f"]
    assert too_long("def f():\n" + "    1\n" * (LINES_OF_A_FUNCTION - 1)) == []
    assert too_long("1\n" * (LINES_OF_A_FILE + 1)) == ["the file"]
    one = "@dataclass(frozen=True)\nclass A:\n    a: int\n    b: int = 0\n    c: ClassVar[int] = 0\n"
    other = (
        "from one import A as Above\n"
        "@dataclass\nclass A(Above):\n    a: int\n    d: int = field(init=False)\n    e: int = 1\n"
        "class B(A):\n    def __init__(self, a, /, b, *, c, d): ...\n"
        "class Plain:\n    a: int\n"
    )
    classes = Classes({"one": one, "other": other})
    taken = {name: classes.arguments(name) for name in classes}
    assert taken == {"one.A": 2, "other.A": 3, "other.B": 4, "other.Plain": 0}
    assert list(classes.line("other.B")) == ["other.B", "other.A", "one.A"]
