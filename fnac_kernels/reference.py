"""The specification: every operation of the package in plain PyTorch, differentiable by autograd.

This module is the one oracle. Tests and benchmarks import it and never copy it. float64 inputs stay float64;
bfloat16 and float16 are widened to float32 first, so what it returns is what a perfect kernel would return.

Shapes: ``img`` is ``(N, C, H, W)``, ``aud`` is ``(M, C)``; a pairing of row n with column n needs N == M.

Source: Sun et al., "Learning Audio-Visual Source Localization via False Negative Aware Contrastive Learning",
CVPR 2023, arXiv 2303.11302. The details that the paper leaves open (the 1e-5 in the min-max, means over all cells,
no renormalisation of pooled features, the sum of both InfoNCE directions) follow the official implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MINMAX_EPS = 1e-5


class Terms(NamedTuple):
    """The four terms of the loss, scalars of at least float32."""

    nce: Tensor
    fns_audio: Tensor
    tne: Tensor
    fns_visual: Tensor


class FNACOutput(NamedTuple):
    """What :func:`fnac_loss` returns: the weighted sum, its four terms, and the matched pairs' maps ``(N, H, W)``."""

    loss: Tensor
    nce: Tensor
    fns_audio: Tensor
    tne: Tensor
    fns_visual: Tensor
    maps: Tensor


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def similarity_maps(img: Tensor, aud: Tensor, tau: float) -> Tensor:
    """``S[n, m, h, w] = <img[n, :, h, w], aud[m]> / tau``."""
    return torch.einsum("nchw,mc->nmhw", _wide(img), _wide(aud)) / tau


def max_logits(img: Tensor, aud: Tensor, tau: float) -> Tensor:
    """``L[n, m] = max over cells of S[n, m]``; the gradient goes to the first of equal cells."""
    return similarity_maps(img, aud, tau).flatten(2).max(dim=-1).values


def paired_maps(img: Tensor, aud: Tensor, tau: float) -> Tensor:
    """``maps[n] = S[n, n]``: the similarity map of each matched pair."""
    return torch.einsum("nchw,nc->nhw", _wide(img), _wide(aud)) / tau


def foreground_mask(maps: Tensor, threshold: float) -> Tensor:
    """``minmax(maps) > threshold`` per map, a boolean ``(N, H, W)`` without gradient."""
    maps = _wide(maps.detach())
    low = maps.amin(dim=(1, 2), keepdim=True)
    high = maps.amax(dim=(1, 2), keepdim=True)
    return (maps - low) / (high - low + MINMAX_EPS) > threshold


def foreground_pool(img: Tensor, maps: Tensor, threshold: float) -> Tensor:
    """Mean over *all* cells of ``img * foreground_mask(maps)``, shape ``(N, C)``."""
    img = _wide(img)
    return (img * foreground_mask(maps, threshold).unsqueeze(1)).mean(dim=(2, 3))


def false_negatives(aud: Tensor, threshold: float, rows: int) -> Tensor:
    """Pairs (n, m), n != m, whose audio-audio product reaches ``threshold``: boolean ``(rows, N)``, the first rows."""
    aud = _wide(aud.detach())
    others = ~torch.eye(rows, len(aud), dtype=torch.bool, device=aud.device)
    return (aud[:rows] @ aud.T >= threshold) & others


def adjacency_contrastive(
    logits: Tensor,
    aud: Tensor,
    img_avg: Tensor,
    foreground: Tensor,
    tau: float,
    *,
    weights: Sequence[float] = (1, 1, 1, 1),
    adjacency_threshold: float | None = None,
) -> Terms:
    """The four terms from the pooled quantities; a term of weight 0 is not computed and is 0."""
    logits, aud, img_avg, foreground = _wide(logits), _wide(aud), _wide(img_avg), _wide(foreground)

    def adjacency(features: Tensor) -> Tensor:
        return torch.softmax(features @ features.T / tau, dim=1)

    nce = fns_audio = tne = fns_visual = logits.new_zeros(())
    if weights[0]:
        kept = logits
        if adjacency_threshold is not None:
            kept = logits.masked_fill(false_negatives(aud, adjacency_threshold, len(aud)), float("-inf"))
        target = torch.arange(len(logits), device=logits.device)
        nce = F.cross_entropy(kept, target) + F.cross_entropy(kept.T, target)
    if weights[1]:
        fns_audio = F.l1_loss(adjacency(aud), torch.softmax(logits, dim=1))
    if weights[2]:
        tne = F.l1_loss(adjacency(aud), adjacency(foreground))
    if weights[3]:
        fns_visual = F.l1_loss(adjacency(img_avg), torch.softmax(logits, dim=1))
    return Terms(nce, fns_audio, tne, fns_visual)


def weighted_sum(weights: Sequence[float], terms: Terms) -> Tensor:
    """``weights . terms``; a term of weight 0 has no part in it, not 0 times what may be infinite."""
    return sum((w * term for w, term in zip(weights, terms, strict=True) if w), start=terms.nce.new_zeros(()))


def fnac_loss(
    img: Tensor,
    aud: Tensor,
    tau: float = 0.03,
    *,
    fg_threshold: float = 0.6,
    weights: Sequence[float] = (1, 100, 100, 100),
    adjacency_threshold: float | None = None,
) -> FNACOutput:
    """``loss = weights . (nce, fns_audio, tne, fns_visual)``, with the terms and the matched maps beside it."""
    img, aud = _wide(img), _wide(aud)
    similarity = similarity_maps(img, aud, tau)
    if torch.compiler.is_compiling() and len(img) % 16:
        # Of maps read out of the similarities torch.compile's programs for the CPU (2.11) write whole vectors past the
        # last, and corrupt the heap.
        maps = paired_maps(img, aud, tau)
    else:
        pairs = torch.arange(len(img), device=img.device)
        maps = similarity[pairs, pairs]
    terms = adjacency_contrastive(
        similarity.flatten(2).max(dim=-1).values,
        aud,
        img.mean(dim=(2, 3)),
        foreground_pool(img, maps, fg_threshold),
        tau,
        weights=weights,
        adjacency_threshold=adjacency_threshold,
    )
    return FNACOutput(weighted_sum(weights, terms), *terms, maps)
