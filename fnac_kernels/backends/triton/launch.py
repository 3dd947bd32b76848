"""What every launch needs: the tensors' device, how products of a dtype are made, and errors that say what helps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import triton.language as tl
from torch import Tensor

from fnac_kernels._precision import bfloat16_allowed

Precision = Literal["tf32x3", "tf32"]


class Constant(tl.constexpr):
    """A number that kernels read by name.

    At every launch Triton compares each of them with what it was when the kernel was compiled; the base class makes a
    compile-time value of the result, through a wrapper that costs a microsecond: 48 of them in a step.
    """

    def __ne__(self, other: object) -> bool:
        return bool(self.value != getattr(other, "value", other))


def precision(dtype: torch.dtype) -> Precision:
    """How float32 operands are multiplied on the tensor cores.

    Exactly, as three products of TensorFloat-32 parts, unless ``set_float32_matmul_precision("medium")`` allows one.
    A float16 fits a TensorFloat-32 whole; bfloat16 operands are multiplied as they are and do not look at this.
    """
    return "tf32" if dtype != torch.float32 or bfloat16_allowed("cuda") else "tf32x3"


def on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the tensor's device and its current stream; on CPU tensors Triton's interpreter runs the kernels."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def on_image(img: Tensor) -> contextlib.AbstractContextManager[object]:
    """:func:`on`, of features among which the kernels find their way in 32 bits, image by image.

    Raises:
        ValueError: an image has more elements.
    """
    elements = math.prod(img.shape[1:])
    if elements >= 2**31:
        raise ValueError(
            f"img has {elements} elements an image (C*H*W); backend 'triton' takes fewer than 2**31, 'cuda' takes more"
        )
    return on(img)


def run(kernel: Any, grid: tuple[int, ...] | Callable[..., tuple[int, ...]], *arguments: Any, **options: Any) -> None:
    """Launch; a kernel that cannot be compiled here says which, why, and what would serve instead.

    Raises:
        RuntimeError: see above.
    """
    try:
        kernel[grid](*arguments, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        raise RuntimeError(
            f"the Triton kernel {name} cannot run on this device: {type(error).__name__}: {error}; "
            "backend='cuda' or backend='reference' would serve"
        ) from error
