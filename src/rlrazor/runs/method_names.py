"""Methods by their names: an experiment's own, and each with a suffix for a KL penalty to the base."""

from collections.abc import Mapping
from typing import Protocol, TypeVar

from rlrazor.errors import RazorError

KL_SUFFIX = "+kl"


class Labelled(Protocol):
    """A method as far as its name goes."""

    @property
    def label(self) -> str: ...  # noqa: D102


M = TypeVar("M", bound=Labelled)


def find(methods: Mapping[str, M], name: str) -> tuple[M, bool]:
    """The method of that name and whether it is KL-regularised: `grpo+kl` is `grpo` plus kl_coef * KL(pi || pi0).

    Raises RazorError, listing the valid names, for an unknown one.
    """
    plain = name.removesuffix(KL_SUFFIX)
    if plain not in methods:
        raise RazorError(
            f"Unknown method {name!r:.60}. Methods: {', '.join(methods)}; each also with '{KL_SUFFIX}' for a KL "
            "penalty to the base, as in grpo+kl."
        )
    return methods[plain], name.endswith(KL_SUFFIX)


def label(methods: Mapping[str, M], name: str) -> str:
    """The method's name for figures and tables. Raises RazorError as `find`."""
    method, regularised = find(methods, name)
    return f"{method.label} + KL" if regularised else method.label
