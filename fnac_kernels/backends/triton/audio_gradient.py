"""The gradient of the audio embeddings, in two kernels: shares of ranges of images, and their sum in order.

For each image a pair touches one cell. Of bfloat16 features with maps up to GATHER_CELLS, one-hot weights built in
registers are multiplied with the image's cells on the tensor cores; else each pair's cell is gathered, a row of
channels, and added with an FMA: N*M*C elements are read through the L2 cache whatever the size of the map. (float32
would need three products of half the rate, float16 one: its range does not hold the gradients.)
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
from fnac_kernels.backends.triton.rows import cells_as_rows

#: Counted: products of 2*64*ceil(P/64) flop a pair and channel at 600 TFLOP/s, against 2 bytes at 5 TB/s.
GATHER_CELLS = 128
#: Bytes of channels_last copies alive at a time, as far as four pieces do it: each piece has shares of its own.
LARGEST_COPY = 128 * 2**20
#: Up to so many images one copy and one launch do: there few launches count for more than the copy's memory.
ONE_COPY = 256


@triton.jit(do_not_specialize=["N", "M", "P", "images"])
def audio_share_kernel(
    img, grad_logits, argmax, shares, N, M, C, P, images,
    GATHER: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What ``images`` images in a row give to BLOCK_M sounds by BLOCK_C channels; ``img`` is ``(N, P, C)``."""
    channel_blocks = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.program_id(0) // channel_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for n in range(split * images, tl.minimum((split + 1) * images, N)):
        row = tl.cast(n, tl.int64)
        grad = tl.load(grad_logits + row * M + m, mask=m < M, other=0.0)
        cell = tl.load(argmax + row * M + m, mask=m < M, other=0).to(tl.int32)
        image = img + row * P * C
        if GATHER:
            cells = tl.load(image + cell[:, None] * C + c[None, :], mask=c[None, :] < C, other=0.0)
            total += grad[:, None] * cells.to(tl.float32)
        else:
            for p0 in range(0, P, BLOCK_P):
                p = p0 + tl.arange(0, BLOCK_P)
                # Sounds along the fast axis, where a thread holds few of them, and transposed afterwards.
                weights = tl.trans(one_hot(cell[None, :], grad[None, :], p[:, None], PRODUCT))
                cells = tl.load(
                    image + p[:, None] * C + c[None, :], mask=(p[:, None] < P) & (c[None, :] < C), other=0.0
                ).to(PRODUCT)
                total = add_product(total, weights, cells, PRECISION)
    out = (split.to(tl.int64) * M + m[:, None]) * C + c[None, :]
    tl.store(shares + out, total, mask=(m[:, None] < M) & (c[None, :] < C))


@triton.jit(do_not_specialize=["splits", "M", "P"])
def audio_gradient_kernel(
    shares, img, grad_maps, grad_aud, daud, splits, M, C, P, stride_c, stride_p, scale,
    MAPS: tl.constexpr, AUD: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_C channels of one sound: its shares in order, and what comes through its own map and
    from elsewhere."""
    m = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for split in range(0, splits):
        total += tl.load(shares + (split * M + m) * C + c, mask=c < C, other=0.0)
    if MAPS:
        for p in range(0, P):
            cell = tl.load(img + m * P * C + p * stride_p + c * stride_c, mask=c < C, other=0.0)
            total += tl.load(grad_maps + m * P + p) * cell.to(tl.float32)
    total *= scale
    if AUD:
        total += tl.load(grad_aud + m * C + c, mask=c < C, other=0.0)
    tl.store(daud + m * C + c, total.to(daud.dtype.element_ty), mask=c < C)


def audio_gradient(
    img: Tensor,
    aud: Tensor,
    tau: float,
    grad_logits: Tensor | None,
    argmax: Tensor | None,
    grad_maps: Tensor | None,
    grad_aud: Tensor | None,
) -> Tensor:
    _, c, h, w = img.shape
    m, cells = aud.shape[0], h * w
    gather = img.dtype != torch.bfloat16 or cells > GATHER_CELLS

    def add_up(blocks: tuning.Blocks) -> Tensor:
        assert grad_logits is not None
        assert argmax is not None
        tiles = triton.cdiv(m, blocks.sizes["BLOCK_M"]) * triton.cdiv(c, blocks.sizes["BLOCK_C"])
        pieces = _pieces(img)
        splits = [tuning.splits(tiles, len(piece)) for piece in pieces]
        shares = torch.empty((sum(splits), m, c), dtype=torch.float32, device=img.device)
        images = [len(piece) for piece in pieces]
        grads, chosen = grad_logits.split(images), argmax.split(images)
        for piece, grad, cell, share in zip(pieces, grads, chosen, shares.split(splits), strict=True):
            run(
                audio_share_kernel, (tiles, len(share)), cells_as_rows(piece), grad, cell, share,
                len(piece), m, c, cells, triton.cdiv(len(piece), len(share)),
                GATHER=gather, **one_hot_products(img.dtype), **blocks.options,
            )  # fmt: skip
        return shares

    shares = torch.empty((0, m, c), dtype=torch.float32, device=img.device)
    if grad_logits is not None:
        blocks = tuning.audio_share(img, cells, gather)
        shares = add_up(sweep.chosen("audio_share", sweep.shape_class(img, m), blocks, add_up))
    daud = torch.empty_like(aud)
    blocks = tuning.audio_gradient()
    run(
        audio_gradient_kernel, (m, triton.cdiv(c, blocks.sizes["BLOCK_C"])), shares, img, grad_maps, grad_aud, daud,
        len(shares), m, c, cells, *image_strides(img), 1 / tau,
        MAPS=grad_maps is not None, AUD=grad_aud is not None, **blocks.options,
    )  # fmt: skip
    return daud


def _pieces(img: Tensor) -> tuple[Tensor, ...]:
    """``img``, or of a large one in NCHW up to four pieces, which are copied one after the other."""
    if len(img) <= ONE_COPY or img.is_contiguous(memory_format=torch.channels_last):
        return (img,)
    return img.tensor_split(min(4, len(img), triton.cdiv(img.nbytes, LARGEST_COPY)))
