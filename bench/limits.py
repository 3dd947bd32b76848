"""How fast a case could run at best on this machine: its least arithmetic and traffic over the measured peaks."""

from __future__ import annotations

import torch

from bench.cases import Case, Op


def seconds(op: Op, case: Case, dtype: torch.dtype, peaks: dict[str, float]) -> float:
    """The time that the work needs at least, at the arithmetic peak of the dtype or at the memory's, whichever is more.

    Arithmetic is counted as the best known algorithm needs it: one dense product forward, a backward that touches the
    winning cell of each pair alone, and half of each symmetric adjacency matrix, once. float32 is judged by
    multiply-adds in float32; a kernel that gets the same result from products of 16-bit values and corrections may
    pass 1.
    """
    flops, elements = work(op, case)
    rate = max(peaks["gemm_float32"], peaks.get("fma", 0.0))
    if dtype != torch.float32:  # 16-bit values can be multiplied in float32 too, where that is faster
        rate = max(rate, peaks["gemm_bfloat16"], peaks.get("amx_bfloat16", 0.0))
    return max(flops / rate, 4 * elements / peaks["copy"])


def work(op: Op, case: Case) -> tuple[float, float]:
    """Floating-point operations, and elements of the features read and written, each time they must be."""
    pairs, features = case.n * case.m, case.n * case.cells * case.c
    products = 2.0 * pairs * case.cells * case.c
    chosen = 4.0 * pairs * case.c  # the winning cell of each pair, to the image and to the sound
    adjacency = 3 * 2.0 * pairs * case.c  # three matrices times the features
    forward, backward = {
        "fnac_loss": (products + adjacency / 2, chosen + adjacency),
        "max_logits": (products, chosen),
        "max_logits_forward": (products, 0.0),
        "nce": (products, chosen),
        "paired_maps": (2.0 * features, 0.0),
        "adjacency_contrastive": (adjacency / 2, adjacency),
    }[op.name]
    if op.name == "adjacency_contrastive":
        features = 3 * case.n * case.c + pairs
    return forward + backward, (3 if op.backward else 1) * features  # read twice, its gradient written once
