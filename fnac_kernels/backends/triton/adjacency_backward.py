"""Gradients of the contrastive and adjacency terms: dL, and ``(dX + dX') x / tau`` for X of A, F, I.

The symmetric weights ``dX + dX'`` of a range of rows are written down, so that A, F and I are made once for all that
needs them, and then multiplied with the features. The range is as large as two bytes per pair allow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fnac_kernels.backends.triton import sweep, tuning
from fnac_kernels.backends.triton.adjacency_tiles import (
    EXACT,
    IN_PARTS,
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
    gram,
    leaves_denominators,
    logit_tile,
    scaled_threshold,
    sign_of_difference,
    softmax,
    stat,
    tile_at,
    within,
)  # fmt: skip
from fnac_kernels.backends.triton.launch import on, run
from fnac_kernels.backends.triton.parts import parts
from fnac_kernels.backends.triton.products import add_product, halves


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
    x, y, stats, row0, N, g,
    X: tl.constexpr, Y: tl.constexpr, SX: tl.constexpr, SY: tl.constexpr, ROUNDING: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """What the sum of ``|P_X - P_Y|``, with gradient g, gives to a tile of X and of Y."""
    px = softmax(x, stats, row0, N, X, AXIS)
    py = softmax(y, stats, row0, N, Y, AXIS)
    BLOCK: tl.constexpr = x.shape[1 - AXIS]
    s = sign_of_difference(x, y, px, py, ROUNDING, Y != LSE_L)
    return g * px * (s - stat(stats, row0, N, SX, BLOCK, AXIS)), g * py * (stat(stats, row0, N, SY, BLOCK, AXIS) - s)


@triton.jit
def put_weights(
    pair_weights, which, value, k0, m0, rows, width,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A tile of the weights ``which``, of ``pair_weights (3, PARTS, rows, width)``."""
    inside = within(rows - k0, width - m0, BLOCK_N, BLOCK_M)
    plane = tl.cast(rows, tl.int64) * width
    out = pair_weights + which * PARTS * plane
    if PARTS == 2:
        high, low = halves(value)
        tl.store(tile_at(out, k0, m0, width, BLOCK_N, BLOCK_M), high, mask=inside)
        tl.store(tile_at(out + plane, k0, m0, width, BLOCK_N, BLOCK_M), low, mask=inside)
    else:
        tl.store(tile_at(out, k0, m0, width, BLOCK_N, BLOCK_M), value, mask=inside)


@triton.jit(do_not_specialize=["row0", "rows"])
def weights_kernel(
    grad_loss, grad_terms, w0, w1, w2, w3, logits, aud, avg, fore, stats, col_lse, dlogits, pair_weights,
    row0, rows, N, width, C, scale, threshold,
    LOSS: tl.constexpr, TERMS: tl.constexpr,
    NCE: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr, MASKED: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of dL and of dI + dI' or, in the second half of the grid, of dA + dA' and dF + dF'; rows from row0 on.

    A is made in both halves: a program that keeps all of them spills.
    """
    MEANS: tl.constexpr = EXACT if PARTS == 1 else IN_PARTS
    column_blocks = tl.cdiv(N, BLOCK_M)
    k0 = tl.program_id(0) // column_blocks * BLOCK_N
    n0, m0 = row0 + k0, tl.program_id(0) % column_blocks * BLOCK_M
    n, m = n0 + tl.arange(0, BLOCK_N), m0 + tl.arange(0, BLOCK_M)
    if (S1 or S2) or MASKED:  # Triton 3.2 takes no chains
        a = gram(aud, n, m, N, C, scale, 1, PRECISION, BLOCK_C)
    if S1:
        g1 = term_gradient(grad_loss, grad_terms, w1, 1, LOSS, TERMS) / N / N
    if tl.program_id(1) == 0:
        logit = logit_tile(logits, n0, m0, N, BLOCK_N, BLOCK_M)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if S1:
            _, total = difference_gradients(a, logit, stats, n0, N, g1, LSE_A, LSE_L, S1A, S1L, EXACT, 1)
        if NCE:
            g0 = term_gradient(grad_loss, grad_terms, w0, 0, LOSS, TERMS) / N
            high = tl.load(col_lse + m, mask=m < N, other=0.0)
            inverse = tl.load(col_lse + N + m, mask=m < N, other=0.0)
            by_column = tl.exp(logit - high[None, :]) * inverse[None, :]
            both = softmax(logit, stats, n0, N, LSE_KEPT, 1) + by_column
            if MASKED:
                both = tl.where(leaves_denominators(a, n, m, threshold), 0.0, both)
            total += g0 * (both - tl.where(n[:, None] == m[None, :], 2.0, 0.0))
        if S3:
            g3 = term_gradient(grad_loss, grad_terms, w3, 3, LOSS, TERMS) / N / N
            v = gram(avg, n, m, N, C, scale, PARTS, PRECISION, BLOCK_C)
            weights, more = difference_gradients(v, logit, stats, n0, N, g3, LSE_I, LSE_L, S3I, S3L, MEANS, 1)
            total += more
            transposed = tl.trans(logit_tile(logits, m0, n0, N, BLOCK_M, BLOCK_N))
            more, _ = difference_gradients(v, transposed, stats, m0, N, g3, LSE_I, LSE_L, S3I, S3L, MEANS, 0)
            put_weights(pair_weights, 2, weights + more, k0, m0, rows, width, PARTS, BLOCK_N, BLOCK_M)
        inside = within(rows - k0, N - m0, BLOCK_N, BLOCK_M)
        tl.store(tile_at(dlogits, n0, m0, N, BLOCK_N, BLOCK_M), total, mask=inside)
    elif S1 or S2:
        weights = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if S1:
            logit = logit_tile(logits, n0, m0, N, BLOCK_N, BLOCK_M)
            weights, _ = difference_gradients(a, logit, stats, n0, N, g1, LSE_A, LSE_L, S1A, S1L, EXACT, 1)
            transposed = tl.trans(logit_tile(logits, m0, n0, N, BLOCK_M, BLOCK_N))
            more, _ = difference_gradients(a, transposed, stats, m0, N, g1, LSE_A, LSE_L, S1A, S1L, EXACT, 0)
            weights += more
        if S2:
            g2 = term_gradient(grad_loss, grad_terms, w2, 2, LOSS, TERMS) / N / N
            f = gram(fore, n, m, N, C, scale, PARTS, PRECISION, BLOCK_C)
            da, df = difference_gradients(a, f, stats, n0, N, g2, LSE_A, LSE_F, S2A, S2F, MEANS, 1)
            weights += da
            da, more = difference_gradients(a, f, stats, m0, N, g2, LSE_A, LSE_F, S2A, S2F, MEANS, 0)
            weights += da
            put_weights(pair_weights, 1, df + more, k0, m0, rows, width, PARTS, BLOCK_N, BLOCK_M)
        put_weights(pair_weights, 0, weights, k0, m0, rows, width, PARTS, BLOCK_N, BLOCK_M)


@triton.jit
def add_weighted(
    total, pair_weights, x, k, c, rows, N, width, C, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """``total[k, c] + sum over m of pair_weights[k, m] x[m, c]``."""
    for m0 in range(0, N, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        tile = tl.load(
            pair_weights + k[:, None].to(tl.int64) * width + m[None, :],
            mask=(k[:, None] < rows) & (m[None, :] < width), other=0.0,
        )  # fmt: skip
        features = tl.load(
            x + m[:, None].to(tl.int64) * C + c[None, :], mask=(m[:, None] < N) & (c[None, :] < C), other=0.0
        )
        total = add_product(total, tile, features, PRECISION)
    return total


@triton.jit
def weighted_features(
    pair_weights, which, x, out, k, c, rows, N, width, C, scale,
    PARTS: tl.constexpr, X_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out[k, c] = scale * sum over m of weights[k, m] x[m, c]``: weights ``which``, x ``(X_PARTS, N, C)``."""
    plane = tl.cast(rows, tl.int64) * width
    weights = pair_weights + which * PARTS * plane
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if PARTS == 2:
        total = add_weighted(total, weights + plane, x, k, c, rows, N, width, C, PRECISION, BLOCK_M)
    if X_PARTS == 2:
        total = add_weighted(total, weights, x + tl.cast(N, tl.int64) * C, k, c, rows, N, width, C, PRECISION, BLOCK_M)
    total = add_weighted(total, weights, x, k, c, rows, N, width, C, PRECISION, BLOCK_M)
    tl.store(out + k[:, None].to(tl.int64) * C + c[None, :], total * scale, mask=(k[:, None] < rows) & (c[None, :] < C))


@triton.jit(do_not_specialize=["row0", "rows", "N"])
def features_kernel(
    pair_weights, aud, avg, fore, daud, davg, dfore, row0, rows, N, width, C, scale,
    S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr,
    PARTS: tl.constexpr, AUD_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows row0 .. row0 + rows of the gradients of aud, foreground and img_avg: one after the other in the grid."""
    k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    which = tl.program_id(2)
    first = tl.cast(row0, tl.int64) * C
    if which == 0:
        if S1 or S2:
            weighted_features(
                pair_weights, 0, aud, daud + first, k, c, rows, N, width, C, scale,
                PARTS, AUD_PARTS, PRECISION, BLOCK_N, BLOCK_M, BLOCK_C,
            )  # fmt: skip
    elif which == 1:
        if S2:
            weighted_features(
                pair_weights, 1, fore, dfore + first, k, c, rows, N, width, C, scale,
                PARTS, PARTS, PRECISION, BLOCK_N, BLOCK_M, BLOCK_C,
            )  # fmt: skip
    else:
        if S3:
            weighted_features(
                pair_weights, 2, avg, davg + first, k, c, rows, N, width, C, scale,
                PARTS, PARTS, PRECISION, BLOCK_N, BLOCK_M, BLOCK_C,
            )  # fmt: skip


def rows_at_a_time(n: int) -> int:
    """Rows whose three weights of four bytes take two bytes per pair of the batch: a sixth. A small batch has all its
    rows done at once, for the sake of few launches.
    """
    return n if n <= 1024 else triton.cdiv(n, 6)


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
        (torch.empty_like if reached else torch.zeros_like)(x, dtype=torch.float32)
        for x, reached in (
            (aud, wanted["S1"] or wanted["S2"]),
            (img_avg, wanted["S3"]),
            (foreground, wanted["S2"]),
        )
    )
    any_distance = any(distances.values())
    rows = rows_at_a_time(n) if any_distance else n
    two = aud.dtype != torch.float32  # parts of means, and of the weights that multiply them
    product = {"PARTS": 1 + two, "PRECISION": "tf32" if two else "tf32x3"}
    sides = 2 if wanted["S1"] or wanted["S2"] else 1
    width = triton.cdiv(n, 16) * 16  # rows of whole 16-byte loads
    pair_weights = None
    if any_distance:
        dtype = torch.bfloat16 if two else torch.float32
        pair_weights = torch.empty((3, 1 + two, rows, width), dtype=dtype, device=logits.device)
    with on(logits):
        means: Sequence[Tensor] = (img_avg, foreground)
        sounds = aud
        if any_distance and aud.dtype == torch.float16:  # bfloat16 weights do not multiply with it
            *means, sounds = parts(img_avg, foreground, aud)
        elif any_distance and two:
            means = parts(img_avg, foreground)

        def weigh(blocks: tuning.Blocks, row0: int = 0) -> None:
            count = min(rows, n - row0)
            tiles = triton.cdiv(count, blocks.sizes["BLOCK_N"]) * triton.cdiv(n, blocks.sizes["BLOCK_M"])
            run(
                weights_kernel, (tiles, sides), grad_loss, grad_terms, *map(float, weights), logits, aud, *means,
                row_stats, col_lse, dlogits, pair_weights, row0, count, n, width, c, 1 / tau,
                scaled_threshold(adjacency_threshold, tau),
                LOSS=grad_loss is not None, TERMS=grad_terms is not None, **wanted, **product, **blocks.options,
            )  # fmt: skip

        def multiply(blocks: tuning.Blocks, row0: int = 0) -> None:
            count = min(rows, n - row0)
            tiles = (triton.cdiv(count, blocks.sizes["BLOCK_N"]), triton.cdiv(c, blocks.sizes["BLOCK_C"]))
            run(
                features_kernel, (*tiles, 3), pair_weights, sounds, *means, daud, davg, dforeground,
                row0, count, n, width, c, 1 / tau, **distances, **product, AUD_PARTS=1 + (sounds is not aud),
                **blocks.options,
            )  # fmt: skip

        shape_class = sweep.pair_class(aud)
        pairs = sweep.chosen("adjacency_weights", shape_class, tuning.adjacency_weights(aud), weigh)
        features = tuning.adjacency_features(aud)
        if any_distance:
            features = sweep.chosen("adjacency_features", shape_class, features, multiply)
        for row0 in range(0, n, rows):
            weigh(pairs, row0)
            if any_distance:
                multiply(features, row0)
    return dlogits, daud, davg, dforeground
