"""Gradients of the contrastive and adjacency terms: dL, and ``(dX + dX') x / tau`` for X of A, F, I.

The symmetric weights ``dX + dX'`` of a range of rows are written down, so that A, F and I are made once for all that
needs them, and then multiplied with the features. The range is as large as two bytes per pair allow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fnac_kernels.backends.triton import tuning
from fnac_kernels.backends.triton.adjacency_tiles import (
    LSE_A,
    LSE_F,
    LSE_I,
    LSE_KEPT,
    LSE_L,
    S1A,
    S1L,
    S2A,
    S2F,
    S3I,
    S3L,
    flags,
    floats,
    gram,
    leaves_denominators,
    logit_tile,
    scaled_threshold,
    sign,
    softmax,
    stat,
)  # fmt: skip
from fnac_kernels.backends.triton.launch import on, precision, run
from fnac_kernels.backends.triton.products import add_product


@triton.jit
def term_gradient(grad_loss, grad_terms, weight, TERM: tl.constexpr, LOSS: tl.constexpr, TERMS: tl.constexpr):
    """The gradient that reaches a wanted term, from the loss and directly."""
    gradient = 0.0
    if LOSS:
        gradient += tl.load(grad_loss) * weight
    if TERMS:
        gradient += tl.load(grad_terms + TERM)
    return gradient


@triton.jit
def difference_gradients(
    x, y, stats, row, N, g,
    X: tl.constexpr, Y: tl.constexpr, SX: tl.constexpr, SY: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """What the sum of ``|P_X - P_Y|``, with gradient g, gives to a tile of X and of Y."""
    px = softmax(x, stats, row, N, X, AXIS)
    py = softmax(y, stats, row, N, Y, AXIS)
    s = sign(px - py)
    return g * px * (s - stat(stats, row, N, SX, AXIS)), g * py * (stat(stats, row, N, SY, AXIS) - s)


@triton.jit(do_not_specialize=["row0", "rows", "N"])
def weights_kernel(
    grad_loss, grad_terms, w0, w1, w2, w3, logits, aud, avg, fore, stats, col_lse, dlogits, pair_weights,
    row0, rows, N, C, scale, threshold,
    LOSS: tl.constexpr, TERMS: tl.constexpr,
    NCE: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of dL and of ``pair_weights (3, rows, N)``: dA + dA', dF + dF', dI + dI' in rows row0 .. row0 + rows."""
    column_blocks = tl.cdiv(N, BLOCK)
    k = tl.program_id(0) // column_blocks * BLOCK + tl.arange(0, BLOCK)
    n = row0 + k
    m = tl.program_id(0) % column_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = (k[:, None] < rows) & (m[None, :] < N)
    if S1 or S2 or S3:
        out = pair_weights + k[:, None].to(tl.int64) * N + m[None, :]
        plane = tl.cast(rows, tl.int64) * N
    # Visual, audio, foreground in this order, so that at most three tiles are alive while the next one is made.
    logit = logit_tile(logits, n, m, N, 1)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    weights = total
    if S1 or S3:
        transposed = logit_tile(logits, n, m, N, 0)
    if S3:
        g3 = term_gradient(grad_loss, grad_terms, w3, 3, LOSS, TERMS) / N / N
        v = gram(avg, n, m, N, C, scale, PRECISION, BLOCK, BLOCK_C)
        weights, total = difference_gradients(v, logit, stats, n, N, g3, LSE_I, LSE_L, S3I, S3L, 1)
        more, _ = difference_gradients(v, transposed, stats, m, N, g3, LSE_I, LSE_L, S3I, S3L, 0)
        tl.store(out + 2 * plane, weights + more, mask=inside)
    if S1 or S2 or MASKED:
        a = gram(aud, n, m, N, C, scale, PRECISION, BLOCK, BLOCK_C)
    if S1:
        g1 = term_gradient(grad_loss, grad_terms, w1, 1, LOSS, TERMS) / N / N
        weights, more = difference_gradients(a, logit, stats, n, N, g1, LSE_A, LSE_L, S1A, S1L, 1)
        total += more
        more, _ = difference_gradients(a, transposed, stats, m, N, g1, LSE_A, LSE_L, S1A, S1L, 0)
        weights += more
    if NCE:
        g0 = term_gradient(grad_loss, grad_terms, w0, 0, LOSS, TERMS) / N
        lse = tl.load(col_lse + m, mask=m < N, other=0.0)
        both = softmax(logit, stats, n, N, LSE_KEPT, 1) + tl.exp(logit - lse[None, :])
        if MASKED:
            both = tl.where(leaves_denominators(a, n, m, threshold), 0.0, both)
        total += g0 * (both - tl.where(n[:, None] == m[None, :], 2.0, 0.0))
    tl.store(dlogits + n[:, None].to(tl.int64) * N + m[None, :], total, mask=inside)
    if S2:
        g2 = term_gradient(grad_loss, grad_terms, w2, 2, LOSS, TERMS) / N / N
        f = gram(fore, n, m, N, C, scale, PRECISION, BLOCK, BLOCK_C)
        da, df = difference_gradients(a, f, stats, n, N, g2, LSE_A, LSE_F, S2A, S2F, 1)
        da_transposed, df_transposed = difference_gradients(a, f, stats, m, N, g2, LSE_A, LSE_F, S2A, S2F, 0)
        tl.store(out + plane, df + df_transposed, mask=inside)
        da += da_transposed
        weights = weights + da if S1 else da
    if S1 or S2:
        tl.store(out, weights, mask=inside)


@triton.jit
def weighted_features(
    pair_weights, x, out, k, c, rows, N, C, scale, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out[k, c] = scale * sum over m of pair_weights[k, m] x[m, c]``."""
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for m0 in range(0, N, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        tile = tl.load(
            pair_weights + k[:, None].to(tl.int64) * N + m[None, :], mask=(k[:, None] < rows) & (m[None, :] < N),
            other=0.0,
        )  # fmt: skip
        features = tl.load(
            x + m[:, None].to(tl.int64) * C + c[None, :], mask=(m[:, None] < N) & (c[None, :] < C), other=0.0
        )
        total = add_product(total, tile, features, PRECISION)
    tl.store(out + k[:, None].to(tl.int64) * C + c[None, :], total * scale, mask=(k[:, None] < rows) & (c[None, :] < C))


@triton.jit(do_not_specialize=["row0", "rows", "N"])
def features_kernel(
    pair_weights, aud, avg, fore, daud, davg, dfore, row0, rows, N, C, scale,
    S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows row0 .. row0 + rows of the gradients of aud, foreground and img_avg: one after the other in the grid."""
    k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    which = tl.program_id(2)
    first = tl.cast(row0, tl.int64) * C
    plane = tl.cast(rows, tl.int64) * N
    if which == 0:
        if S1 or S2:
            weighted_features(
                pair_weights, aud, daud + first, k, c, rows, N, C, scale, PRECISION, BLOCK_N, BLOCK_M, BLOCK_C
            )
    elif which == 1:
        if S2:
            weighted_features(
                pair_weights + plane, fore, dfore + first, k, c, rows, N, C, scale,
                PRECISION, BLOCK_N, BLOCK_M, BLOCK_C,
            )  # fmt: skip
    else:
        if S3:
            weighted_features(
                pair_weights + 2 * plane, avg, davg + first, k, c, rows, N, C, scale,
                PRECISION, BLOCK_N, BLOCK_M, BLOCK_C,
            )  # fmt: skip


def rows_at_a_time(n: int) -> int:
    """Rows whose three weights of four bytes take two bytes per pair of the batch: a sixth. A small batch has all its
    rows done at once, for the sake of few launches.
    """
    return n if n <= 1024 else n // 6


def adjacency_backward(
    grad_loss: Tensor | None,
    grad_terms: Tensor | None,
    logits: Tensor,
    aud: Tensor,
    img_avg: Tensor,
    foreground: Tensor,
    row_stats: Tensor,
    col_lse: Tensor,
    tau: float,
    weights: tuple[float, ...],
    adjacency_threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c = aud.shape
    wanted = flags(weights, adjacency_threshold)
    distances = {name: wanted[name] for name in ("S1", "S2", "S3")}
    dlogits = torch.empty_like(logits)
    daud, davg, dforeground = (
        torch.empty_like(x) if reached else torch.zeros_like(x)
        for x, reached in (
            (aud, wanted["S1"] or wanted["S2"]),
            (img_avg, wanted["S3"]),
            (foreground, wanted["S2"]),
        )
    )
    product = {"PRECISION": precision(torch.float32)}
    pairs, features = tuning.adjacency_weights(logits), tuning.adjacency_features(logits)
    any_distance = any(distances.values())
    rows = rows_at_a_time(n) if any_distance else n
    pair_weights = floats(logits, 3, rows, n) if any_distance else None
    with on(logits):
        for row0 in range(0, n, rows):
            count = min(rows, n - row0)
            run(
                weights_kernel, (triton.cdiv(count, pairs.sizes["BLOCK"]) * triton.cdiv(n, pairs.sizes["BLOCK"]),),
                grad_loss, grad_terms, *map(float, weights), logits, aud, img_avg, foreground, row_stats, col_lse,
                dlogits, pair_weights, row0, count, n, c, 1 / tau, scaled_threshold(adjacency_threshold, tau),
                LOSS=grad_loss is not None, TERMS=grad_terms is not None, **wanted, **product, **pairs.options,
            )  # fmt: skip
            if any_distance:
                tiles = (triton.cdiv(count, features.sizes["BLOCK_N"]), triton.cdiv(c, features.sizes["BLOCK_C"]))
                run(
                    features_kernel, (*tiles, 3), pair_weights, aud, img_avg, foreground, daud, davg, dforeground,
                    row0, count, n, c, 1 / tau, **distances, **product, **features.options,
                )  # fmt: skip
    return dlogits, daud, davg, dforeground
