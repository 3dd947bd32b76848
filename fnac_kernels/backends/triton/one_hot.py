"""One-hot weights: how the gradient of a maximum, which touches one cell of a pair, is fed to the tensor cores."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fnac_kernels.backends.triton.launch import precision


@triton.jit
def one_hot(cell, grad, p, PRODUCT: tl.constexpr):
    """``grad`` where ``cell == p``, in the dtype that it is multiplied in."""
    return tl.where(cell == p, grad, 0.0).to(PRODUCT)


def one_hot_products(dtype: torch.dtype) -> dict[str, Any]:
    """The constants that say how gradients meet features of this dtype.

    Of bfloat16 features the gradient is rounded to bfloat16, like the result, and multiplied at the full rate. The
    range of float16 does not hold a gradient (it may be scaled by any factor), so there both become float32.
    """
    return {"PRODUCT": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32, "PRECISION": precision(dtype)}
