"""What training keeps: the best and the last epoch's checkpoint, and the history of terms and scores."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from fnac.data.avsbench import AVSBench
from fnac.evaluation import BOX_SCORES, MASK_SCORES, Score
from fnac.files import once_whole


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints beside their place. Lightning's own way is to copy them from the folder of temporary files,
    which leaves half a file where that lies on another disk and the copy is cut off.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a file under its name only once it is whole; what has no folders (``s3://``) is left to Lightning."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with once_whole(path) as partial:
            torch.save(checkpoint, partial)


class BestAndLast(ModelCheckpoint):
    """Keeps the last epoch (``last.ckpt``) and the best on the validation split (``best.ckpt``), where there is one.

    A run that is stopped within an epoch keeps its last whole step as ``last.ckpt``.

    Args:
        score: to choose by; by default ``ap50``, or ``miou`` where the validation clips have masks.
        dirpath: folder; by default below the logger's.
    """

    def __init__(self, score: Score | None = None, dirpath: str | None = None) -> None:
        super().__init__(dirpath, filename="best", mode="max", save_last=False, enable_version_counter=False)
        self.score = score
        self.fitting, self.between_steps, self.told_to_stop = False, False, False
        self.resumed_from = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Without validation there is no best: only the last epoch is kept.

        Raises:
            ValueError: the validation clips have no such score.
        """
        super().setup(trainer, pl_module, stage)
        self.fitting, self.between_steps, self.told_to_stop = stage == "fit", False, False
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()
        folders: Mapping[str, Any] = getattr(trainer.datamodule, "folders", {})  # type: ignore[attr-defined]
        validation = folders.get("val")
        measured = MASK_SCORES if isinstance(validation, AVSBench) else BOX_SCORES
        scores = [score for score in measured if score in get_args(Score)]
        if self.fitting and self.score not in (None, *scores):
            raise ValueError(
                f"score (--best_by) is {self.score!r}; validation clips of this kind have {', '.join(scores)}"
            )
        if validation is not None:
            self.monitor = f"val/{self.score or scores[0]}"
        elif self.fitting and self.score is not None:
            raise ValueError(
                f"score (--best_by) is {self.score!r}, by which no epoch can be chosen without validation clips"
            )
        elif self.fitting:
            self.monitor, self.save_top_k = None, 0

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on, before training, SIGTERM waits for the first moment at which all learn of it."""
        super().on_sanity_check_start(trainer, pl_module)
        self._on_sigterm(trainer, self._note_sigterm)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In several processes SIGTERM waits for a step's end, where all learn of it."""
        super().on_train_start(trainer, pl_module)
        self._on_sigterm(trainer, self._note_sigterm)
        self._stop_together(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where nothing is trained, SIGTERM ends a process at once: the others miss it when they next exchange."""
        super().on_validation_start(trainer, pl_module)
        if not self.fitting:
            self._on_sigterm(trainer, _end)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation alone."""
        super().on_test_start(trainer, pl_module)
        self._on_sigterm(trainer, _end)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation alone."""
        super().on_predict_start(trainer, pl_module)
        self._on_sigterm(trainer, _end)

    @staticmethod
    def _on_sigterm(trainer: Trainer, handler: Callable[..., None]) -> None:
        """Replace Lightning's handler in several processes: it tells the others at once, amid what they exchange, so
        that all may wait for ever. Lightning takes ours off at the end.
        """
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)

    def _note_sigterm(self, *_: Any) -> None:
        self.told_to_stop = True

    def _stop_together(self, trainer: Trainer) -> None:
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self.told_to_stop, all=False):
            raise SIGTERMException

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here to the step's end there is no state to resume exactly from."""
        self.between_steps = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the step where training stops within an epoch: Lightning would call that the epoch's end."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        self._keep_if_stopping(trainer)
        if self._between_batches(trainer):
            self._stop_together(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the scores too where training stops within an epoch: Lightning validates then."""
        super().on_validation_end(trainer, pl_module)
        self._keep_if_stopping(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the epoch, best or not. Lightning's own ``save_last`` writes the file with a new best only."""
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.is_last_batch:
            self._keep_last(trainer)
        self._stop_together(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the last step where none is under way: on SIGTERM, which waits for its end, or an unreadable file."""
        super().on_exception(trainer, pl_module, exception)
        together = trainer.world_size == 1 or isinstance(exception, SIGTERMException)  # else the others would not come
        if trainer.training and together and self._between_batches(trainer):
            self._keep_last(trainer)
        # Processes that validate are stopped at different batches, so one alone keeps what it was validating.
        trained = self.between_steps or trainer.is_last_batch
        if self.fitting and trainer.validating and trainer.world_size == 1 and trained:
            # As if within the first batch, so that the whole split is validated again: scores are not in the file.
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.increment_ready()
            progress.increment_started()
            self._keep_last(trainer)

    def _between_batches(self, trainer: Trainer) -> bool:
        """Whether no step is under way, and the epoch has not ended either."""
        return self.between_steps and not trainer.is_last_batch

    def _keep_if_stopping(self, trainer: Trainer) -> None:
        stopping = trainer.should_stop or trainer.global_step == trainer.max_steps
        if stopping and self._between_batches(trainer):
            self._keep_last(trainer)

    def _keep_last(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(Path(self.dirpath or "", "last.ckpt"), weights_only=False)  # all, to resume from

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note where it lies: the best epoch so far lies beside it."""
        self.resumed_from = Path(trainer.ckpt_path or "")

    @property
    def state_key(self) -> str:
        """One for all: Lightning's has the score in it, and misses the callback of a checkpoint that has another."""
        return type(self).__name__

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best epoch so far; a run that goes on in another folder takes a copy of that along."""
        if not self.fitting:
            return
        if state_dict["monitor"] != self.monitor:
            told = (
                f"the best epoch so far was chosen by {state_dict['monitor']}; by {self.monitor} the choice begins anew"
            )
            rank_zero_warn(told)
            return
        if state_dict["dirpath"] != self.dirpath:
            state_dict = state_dict | {"dirpath": self.dirpath} | self._take_along(state_dict)
        super().load_state_dict(state_dict)

    def _take_along(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        best = self.resumed_from.with_name(f"{self.filename}{self.FILE_EXTENSION}")
        if not best.is_file() or state_dict["best_model_score"] is None:
            if state_dict["best_model_path"]:
                rank_zero_warn(f"{best} is not there: the best of the epochs to come will be kept")
            return {"best_model_path": "", "best_model_score": None, "best_k_models": {}, "kth_best_model_path": ""}
        copy = Path(self.dirpath or "", best.name)
        _copy(best, copy)
        models = {str(copy): state_dict["best_model_score"]}
        return {"best_model_path": str(copy), "best_k_models": models, "kth_best_model_path": str(copy)}


def _end(*_: Any) -> None:
    raise SIGTERMException


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
