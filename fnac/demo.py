"""``fnac demo``: from nothing to a trained, evaluated and illustrated model on generated data."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from fnac.callbacks import BestAndLast, History
from fnac.checkpoints import read_checkpoint
from fnac.data.datamodule import ClipData, single_for_training
from fnac.data.generate import make_data
from fnac.files import once_whole
from fnac.pictures import choose_examples, gallery, to_png
from fnac.report import write_report
from fnac.results import environment, render, write_results, write_text
from fnac.seeding import check_seed
from fnac.training import MODEL, OBJECT_ONLY, Localization, accelerator, fast_precision
from fnac.warmup import warm_up
from fnac_kernels import info

FNAC, NCE, UNTRAINED, WARM_UP = "FNAC", "NCE alone", "untrained", "warm-up"
BLIND = (UNTRAINED, OBJECT_ONLY, "centre", "whole frame")  # rows that do not see the ground truth
COMPARED = {"ap50": "AP50", "pointing": "pointing accuracy"}  # scores in words


@dataclass(frozen=True)
class DemoSettings:
    """What the demo's result depends on.

    The three distances of the loss are means over the batch's pairs. The published weight 100 belongs to a batch of
    256; with 64 clips the same gradient per pair is that of a weight of 25.
    """

    seed: int
    train: int
    val: int
    test: int
    single: int
    encoder_epochs: int
    epochs: int
    warmup_epochs: int
    batch_size: int
    distance_weight: float
    image_size: int = 96
    seconds: float = 0.5
    image_stages: int = 3
    audio_stages: int = 3


def demo(
    out: str = "runs/demo",
    seed: int = 0,
    train: int = 3000,
    val: int = 200,
    test: int = 400,
    single: int = 1500,
    encoder_epochs: int = 6,
    epochs: int = 5,
    warmup_epochs: int = 2,
    batch_size: int = 64,
    distance_weight: float = 25.0,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Generate data, train FNAC and NCE alone on it, evaluate on the test split, and write a report.

    What a former call with the same settings left in ``out`` is used again: data, image encoder, checkpoints; a run
    that was interrupted goes on from its last epoch.

    Args:
        out: folder for everything.
        seed: of the data and of training.
        train: training clips.
        val: validation clips, which choose the epoch to test.
        test: test clips.
        single: single-object frames for the image encoder's warm-up.
        encoder_epochs: epochs of that warm-up.
        epochs: epochs of training, of which the first ``warmup_epochs`` with NCE alone, once for both.
        warmup_epochs: see ``epochs``.
        batch_size: clips per step.
        distance_weight: weight of the three L1 terms after the warm-up.
        progress: show progress bars.

    Returns:
        The table: row -> score -> value in 0..1.
    """
    settings = DemoSettings(
        seed, train, val, test, single, encoder_epochs, epochs, warmup_epochs, batch_size, distance_weight
    )
    _check(settings)
    folder = Path(out)
    _claim(folder, settings)
    with _quiet():
        return _Demo(folder, settings, progress).run()


def _check(settings: DemoSettings) -> None:
    """Refuse what could not be trained or scored before anything is trained."""
    check_seed(settings.seed)
    for name in ("warmup_epochs", "val", "test", "single", "encoder_epochs", "epochs", "batch_size"):
        least = 0 if name == "warmup_epochs" else 1
        if (value := getattr(settings, name)) < least:
            raise ValueError(f"{name} is {value}; it should be at least {least}")
    if min(settings.train, single_for_training(settings.single)) < settings.batch_size:
        raise ValueError(
            f"train is {settings.train}, single {settings.single}; train and nine tenths of single should be at least "
            f"batch_size, which is {settings.batch_size}: training takes whole batches"
        )


def _claim(folder: Path, settings: DemoSettings) -> None:
    """Refuse a folder that holds another demo."""
    record = folder / "settings.json"
    if record.is_file():
        if _read(record) != asdict(settings):
            raise FileExistsError(f"out: {folder} holds a demo with other settings; choose another folder or delete it")
    else:
        write_text(record, json.dumps(asdict(settings), indent=2))


def _read(record: Path) -> Any:
    try:
        return json.loads(record.read_text())
    except ValueError:
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's hints, which are for people who write trainers."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with warnings.catch_warnings():
        for hint in (
            "does not have many workers",
            "Checkpoint directory",
            "no logger configured",
            "found in eval mode",
            "callbacks used to create the checkpoint",
            "isinstance.treespec, LeafSpec",
        ):
            warnings.filterwarnings("ignore", f".*{hint}.*")
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(level)


class _Demo:
    def __init__(self, folder: Path, settings: DemoSettings, progress: bool) -> None:
        self.folder, self.settings, self.progress = folder, settings, progress
        self.precision = fast_precision()
        self.encoder = folder / "image_encoder.pt"
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, dict[str, float]]:
        settings, folder = self.settings, self.folder
        with self._stage("data"):
            root = make_data(
                folder / "data", seed=settings.seed, train=settings.train, val=settings.val, test=settings.test,
                single=settings.single, image_size=settings.image_size, seconds=settings.seconds,
                progress=self.progress,
            )  # fmt: skip
        if not self.encoder.is_file():
            with self._stage("image encoder, supervised"):
                accuracy = warm_up(
                    root, self.encoder, image_stages=settings.image_stages, image_size=settings.image_size,
                    batch_size=settings.batch_size, epochs=settings.encoder_epochs, seed=settings.seed,
                    enable_progress_bar=self.progress, precision=self.precision, accelerator=accelerator(), devices=1,
                )  # fmt: skip
            print(f"names the object of {accuracy:.1%} of held-out single-object frames")
        data = ClipData(
            str(root), batch_size=settings.batch_size, image_size=settings.image_size, clip_seconds=settings.seconds,
            seed=settings.seed, cache=True,
        )  # fmt: skip
        shared = min(settings.warmup_epochs, settings.epochs)
        if shared > 0:
            self._train(WARM_UP, data, shared)
        runs = {name: self._train(name, data, settings.epochs) for name in (FNAC, NCE)}
        with self._stage("evaluation"):
            table, examples = self._evaluate(data)
        self._report(table, examples, runs, data)
        return table

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)

    def _model(self, name: str) -> Localization:
        settings = self.settings
        weight = settings.distance_weight if name == FNAC else 0
        return Localization(
            image_stages=settings.image_stages,
            audio_stages=settings.audio_stages,
            image_weights=str(self.encoder),
            object_weights=str(self.encoder),
            weights=(1, weight, weight, weight),
            warmup_epochs=settings.warmup_epochs,
            seed=settings.seed,
        )

    def _trainer(self, *callbacks: Any, **options: Any) -> Trainer:
        return Trainer(
            accelerator=accelerator(), devices=1, precision=self.precision, logger=False, callbacks=list(callbacks),
            enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), enable_model_summary=False,
            enable_progress_bar=self.progress, num_sanity_val_steps=0, **options,
        )  # fmt: skip

    def _checkpoints(self, name: str) -> Path:
        return self.folder / name.lower().replace(" ", "-")

    def _train(self, name: str, data: ClipData, epochs: int) -> History:
        """Train up to an epoch: from the run's own last one, else from the warm-up's, which is the same for all."""
        history = History()
        last = self._checkpoints(name) / "last.ckpt"
        found = [path for path in (last, self._checkpoints(WARM_UP) / last.name) if path.is_file()]
        # cIoU's mean, not AP50: that saturates on this data and no longer tells epochs apart.
        checkpoints = BestAndLast("ciou", dirpath=str(last.parent))
        if found:
            read_checkpoint(found[0])  # which names the file where it is damaged
        trainer = self._trainer(history, checkpoints, max_epochs=epochs)
        with self._stage(f"training, {name}"):
            trainer.fit(self._model(name), data, ckpt_path=str(found[0]) if found else None, weights_only=True)
        return history

    def _evaluate(self, data: ClipData) -> tuple[dict[str, dict[str, float]], list[Any]]:
        tester = self._trainer()
        table: dict[str, dict[str, float]] = {}
        for name in (FNAC, NCE, UNTRAINED):
            model = self._model(name)
            best = None if name == UNTRAINED else str(self._checkpoints(name) / "best.ckpt")
            tester.test(model, data, ckpt_path=best, verbose=False, weights_only=True)
            table[name] = model.results.pop(MODEL)
            if name == FNAC:
                maps = torch.cat([batch["map"].float() for batch in tester.predict(model, data)])  # type: ignore[union-attr, call-overload]
                baselines = model.results
        return table | baselines, choose_examples(data.test_set, maps)

    def _report(
        self, table: dict[str, dict[str, float]], examples: list[Any], runs: Mapping[str, History], data: ClipData
    ) -> None:
        settings, folder = self.settings, self.folder
        if (results := folder / "results.json").is_file():  # of the call that did what this one found done
            self.seconds |= json.loads(results.read_text())["seconds"]
        notes = [margin(table), compare(table, settings.test)]
        write_results(
            results, table, settings=asdict(settings), seconds=self.seconds, precision=self.precision,
            upsampling="bicubic", input=data.input, selection="epoch with the best mean cIoU on the validation split",
        )  # fmt: skip
        write_report(
            folder / "report.html",
            title=f"FNAC on generated clips, seed {settings.seed}",
            introduction=[
                f"Two encoders learned from {settings.train} unlabelled clips which object of a frame makes the sound "
                "that is heard. Each frame shows two objects of different classes on clutter; one of them sounds. "
                "Boxes served to choose the epoch, on other clips, and to score it, on others again.",
                f"The image encoder did not start from ImageNet weights, as the paper's does, but from "
                f"{settings.encoder_epochs} epochs of naming the object in {settings.single} frames with one object "
                "each (supervised). Object only is that encoder's activity, without any sound.",
            ],
            table=table,
            trained=(FNAC, NCE),
            notes=notes,
            runs=runs,
            examples=examples,
            facts={
                **asdict(settings), "precision": self.precision, "up-sampling": "bicubic",
                "tested epoch": "the best by mean cIoU on the validation split",
                "loss kernels": info()["automatic"]["cuda" if torch.cuda.is_available() else "cpu"],
                **{f"seconds, {stage}": spent for stage, spent in self.seconds.items()}, **environment(),
            },
        )  # fmt: skip
        with once_whole(folder / "examples.png") as path:
            path.write_bytes(to_png(gallery([*examples[:-2][:4], *examples[-2:]])))
        print(f"\nTest split, {settings.test} clips, maps brought to pixels by bicubic interpolation; in percent:\n")
        print(render(table), *notes, f"The report: {folder / 'report.html'}", sep="\n")


def margin(table: Mapping[str, Mapping[str, float]]) -> str:
    """How far FNAC is above the best baseline that does not see the ground truth, in words."""
    parts = []
    for score, label in COMPARED.items():
        best = max(BLIND, key=lambda row: table[row][score])
        points = 100 * (table[FNAC][score] - table[best][score])
        parts.append(f"{label}: {points:+.1f} points against {best}, the best row that does not see the ground truth")
    return f"FNAC's {'; '.join(parts)}."


def compare(table: Mapping[str, Mapping[str, float]], clips: int) -> str:
    """Whether FNAC's three further terms helped on this data, in words, with the sampling error of the difference."""
    parts, ahead, behind = [], False, False
    for score, label in COMPARED.items():
        ours, theirs = table[FNAC][score], table[NCE][score]
        error = ((ours * (1 - ours) + theirs * (1 - theirs)) / clips) ** 0.5
        ahead |= ours - theirs > 2 * error
        behind |= theirs - ours > 2 * error
        parts.append(f"{label} FNAC {100 * ours:.1f}, NCE alone {100 * theirs:.1f} (standard error {100 * error:.1f})")
    verdict = {
        (True, False): "On this data FNAC's terms helped",
        (False, True): "On this data NCE alone does better than FNAC",
        (True, True): "On this data FNAC's terms helped some scores and harmed others",
        (False, False): "On this data NCE alone does as well as FNAC",
    }[ahead, behind]
    return f"{verdict}: {'; '.join(parts)}."
