"""Max-pooled logits: sounds times the cells of images on the tensor cores, maximum and first argmax on the fly.

Source: ``max over cells of <img[n, :, p], aud[m]> / tau`` (arXiv 2303.11302), see ``fnac_kernels.reference``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fnac_kernels.backends.triton import sweep, tuning
from fnac_kernels.backends.triton.launch import on_image, precision, run
from fnac_kernels.backends.triton.products import INTERPRETED, add_product
from fnac_kernels.backends.triton.rows import cells_as_rows


@triton.jit
def larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum_or_nan(x):
    """The maximum over the last axis of three; any NaN makes it NaN."""
    if INTERPRETED:  # it would call Python for every element
        has_nan = tl.max((x != x).to(tl.int32), axis=2) > 0
        return tl.where(has_nan, float("nan"), tl.max(tl.where(x != x, float("-inf"), x), axis=2))
    else:
        return tl.reduce(x, 2, larger_or_nan)


@triton.jit
def marked(wanted):
    """A sum of powers of 4 over the last axis of three, up to 64 long: one where ``wanted``, the largest for the first.

    What follows the first adds less than a third of it, so the exponent tells where that is (``first_marked``); 0 means
    nowhere. An element costs a comparison that gives 1.0 or 0.0 and an FMA, where a minimum of positions takes a
    comparison, a choice and a minimum, each at half an FMA's rate.
    """
    # A factor for each eight and one inside: a thread holds two of eight in every eight, so the first is an immediate.
    ones = tl.reshape(wanted, (wanted.shape[0], wanted.shape[1], wanted.shape[2] // 8, 8)).to(tl.float32)
    coarse = ((253 - 16 * tl.arange(0, wanted.shape[2] // 8)) << 23).to(tl.float32, bitcast=True)
    fine = ((127 - 2 * tl.arange(0, 8)) << 23).to(tl.float32, bitcast=True)
    return tl.sum(tl.sum(ones * coarse[None, None, :, None], axis=2) * fine[None, None, :], axis=2)


@triton.jit
def first_marked(total):
    return (253 - (total.to(tl.int32, bitcast=True) >> 23)) >> 1


@triton.jit
def tile_maximum(
    img, aud, n0, m, p0, N, M, C, P,
    PRECISION: tl.constexpr,
    IMAGES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Maximum and first argmax over WIDTH cells of each of IMAGES images: two ``(BLOCK_M, IMAGES)``.

    Sounds are the rows, so that a row's cells lie in four lanes and the maximum needs two shuffles. Beyond the last
    cell, image and sound the last one is repeated: it changes no maximum and needs no mask.
    """
    column = tl.arange(0, IMAGES * WIDTH)
    image = tl.minimum(n0 + column // WIDTH, N - 1)
    cell = tl.minimum(p0 + column % WIDTH, P - 1)
    c = tl.arange(0, BLOCK_C)
    sounds_at = aud + tl.minimum(m, M - 1)[:, None].to(tl.int64) * C + c[None, :]
    cells_at = img + (image.to(tl.int64) * P + cell)[None, :] * C + c[:, None]
    similarity = tl.zeros((BLOCK_M, IMAGES * WIDTH), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        sounds = tl.load(sounds_at, mask=c[None, :] < C - c0, other=0.0)
        cells = tl.load(cells_at, mask=c[:, None] < C - c0, other=0.0)
        similarity = add_product(similarity, sounds, cells, PRECISION)
        sounds_at += BLOCK_C
        cells_at += BLOCK_C
    similarity = tl.reshape(similarity, (BLOCK_M, IMAGES, WIDTH))
    top = maximum_or_nan(similarity)
    marks = marked(similarity == top[:, :, None])
    # Nothing equals a maximum that is NaN: only then are the NaN looked for.
    if tl.min(marks) == 0:
        marks = tl.where(marks == 0, marked(similarity != similarity), marks)
    return top, tl.minimum(p0 + first_marked(marks), P - 1)


@triton.jit
def keep_larger(best, index, top, first):
    """The maximum so far and its cell, after one more tile; the first NaN stays."""
    better = (best == best) & ((top > best) | (top != top))
    return tl.where(better, top, best), tl.where(better, first, index)


@triton.jit(do_not_specialize=["N", "M", "P"])
def max_logits_kernel(
    img, aud, logits, argmax, N, M, C, P, scale,
    PRECISION: tl.constexpr, FULL: tl.constexpr, TAIL: tl.constexpr, GROUP: tl.constexpr,
    IMAGES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M sounds and IMAGES images, cells in tiles of BLOCK_P (if FULL), the last of TAIL (if any)."""
    # Programs that run together share images and at most GROUP blocks of sounds, which stay in the L2 cache.
    program = tl.program_id(0)
    image_blocks = tl.cdiv(N, IMAGES)
    group = program // (GROUP * image_blocks)
    width = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP, GROUP)
    inside = program - group * GROUP * image_blocks
    n0 = inside // width * IMAGES
    m = (group * GROUP + inside % width) * BLOCK_M + tl.arange(0, BLOCK_M)

    best = tl.full((BLOCK_M, IMAGES), float("-inf"), tl.float32)
    index = tl.zeros((BLOCK_M, IMAGES), tl.int32)
    if FULL:
        for p0 in range(0, P - P % BLOCK_P if TAIL else P, BLOCK_P):
            top, first = tile_maximum(img, aud, n0, m, p0, N, M, C, P, PRECISION, IMAGES, BLOCK_P, BLOCK_M, BLOCK_C)
            best, index = keep_larger(best, index, top, first)
    if TAIL:
        p0 = P - P % BLOCK_P if FULL else 0
        top, first = tile_maximum(img, aud, n0, m, p0, N, M, C, P, PRECISION, IMAGES, TAIL, BLOCK_M, BLOCK_C)
        best, index = keep_larger(best, index, top, first)
    n = n0 + tl.arange(0, IMAGES)
    out = n[None, :].to(tl.int64) * M + m[:, None]
    inside = (n[None, :] < N) & (m[:, None] < M)
    tl.store(logits + out, best * scale, mask=inside)
    tl.store(argmax + out, index.to(argmax.dtype.element_ty), mask=inside)


def max_logits(img: Tensor, aud: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    n, c, h, w = img.shape
    m, cells = aud.shape[0], h * w
    logits = torch.empty((n, m), dtype=torch.float32, device=img.device)
    argmax = torch.empty((n, m), dtype=torch.uint8 if cells <= 256 else torch.uint16, device=img.device)

    def launch(blocks: tuning.Blocks) -> None:
        programs = triton.cdiv(n, blocks.sizes["IMAGES"]) * triton.cdiv(m, blocks.sizes["BLOCK_M"])
        run(
            max_logits_kernel, (programs,), rows, aud, logits, argmax, n, m, c, cells, 1 / tau,
            PRECISION=precision(img.dtype), **blocks.options,
        )  # fmt: skip

    with on_image(img):
        rows = cells_as_rows(img)
        launch(sweep.chosen("max_logits", sweep.shape_class(img, m), tuning.max_logits(img, n, m, cells), launch))
    return logits, argmax
