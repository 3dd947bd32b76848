"""The Lightning module: START HERE for how FNAC is trained and evaluated, with the loss of ``fnac_kernels``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from fnac import metrics, segmentation
from fnac.checkpoints import read_weights
from fnac.evaluation import Evaluation
from fnac.metrics import Upsampling
from fnac.model import AudioVisualModel, image_encoder, load_strictly, object_maps
from fnac.seeding import check_seed, mixed, seeded
from fnac_kernels import FNACLoss, paired_maps

MODEL, OBJECT_GUIDED, OBJECT_ONLY, ORACLE = "model", "model + objects", "object only", "oracle"
NEEDS_NO_MODEL: dict[str, Callable[[Tensor], Tensor]] = {
    "centre": metrics.centre_box, "whole frame": metrics.whole_frame, ORACLE: metrics.oracle,
}  # fmt: skip
CHOSEN_AT_USE = (
    "image_weights", "init_from", "upsampling", "object_weights", "object_alpha", "channels_last", "backend",
)  # fmt: skip
TERMS = ("loss", "nce", "fns_audio", "tne", "fns_visual")


class Localization(LightningModule):
    """Trains the two encoders with the FNAC loss, and scores or returns their localization maps.

    The first epochs train with NCE alone, the others with the published weights. Random numbers of a step (dropout)
    depend on ``seed``, rank, step and part alone, so a resumed run draws what an uninterrupted one would have drawn.

    Args:
        dim: size of the embeddings.
        image_stages: stages of the image ResNet-18 to keep, see :class:`~fnac.model.AudioVisualModel`.
        audio_stages: the same for audio.
        image_dropout: dropout of the image features.
        audio_dropout: dropout of the audio features.
        image_weights: what the image encoder starts from: "imagenet", a file, or null for random weights.
        init_from: file to take the weights of the whole model from: an official checkpoint, one of this project.
        tau: temperature.
        fg_threshold: of the foreground mask.
        weights: of nce, fns_audio, tne, fns_visual after the warm-up. The three distances are means over N * N
            pairs: the published 100 belongs to a batch of 256, which gradients accumulated over smaller ones are not.
        adjacency_threshold: audio similarity from which a pair is no negative (null: the published method).
        negatives: where several processes train, "process" compares a clip with those of its own process's batch, as
            the official code does, and "all" with those of all processes: a batch that one device cannot hold.
        warmup_epochs: epochs that train with NCE alone.
        lr: learning rate of Adam.
        weight_decay: of Adam.
        upsampling: from cells to pixels, at evaluation.
        object_weights: image encoder of the object-only baseline, as ``image_weights``; null takes the model's own.
        object_alpha: also score the object-guided map, ``alpha * map + (1 - alpha) * objects``, each scaled to 0..1.
            EZ-VSL and FNAC use 0.4.
        channels_last: memory format of the encoders.
        backend: of the loss's kernels; null chooses by device.
        seed: of the weights and of dropout.
    """

    def __init__(
        self,
        dim: int = 512,
        image_stages: int = 4,
        audio_stages: int = 4,
        image_dropout: float = 0.9,
        audio_dropout: float = 0.0,
        image_weights: str | None = None,
        init_from: str | None = None,
        tau: float = 0.03,
        fg_threshold: float = 0.6,
        weights: tuple[float, float, float, float] = (1, 100, 100, 100),
        adjacency_threshold: float | None = None,
        negatives: Literal["process", "all"] = "process",
        warmup_epochs: int = 5,
        lr: float = 1e-4,
        weight_decay: float = 1e-4,
        upsampling: Upsampling = "bicubic",
        object_weights: str | None = None,
        object_alpha: float | None = None,
        channels_last: bool = True,
        backend: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("dim", dim, 1), ("warmup_epochs", warmup_epochs, 0), ("lr", lr, 0), ("weight_decay", weight_decay, 0),
        ):  # fmt: skip
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        check_seed(seed)
        for name, value in (("image_dropout", image_dropout), ("audio_dropout", audio_dropout)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        if negatives not in ("process", "all"):
            raise ValueError(f'negatives must be "process" or "all", got {negatives!r}')
        if object_alpha is not None and not 0 <= object_alpha <= 1:
            raise ValueError(f"object_alpha must be between 0 and 1, got {object_alpha}")
        # Checkpoints name what the weights mean. What else there is to choose stays the caller's: Lightning's command
        # line would take it from the checkpoint, whatever its flags say.
        self.save_hyperparameters(ignore=[*CHOSEN_AT_USE])
        self.upsampling, self.object_alpha = upsampling, object_alpha
        with seeded(seed):
            self.model = AudioVisualModel(
                dim,
                image_stages=image_stages,
                audio_stages=audio_stages,
                image_dropout=image_dropout,
                audio_dropout=audio_dropout,
                image_weights=image_weights,
            )
        if init_from is not None:
            load_strictly(self.model, read_weights(init_from), init_from)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        # In a tuple, out of sight of parameters() and state_dict(): it is no part of the model.
        self._objects = (image_encoder(image_stages, object_weights).eval(),) if object_weights else ()
        self.loss = FNACLoss(
            tau,
            fg_threshold=fg_threshold,
            adjacency_threshold=adjacency_threshold,
            weights=weights,
            backend=backend,
            distributed=negatives == "all",
        )
        self.weights = self.loss.weights
        self.val_scores = Evaluation()
        rows = [MODEL, *([OBJECT_GUIDED] if object_alpha is not None else []), OBJECT_ONLY, *NEEDS_NO_MODEL]
        self.test_scores = nn.ModuleDict({row: Evaluation() for row in rows})
        self.results: dict[str, dict[str, float]] = {}
        self.clip_scores: dict[str, dict[str, Tensor]] = {}

    def configure_model(self) -> None:
        """Take the trainer's precision: it would do so after loading a checkpoint, whose float64 were rounded then."""
        if self._trainer is not None:  # load_from_checkpoint has none
            for module in (self, *self._objects):
                self.trainer.precision_plugin.convert_module(module)

    def forward(self, image: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised features ``img (N, C, H, W)`` and ``aud (N, C)``."""
        return self.model(image.contiguous(memory_format=self.memory_format), audio)

    def maps(self, image: Tensor, audio: Tensor) -> Tensor:
        """Cosine of each clip's image cells and sound, brought to pixels: float32 ``(N, 224, 224)``."""
        img, aud = self(image, audio)
        cosines = paired_maps(img, aud, 1.0, backend=self.loss.backend)
        return metrics.upsample(cosines, mode=self.upsampling)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Switch to the published weights once the warm-up is over; seed each batch whose gradients a step takes."""
        # Not at the epoch's start, which Lightning leaves out where it resumes within an epoch.
        warming_up = self.current_epoch < self.hparams["warmup_epochs"]
        self.loss.weights = (self.weights[0], 0, 0, 0) if warming_up else self.weights
        part = batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(mixed(self.hparams["seed"], self.global_rank, self.global_step, part))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of a batch; its terms are logged."""
        output = self.loss(*self(batch["image"], batch["audio"]))
        terms = {f"train/{term}": getattr(output, term).detach() for term in TERMS}
        self.log_dict(terms, batch_size=len(batch["image"]))
        self.log("nce", output.nce.detach(), prog_bar=True, logger=False, batch_size=len(batch["image"]))
        return output.loss

    def on_validation_start(self) -> None:
        """Validate the model that checkpoints hold, process 0's: where validation begins between accumulated batches,
        the others' running statistics are still their own."""
        if self.trainer.world_size > 1:
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score the maps."""
        self.val_scores.update(self.maps(batch["image"], batch["audio"]), batch)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the whole split."""
        scores = {name: value.float() for name, value in self.val_scores.finish().summary.items()}
        self.log_dict({f"val/{name}": value for name, value in scores.items()}, sync_dist=True)
        shown = next(iter(scores))
        self.log(shown, scores[shown], prog_bar=True, logger=False, sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score the maps, and those of the baselines."""
        if "mask" in batch:
            truth, draws = batch["mask"], NEEDS_NO_MODEL | {ORACLE: segmentation.oracle}
        else:
            truth, draws = batch["gt"], NEEDS_NO_MODEL
        found = self._compared_maps(batch["image"], batch["audio"])
        found |= {name: draw(truth) for name, draw in draws.items()}
        for row, scores in self.test_scores.items():
            scores.update(found[row], batch)  # type: ignore[operator]

    def on_test_epoch_end(self) -> None:
        """Keep the table as ``results``, {row: {score: value in 0..1}}, and log the model's row.

        ``clip_scores`` are those of each clip, {row: {score: values (n,)}}, with its ``index`` in the data set.
        """
        for row, scores in self.test_scores.items():
            summary, self.clip_scores[row] = scores.finish()  # type: ignore[operator]
            self.results[row] = {name: float(value) for name, value in summary.items()}
        self.log_dict({f"test/{name}": value for name, value in self.results[MODEL].items()}, sync_dist=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Names, and maps of cosines ``(N, 224, 224)``. Ends at SIGTERM, for which Lightning does not look here."""
        if self.trainer.received_sigterm:
            raise SIGTERMException
        return {"name": batch["name"], "map": self.maps(batch["image"], batch["audio"])}

    def on_predict_epoch_end(self) -> None:
        """Wait for the other processes' maps: one that failed fails all."""
        self.trainer.strategy.barrier()

    def _compared_maps(self, image: Tensor, audio: Tensor) -> dict[str, Tensor]:
        maps = self.maps(image, audio)
        encoder = self._objects[0].to(image.device) if self._objects else self.model.imgnet
        objects = metrics.upsample(object_maps(encoder, image), mode=self.upsampling)
        found = {MODEL: maps, OBJECT_ONLY: objects}
        if (alpha := self.object_alpha) is not None:
            found[OBJECT_GUIDED] = alpha * metrics.minmax(maps) + (1 - alpha) * metrics.minmax(objects)
        return found

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with another optimizer: torch takes the saved settings, whether they fit it or not."""
        if self._trainer is None or self.trainer.state.fn != "fit" or not checkpoint.get("optimizer_states"):
            return
        here = _settings(_optimizer(self.configure_optimizers()).state_dict())
        there = _settings(checkpoint["optimizer_states"][0])
        differ = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        if differ:
            told = ", ".join(f"{name} {here.get(name)} (was {there.get(name)})" for name in differ)
            raise ValueError(
                f"--optimizer or --lr_scheduler is not the checkpoint's, by {told}: give the same ones, or take the "
                "checkpoint's weights alone, with --model.init_from instead of --ckpt_path"
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, in one pass over the parameters."""
        return torch.optim.Adam(
            self.model.parameters(), self.hparams["lr"], weight_decay=self.hparams["weight_decay"], fused=True
        )


def _optimizer(configured: Any) -> torch.optim.Optimizer:
    """The one of what ``configure_optimizers`` returns: itself, with schedulers in lists, or in a dict."""
    if isinstance(configured, Mapping):
        return configured["optimizer"]
    return configured[0][0] if isinstance(configured, (list, tuple)) else configured


def _settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of an optimizer's state, what was chosen: a schedule changes the rate, and keeps the one that it began with."""
    group = state["param_groups"][0]
    chosen = {name: tuple(v) if isinstance(v, list) else v for name, v in group.items() if name != "params"}
    return chosen | {"lr": chosen.get("initial_lr", chosen["lr"])}


def accelerator() -> Literal["cuda", "cpu"]:
    """CUDA where there is a device. Lightning's "auto" would also choose Apple's, which has no float64 for scores."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_precision() -> Literal["bf16-mixed", "32-true"]:
    """bfloat16 autocast where the machine multiplies bfloat16 faster than float32, else plain float32."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    found = torch.cpu.get_capabilities()
    return "bf16-mixed" if found.get("amx_bf16") or found.get("avx512_bf16") else "32-true"
