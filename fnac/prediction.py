"""What ``fnac predict`` leaves: each clip's map, and a picture of it over the frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image

from fnac.data.dataset import IMAGENET_MEAN, IMAGENET_STD
from fnac.files import once_whole
from fnac.metrics import SIZE
from fnac.pictures import heat_over_frame


class PredictionWriter(BasePredictionWriter):
    """Writes ``<name>.npy``, the map of cosines, float32 (224, 224), and ``<name>.png``, the heat map over the frame.

    Args:
        output_dir: folder for both.
    """

    def __init__(self, output_dir: str = "runs/predictions") -> None:
        super().__init__("batch")
        self.output_dir = Path(output_dir)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: dict[str, Any],
        batch_indices: Sequence[int] | None,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write a batch's files."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        for name, image, found in zip(prediction["name"], batch["image"].cpu(), prediction["map"].cpu(), strict=True):
            frame = (255 * (image * std + mean)).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            frame = np.asarray(Image.fromarray(frame).resize((SIZE, SIZE)))
            with once_whole(self.output_dir / f"{name}.npy") as path, path.open("wb") as file:
                np.save(file, found.float().numpy())
            with once_whole(self.output_dir / f"{name}.png") as path:
                Image.fromarray(heat_over_frame(frame, found)).save(path, "PNG")
