"""What a served base has drawn for the log of a watched run, kept beside it: no server need draw the same again.

SGLang takes no seed unless it is started for it, and the others round otherwise as requests meet. Checkpoints measured
on other completions than those before them would be told apart by luck.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from rlrazor import __version__
from rlrazor.lm.digests import is_same_base
from rlrazor.lm.kl import Sequences
from rlrazor.system.documents import checked, parse_json, read_text
from rlrazor.system.schema import Name, Open, Text
from rlrazor.system.writing import write_text

_MEND = "delete it, and the base draws anew"
Ids = list[Annotated[int, Field(ge=0, lt=1 << 31)]]


class _Probe(Open):
    """Of each completion its prompt's number; token ids."""

    prompts: list[Ids]
    completions: list[Ids]
    prompt_of: list[Annotated[int, Field(ge=0)]]

    @model_validator(mode="after")
    def _is_of_its_prompts(self) -> _Probe:
        if not self.prompt_of or len(self.prompt_of) != len(self.completions):
            raise ValueError("not every completion has a prompt")
        if max(self.prompt_of) >= len(self.prompts):
            raise ValueError("a completion is of a prompt that is not there")
        return self


class _Drawn(Open):
    """The file. `of`: hashes of how it was drawn."""

    base: Text
    of: dict[Name, Text]
    probes: dict[Name, _Probe]


@dataclass(frozen=True)
class KeptDraws:
    """A file beside a log; `of`: hashes of the prompts, the tokenizer, and how completions are drawn."""

    path: Path
    of: Mapping[str, str]

    @classmethod
    def beside(cls, log: Path, of: Mapping[str, str]) -> KeptDraws:
        """LOG.drawn.json."""
        return cls(log.with_name(f"{log.name}.drawn.json"), of)

    def of_base(self, digest: str) -> dict[str, Sequences]:
        """Each probe as this base completed it; empty where none is kept that was drawn so. Raises RazorError."""
        if not self.path.is_file():
            return {}
        found = checked(_Drawn, parse_json(read_text(self.path), self.path, mend=_MEND), self.path, mend=_MEND)
        if found.of != dict(self.of) or not is_same_base(found.base, digest):
            return {}
        return {name: Sequences(one.prompts, one.completions, one.prompt_of) for name, one in found.probes.items()}

    def keep(self, digest: str, probes: Mapping[str, Sequences]) -> None:
        """Write it. Raises RazorError where that fails."""
        each = {
            name: {
                "prompts": [list(row) for row in one.prompts],
                "completions": [list(row) for row in one.completions],
                "prompt_of": list(one.prompt_of),
            }
            for name, one in probes.items()
        }
        kept = {"versions": {"rlrazor": __version__}, "base": digest, "of": dict(self.of), "probes": each}
        write_text(self.path, json.dumps(kept) + "\n", "json")
