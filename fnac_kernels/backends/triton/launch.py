"""What every launch needs: the tensors' device, how products of a dtype are made, and errors that say what helps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

Precision = Literal["ieee", "tf32"]


def image_strides(img: Tensor) -> tuple[int, int]:
    """Strides of ``img (N, C, H, W)`` over channels and over cells; it is dense in NCHW or channels_last."""
    _, c, h, w = img.shape
    return (h * w, 1) if img.is_contiguous() and h * w > 1 else (1, c)


def widened(dtype: torch.dtype) -> bool:
    """Whether 16-bit operands are made float32 before they are multiplied: Triton's interpreter takes the bits of a
    bfloat16 for an integer there.
    """
    return dtype != torch.float32 and isinstance(_probe, InterpretedFunction)


def precision(dtype: torch.dtype) -> Precision:
    """How float32 operands are multiplied: exactly, unless ``set_float32_matmul_precision("medium")`` or 16-bit
    features allow TensorFloat-32, whose 10 bits hold a float16 or bfloat16 value as it is.
    """
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "medium":
        return "tf32"
    return "ieee"


@triton.jit
def _probe():
    """Tells whether kernels are interpreted: that was settled when they were defined."""


@contextlib.contextmanager
def on(x: Tensor) -> Iterator[None]:
    """Launch on the tensor's device and its current stream; on CPU tensors Triton's interpreter runs the kernels."""
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        yield


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
