"""Max-pooled logits: an image's cells times a block of sounds on the tensor cores, maximum and first argmax on the fly.

Source: ``max over cells of <img[n, :, p], aud[m]> / tau`` (arXiv 2303.11302), see ``fnac_kernels.reference``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fnac_kernels.backends.triton import tuning
from fnac_kernels.backends.triton.launch import image_strides, on, precision, run, widened


@triton.jit
def max_logits_kernel(
    img, aud, logits, argmax, M, C, P, stride_c, stride_p, scale,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: one image and BLOCK_M sounds."""
    n = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    image = img + n * C * P
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    index = tl.zeros((BLOCK_M,), tl.int32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        similarity = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            cells = tl.load(
                image + p[:, None] * stride_p + c[None, :] * stride_c,
                mask=(p[:, None] < P) & (c[None, :] < C), other=0.0,
            )  # fmt: skip
            sounds = tl.load(
                aud + m[None, :].to(tl.int64) * C + c[:, None], mask=(m[None, :] < M) & (c[:, None] < C), other=0.0
            )
            if WIDEN:
                cells, sounds = cells.to(tl.float32), sounds.to(tl.float32)
            similarity = tl.dot(cells, sounds, similarity, input_precision=PRECISION)
        # A NaN wins, the first one; comparisons with it are false, so it is looked for apart.
        similarity = tl.where(p[:, None] < P, similarity, float("-inf"))
        is_nan = similarity != similarity
        top = tl.max(tl.where(is_nan, float("inf"), similarity), axis=0)
        has_nan = tl.max(is_nan.to(tl.int32), axis=0) > 0
        wins = tl.where(has_nan[None, :], is_nan, similarity == top[None, :])
        first = tl.min(tl.where(wins, p[:, None], P), axis=0)
        top = tl.where(has_nan, float("nan"), top)
        better = (best == best) & ((top > best) | has_nan)
        best = tl.where(better, top, best)
        index = tl.where(better, first, index)
    tl.store(logits + n * M + m, best * scale, mask=m < M)
    tl.store(argmax + n * M + m, index.to(tl.uint16), mask=m < M)


def max_logits(img: Tensor, aud: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    n, c, h, w = img.shape
    m, cells = aud.shape[0], h * w
    logits = torch.empty((n, m), dtype=torch.float32, device=img.device)
    argmax = torch.empty((n, m), dtype=torch.uint16, device=img.device)
    blocks = tuning.max_logits(cells, wide=img.dtype == torch.float32)
    with on(img):
        run(
            max_logits_kernel, (n, triton.cdiv(m, blocks.sizes["BLOCK_M"])),
            img, aud, logits, argmax, m, c, cells, *image_strides(img), 1 / tau,
            PRECISION=precision(img.dtype), WIDEN=widened(img.dtype), **blocks.options,
        )  # fmt: skip
    return logits, argmax
