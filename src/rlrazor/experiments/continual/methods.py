"""The methods: ParityMNIST's, whose targets and losses hold for any split of the digits, with two penalties.

In a stage of a sequence "the base" of a method, which the oracle's and KL-DPG's targets are made of, is the policy that
the stage starts from. A penalty holds a run to the base of all stages (`+kl`), or to the stage before (`+kl-before`).
"""

from collections.abc import Mapping

from rlrazor.errors import RazorError
from rlrazor.experiments.parity_mnist import methods as parity
from rlrazor.experiments.parity_mnist.methods import Method

PLAIN = ("sft-1", "sft-2", "oracle", "reinforce", "grpo", "dr-grpo", "kl-dpg")
METHODS: Mapping[str, Method] = {name: parity.METHODS[name] for name in (*PLAIN, "replay", "ewc")}
PENALTIES: Mapping[str, str] = {"": "", "+kl": " + KL to the base", "+kl-before": " + KL to the stage before"}


def find_method(name: str) -> tuple[Method, str]:
    """The method of that name, and its penalty, one of PENALTIES. Raises RazorError, with the names, for another."""
    plain, plus, penalty = name.partition("+")
    if plain not in METHODS or plus + penalty not in PENALTIES:
        raise RazorError(
            f"Unknown method {name!r:.60}. Methods: {', '.join(METHODS)}; each also with '+kl' for a KL penalty to the "
            "base, or '+kl-before' for one to the stage before."
        )
    return METHODS[plain], plus + penalty


def label_of(name: str) -> str:
    """The method's name for figures and tables."""
    method, penalty = find_method(name)
    return method.label + PENALTIES[penalty]
