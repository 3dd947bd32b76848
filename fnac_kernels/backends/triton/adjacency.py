"""The contrastive and adjacency terms, in tiles: log-sum-exps first, then the differences of the softmaxes.

Programs own tiles rather than rows, so that a small batch fills the device, and of the symmetric matrices only tiles
on and above the diagonal, each of which serves two. What they add up for a row lies in ``partials`` by block of
columns ("slot") and is added in that order, by one program.
"""

from __future__ import annotations

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
    ROW_STATS,
    S1A,
    S1L,
    S2A,
    S2F,
    S3I,
    S3L,
    along,
    flags,
    floats,
    gram,
    leaves_denominators,
    logit_tile,
    rows_and_columns,
    scaled_threshold,
    sign_of_difference,
    softmax,
)  # fmt: skip
from fnac_kernels.backends.triton.launch import Constant, on, run

#: Planes of the first kernel's partials: (maximum, sum of exp) of A, F, I, L, kept L at LSE_A .., then of L's columns.
LSE_COLUMN = Constant(10)
LSE_PLANES = Constant(12)
#: Planes of the second kernel's partials: the row sums, in the order of row_stats from S1A on.
SUM_PLANES = Constant(6)


@triton.jit
def put(partials, plane, row, N, value):
    tl.store(partials + plane.to(tl.int64) * N + row, value, mask=row < N)


@triton.jit
def put_lse(partials, slot, row, N, tile, COLUMN: tl.constexpr, AXIS: tl.constexpr):
    """Maximum and sum of exp along an axis of the tile; of an axis of -inf the sum is 0."""
    high = tl.max(tile, axis=AXIS)
    shift = tl.where(high == float("-inf"), 0.0, high)
    plane = slot * LSE_PLANES + COLUMN
    put(partials, plane, row, N, high)
    put(partials, plane + 1, row, N, tl.sum(tl.exp(tile - along(shift, AXIS)), axis=AXIS))


@triton.jit
def put_logits(
    partials, logits, leaves, n, m, i, j, N,
    NCE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    tile = tl.trans(logit_tile(logits, j * BLOCK, i * BLOCK, N, BLOCK, BLOCK))
    if AXIS == 1:
        tile = logit_tile(logits, i * BLOCK, j * BLOCK, N, BLOCK, BLOCK)
        row, row_slot, column, column_slot = n, j, m, i
    else:
        row, row_slot, column, column_slot = m, i, n, j
    put_lse(partials, row_slot, row, N, tile, LSE_L, AXIS)
    if MASKED:
        tile = tl.where(leaves, float("-inf"), tile)
        put_lse(partials, row_slot, row, N, tile, LSE_KEPT, AXIS)
    if NCE:
        put_lse(partials, column_slot, column, N, tile, LSE_COLUMN, 1 - AXIS)


@triton.jit
def statistics_kernel(
    logits, aud, avg, fore, partials, N, C, scale, threshold,
    NCE: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What a tile gives to the log-sum-exps of its rows and, transposed, of its columns."""
    i, j, n, m = rows_and_columns(tl.program_id(0), BLOCK)
    leaves = n[:, None] < 0
    if (S1 or S2) or MASKED:  # Triton 3.2 takes no chains
        a = gram(aud, n, m, N, C, scale, 1, PRECISION, BLOCK_C)
        if S1 or S2:
            put_lse(partials, j, n, N, a, LSE_A, 1)
            if i < j:
                put_lse(partials, i, m, N, a, LSE_A, 0)
        if MASKED:
            leaves = leaves_denominators(a, n, m, threshold)
    if S2:
        f = gram(fore, n, m, N, C, scale, 1, PRECISION, BLOCK_C)
        put_lse(partials, j, n, N, f, LSE_F, 1)
        if i < j:
            put_lse(partials, i, m, N, f, LSE_F, 0)
    if S3:
        v = gram(avg, n, m, N, C, scale, 1, PRECISION, BLOCK_C)
        put_lse(partials, j, n, N, v, LSE_I, 1)
        if i < j:
            put_lse(partials, i, m, N, v, LSE_I, 0)
    put_logits(partials, logits, leaves, n, m, i, j, N, NCE, MASKED, BLOCK, 1)
    if i < j:
        put_logits(partials, logits, leaves, n, m, i, j, N, NCE, MASKED, BLOCK, 0)


@triton.jit
def collected(partials, slots, row, N, COLUMN: tl.constexpr):
    """Maximum and sum of exp over all slots."""
    high = tl.full(row.shape, float("-inf"), tl.float32)
    total = tl.zeros(row.shape, tl.float32)
    at = partials + COLUMN * N + row
    for slot in range(0, slots):
        plane = tl.cast(slot, tl.int64) * LSE_PLANES * N
        more = tl.load(at + plane, mask=row < N, other=0.0)
        higher = tl.maximum(high, more)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.load(at + plane + N, mask=row < N, other=0.0)
        total = total * tl.exp(high - shift) + share * tl.exp(more - shift)
        high = higher
    return high, total


@triton.jit
def put_softmax(stats, n, N, COLUMN: tl.constexpr, high, total):
    """Maximum, and the inverse of the sum."""
    tl.store(stats + COLUMN * N + n, high, mask=n < N)
    tl.store(stats + (COLUMN + 1) * N + n, tl.div_rn(tl.full(total.shape, 1.0, tl.float32), total), mask=n < N)


@triton.jit(do_not_specialize=["N", "slots"])
def collect_kernel(
    partials, logits, stats, col_lse, entropies, N, slots,
    NCE: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What makes softmaxes of BLOCK rows and columns, and their shares of the InfoNCE."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if S1 or S2:
        high, total = collected(partials, slots, n, N, LSE_A)
        put_softmax(stats, n, N, LSE_A, high, total)
    if S2:
        high, total = collected(partials, slots, n, N, LSE_F)
        put_softmax(stats, n, N, LSE_F, high, total)
    if S3:
        high, total = collected(partials, slots, n, N, LSE_I)
        put_softmax(stats, n, N, LSE_I, high, total)
    high, total = collected(partials, slots, n, N, LSE_L)
    put_softmax(stats, n, N, LSE_L, high, total)
    if NCE:
        if MASKED:
            high, total = collected(partials, slots, n, N, LSE_KEPT)
        put_softmax(stats, n, N, LSE_KEPT, high, total)
        column_high, column_total = collected(partials, slots, n, N, LSE_COLUMN)
        put_softmax(col_lse, n, N, 0, column_high, column_total)
        positive = tl.load(logits + n.to(tl.int64) * N + n, mask=n < N, other=0.0)
        of_row, of_column = (high - positive) + tl.log(total), (column_high - positive) + tl.log(column_total)
        tl.store(entropies + n, of_row + of_column, mask=n < N)


@triton.jit
def difference(
    partials, x, y, stats, row0, slot, N,
    X: tl.constexpr, Y: tl.constexpr, SX: tl.constexpr, SY: tl.constexpr, ROUNDING: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """The sum of ``|P_X - P_Y|`` over a tile; its row sums of sign times softmax go to ``partials``."""
    row = row0 + tl.arange(0, x.shape[1 - AXIS])
    px = softmax(x, stats, row0, N, X, AXIS)
    py = softmax(y, stats, row0, N, Y, AXIS)
    s = sign_of_difference(x, y, px, py, ROUNDING, Y != LSE_L)
    put(partials, slot * SUM_PLANES + (SX - S1A), row, N, tl.sum(s * px, axis=AXIS))
    put(partials, slot * SUM_PLANES + (SY - S1A), row, N, tl.sum(s * py, axis=AXIS))
    return tl.sum(tl.abs(px - py))


@triton.jit
def distances_kernel(
    logits, aud, avg, fore, stats, partials, tile_terms, N, C, scale,
    S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of the three distances, and its transpose. One distance after the other: few tiles are alive at a time."""
    i, j, n, m = rows_and_columns(tl.program_id(0), BLOCK)
    out = tile_terms + tl.program_id(0) * 3
    MEANS: tl.constexpr = EXACT if aud.dtype.element_ty == tl.float32 else IN_PARTS  # in the backward
    if S1 or S3:
        logit, transposed = (
            logit_tile(logits, i * BLOCK, j * BLOCK, N, BLOCK, BLOCK),
            tl.trans(logit_tile(logits, j * BLOCK, i * BLOCK, N, BLOCK, BLOCK)),
        )
    if S3:
        v = gram(avg, n, m, N, C, scale, 1, PRECISION, BLOCK_C)
        total = difference(partials, v, logit, stats, i * BLOCK, j, N, LSE_I, LSE_L, S3I, S3L, MEANS, 1)
        if i < j:
            total += difference(partials, v, transposed, stats, j * BLOCK, i, N, LSE_I, LSE_L, S3I, S3L, MEANS, 0)
        tl.store(out + 2, total)
    if S1 or S2:
        a = gram(aud, n, m, N, C, scale, 1, PRECISION, BLOCK_C)
    if S1:
        total = difference(partials, a, logit, stats, i * BLOCK, j, N, LSE_A, LSE_L, S1A, S1L, EXACT, 1)
        if i < j:
            total += difference(partials, a, transposed, stats, j * BLOCK, i, N, LSE_A, LSE_L, S1A, S1L, EXACT, 0)
        tl.store(out, total)
    if S2:
        f = gram(fore, n, m, N, C, scale, 1, PRECISION, BLOCK_C)
        total = difference(partials, a, f, stats, i * BLOCK, j, N, LSE_A, LSE_F, S2A, S2F, MEANS, 1)
        if i < j:
            total += difference(partials, a, f, stats, j * BLOCK, i, N, LSE_A, LSE_F, S2A, S2F, MEANS, 0)
        tl.store(out + 1, total)


@triton.jit
def ordered_sum(x, count, stride, BLOCK: tl.constexpr):
    """The float64 sum of ``count`` float32 values."""
    total = tl.zeros((BLOCK,), tl.float64)
    for k0 in range(0, count, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        total += tl.load(x + k.to(tl.int64) * stride, mask=k < count, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["N", "slots", "tiles"])
def finish_kernel(
    partials, tile_terms, entropies, stats, loss, terms, N, slots, tiles, w0, w1, w2, w3,
    NCE: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row sums of BLOCK rows; the last program: the means and their weighted sum."""
    block = tl.program_id(0)
    if block * BLOCK < N:
        if (S1 or S2) or S3:
            n = block * BLOCK + tl.arange(0, BLOCK)
            plane = tl.arange(0, 8)
            wanted = (n[:, None] < N) & (plane[None, :] < SUM_PLANES)
            sums = tl.zeros((BLOCK, 8), tl.float32)
            for slot in range(0, slots):
                at = (tl.cast(slot, tl.int64) * SUM_PLANES + plane[None, :]) * N + n[:, None]
                sums += tl.load(partials + at, mask=wanted, other=0.0)
            tl.store(stats + (S1A + plane[None, :]) * N + n[:, None], sums, mask=wanted)
    else:
        # A term of weight 0 has no part in the sum, not 0 times what may be infinite.
        zero = tl.cast(0.0, tl.float64)
        nce, fns_audio, tne, fns_visual, total = zero, zero, zero, zero, zero
        if NCE:
            nce = ordered_sum(entropies, N, 1, BLOCK) / N
            total += w0 * nce
        if S1:
            fns_audio = ordered_sum(tile_terms, tiles, 3, BLOCK) / N / N
            total += w1 * fns_audio
        if S2:
            tne = ordered_sum(tile_terms + 1, tiles, 3, BLOCK) / N / N
            total += w2 * tne
        if S3:
            fns_visual = ordered_sum(tile_terms + 2, tiles, 3, BLOCK) / N / N
            total += w3 * fns_visual
        tl.store(terms, nce.to(tl.float32))
        tl.store(terms + 1, fns_audio.to(tl.float32))
        tl.store(terms + 2, tne.to(tl.float32))
        tl.store(terms + 3, fns_visual.to(tl.float32))
        tl.store(loss, total.to(tl.float32))


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
    loss, terms = floats(logits), floats(logits, 4)
    stats, col_lse, entropies = floats(logits, n, ROW_STATS), floats(logits, 2, n), floats(logits, n)
    wanted = flags(weights, adjacency_threshold)
    distances = {name: wanted[name] for name in ("S1", "S2", "S3")}
    rows = tuning.adjacency_rows()
    row_blocks = triton.cdiv(n, rows.sizes["BLOCK"])
    inputs = (logits, aud, img_avg, foreground)

    def launch(blocks: tuning.Blocks) -> None:
        slots = triton.cdiv(n, blocks.sizes["BLOCK"])
        tiles = slots * (slots + 1) // 2
        tile = {"PRECISION": "tf32x3", **blocks.options}
        partials = floats(logits, slots, LSE_PLANES.value, n)
        tile_terms = floats(logits, tiles, 3)
        run(
            statistics_kernel, (tiles,), *inputs, partials, n, c, 1 / tau, scaled_threshold(adjacency_threshold, tau),
            **wanted, **tile,
        )  # fmt: skip
        run(
            collect_kernel, (row_blocks,), partials, logits, stats, col_lse, entropies, n, slots,
            **wanted, **rows.options,
        )  # fmt: skip
        if any(distances.values()):
            # The log-sum-exps are collected: their partials' memory is free for the sums.
            run(
                distances_kernel, (tiles,), *inputs, stats, partials, tile_terms, n, c, 1 / tau,
                **distances, **tile,
            )  # fmt: skip
        run(
            finish_kernel, (row_blocks + 1,), partials, tile_terms, entropies, stats, loss, terms, n, slots, tiles,
            *map(float, weights), NCE=wanted["NCE"], **distances, **rows.options,
        )  # fmt: skip

    with on(logits):
        launch(sweep.chosen("adjacency", sweep.pair_class(aud), tuning.adjacency(aud), launch))
    return loss, terms, stats, col_lse
