"""float32 means of 16-bit features as two bfloat16 parts, high and low: multiplied part by part at the full rate.

For gradients, which are rounded to the features' 8 or 11 bits: 16 bits of a mean are enough there, and a product takes
three of parts (low by low is below what is kept), half the time of three in TensorFloat-32, without a way through
registers. They are parted in a kernel of their own: parted in registers, products wait for one another. The terms
themselves want float32's digits: with parts a term of clustered features was off by 8e-6, float32 by 3e-6.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fnac_kernels.backends.triton import tuning
from fnac_kernels.backends.triton.launch import run
from fnac_kernels.backends.triton.products import halves


@triton.jit(do_not_specialize=["count"])
def parts_kernel(x, y, z, out, count, BLOCK: tl.constexpr):
    """``out (.., 2, count)``: the parts of x, y, z, one after the other in the grid."""
    which = tl.program_id(1)
    start = tl.cast(tl.program_id(0), tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    wanted = at < count - start
    if which == 0:
        value = tl.load(x + start + at, mask=wanted, other=0.0).to(tl.float32)
    elif which == 1:
        value = tl.load(y + start + at, mask=wanted, other=0.0).to(tl.float32)
    else:
        value = tl.load(z + start + at, mask=wanted, other=0.0).to(tl.float32)
    high, low = halves(value)
    out += tl.cast(which, tl.int64) * 2 * count + start
    tl.store(out + at, high, mask=wanted)
    tl.store(out + tl.cast(count, tl.int64) + at, low, mask=wanted)


def parts(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``(2, N, C)`` bfloat16 for each of up to three ``(N, C)``; an empty one stays as it is."""
    wanted = [x for x in tensors if len(x)]
    if not wanted:
        return tensors
    n, c = wanted[0].shape
    out = torch.empty((len(wanted), 2, n, c), dtype=torch.bfloat16, device=wanted[0].device)
    blocks = tuning.elements()
    grid = (triton.cdiv(n * c, blocks.sizes["BLOCK"]), len(wanted))
    run(parts_kernel, grid, *(wanted * 3)[:3], out, n * c, **blocks.options)
    made = iter(out.unbind())
    return tuple(next(made) if len(x) else x for x in tensors)
