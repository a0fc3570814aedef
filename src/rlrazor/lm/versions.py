"""What differs between the versions of transformers that pyproject.toml allows, told by feature and not by number."""

from typing import Any

import torch


def in_dtype(dtype: torch.dtype) -> dict[str, Any]:
    """The argument of `from_pretrained` that loads weights in this dtype: `torch_dtype`, since 4.56 `dtype`."""
    from transformers import PretrainedConfig

    return {"dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype": dtype}
