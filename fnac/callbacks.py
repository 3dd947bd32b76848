"""What training keeps: the best and the last epoch's checkpoint, and the history of terms and scores."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from fnac.files import once_whole


class BestAndLast(ModelCheckpoint):
    """Keeps the last epoch (``last.ckpt``) and the best on the validation split (``best.ckpt``), where there is one.

    Args:
        monitor: score to choose by.
        dirpath: folder; by default below the logger's.
    """

    def __init__(self, monitor: str = "val/ap50", dirpath: str | None = None) -> None:
        super().__init__(
            dirpath, filename="best", monitor=monitor, mode="max", save_last=False, enable_version_counter=False
        )
        self.fitting, self.resumed_from = False, Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Without validation there is no best: only the last epoch is kept."""
        super().setup(trainer, pl_module, stage)
        self.fitting = stage == "fit"
        folders: Mapping[str, Any] = getattr(trainer.datamodule, "folders", {})  # type: ignore[attr-defined]
        if self.fitting and folders.get("val") is None:
            self.monitor, self.save_top_k = None, 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the epoch, best or not. Lightning's own ``save_last`` writes the file with a new best only."""
        super().on_train_epoch_end(trainer, pl_module)
        trainer.save_checkpoint(Path(self.dirpath or "", "last.ckpt"), weights_only=False)  # all there is to resume

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note where it lies: the best epoch so far lies beside it."""
        self.resumed_from = Path(trainer.ckpt_path or "")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best epoch so far; a run that goes on in another folder takes a copy of that along."""
        if not self.fitting:
            return
        if state_dict["dirpath"] != self.dirpath:
            state_dict = state_dict | {"dirpath": self.dirpath} | self._take_along(state_dict)
        super().load_state_dict(state_dict)

    def _take_along(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        best = self.resumed_from.with_name(f"{self.filename}{self.FILE_EXTENSION}")
        if not best.is_file():
            if state_dict["best_model_path"]:
                rank_zero_warn(f"{best} is not there: the best of the epochs to come will be kept")
            return {"best_model_path": "", "best_model_score": None, "best_k_models": {}, "kth_best_model_path": ""}
        copy = Path(self.dirpath or "", best.name)
        _copy(best, copy)
        models = {str(copy): state_dict["best_model_score"]}
        return {"best_model_path": str(copy), "best_k_models": models, "kth_best_model_path": str(copy)}


@rank_zero_only
def _copy(source: Path, target: Path) -> None:
    with once_whole(target) as partial:
        shutil.copyfile(source, partial)


class History(Callback):
    """The training terms of every step and the validation scores of every epoch; checkpoints carry them.

    ``train`` and ``val`` are lists of dicts that hold ``step`` and the values by name.
    """

    def __init__(self) -> None:
        self.train: list[dict[str, float]] = []
        self.val: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Note the step's terms."""
        self.train.append(self._logged(trainer, "train/"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the epoch's scores."""
        if not trainer.sanity_checking:
            self.val.append(self._logged(trainer, "val/"))

    @staticmethod
    def _logged(trainer: Trainer, prefix: str) -> dict[str, float]:
        values = {k.removeprefix(prefix): float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}
        return {"step": trainer.global_step, **values}

    def state_dict(self) -> dict[str, Any]:
        """Both lists."""
        return {"train": self.train, "val": self.val}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from both lists."""
        self.train, self.val = list(state_dict["train"]), list(state_dict["val"])
