"""How well a map finds the sounding object: cIoU and what is derived from it, pointing, and maps that need no model.

Maps and ground truths are ``(N, S, S)``, S = 224 as published; a ground truth holds values in 0..1 (the union of the
boxes for VGG-SS, the annotators' consensus for Flickr). Scores are float64, per sample, independent of the batch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

SIZE = 224
THRESHOLDS = 0.05 * torch.arange(21, dtype=torch.float64)  # of the success rate under which the AUC is taken

Upsampling = Literal["bicubic", "bilinear_align_corners"]


def upsample(maps: Tensor, size: int = SIZE, mode: Upsampling = "bicubic") -> Tensor:
    """Bring localization maps ``(N, h, w)`` to float32 ``(N, size, size)``: the one place that does.

    The official code trains and tests VGG-SS with ``"bicubic"``; another of its test functions has
    ``"bilinear_align_corners"``. Scores depend on the choice, so it belongs beside them.
    """
    if maps.ndim != 3:
        raise ValueError(f"maps must have shape (N, h, w), got {tuple(maps.shape)}")
    if mode == "bicubic":
        larger = F.interpolate(maps[:, None].float(), (size, size), mode="bicubic", align_corners=False)
    elif mode == "bilinear_align_corners":
        larger = F.interpolate(maps[:, None].float(), (size, size), mode="bilinear", align_corners=True)
    else:
        raise ValueError(f'mode must be "bicubic" or "bilinear_align_corners", got {mode!r}')
    return larger[:, 0]


def minmax(maps: Tensor) -> Tensor:
    """Each map ``(N, S, S)`` scaled to 0..1; a constant one becomes 0."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)


def ciou(maps: Tensor, gt: Tensor) -> Tensor:
    """Consensus IoU (N,) of the map's upper half: pixels that are at least the map's own median (sorted element n/2).

    ``sum(P * G) / (sum(G) + sum(P where G = 0))``; 0 for an empty ground truth. A constant map counts every pixel.
    Source: Senocak et al., CVPR 2018, with the median threshold of EZ-VSL and FNAC.
    """
    maps, gt = _flat(maps, gt)
    median = maps.kthvalue(maps.shape[1] // 2 + 1, dim=1, keepdim=True).values
    return _consensus_iou(maps >= median, gt)


def adaptive_ciou(maps: Tensor, gt: Tensor) -> Tensor:
    """Consensus IoU (N,) of as many of the map's highest pixels as the ground truth covers (more where they tie)."""
    maps, gt = _flat(maps, gt)
    area = (gt > 0).sum(dim=1, keepdim=True)
    ranked = maps.sort(dim=1, descending=True).values
    return _consensus_iou(maps >= ranked.gather(1, (area - 1).clamp(min=0)), gt)


def pointing(maps: Tensor, gt: Tensor) -> Tensor:
    """1 (N,) where the map's peak lies in the ground truth, else 0; several equal peaks share the answer."""
    maps, gt = _flat(maps, gt)
    peaks = maps == maps.amax(dim=1, keepdim=True)
    return (peaks & (gt > 0)).sum(dim=1).double() / peaks.sum(dim=1)


def _flat(maps: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
    if maps.ndim != 3 or maps.shape != gt.shape:
        raise ValueError(f"maps and gt must both have shape (N, S, S), got {tuple(maps.shape)} and {tuple(gt.shape)}")
    check_finite(maps)
    return maps.flatten(1), gt.flatten(1)


def check_finite(maps: Tensor) -> None:
    """Raise ValueError for maps with NaN or infinite values, which comparisons would turn into a score."""
    if not maps.isfinite().all():
        raise ValueError("maps must be finite, got NaN or infinite values")


def _consensus_iou(predicted: Tensor, gt: Tensor) -> Tensor:
    gt = gt.double()
    hit = (predicted * gt).sum(dim=1)
    false_alarm = (predicted & (gt == 0)).sum(dim=1)
    return hit / (gt.sum(dim=1) + false_alarm).clamp(min=1e-12)  # the bound only matters where hit is 0


def confidence(maps: Tensor) -> Tensor:
    """How sure (N,) a map is that there is a source at all: the mean of its highest quarter (Mo and Morgado, 2022)."""
    pixels = maps.flatten(1)
    return pixels.topk(max(pixels.shape[1] // 4, 1), dim=1).values.mean(dim=1)


def detection(confidence: Tensor, hit: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Average precision and the best F1 over all confidences (n,) from which a source counts as found.

    Found and ``hit`` (in the right place) is a true positive, found elsewhere or in a negative a false one, and a
    positive that is not found a false negative. Source: Mo and Morgado, *A Closer Look at Weakly-Supervised
    Audio-Visual Source Localization*, NeurIPS 2022, whose code takes every (n / 200)-th confidence and counts area
    from the first of them on.
    """
    order = confidence.argsort(descending=True)
    hit, positive = (hit & positive)[order], positive[order]
    found = torch.arange(1, len(order) + 1, device=order.device)
    right, missed = hit.cumsum(0), positive.sum() - positive.cumsum(0)
    last = confidence[order].diff(append=confidence.new_full((1,), -torch.inf)) < 0  # of equal ones
    found, right, missed = found[last], right[last].double(), missed[last]
    precision, recall = right / found, right / (right + missed).clamp(min=1)
    best_from_here = precision.flip(0).cummax(0).values.flip(0)
    area = (recall.diff(prepend=recall.new_zeros(1)) * best_from_here).sum()
    return area, (2 * precision * recall / (precision + recall).clamp(min=1e-12)).max()


class Scored(NamedTuple):
    """Scores of a data set by name, float64 scalars, and those of its clips (n,), ordered by their ``index``."""

    summary: dict[str, Tensor]
    clips: dict[str, Tensor]


class LocalizationScores(Metric):
    """Scores over a data set of clips with boxes; in several processes each scores its share.

    The summary has ``ap50`` (share of clips with cIoU >= 0.5, what papers report as cIoU), ``ciou`` (average), ``auc``
    (trapezoid of the success rate over thresholds 0, 0.05 .. 1), ``pointing`` and ``adaptive_ciou``, all of clips whose
    source is in the frame. Where there are others, it has ``ap`` and ``max_f1`` over all, see :func:`detection`.
    """

    full_state_update = False
    rows: list[Tensor]  # of clips: index, positive, and the scores
    columns = ("index", "positive", "ciou", "pointing", "adaptive_ciou", "confidence")

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, maps: Tensor, gt: Tensor, index: Tensor, positive: Tensor | None = None) -> None:
        """Add clips.

        Args:
            maps, gt: ``(N, S, S)``.
            index: ``(N,)``, which clips of the data set they are.
            positive: ``(N,)``, whether the sound's source is in the frame; by default all are.
        """
        if positive is None:
            positive = torch.ones_like(index, dtype=torch.bool)
        values = (index, positive, ciou(maps, gt), pointing(maps, gt), adaptive_ciou(maps, gt), confidence(maps))
        self.rows.append(torch.stack([value.double() for value in values], dim=1))

    def compute(self) -> Scored:
        """Scores of all clips so far, in 0..1 but for a clip's ``confidence``."""
        rows = dim_zero_cat(self.rows)
        clips = dict(zip(self.columns, rows[rows[:, 0].argsort()].unbind(1), strict=True))
        positive = clips["positive"] > 0
        values = clips["ciou"][positive]
        success_rate = (values[:, None] >= THRESHOLDS.to(values.device)).double().mean(dim=0)
        summary = {
            "ap50": success_rate[10],
            "ciou": values.mean(),
            "auc": torch.trapezoid(success_rate, THRESHOLDS.to(values.device)),
            "pointing": clips["pointing"][positive].mean(),
            "adaptive_ciou": clips["adaptive_ciou"][positive].mean(),
        }
        if not positive.all():
            summary["ap"], summary["max_f1"] = detection(clips["confidence"], clips["ciou"] >= 0.5, positive)
        return Scored(summary, clips)


def centre_box(gt: Tensor) -> Tensor:
    """Maps like ``gt`` that fall off from the centre in squares: the upper half is a centred box of half the frame."""
    height, width = gt.shape[1:]
    y = (torch.arange(height, device=gt.device) - (height - 1) / 2).abs() / height
    x = (torch.arange(width, device=gt.device) - (width - 1) / 2).abs() / width
    return (1 - torch.maximum(y[:, None], x[None, :])).expand(gt.shape)


def whole_frame(gt: Tensor) -> Tensor:
    """Constant maps like ``gt``: every pixel counts as predicted."""
    return torch.ones_like(gt, dtype=torch.float32)


def oracle(gt: Tensor) -> Tensor:
    """Maps whose upper half is the best half frame there is: the ground truth, highest first, and other pixels."""
    # Distinct values, or the median of a small ground truth would be 0 and let every pixel in.
    order = torch.arange(gt[0].numel(), device=gt.device).view(gt.shape[1:]) / gt[0].numel()
    return torch.where(gt > 0, 1 + gt.double(), 0) * 2 + order.double()
