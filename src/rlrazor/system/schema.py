"""What files may hold, field by field: `documents.checked` says in a sentence where one holds anything else."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from rlrazor.bounds import LARGEST_SEED, LONGEST_NAME, MOST_STEPS

LARGEST_KL = 1e12  # nats: a ruined model comes to millions
_ROUNDING = 1e-9  # by which a mean of scores may be off

Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
Text = Annotated[str, Field(max_length=1_000_000)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""Of SHA-256: 16 hexadecimal digits."""
Score = Annotated[float, Field(ge=-_ROUNDING, le=1 + _ROUNDING)]
Drop = Annotated[float, Field(ge=-1 - _ROUNDING, le=1 + _ROUNDING)]
Step = Annotated[int, Field(ge=0, le=MOST_STEPS)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]


class Schema(BaseModel):
    """An object whose keys are all known. `true` is no number, 2.0 no whole number, "0.9" neither."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Open(Schema):
    """An object that may have more keys than we read."""

    model_config = ConfigDict(extra="allow")
