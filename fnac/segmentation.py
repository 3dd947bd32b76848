"""How well a map covers the sounding object's mask: AVSBench's mIoU and F-score (Zhou et al., ECCV 2022)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fnac.metrics import Scored, check_finite, minmax

BETA_SQUARED = 0.3
CUTS = torch.linspace(0, 1, 255)  # of the F-score, where a pixel counts as predicted from the cut on


def scaled(maps: Tensor) -> Tensor:
    """Each map ``(N, S, S)`` scaled to 0..1, float32; a constant one becomes 1: it marks every pixel."""
    check_finite(maps)
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(high > low, minmax(maps), 1).float()


def mask_iou(maps: Tensor, mask: Tensor) -> Tensor:
    """IoU (N,) of the pixels above 0.5 of maps in 0..1, with masks of 0 and 1, all ``(N, S, S)``.

    Where the mask is empty, the share of pixels that are not predicted.
    """
    predicted, mask = (maps > 0.5).flatten(1), mask.flatten(1) > 0
    inter, union = (predicted & mask).sum(1), (predicted | mask).sum(1)
    return torch.where(mask.any(1), inter / union.clamp(min=1).double(), (~predicted).double().mean(1))


def f_curves(maps: Tensor, mask: Tensor) -> Tensor:
    """F-scores (N, 255) of maps in 0..1 at each of the cuts: ``1.3 P R / (0.3 P + R)``, 0 where nothing is hit."""
    count = len(CUTS)
    # How many cuts a pixel passes: a histogram of that serves all cuts at once.
    passed = torch.bucketize(maps.flatten(1), CUTS.to(maps.device), right=True)
    passed += (count + 1) * torch.arange(len(maps), device=maps.device)[:, None]
    truth = (mask.flatten(1) > 0).double()
    predicted, hit = (
        torch.bincount(passed.flatten(), weights, minlength=(count + 1) * len(maps)).view(-1, count + 1)
        for weights in (torch.ones_like(truth).flatten(), truth.flatten())
    )
    predicted, hit = (histogram.flip(1).cumsum(1).flip(1)[:, 1:] for histogram in (predicted, hit))
    # P = hit / predicted and R = hit / truth, put in: F = 1.3 hit / (0.3 truth + predicted).
    return (1 + BETA_SQUARED) * hit / (BETA_SQUARED * truth.sum(1, keepdim=True) + predicted).clamp(min=1e-12)


def oracle(mask: Tensor) -> Tensor:
    """Masks ``(N, S, S)`` as maps. Of an empty one the first pixel: a constant map would mark them all."""
    maps = mask.float().clone()
    maps[~mask.flatten(1).any(1), 0, 0] = 1
    return maps


class SegmentationScores(Metric):
    """Scores over a data set of clips with masks; in several processes each scores its share.

    The summary has ``miou``, ``f_score``, the highest of the data set's mean F-scores at a cut, and
    ``f_score_of_batches``, which AVSBench's own code reports: the mean over batches of each one's highest, so that it
    depends on how clips come together in batches. Clips with an empty mask have no F-score.
    """

    full_state_update = False
    rows: list[Tensor]  # of clips: index and IoU
    curve: Tensor  # sum of F-scores
    counts: Tensor  # clips in that sum, batches
    best_of_batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("curve", torch.zeros(len(CUTS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("best_of_batches", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, maps: Tensor, mask: Tensor, index: Tensor) -> None:
        """Add a batch of clips: maps ``(N, S, S)`` of any scale, masks of 0 and 1, index (N,) in the data set."""
        maps = scaled(maps)
        self.rows.append(torch.stack([index.double(), mask_iou(maps, mask)], dim=1))
        sounding = mask.flatten(1).any(1)
        curves = f_curves(maps[sounding], mask[sounding])
        # A model cast to bfloat16 casts its metrics' states too, while they are still zero.
        self.curve = self.curve.double() + curves.sum(dim=0)
        self.counts = self.counts.double() + self.counts.new_tensor([len(curves), 1]).double()
        if len(curves):
            self.best_of_batches = self.best_of_batches.double() + curves.mean(dim=0).max()

    def compute(self) -> Scored:
        """Scores of all clips so far, in 0..1."""
        rows = dim_zero_cat(self.rows)
        index, iou = rows[rows[:, 0].argsort()].unbind(1)
        clips, batches = self.counts.double()
        summary = {
            "miou": iou.mean(),
            "f_score": self.curve.max() / clips.clamp(min=1),
            "f_score_of_batches": self.best_of_batches / batches,
        }
        return Scored(summary, {"index": index, "iou": iou})
