"""The gradient of the features. Each pair touches one cell: a one-hot weight tile, built in registers from argmax and
gradient, is multiplied with the other side's features. Every element has one writer, so results are deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fnac_kernels.backends.triton import tuning
from fnac_kernels.backends.triton.launch import image_strides, on, precision, run


@triton.jit
def image_gradient_kernel(
    aud, grad_logits, argmax, grad_maps, mask, grad_avg, grad_foreground, dimg, M, C, P, stride_c, stride_p, scale,
    LOGITS: tl.constexpr, MAPS: tl.constexpr, AVG: tl.constexpr, FOREGROUND: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_P cells by BLOCK_C channels of one image's gradient."""
    n = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if LOGITS:
        for m0 in range(0, M, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            grad = tl.load(grad_logits + n * M + m, mask=m < M, other=0.0)
            cell = tl.load(argmax + n * M + m, mask=m < M, other=0).to(tl.int32)
            # Of padded pairs the gradient is 0, and those that do not choose the cell are never multiplied by it.
            weights = tl.where(cell[None, :] == p[:, None], grad[None, :], 0.0)
            sounds = tl.load(
                aud + m[:, None].to(tl.int64) * C + c[None, :], mask=(m[:, None] < M) & (c[None, :] < C), other=0.0
            )
            total = tl.dot(weights, sounds.to(tl.float32), total, input_precision=PRECISION)
    if MAPS:
        sound = tl.load(aud + n * C + c, mask=c < C, other=0.0).to(tl.float32)
        total += tl.load(grad_maps + n * P + p, mask=p < P, other=0.0)[:, None] * sound[None, :]
    total *= scale
    if AVG:
        total += (tl.load(grad_avg + n * C + c, mask=c < C, other=0.0) / P)[None, :]
    if FOREGROUND:
        inside = tl.load(mask + n * P + p, mask=p < P, other=0).to(tl.float32)
        share = tl.load(grad_foreground + n * C + c, mask=c < C, other=0.0) / P
        total += inside[:, None] * share[None, :]
    tl.store(
        dimg + n * C * P + p[:, None] * stride_p + c[None, :] * stride_c, total.to(dimg.dtype.element_ty),
        mask=(p[:, None] < P) & (c[None, :] < C),
    )  # fmt: skip


@triton.jit
def audio_gradient_kernel(
    img, grad_logits, argmax, grad_maps, daud, N, M, C, P, stride_c, stride_p, scale,
    LOGITS: tl.constexpr, MAPS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_M sounds by BLOCK_C channels of the sounds' gradient."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if LOGITS:
        for n in range(0, N):
            row = tl.cast(n, tl.int64)
            grad = tl.load(grad_logits + row * M + m, mask=m < M, other=0.0)
            cell = tl.load(argmax + row * M + m, mask=m < M, other=0).to(tl.int32)
            for p0 in range(0, P, BLOCK_P):
                p = p0 + tl.arange(0, BLOCK_P)
                weights = tl.where(cell[:, None] == p[None, :], grad[:, None], 0.0)
                cells = tl.load(
                    img + row * C * P + p[:, None] * stride_p + c[None, :] * stride_c,
                    mask=(p[:, None] < P) & (c[None, :] < C), other=0.0,
                )  # fmt: skip
                total = tl.dot(weights, cells.to(tl.float32), total, input_precision=PRECISION)
    if MAPS:
        for p in range(0, P):
            cells = tl.load(
                img + m[:, None].to(tl.int64) * C * P + p * stride_p + c[None, :] * stride_c,
                mask=(m[:, None] < M) & (c[None, :] < C), other=0.0,
            )  # fmt: skip
            grad = tl.load(grad_maps + m.to(tl.int64) * P + p, mask=m < M, other=0.0)
            total += grad[:, None] * cells.to(tl.float32)
    tl.store(
        daud + m[:, None].to(tl.int64) * C + c[None, :], (total * scale).to(daud.dtype.element_ty),
        mask=(m[:, None] < M) & (c[None, :] < C),
    )  # fmt: skip


def feature_backward(
    img: Tensor,
    aud: Tensor | None,
    tau: float,
    *,
    grad_logits: Tensor | None,
    argmax: Tensor | None,
    grad_maps: Tensor | None,
    mask: Tensor | None,
    grad_avg: Tensor | None,
    grad_foreground: Tensor | None,
    need_img: bool,
    need_aud: bool,
) -> tuple[Tensor | None, Tensor | None]:
    n, c, h, w = img.shape
    cells, strides = h * w, image_strides(img)
    m = 0 if aud is None else aud.shape[0]
    sources = {"LOGITS": grad_logits is not None, "MAPS": grad_maps is not None}
    dimg = torch.empty_like(img) if need_img else None
    daud = torch.empty_like(aud) if need_aud and aud is not None else None
    with on(img):
        if dimg is not None:
            blocks = tuning.image_gradient(cells)
            grid = (n, triton.cdiv(cells, blocks.sizes["BLOCK_P"]), triton.cdiv(c, blocks.sizes["BLOCK_C"]))
            run(
                image_gradient_kernel, grid, aud, grad_logits, argmax, grad_maps,
                None if mask is None else mask.view(torch.int8), grad_avg, grad_foreground, dimg,
                m, c, cells, *strides, 1 / tau, **sources, AVG=grad_avg is not None,
                FOREGROUND=grad_foreground is not None, PRECISION=precision(img.dtype), **blocks.options,
            )  # fmt: skip
        if daud is not None:
            blocks = tuning.audio_gradient(cells)
            tiles = (triton.cdiv(m, blocks.sizes["BLOCK_M"]), triton.cdiv(c, blocks.sizes["BLOCK_C"]))
            run(
                audio_gradient_kernel, tiles, img, grad_logits, argmax, grad_maps, daud, n, m, c, cells, *strides,
                1 / tau, **sources, PRECISION=precision(img.dtype), **blocks.options,
            )  # fmt: skip
    return dimg, daud
