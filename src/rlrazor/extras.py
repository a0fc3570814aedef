"""Optional dependencies: what each extra of pyproject.toml brings, and the sentence where it is missing."""

import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec

from rlrazor.errors import RazorError

EXTRAS = {
    "guard": ("transformers", "accelerate", "safetensors"),
    "train": ("trl", "peft", "datasets"),
    "eval": ("lm_eval", "math_verify"),
    "robot": ("metaworld", "mujoco", "gymnasium"),
}


class MissingExtraError(RazorError, ImportError):
    """A package is not installed: an ImportError to who imports, a sentence on the command line."""


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Of those of these packages that are installed, by the names that they are installed by."""
    found = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def needs_extra(*extras: str) -> None:
    """Raise MissingExtraError where a package of these extras is not installed.

    Imports none of them, which takes seconds.
    """
    for extra in extras:
        for package in EXTRAS[extra]:
            if not _is_installed(package):
                raise MissingExtraError(
                    f"This needs the extra [{extra}], and {package} is missing: {installing(extra)}."
                )


def installing(extra: str) -> str:
    """How an extra is installed: rlrazor is in no index of packages."""
    return f"in the checkout of rlrazor, pip install -e '.[{extra}]'"


def needs_package(package: str, what: str, install: str = "") -> None:
    """Raise MissingExtraError where a package that only `what` needs, the sentence's subject, is not installed.

    `install`: what pip is to install, by default the package.
    """
    if not _is_installed(package):
        raise MissingExtraError(
            f"{what} needs the package {package}, which is not installed: pip install {install or package}."
        )


def _is_installed(package: str) -> bool:
    if sys.modules.get(package) is not None:
        return True
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # a finder that refuses it, or None in its place
        return False
