"""How copies of two models are trained to see what comes back (`recover`)."""

from dataclasses import dataclass

from rlrazor import bounds


@dataclass(frozen=True)
class Recovery:
    """So many steps, at `lr`, None for the one by rule; `rank` 0 for all weights, else that of a LoRA.

    `seed` chooses the items and their order. Raises RazorError for what is out of bounds.
    """

    steps: int
    lr: float | None = None
    rank: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, option in (("steps", ""), ("lr", "-lr"), ("rank", "-rank"), ("seed", "-seed")):
            bounds.check(f"recover_{name}", getattr(self, name), f"--recover{option}")
