"""How a product of tiles is added up: the one place that knows what the tensor cores round."""

from __future__ import annotations

import triton
import triton.language as tl

from fnac_kernels.backends.triton.launch import Constant


@triton.jit
def _probe():
    """Whether Triton's interpreter runs the kernels was settled when they were defined: this one's type tells."""


INTERPRETED = Constant(not isinstance(_probe, triton.JITFunction))


@triton.jit
def rounded(x):
    """A float32 tile in bfloat16, rounded to nearest: the interpreter would cut."""
    if INTERPRETED:
        x = ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def halves(x):
    """A float32 tile as the sum of two of bfloat16: 16 bits of it."""
    high = rounded(x)
    return high, rounded(x - high.to(tl.float32))


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """``total + a @ b``, float32.

    Tensor cores cut off what they add up. With three TensorFloat-32 products for a float32 one ("tf32x3") the cut is
    all the error there is; so each block of channels is added outside of them, rounded to nearest, and the sum is as
    good as float32's (Ootomo and Yokota, arXiv 2203.03341). An FMA, because Triton would fold a plain addition into
    the product.
    """
    if INTERPRETED:  # it multiplies the bits of bfloat16 values as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    if PRECISION == "tf32x3" and a.dtype == tl.float32:
        return tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)
