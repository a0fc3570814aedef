"""What differs between the versions of transformers that pyproject.toml allows, told by feature and not by number."""

import inspect
from typing import Any

import torch


def in_dtype(dtype: torch.dtype) -> dict[str, Any]:
    """The argument of `from_pretrained` that loads weights in this dtype: `torch_dtype`, since 4.56 `dtype`."""
    from transformers import PretrainedConfig

    return {"dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype": dtype}


def weights_by_config() -> bool:
    """Whether `from_pretrained` reads the file of weights that a config names: since 4.57 or so."""
    from transformers import modeling_utils

    files = getattr(modeling_utils, "_get_resolved_checkpoint_files", None)
    return files is None or "transformers_explicit_filename" in inspect.signature(files).parameters
