"""What PyTorch is told of the precision of float32 products."""

from __future__ import annotations

from typing import Literal

import torch


def bfloat16_allowed(device: Literal["cpu", "cuda"]) -> bool:
    """Whether float32 products may be made of bfloat16's: at ``torch.set_float32_matmul_precision("medium")``.

    Where the device's own setting (``torch.backends.mkldnn.matmul.fp32_precision``) was used instead, PyTorch raises
    when it is asked for the general one. CUDA's own knows TensorFloat-32 alone, which "high" allows too.
    """
    try:
        return torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:
        return device == "cpu" and torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
