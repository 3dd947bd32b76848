"""How a product of tiles is added up: the one place that knows what the tensor cores round."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """``total + a @ b``, float32.

    Tensor cores cut off what they add up. With three TensorFloat-32 products for a float32 one ("tf32x3") the cut is
    all the error there is; so each block of channels is added outside of them, rounded to nearest, and the sum is as
    good as float32's (Ootomo and Yokota, arXiv 2203.03341). An FMA, because Triton would fold a plain addition into
    the product.
    """
    if PRECISION == "tf32x3":
        return tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)
