"""The gradient of the image features: every gradient of a tile meets in one write.

Each pair touches one cell. A one-hot weight tile, built in registers from argmax and gradient, is multiplied with the
sounds on the tensor cores; the other way, a row of aud gathered for each pair, moves as many bytes through the L2
cache as this does with one image a program, and needs the pairs sorted by cell.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fnac_kernels._native import image_strides
from fnac_kernels.backends.triton import sweep, tuning
from fnac_kernels.backends.triton.launch import run
from fnac_kernels.backends.triton.one_hot import one_hot, one_hot_products
from fnac_kernels.backends.triton.products import add_product


@triton.jit
def of_images(x, first, second, column, width, upper, IMAGES: tl.constexpr):
    """Row ``first`` of ``x (N, width)``; where not upper, row ``second``."""
    value = tl.load(x + first * width + column, mask=column < width, other=0)[None, :]
    if IMAGES == 2:
        value = tl.where(upper, value, tl.load(x + second * width + column, mask=column < width, other=0)[None, :])
    return value


@triton.jit(do_not_specialize=["N", "M", "P"])
def image_gradient_kernel(
    aud, grad_logits, argmax, grad_maps, mask, grad_avg, grad_foreground, dimg, N, M, C, P, stride_c, stride_p, scale,
    LOGITS: tl.constexpr, MAPS: tl.constexpr, AVG: tl.constexpr, FOREGROUND: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    IMAGES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_P cells of one or two images by BLOCK_C channels.

    Two images share every tile of sounds that is read: at 7x7 half the traffic, which would be the limit.
    """
    # Blocks of channels are next to each other: they read the same pairs.
    channel_blocks = tl.cdiv(C, BLOCK_C)
    cell_blocks = tl.cdiv(P, BLOCK_P)
    program = tl.program_id(0)
    c = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    program //= channel_blocks
    first = (program // cell_blocks * IMAGES).to(tl.int64)
    second = tl.minimum(first + IMAGES - 1, N - 1)
    row = tl.arange(0, IMAGES * BLOCK_P)
    p = program % cell_blocks * BLOCK_P + row % BLOCK_P
    upper = (row < BLOCK_P)[:, None]
    n = first + row // BLOCK_P
    inside = (p < P) & (n < N)
    # What the pairs' own maps and means give comes first, while no accumulator is alive yet.
    total = tl.zeros((IMAGES * BLOCK_P, BLOCK_C), tl.float32)
    if MAPS:
        sound = of_images(aud, first, second, c, C, upper, IMAGES).to(tl.float32)
        total += tl.load(grad_maps + n * P + p, mask=inside, other=0.0)[:, None] * sound * scale
    if AVG:
        total += of_images(grad_avg, first, second, c, C, upper, IMAGES) / P
    if FOREGROUND:
        share = of_images(grad_foreground, first, second, c, C, upper, IMAGES) / P
        total += tl.load(mask + n * P + p, mask=inside, other=0).to(tl.float32)[:, None] * share
    if LOGITS:
        for m0 in range(0, M, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            grad = of_images(grad_logits, first, second, m, M, upper, IMAGES) * scale
            cell = of_images(argmax, first, second, m, M, upper, IMAGES).to(tl.int32)
            weights = one_hot(cell, grad, p[:, None], PRODUCT)
            sounds = tl.load(
                aud + m[:, None].to(tl.int64) * C + c[None, :], mask=(m[:, None] < M) & (c[None, :] < C), other=0.0
            ).to(PRODUCT)
            total = add_product(total, weights, sounds, PRECISION)
    tl.store(
        dimg + n[:, None] * C * P + p[:, None] * stride_p + c[None, :] * stride_c, total.to(dimg.dtype.element_ty),
        mask=inside[:, None] & (c[None, :] < C),
    )  # fmt: skip


def image_gradient(
    img: Tensor,
    aud: Tensor | None,
    tau: float,
    grad_logits: Tensor | None,
    argmax: Tensor | None,
    grad_maps: Tensor | None,
    mask: Tensor | None,
    grad_avg: Tensor | None,
    grad_foreground: Tensor | None,
) -> Tensor:
    n, c, h, w = img.shape
    m, cells = 0 if aud is None else aud.shape[0], h * w
    dimg = torch.empty_like(img)

    def launch(blocks: tuning.Blocks) -> None:
        sizes = blocks.sizes
        programs = (
            triton.cdiv(n, sizes["IMAGES"]) * triton.cdiv(cells, sizes["BLOCK_P"]) * triton.cdiv(c, sizes["BLOCK_C"])
        )
        run(
            image_gradient_kernel, (programs,), aud, grad_logits, argmax, grad_maps,
            None if mask is None else mask.view(torch.int8), grad_avg, grad_foreground, dimg,
            n, m, c, cells, *image_strides(img), 1 / tau,
            LOGITS=grad_logits is not None, MAPS=grad_maps is not None, AVG=grad_avg is not None,
            FOREGROUND=grad_foreground is not None, **one_hot_products(img.dtype), **blocks.options,
        )  # fmt: skip

    launch(sweep.chosen("image_gradient", sweep.shape_class(img, m), tuning.image_gradient(img, n, cells), launch))
    return dimg
