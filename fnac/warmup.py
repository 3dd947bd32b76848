"""Supervised warm-up of an image encoder on generated single-object frames: what stands in for ImageNet weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from fnac.checkpoints import save_weights
from fnac.data.datamodule import single_object_loaders
from fnac.data.scene import CLASSES
from fnac.model import WIDTHS, feature_map, image_encoder
from fnac.seeding import seeded


class ObjectClassifier(LightningModule):
    """An image encoder with mean pooling and a linear layer, trained to name the one object of a frame."""

    def __init__(self, *, image_stages: int, lr: float, steps: int) -> None:
        super().__init__()
        self.net = image_encoder(image_stages).to(memory_format=torch.channels_last)
        self.head = nn.Linear(WIDTHS[image_stages - 1], len(CLASSES))
        self.accuracy = MulticlassAccuracy(len(CLASSES), average="micro")
        self.lr, self.steps = lr, steps

    def forward(self, image: Tensor) -> Tensor:
        """Scores ``(N, classes)``."""
        image = image.contiguous(memory_format=torch.channels_last)
        return self.head(feature_map(self.net, image).mean(dim=(2, 3)))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross entropy."""
        loss = F.cross_entropy(self(batch["image"]), _targets(batch).to(self.device))
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Accuracy on frames that are not trained on."""
        self.accuracy(self(batch["image"]), _targets(batch).to(self.device))
        self.log("accuracy", self.accuracy, prog_bar=True, batch_size=len(batch["image"]))

    def configure_optimizers(self) -> Any:
        """Adam under the one-cycle schedule."""
        adam = torch.optim.Adam(self.parameters(), self.lr, weight_decay=1e-4, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(adam, self.lr, total_steps=self.steps)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _targets(batch: dict[str, Any]) -> Tensor:
    return torch.tensor([CLASSES.index(label) for label in batch["label"]])


def warm_up(
    root: str | Path,
    save_to: str | Path,
    *,
    image_stages: int = 4,
    image_size: int = 112,
    batch_size: int = 64,
    epochs: int = 10,
    lr: float = 1e-3,
    seed: int = 0,
    **trainer: Any,
) -> float:
    """Train an image encoder on the ``single`` frames of a generated data set and save its weights.

    Args:
        root: the data set.
        save_to: file for the weights; ``image_weights`` of the model can name it.
        image_stages: stages of ResNet-18 to keep.
        image_size: side of the images in pixels.
        batch_size: frames per step.
        epochs: passes over nine tenths of the frames.
        lr: highest learning rate.
        seed: of weights, order and augmentation.
        trainer: further arguments of Lightning's Trainer.

    Returns:
        The accuracy on the other tenth, in 0..1.
    """
    train, held_out = single_object_loaders(root, image_size=image_size, batch_size=batch_size, seed=seed)
    with seeded(seed):
        classifier = ObjectClassifier(image_stages=image_stages, lr=lr, steps=epochs * len(train))
    engine = Trainer(
        max_epochs=epochs, check_val_every_n_epoch=epochs, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_model_summary=False, **trainer,
    )  # fmt: skip
    engine.fit(classifier, train, held_out)
    save_weights(classifier.net.state_dict(), save_to)
    return float(engine.callback_metrics["accuracy"])
