"""What of a model folder's JSON files we go by ourselves. Of the rest transformers and PEFT say what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import field_validator

from rlrazor.errors import RazorError
from rlrazor.system.documents import checked, loads
from rlrazor.system.files import read_bytes
from rlrazor.system.schema import Open, Text

MEND = "save or download it again"
T = TypeVar("T", bound=Open)

_LARGEST_ID = 2**31 - 1


def is_token_id(value: Any) -> bool:
    """Whether this is a token's number, or -1, which old configs have for none."""
    return type(value) is int and -1 <= value <= _LARGEST_ID


class ModelConfig(Open):
    """config.json and generation_config.json: the tokens that end a text, pad and begin one."""

    eos_token_id: Any = None
    pad_token_id: Any = None
    bos_token_id: Any = None

    @field_validator("eos_token_id", "pad_token_id", "bos_token_id")
    @classmethod
    def _is_a_token(cls, value: Any) -> Any:
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(map(is_token_id, ids)):
            raise ValueError("there has to be the number of a token, or a list of such")
        return value


class AdapterConfig(Open):
    """adapter_config.json: what the adapter is for, and the base that it was trained on."""

    task_type: Text | None = None
    base_model_name_or_path: Text | None = None


def read_config(path: Path) -> Any:
    """What a JSON file of a model is, NaN and infinity as text. Raises OSError, and ValueError for what is no JSON."""
    return loads(read_bytes(path).decode("utf-8-sig"), nan=str, lenient=True)


def check_config(path: Path) -> None:
    """Raise RazorError for a config of a model, or of its generation, that is there and is not one."""
    if path.is_file():
        _checked(ModelConfig, path, MEND)


def read_adapter_config(path: Path) -> AdapterConfig:
    """Raises RazorError for one that is missing or damaged."""
    return _checked(AdapterConfig, path, "save the adapter again")


def _checked(schema: type[T], path: Path, mend: str) -> T:
    try:
        found = read_config(path)
    except (OSError, ValueError) as error:
        raise RazorError(f"{path} is damaged ({error}): {mend}.") from error
    return checked(schema, found, path, mend=mend)
