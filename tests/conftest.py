"""What every test shares."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _one_trainer_after_another() -> Iterator[None]:
    """Accelerate keeps the first trainer's precision for the whole process, and refuses another's."""
    yield
    if (accelerate := sys.modules.get("accelerate.state")) is not None:
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)
