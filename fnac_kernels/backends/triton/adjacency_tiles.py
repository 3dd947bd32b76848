"""Tiles of the N x N matrices that the adjacency terms compare: made where they are needed, never kept.

A, F and I are symmetric, so one tile of them serves two tiles of the terms: with AXIS 1 its rows (``n``) are the rows
of the softmax, with AXIS 0 its columns (``m``) are. Of L both tiles are read, the second one transposed.

``row_stats`` is kept as planes of N values, because tiles read it by plane: log-sum-exps of A, F, I, L, and of L
without the masked pairs, each as (maximum, log of the sum), because their float32 sum would cost the softmax two
digits; then the row sums of s1 P_A, s2 P_A, s2 P_F, s3 P_I, s1 P_L, s3 P_L with s1 = sign(P_A - P_L),
s2 = sign(P_A - P_F), s3 = sign(P_I - P_L). Source: the formulas in ``fnac_kernels/README.md``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fnac_kernels.backends.triton.products import add_product

ROW_STATS = 16
LSE_A, LSE_F, LSE_I, LSE_L, LSE_KEPT = (tl.constexpr(column) for column in (0, 2, 4, 6, 8))
S1A, S2A, S2F, S3I, S1L, S3L = (tl.constexpr(column) for column in range(10, 16))


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
def gram(x, n, m, N, C, scale, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """``<x[n], x[m]> * scale`` of a tile; -inf beyond the matrix, so that its exp is 0."""
    c = tl.arange(0, BLOCK_C)
    rows_at = x + tl.minimum(n, N - 1)[:, None].to(tl.int64) * C + c[None, :]
    columns_at = x + tl.minimum(m, N - 1)[None, :].to(tl.int64) * C + c[:, None]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        rows = tl.load(rows_at, mask=c[None, :] < C - c0, other=0.0)
        columns = tl.load(columns_at, mask=c[:, None] < C - c0, other=0.0)
        total = add_product(total, rows, columns, PRECISION)
        rows_at += BLOCK_C
        columns_at += BLOCK_C
    return tl.where((n[:, None] < N) & (m[None, :] < N), total * scale, float("-inf"))


@triton.jit
def logit_tile(logits, n, m, N, AXIS: tl.constexpr):
    """``logits[n, m]`` or, for AXIS 0, ``logits[m, n]`` at ``(n, m)``; -inf beyond the matrix."""
    row, column = n[:, None].to(tl.int64), m[None, :].to(tl.int64)
    at = row * N + column if AXIS == 1 else column * N + row
    return tl.load(logits + at, mask=(row < N) & (column < N), other=float("-inf"))


@triton.jit
def along(vector, AXIS: tl.constexpr):
    """A value per row of the softmax, laid out along the tile."""
    return vector[:, None] if AXIS == 1 else vector[None, :]


@triton.jit
def stat(stats, row, N, COLUMN: tl.constexpr, AXIS: tl.constexpr):
    return along(tl.load(stats + COLUMN * N + row, mask=row < N, other=0.0), AXIS)


@triton.jit
def softmax(tile, stats, row, N, COLUMN: tl.constexpr, AXIS: tl.constexpr):
    """The row softmax of a tile whose rows are ``row``."""
    return tl.exp(tile - stat(stats, row, N, COLUMN, AXIS) - stat(stats, row, N, COLUMN + 1, AXIS))


@triton.jit
def sign(x):
    """-1, 0 or 1; NaN stays NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def leaves_denominators(a, n, m, threshold):
    """Pairs whose sounds are so alike (``a``, scaled like the threshold) that they count as false negatives."""
    return (a >= threshold) & (n[:, None] != m[None, :])


def flags(weights: tuple[float, ...], adjacency_threshold: float | None) -> dict[str, bool]:
    """Which terms are wanted, as the kernels' constants."""
    nce, s1, s2, s3 = (weight != 0 for weight in weights)
    return {"NCE": nce, "S1": s1, "S2": s2, "S3": s3, "MASKED": nce and adjacency_threshold is not None}


def scaled_threshold(adjacency_threshold: float | None, tau: float) -> float:
    """The threshold on the audio adjacency matrix, which is divided by tau."""
    return 0.0 if adjacency_threshold is None else adjacency_threshold / tau


def floats(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
