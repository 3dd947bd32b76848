"""Scores of maps, whichever ground truth the clips have."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from fnac.metrics import LocalizationScores, Scored
from fnac.segmentation import SegmentationScores

BOX_SCORES = ("ap50", "ciou", "auc", "pointing", "adaptive_ciou")
MASK_SCORES = ("miou", "f_score", "f_score_of_batches")
Score = Literal["ap50", "ciou", "auc", "pointing", "adaptive_ciou", "miou", "f_score"]  # to choose an epoch by


class Evaluation(nn.Module):
    """Scores of one kind of map: by boxes (``gt``) or by masks (``mask``), as a data set's batches have it."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.masks = LocalizationScores(), SegmentationScores()

    def update(self, maps: Tensor, batch: dict[str, Any]) -> None:
        """Add the clips of a batch."""
        if "mask" in batch:
            self.masks.update(maps, batch["mask"], batch["index"])
        else:
            self.boxes.update(maps, batch["gt"], batch["index"], batch.get("positive"))

    def finish(self) -> Scored:
        """Scores of all clips, of all processes; the next update begins anew."""
        used = self.masks if self.masks.update_called else self.boxes
        scored = used.compute()
        used.reset()
        return scored
