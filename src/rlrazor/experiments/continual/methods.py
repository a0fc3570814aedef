"""The methods: ParityMNIST's, whose targets and losses hold for any split of the digits, with two penalties.

In a stage of a sequence "the base" of a method, which the oracle's and KL-DPG's targets are made of, is the policy that
the stage starts from. A penalty holds a run to the base of all stages (`+kl`), or to the stage before (`+kl-before`).
"""

from collections.abc import Mapping

from rlrazor.errors import RazorError
from rlrazor.experiments.continual.config import CORE_METHODS
from rlrazor.experiments.parity_mnist import methods as parity
from rlrazor.experiments.parity_mnist.methods import Method

TO_BASE, TO_BEFORE = "+kl", "+kl-before"
METHODS: Mapping[str, Method] = {name: parity.METHODS[name] for name in (*CORE_METHODS, "replay", "ewc")}
PENALTIES: Mapping[str, str] = {"": "", TO_BASE: " + KL to the base", TO_BEFORE: " + KL to the stage before"}


def find_method(name: str) -> tuple[Method, str]:
    """The method of that name, and its penalty, one of PENALTIES. Raises RazorError, with the names, for another."""
    plain, plus, penalty = name.partition("+")
    if plain not in METHODS or plus + penalty not in PENALTIES:
        raise RazorError(
            f"Unknown method {name!r:.60}. Methods: {', '.join(METHODS)}; each also with '{TO_BASE}' for a KL penalty "
            f"to the base, or '{TO_BEFORE}' for one to the stage before."
        )
    return METHODS[plain], plus + penalty


def label_of(name: str) -> str:
    """The method's name for figures and tables."""
    method, penalty = find_method(name)
    return method.label + PENALTIES[penalty]
