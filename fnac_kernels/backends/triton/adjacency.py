"""The contrastive and adjacency terms, and their gradients, in tiles of N x N that are recomputed and never kept.

The columns of ``row_stats``: log-sum-exps of A, F, I, L, and of L without the masked pairs, each as (maximum, log of
the sum), because their float32 sum would cost the softmax two digits; then the row sums of s1 P_A, s2 P_A, s2 P_F,
s3 P_I, s1 P_L, s3 P_L with s1 = sign(P_A - P_L), s2 = sign(P_A - P_F), s3 = sign(P_I - P_L).
Source: the formulas in ``fnac_kernels/README.md``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fnac_kernels.backends.triton import tuning
from fnac_kernels.backends.triton.launch import on, precision, run

ROW_STATS = 16
LSE_A, LSE_F, LSE_I, LSE_L, LSE_KEPT = (tl.constexpr(column) for column in (0, 2, 4, 6, 8))
S1A, S2A, S2F, S3I, S1L, S3L = (tl.constexpr(column) for column in range(10, 16))
STATS = tl.constexpr(ROW_STATS)


@triton.jit
def gram(
    x, n, m, N, C, scale,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``<x[n], x[m]> * scale`` of a tile; -inf beyond the last column, so that its exp is 0."""
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        rows = tl.load(
            x + n[:, None].to(tl.int64) * C + c[None, :], mask=(n[:, None] < N) & (c[None, :] < C), other=0.0
        )
        columns = tl.load(
            x + m[None, :].to(tl.int64) * C + c[:, None], mask=(m[None, :] < N) & (c[:, None] < C), other=0.0
        )
        total = tl.dot(rows, columns, total, input_precision=PRECISION)
    return tl.where(m[None, :] < N, total * scale, float("-inf"))


@triton.jit
def logit_tile(logits, n, m, N):
    """``logits[n, m]``; -inf beyond the last column."""
    tile = tl.load(
        logits + n[:, None].to(tl.int64) * N + m[None, :], mask=(n[:, None] < N) & (m[None, :] < N), other=0.0
    )
    return tl.where(m[None, :] < N, tile, float("-inf"))


@triton.jit
def transposed_logit_tile(logits, n, m, N):
    """``logits[m, n]``; -inf beyond the last m."""
    tile = tl.load(
        logits + m[None, :].to(tl.int64) * N + n[:, None], mask=(n[:, None] < N) & (m[None, :] < N), other=0.0
    )
    return tl.where(m[None, :] < N, tile, float("-inf"))


@triton.jit
def add_exp(high, total, tile):
    """One more tile of an online log-sum-exp over rows."""
    higher = tl.maximum(high, tl.max(tile, axis=1))
    return higher, total * tl.exp(high - higher) + tl.sum(tl.exp(tile - higher[:, None]), axis=1)


@triton.jit
def store_lse(stats, n, N, COLUMN: tl.constexpr, high, total):
    tl.store(stats + n * STATS + COLUMN, high, mask=n < N)
    tl.store(stats + n * STATS + COLUMN + 1, tl.log(total), mask=n < N)


@triton.jit
def row_softmax(tile, stats, n, N, COLUMN: tl.constexpr):
    """The row softmax of a tile whose rows are n."""
    high = tl.load(stats + n * STATS + COLUMN, mask=n < N, other=0.0)
    log = tl.load(stats + n * STATS + COLUMN + 1, mask=n < N, other=0.0)
    return tl.exp(tile - high[:, None] - log[:, None])


@triton.jit
def column_softmax(tile, stats, m, N, COLUMN: tl.constexpr):
    """The transpose of the row softmax, of a symmetric matrix's tile or a transposed one: row m's at column n."""
    high = tl.load(stats + m * STATS + COLUMN, mask=m < N, other=0.0)
    log = tl.load(stats + m * STATS + COLUMN + 1, mask=m < N, other=0.0)
    return tl.exp(tile - high[None, :] - log[None, :])


@triton.jit
def stat(stats, n, N, COLUMN: tl.constexpr):
    return tl.load(stats + n * STATS + COLUMN, mask=n < N, other=0.0)


@triton.jit
def sign(x):
    """-1, 0 or 1; NaN stays NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def forward_kernel(
    logits, aud, avg, fore, stats, col_lse, row_terms, N, C, scale, threshold,
    NCE: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Statistics, column log-sum-exps and the rows' shares of the terms, for BLOCK_N rows (and as many columns)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    low = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    zero = tl.zeros((BLOCK_N,), tl.float32)
    high_a, high_f, high_i, high_l, high_kept, high_col = low, low, low, low, low, low
    sum_a, sum_f, sum_i, sum_l, sum_kept, sum_col = zero, zero, zero, zero, zero, zero
    for m0 in range(0, N, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        kept = logit_tile(logits, n, m, N)
        high_l, sum_l = add_exp(high_l, sum_l, kept)
        if S1 or S2 or MASKED:
            a = gram(aud, n, m, N, C, scale, PRECISION, BLOCK_N, BLOCK_M, BLOCK_C)
            high_a, sum_a = add_exp(high_a, sum_a, a)
        if S2:
            f = gram(fore, n, m, N, C, scale, PRECISION, BLOCK_N, BLOCK_M, BLOCK_C)
            high_f, sum_f = add_exp(high_f, sum_f, f)
        if S3:
            i = gram(avg, n, m, N, C, scale, PRECISION, BLOCK_N, BLOCK_M, BLOCK_C)
            high_i, sum_i = add_exp(high_i, sum_i, i)
        if NCE:
            columns = transposed_logit_tile(logits, n, m, N)
            if MASKED:
                leaves = (a >= threshold * scale) & (n[:, None] != m[None, :])
                kept = tl.where(leaves, float("-inf"), kept)
                columns = tl.where(leaves, float("-inf"), columns)
            high_kept, sum_kept = add_exp(high_kept, sum_kept, kept)
            high_col, sum_col = add_exp(high_col, sum_col, columns)
    store_lse(stats, n, N, LSE_A, high_a, sum_a)
    store_lse(stats, n, N, LSE_F, high_f, sum_f)
    store_lse(stats, n, N, LSE_I, high_i, sum_i)
    store_lse(stats, n, N, LSE_L, high_l, sum_l)
    store_lse(stats, n, N, LSE_KEPT, high_kept, sum_kept)
    tl.store(col_lse + n, high_col + tl.log(sum_col), mask=n < N)
    if NCE:
        positive = tl.load(logits + n.to(tl.int64) * N + n, mask=n < N, other=0.0)
        entropy = (high_kept - positive) + tl.log(sum_kept) + (high_col - positive) + tl.log(sum_col)
        tl.store(row_terms + n * 4, entropy, mask=n < N)
    # The second pass reads the statistics from registers: they are this program's own rows.
    term1, term2, term3 = zero, zero, zero
    s1a, s2a, s2f, s3i, s1l, s3l = zero, zero, zero, zero, zero, zero
    if S1 or S2 or S3:
        for m0 in range(0, N, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            if S1 or S2:
                a = gram(aud, n, m, N, C, scale, PRECISION, BLOCK_N, BLOCK_M, BLOCK_C)
                pa = tl.exp(a - high_a[:, None] - tl.log(sum_a)[:, None])
            if S1 or S3:
                pl = tl.exp(logit_tile(logits, n, m, N) - high_l[:, None] - tl.log(sum_l)[:, None])
            if S1:
                s1 = sign(pa - pl)
                term1 += tl.sum(tl.abs(pa - pl), axis=1)
                s1a += tl.sum(s1 * pa, axis=1)
                s1l += tl.sum(s1 * pl, axis=1)
            if S2:
                f = gram(fore, n, m, N, C, scale, PRECISION, BLOCK_N, BLOCK_M, BLOCK_C)
                pf = tl.exp(f - high_f[:, None] - tl.log(sum_f)[:, None])
                s2 = sign(pa - pf)
                term2 += tl.sum(tl.abs(pa - pf), axis=1)
                s2a += tl.sum(s2 * pa, axis=1)
                s2f += tl.sum(s2 * pf, axis=1)
            if S3:
                i = gram(avg, n, m, N, C, scale, PRECISION, BLOCK_N, BLOCK_M, BLOCK_C)
                pi = tl.exp(i - high_i[:, None] - tl.log(sum_i)[:, None])
                s3 = sign(pi - pl)
                term3 += tl.sum(tl.abs(pi - pl), axis=1)
                s3i += tl.sum(s3 * pi, axis=1)
                s3l += tl.sum(s3 * pl, axis=1)
    tl.store(row_terms + n * 4 + 1, term1, mask=n < N)
    tl.store(row_terms + n * 4 + 2, term2, mask=n < N)
    tl.store(row_terms + n * 4 + 3, term3, mask=n < N)
    tl.store(stats + n * STATS + S1A, s1a, mask=n < N)
    tl.store(stats + n * STATS + S2A, s2a, mask=n < N)
    tl.store(stats + n * STATS + S2F, s2f, mask=n < N)
    tl.store(stats + n * STATS + S3I, s3i, mask=n < N)
    tl.store(stats + n * STATS + S1L, s1l, mask=n < N)
    tl.store(stats + n * STATS + S3L, s3l, mask=n < N)


@triton.jit
def finish_kernel(
    row_terms, losses, N, w0, w1, w2, w3,
    NCE: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Means of the rows' shares in order, and their weighted sum: losses = (loss, nce, fns_audio, tne, fns_visual)."""
    t = tl.arange(0, 4)
    wanted = ((t == 0) & NCE) | ((t == 1) & S1) | ((t == 2) & S2) | ((t == 3) & S3)
    total = tl.zeros((4,), tl.float64)
    for n0 in range(0, N, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        rows = tl.load(row_terms + n[:, None] * 4 + t[None, :], mask=(n[:, None] < N) & wanted[None, :], other=0.0)
        total += tl.sum(rows.to(tl.float64), axis=0)
    means = total / tl.where(t == 0, 1.0, N * 1.0) / N
    weights = tl.where(t == 0, w0, tl.where(t == 1, w1, tl.where(t == 2, w2, w3)))
    # Not a product where the weight is 0: 0 times infinity is not 0.
    tl.store(losses + 1 + t, means.to(tl.float32))
    tl.store(losses, tl.sum(tl.where(wanted, weights * means, 0.0), axis=0).to(tl.float32))


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
def logit_gradient_kernel(
    grad_loss, grad_terms, w0, w1, w3, logits, aud, avg, stats, col_lse, dlogits, N, C, scale, threshold,
    LOSS: tl.constexpr, TERMS: tl.constexpr,
    NCE: tl.constexpr, S1: tl.constexpr, S3: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of dL."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    logit = logit_tile(logits, n, m, N)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if S1 or MASKED:
        a = gram(aud, n, m, N, C, scale, PRECISION, BLOCK_N, BLOCK_M, BLOCK_C)
    if S1 or S3:
        pl = row_softmax(logit, stats, n, N, LSE_L)
        if S1:
            g1 = term_gradient(grad_loss, grad_terms, w1, 1, LOSS, TERMS)
            s1 = sign(row_softmax(a, stats, n, N, LSE_A) - pl)
            total += g1 * (stat(stats, n, N, S1L)[:, None] - s1)
        if S3:
            i = gram(avg, n, m, N, C, scale, PRECISION, BLOCK_N, BLOCK_M, BLOCK_C)
            g3 = term_gradient(grad_loss, grad_terms, w3, 3, LOSS, TERMS)
            s3 = sign(row_softmax(i, stats, n, N, LSE_I) - pl)
            total += g3 * (stat(stats, n, N, S3L)[:, None] - s3)
        total = total * pl / N / N
    if NCE:
        g0 = term_gradient(grad_loss, grad_terms, w0, 0, LOSS, TERMS) / N
        lse = tl.load(col_lse + m, mask=m < N, other=0.0)
        both = row_softmax(logit, stats, n, N, LSE_KEPT) + tl.exp(logit - lse[None, :])
        if MASKED:
            both = tl.where((a >= threshold * scale) & (n[:, None] != m[None, :]), 0.0, both)
        total += g0 * (both - tl.where(n[:, None] == m[None, :], 2.0, 0.0))
    tl.store(dlogits + n[:, None].to(tl.int64) * N + m[None, :], total, mask=(n[:, None] < N) & (m[None, :] < N))


@triton.jit
def feature_gradient_kernel(
    grad_loss, grad_terms, w1, w2, w3, logits, aud, avg, fore, stats, gradient, N, C, scale,
    WHICH: tl.constexpr, LOSS: tl.constexpr, TERMS: tl.constexpr,
    S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows by BLOCK_C channels of the gradient of aud (WHICH "a"), foreground ("f") or img_avg ("i"):
    ``(dX + dX') x / tau``, the tiles of dX made and used at once.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for m0 in range(0, N, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        tile = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if WHICH == "i":
            x = avg
            g3 = term_gradient(grad_loss, grad_terms, w3, 3, LOSS, TERMS)
            i = gram(avg, n, m, N, C, scale, PRECISION, BLOCK_N, BLOCK_M, BLOCK_C)
            pi, pit = row_softmax(i, stats, n, N, LSE_I), column_softmax(i, stats, m, N, LSE_I)
            pl = row_softmax(logit_tile(logits, n, m, N), stats, n, N, LSE_L)
            plt = column_softmax(transposed_logit_tile(logits, n, m, N), stats, m, N, LSE_L)
            tile += g3 * (
                pi * (sign(pi - pl) - stat(stats, n, N, S3I)[:, None])
                + pit * (sign(pit - plt) - stat(stats, m, N, S3I)[None, :])
            )
        else:
            a = gram(aud, n, m, N, C, scale, PRECISION, BLOCK_N, BLOCK_M, BLOCK_C)
            pa, pat = row_softmax(a, stats, n, N, LSE_A), column_softmax(a, stats, m, N, LSE_A)
            if S2:
                g2 = term_gradient(grad_loss, grad_terms, w2, 2, LOSS, TERMS)
                f = gram(fore, n, m, N, C, scale, PRECISION, BLOCK_N, BLOCK_M, BLOCK_C)
                pf, pft = row_softmax(f, stats, n, N, LSE_F), column_softmax(f, stats, m, N, LSE_F)
                s2, s2t = sign(pa - pf), sign(pat - pft)
            if WHICH == "f":
                x = fore
                tile -= g2 * (
                    pf * (s2 - stat(stats, n, N, S2F)[:, None]) + pft * (s2t - stat(stats, m, N, S2F)[None, :])
                )
            else:
                x = aud
                if S2:
                    tile += g2 * (
                        pa * (s2 - stat(stats, n, N, S2A)[:, None]) + pat * (s2t - stat(stats, m, N, S2A)[None, :])
                    )
                if S1:
                    g1 = term_gradient(grad_loss, grad_terms, w1, 1, LOSS, TERMS)
                    pl = row_softmax(logit_tile(logits, n, m, N), stats, n, N, LSE_L)
                    plt = column_softmax(transposed_logit_tile(logits, n, m, N), stats, m, N, LSE_L)
                    tile += g1 * (
                        pa * (sign(pa - pl) - stat(stats, n, N, S1A)[:, None])
                        + pat * (sign(pat - plt) - stat(stats, m, N, S1A)[None, :])
                    )
        features = tl.load(
            x + m[:, None].to(tl.int64) * C + c[None, :], mask=(m[:, None] < N) & (c[None, :] < C), other=0.0
        )
        total = tl.dot(tile / N / N, features, total, input_precision=PRECISION)
    tl.store(
        gradient + n[:, None].to(tl.int64) * C + c[None, :], total * scale, mask=(n[:, None] < N) & (c[None, :] < C)
    )


def _flags(weights: tuple[float, ...], adjacency_threshold: float | None) -> dict[str, bool]:
    nce, s1, s2, s3 = (weight != 0 for weight in weights)
    return {"NCE": nce, "S1": s1, "S2": s2, "S3": s3, "MASKED": nce and adjacency_threshold is not None}


def adjacency(
    logits: Tensor,
    aud: Tensor,
    img_avg: Tensor,
    foreground: Tensor,
    tau: float,
    weights: tuple[float, ...],
    adjacency_threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c = aud.shape
    stats = torch.empty((n, ROW_STATS), dtype=torch.float32, device=logits.device)
    col_lse = torch.empty(n, dtype=torch.float32, device=logits.device)
    row_terms = torch.empty((n, 4), dtype=torch.float32, device=logits.device)
    losses = torch.empty(5, dtype=torch.float32, device=logits.device)
    blocks, flags = tuning.adjacency(), _flags(weights, adjacency_threshold)
    wanted = {name: flag for name, flag in flags.items() if name != "MASKED"}
    with on(logits):
        run(
            forward_kernel, (triton.cdiv(n, blocks.sizes["BLOCK_N"]),),
            logits, aud, img_avg, foreground, stats, col_lse, row_terms, n, c, 1 / tau, adjacency_threshold or 0.0,
            **flags, PRECISION=precision(torch.float32), **blocks.options,
        )  # fmt: skip
        run(finish_kernel, (1,), row_terms, losses, n, *map(float, weights), **wanted, BLOCK=256, num_warps=4)
    # Copies: an operator's outputs must not share memory.
    return losses[0].clone(), losses[1:].clone(), stats, col_lse


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
    blocks, flags = tuning.adjacency_gradient(), _flags(weights, adjacency_threshold)
    w0, w1, w2, w3 = map(float, weights)
    common = {
        "LOSS": grad_loss is not None, "TERMS": grad_terms is not None, "PRECISION": precision(torch.float32),
        **blocks.options,
    }  # fmt: skip
    dlogits = torch.empty_like(logits)
    rows = triton.cdiv(n, blocks.sizes["BLOCK_N"])
    distances = {name: flags[name] for name in ("S1", "S2", "S3")}

    def gradient(which: str, like: Tensor, wanted: bool) -> Tensor:
        if not wanted:
            return torch.zeros_like(like)
        out = torch.empty_like(like)
        run(
            feature_gradient_kernel, (rows, triton.cdiv(c, blocks.sizes["BLOCK_C"])),
            grad_loss, grad_terms, w1, w2, w3, logits, aud, img_avg, foreground, row_stats, out, n, c, 1 / tau,
            WHICH=which, **distances, **common,
        )  # fmt: skip
        return out

    with on(logits):
        run(
            logit_gradient_kernel, (rows, triton.cdiv(n, blocks.sizes["BLOCK_M"])),
            grad_loss, grad_terms, w0, w1, w3, logits, aud, img_avg, row_stats, col_lse, dlogits, n, c, 1 / tau,
            adjacency_threshold or 0.0, **{name: flags[name] for name in ("NCE", "S1", "S3", "MASKED")}, **common,
        )  # fmt: skip
        daud = gradient("a", aud, flags["S1"] or flags["S2"])
        davg = gradient("i", img_avg, flags["S3"])
        dforeground = gradient("f", foreground, flags["S2"])
    return dlogits, daud, davg, dforeground
