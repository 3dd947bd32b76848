"""Tiles of the N x N matrices that the adjacency terms compare: made where they are needed, never kept.

A, F and I are symmetric, so one tile of them serves two tiles of the terms: with AXIS 1 its rows (``n``) are the rows
of the softmax, with AXIS 0 its columns (``m``) are. Of L both tiles are read, the second one transposed.

``row_stats`` is kept as planes of N values, because tiles read it by plane: of the rows of A, F, I, L, and of L
without the masked pairs, (maximum, inverse of the sum of exponentials), because a log-sum-exp costs the softmax digits;
then the row sums of s1 P_A, s2 P_A, s2 P_F, s3 P_I, s1 P_L, s3 P_L with s1 = sign(P_A - P_L), s2 = sign(P_A - P_F),
s3 = sign(P_I - P_L). Source: the formulas in ``fnac_kernels/README.md``.
"""

from __future__ import annotations

from ctypes import c_float

import torch
import triton
import triton.language as tl

from fnac_kernels.backends.triton.launch import Constant
from fnac_kernels.backends.triton.products import add_product

ROW_STATS = 16
LSE_A, LSE_F, LSE_I, LSE_L, LSE_KEPT, S1A, S2A, S2F, S3I, S1L, S3L = map(Constant, (0, 2, 4, 6, 8, *range(10, 16)))
#: How far rounding may move a float32 logit, of its size: products of float32, and of 16-bit features' means in parts.
EXACT, IN_PARTS = Constant(2.0**-21), Constant(2.0**-17)


@triton.jit
def rows_and_columns(program, BLOCK: tl.constexpr):
    """Block of rows i and of columns j >= i of a program: tile j(j+1)/2 + i."""
    j = ((tl.sqrt(8.0 * program + 1.0) - 1.0) / 2.0).to(tl.int32)
    # A float32 root may be one off.
    j = tl.where(j * (j + 1) // 2 > program, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= program, j + 1, j)
    i = program - j * (j + 1) // 2
    return i, j, i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def add_gram(total, x, y, n, m, N, C, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr):
    """``total + <x[n], y[m]>`` of a tile; beyond the last row that one is repeated."""
    c = tl.arange(0, BLOCK_C)
    rows_at = x + tl.minimum(n, N - 1)[:, None].to(tl.int64) * C + c[None, :]
    columns_at = y + tl.minimum(m, N - 1)[None, :].to(tl.int64) * C + c[:, None]
    for c0 in range(0, C, BLOCK_C):
        rows = tl.load(rows_at, mask=c[None, :] < C - c0, other=0.0)
        columns = tl.load(columns_at, mask=c[:, None] < C - c0, other=0.0)
        total = add_product(total, rows, columns, PRECISION)
        rows_at += BLOCK_C
        columns_at += BLOCK_C
    return total


@triton.jit
def gram(
    x, n, m, N, C, scale, PARTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """``<x[n], x[m]> * scale`` of a tile, x ``(PARTS, N, C)``; -inf beyond the matrix, so that its exp is 0."""
    total = tl.zeros((n.shape[0], m.shape[0]), tl.float32)
    if PARTS == 2:
        low = x + tl.cast(N, tl.int64) * C
        total = add_gram(total, low, x, n, m, N, C, PRECISION, BLOCK_C)
        total = add_gram(total, x, low, n, m, N, C, PRECISION, BLOCK_C)
    total = add_gram(total, x, x, n, m, N, C, PRECISION, BLOCK_C)
    return tl.where((n[:, None] < N) & (m[None, :] < N), total * scale, float("-inf"))


@triton.jit
def tile_at(x, n0, m0, N, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where the tile of ``x (.., N)`` from row n0 and column m0 on lies.

    One 64-bit address and 32-bit offsets, which all tiles share: with 64-bit ones for each of them kernels spill.
    """
    inside = tl.arange(0, BLOCK_N)[:, None] * N + tl.arange(0, BLOCK_M)[None, :]
    return x + (tl.cast(n0, tl.int64) * N + m0) + inside


@triton.jit
def within(rows, columns, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """What of a tile is among the first ``rows`` and ``columns``."""
    return (tl.arange(0, BLOCK_N)[:, None] < rows) & (tl.arange(0, BLOCK_M)[None, :] < columns)


@triton.jit
def logit_tile(logits, n0, m0, N, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """``logits[n, m]`` of the tile from (n0, m0) on; -inf beyond the matrix."""
    inside = within(N - n0, N - m0, BLOCK_N, BLOCK_M)
    return tl.load(tile_at(logits, n0, m0, N, BLOCK_N, BLOCK_M), mask=inside, other=float("-inf"))


@triton.jit
def along(vector, AXIS: tl.constexpr):
    """A value per row of the softmax, laid out along the tile."""
    return vector[:, None] if AXIS == 1 else vector[None, :]


@triton.jit
def stat(stats, row0, N, COLUMN: tl.constexpr, BLOCK: tl.constexpr, AXIS: tl.constexpr):
    block = tl.arange(0, BLOCK)
    return along(tl.load(stats + (COLUMN * N + row0) + block, mask=block < N - row0, other=0.0), AXIS)


@triton.jit
def softmax(tile, stats, row0, N, COLUMN: tl.constexpr, AXIS: tl.constexpr):
    """The row softmax of a tile whose rows are ``row0`` and the following.

    A tile that is made again, with other roundings, may exceed the maximum; of large values by much.
    """
    BLOCK: tl.constexpr = tile.shape[1 - AXIS]
    x = tile - stat(stats, row0, N, COLUMN, BLOCK, AXIS)
    return tl.exp(tl.where(x > 0, 0.0, x)) * stat(stats, row0, N, COLUMN + 1, BLOCK, AXIS)


@triton.jit
def sign_of_difference(x, y, px, py, ROUNDING: tl.constexpr, BOTH: tl.constexpr):
    """``sign(px - py)`` of the softmaxes of x and y, 0 where rounding may have decided it; never NaN.

    y is read, not made again, and has no rounding of its own, unless BOTH are made.

    The backward makes the tiles again, with other roundings than the forward. A sign that is not the one that the row
    sums were made with leaves in the gradient what should cancel: of two equal pairs half a row. So what is within
    ROUNDING of the logits' size counts as equal, forward and backward. Of the smaller softmax: one of 0 is 0 however
    large its logit, and of a logit of -inf the product is NaN, within which is nothing.
    """
    d = px - py
    size = tl.abs(x)
    if BOTH:
        size += tl.abs(y)
    within = ROUNDING * size * tl.minimum(px, py)
    return tl.where(tl.abs(d) <= within, 0.0, tl.where(d > 0, 1.0, -1.0))


@triton.jit
def leaves_denominators(a, n, m, threshold):
    """Pairs whose sounds are so alike (``a``, scaled like the threshold) that they count as false negatives."""
    return (a >= threshold) & (n[:, None] != m[None, :])


def flags(weights: tuple[float, ...], adjacency_threshold: float | None) -> dict[str, bool]:
    """Which terms are wanted, as the kernels' constants."""
    nce, s1, s2, s3 = (weight != 0 for weight in weights)
    return {"NCE": nce, "S1": s1, "S2": s2, "S3": s3, "MASKED": nce and adjacency_threshold is not None}


def scaled_threshold(adjacency_threshold: float | None, tau: float) -> float:
    """The threshold on the audio adjacency matrix, divided by tau and rounded as that is, for pairs at it."""
    return 0.0 if adjacency_threshold is None else c_float(adjacency_threshold).value * c_float(1 / tau).value


def floats(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
