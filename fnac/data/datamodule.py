"""The Lightning data module, with sampling that a resumed run continues exactly."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from fnac.audio import SEGMENT, Masks, MediaError
from fnac.data.avsbench import AVSBench, is_avsbench
from fnac.data.dataset import Augmentation, ClipDataset, OnBadClip
from fnac.data.layout import ClipFolder
from fnac.data.leakage import OnLeakage, refuse_leakage
from fnac.seeding import check_seed

READING = ("image_size", "sample_rate", "clip_seconds")  # what makes the network's input of a file
SAMPLING = ("batch_size", "seed", "flip", "masks", "mask_width")  # what else the course of training depends on
PROCESSES, CLIPS = "processes", "clips"  # and how many share out the clips, and which these are


class ClipData(LightningDataModule):
    """Training, validation and test clips.

    Args:
        root: folder of a generated data set (``fnac make-data``), or of a subset of AVSBench
            (:class:`~fnac.data.avsbench.AVSBench`), whose splits are used where the next three are not given. Of a
            generated one they may also give single fields, such as ``--data.test.negatives silent``.
        train: training clips, for instance ``--data.train.root FOLDER --data.train.ids LIST.txt``; see
            :class:`~fnac.data.layout.ClipFolder` for its fields. Boxes and classes, if any, are not trained on.
        val: annotated clips for validation; without them there is none.
        test: clips for testing (annotated) and predicting.
        batch_size: clips per step and process.
        num_workers: processes that decode; 0 decodes in the training process.
        image_size: side of the images in pixels.
        sample_rate: of the sounds in Hz; files of another rate are resampled.
        clip_seconds: length of sound, from the middle of the file, repeated if that is shorter.
        flip: mirror half of the training frames.
        masks: fill of the training masks on spectrograms: "mean", or "official" for what the official code does
            (0, which is loud, at places drawn over the wrong axis), or "none".
        mask_width: bound of the masks' widths.
        seed: of the order of training clips and of augmentation.
        on_bad_clip: "skip" leaves training clips out whose files are missing or unreadable, and says how many; a
            batch of none but those is an error. Validation and test never leave any out.
        on_leakage: what to do before training if clips of ``val`` or ``test`` are also in ``train``.
        cache: keep decoded clips in memory (of each worker), for small sets.
    """

    def __init__(
        self,
        root: str | None = None,
        train: ClipFolder | None = None,
        val: ClipFolder | None = None,
        test: ClipFolder | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
        image_size: int = 224,
        sample_rate: int = 16_000,
        clip_seconds: float = 3.0,
        flip: bool = True,
        masks: Masks = "mean",
        mask_width: int = 10,
        seed: int = 0,
        on_bad_clip: OnBadClip = "error",
        on_leakage: OnLeakage = "error",
        cache: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("image_size", image_size, 1),
            ("sample_rate", sample_rate, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        check_seed(seed)
        if round(clip_seconds * sample_rate) < SEGMENT:
            raise ValueError(
                f"clip_seconds must give at least {SEGMENT} samples, got {clip_seconds} s at {sample_rate} Hz"
            )
        self.folders: dict[str, ClipFolder | AVSBench | None] = {"train": train, "val": val, "test": test}
        split_of = AVSBench if root is not None and is_avsbench(root) else generated_split
        for split, folder in self.folders.items():
            if folder is None or not folder.root:
                made = None if root is None else split_of(str(root), split)
                self.folders[split] = made if folder is None else _completed(folder, made, split)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.augmentation = Augmentation(flip, masks, mask_width)
        self.on_bad_clip, self.on_leakage = on_bad_clip, on_leakage
        self.reading: dict[str, Any] = {
            "image_size": image_size,
            "sample_rate": sample_rate,
            "clip_seconds": clip_seconds,
            "cache": cache,
        }
        self.settings = {name: self.reading[name] for name in READING} | {
            "batch_size": batch_size, "seed": seed, "flip": flip, "masks": masks, "mask_width": mask_width,
        }  # fmt: skip
        self._sets: dict[str, ClipDataset] = {}

    @property
    def input(self) -> dict[str, Any]:
        """Size, rate and seconds of what the network is given: scores depend on them."""
        return {name: self.settings[name] for name in READING}

    @property
    def train_set(self) -> ClipDataset:
        """The training clips, augmented."""
        return self._set("train")

    @property
    def val_set(self) -> ClipDataset:
        """The validation clips."""
        return self._set("val")

    @property
    def test_set(self) -> ClipDataset:
        """The test clips."""
        return self._set("test")

    def _set(self, split: str) -> ClipDataset:
        if split not in self._sets:
            folder = self.folders[split]
            if folder is None:
                raise ValueError(f"{split}: there are no {split} clips; give their folder, or a root that holds some")
            if isinstance(folder, ClipFolder) and folder.audio is None:
                raise ValueError(f"{split}.audio is null; the model needs the folder of the clips' sounds")
            training: dict[str, Any] = {}
            if split == "train":
                training = {"augmentation": self.augmentation, "seed": self.seed, "on_bad_clip": self.on_bad_clip}
            self._sets[split] = ClipDataset(folder, **self.reading, **training)
        return self._sets[split]

    def setup(self, stage: str) -> None:
        """Find all files of the stage; before training, look for leakage and clips to train on."""
        if stage == "fit":
            if len(self.train_set) < self.batch_size * self._world()["num_replicas"]:
                raise ValueError(
                    f"batch_size must be at most the number of training clips per process: got {self.batch_size}, "
                    f"with {len(self.train_set)} clips for {self._world()['num_replicas']} process(es)"
                )
            for split in ("val", "test"):
                if self.folders[split] is not None:
                    tested = [clip.name for clip in self._set(split).clips if clip.positive]
                    refuse_leakage(self.train_set.names, tested, split, self.on_leakage)
        evaluated = {"fit": "val", "validate": "val", "test": "test"}.get(stage)
        if evaluated is None or (stage == "fit" and self.folders["val"] is None):
            return
        if self._set(evaluated).clips[0].annotation is None:
            raise ValueError(
                f"{evaluated}: annotations are needed to evaluate (--data.{evaluated}.annotations), got none"
            )

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep: how clips were prepared and drawn, which they are, and for how many processes."""
        return self.settings | {PROCESSES: self._world()["num_replicas"]} | self._digest()

    def _digest(self) -> dict[str, str]:
        """The training clips in a few letters, where they have been listed."""
        if "train" not in self._sets:
            return {}
        return {CLIPS: hashlib.sha256("\n".join(self.train_set.names).encode()).hexdigest()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse clips prepared otherwise than those a checkpoint was trained on, and to resume with another order."""
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        processes, digest = self._world()["num_replicas"], self._digest()
        otherwise = "or take the checkpoint's weights alone, with --model.init_from instead of --ckpt_path"
        if fitting and (trained := state_dict.get(PROCESSES, processes)) != processes:
            raise ValueError(
                f"--trainer.devices x --trainer.num_nodes is {processes}, but the checkpoint was trained in {trained} "
                f"process(es), which share out each epoch's clips: use as many, {otherwise}"
            )
        if fitting and digest and state_dict.get(CLIPS, digest[CLIPS]) != digest[CLIPS]:
            raise ValueError(
                f"--data.train: the checkpoint was trained on other clips than these {len(self.train_set)}: give the "
                f"same, {otherwise}"
            )
        for name in READING + SAMPLING if fitting else READING:
            here, there = self.settings[name], state_dict[name]
            if here != there:
                flag = "--seed_everything" if name == "seed" else f"--data.{name}"
                raise ValueError(
                    f"{flag} is {here}, but the checkpoint was trained with {there}: give {flag} {there}, {otherwise}"
                )

    def train_dataloader(self) -> DataLoader:
        """Shuffled by seed and epoch; batches are all full."""
        sampler = EpochSampler(self.train_set, seed=self.seed, **self._world())
        loader = ResumableLoader(self.train_set, sampler=sampler, drop_last=True, **self._loading())
        if (trainer := self.trainer) is not None:
            loader.trained = lambda: trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        return loader

    def val_dataloader(self) -> DataLoader | list:
        """In order, each clip once; nothing where there are no validation clips."""
        return [] if self.folders["val"] is None else self._evaluation_loader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        """In order, each clip once."""
        return self._evaluation_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader:
        """The test clips."""
        return self._evaluation_loader(self.test_set)

    def _evaluation_loader(self, dataset: ClipDataset) -> DataLoader:
        world = self._world()
        if len(dataset) < world["num_replicas"]:
            raise ValueError(
                "trainer.devices x trainer.num_nodes must be at most the number of clips to evaluate, so that each "
                f"process has one: got {world['num_replicas']} processes for {len(dataset)} clip(s)"
            )
        # Shards without the repeats that would make them equal: a score over repeats is another score.
        sampler = UnrepeatedDistributedSampler(dataset, shuffle=False, **world)
        return DataLoader(dataset, sampler=sampler, **self._loading())

    def _world(self) -> dict[str, int]:
        trainer = self.trainer
        return (
            {"num_replicas": trainer.world_size, "rank": trainer.global_rank}
            if trainer
            else {"num_replicas": 1, "rank": 0}
        )

    def _loading(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": collate,
        }


def generated_split(root: str | Path, split: str) -> ClipFolder | None:
    """A split of a generated data set: ``"train"``, ``"val"``, ``"test"``, or ``"single"``, which has no sounds.

    None if the data set was made without it.

    Raises:
        FileNotFoundError: ``root`` is not a generated data set.
    """
    if not (Path(root) / "manifest.json").is_file():
        raise FileNotFoundError(
            f"root: {root} holds no generated data set, nor AVSBench; make one with `fnac make-data {root}`"
        )
    folder = Path(root) / split
    if not folder.is_dir():
        return None
    audio = None if split == "single" else "audio"
    return ClipFolder(str(folder), audio=audio, annotations=str(folder / "annotations.json"))


def _completed(folder: ClipFolder | AVSBench, made: ClipFolder | AVSBench | None, split: str) -> ClipFolder:
    """A generated split with those fields of a folder that were given, which has no root of its own."""
    if not isinstance(made, ClipFolder):
        raise ValueError(f"{split}.root is missing: other fields of {split} need it, or a root of generated data")
    given = {field.name: getattr(folder, field.name) for field in fields(folder)}
    return replace(made, **{name: value for name, value in given.items() if value != getattr(ClipFolder, name)})


def single_for_training(frames: int) -> int:
    """How many of so many single-object frames are trained on: all but a tenth, or one, for the accuracy."""
    return frames - max(frames // 10, 1)


def single_object_loaders(
    root: str | Path, *, image_size: int, batch_size: int, seed: int
) -> tuple[DataLoader, DataLoader]:
    """Loaders of single-object frames of a generated data set: training (augmented), and a held-out tenth.

    Batches are dicts with ``image``, ``label`` and ``name``, see :class:`~fnac.data.dataset.ClipDataset`.
    """
    folder = generated_split(root, "single")
    if folder is None:
        raise ValueError(f"root: {root} was made without single-object frames")
    reading: dict[str, Any] = {"image_size": image_size, "cache": True}
    names = ClipDataset(folder).names
    cut = single_for_training(len(names))
    if cut < batch_size:
        raise ValueError(f"batch_size must be at most {cut}, the number of frames to train on, got {batch_size}")
    train = ClipDataset(folder, **reading, names=names[:cut], augmentation=Augmentation(), seed=seed)
    held_out = ClipDataset(folder, **reading, names=names[cut:])
    sampler = EpochSampler(train, num_replicas=1, rank=0, seed=seed)
    return (
        DataLoader(train, batch_size, sampler=sampler, drop_last=True, collate_fn=collate),
        DataLoader(held_out, batch_size, collate_fn=collate),
    )


class EpochSampler(DistributedSampler):
    """Shuffles by seed and epoch, and yields (epoch, index), so that a data set's augmentation can follow the epoch.

    The first ``skip`` items of the next pass are left out.
    """

    skip = 0

    def __init__(self, dataset: Dataset, *, num_replicas: int, rank: int, seed: int) -> None:
        # The base class shuffles by seed + epoch: apart, or neighbouring seeds share their epochs' orders.
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed * 100_003, drop_last=True)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, skip, self.skip = self.epoch, self.skip, 0
        return ((epoch, index) for index in islice(super().__iter__(), skip, None))


class ResumableLoader(DataLoader):
    """A training loader that can go on within an epoch: Lightning keeps its state in checkpoints.

    It also counts the clips that :func:`collate` left out, and says how many they were.
    """

    given, begun = 0, 0
    trained: Callable[[], int] | None = None  # asks the trainer how many of the given batches it has trained on
    resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so nothing happens before the first batch is asked for: by then Lightning has set the epoch.
        resume, self.resume = self.resume, None
        self.begun = self._epoch()
        self.given = resume["given"] if resume and resume["epoch"] == self._epoch() else 0
        batch_size, skipped, ours = self.batch_size or 1, 0, isinstance(self.sampler, EpochSampler)
        if ours:
            self.sampler.skip = self.given * batch_size  # type: ignore[attr-defined]
        try:
            for batch in islice(super().__iter__(), 0 if ours else self.given, None):
                self.given += 1
                skipped += batch_size - len(batch["name"])
                yield batch
        finally:  # Lightning does not ask for more than the last batch it wants, and drops the pass instead
            if skipped:
                warnings.warn(f"epoch {self.begun}: {skipped} unreadable training clips were skipped", stacklevel=2)

    def _epoch(self) -> int:
        # Lightning replaces the sampler where it is told to overfit some batches.
        return self.sampler.epoch if isinstance(self.sampler, EpochSampler) else 0

    def state_dict(self) -> dict[str, int]:
        """The epoch of the pass, and how many of its batches have been used: those given, but for one not trained."""
        return {"epoch": self.begun, "given": self.trained() if self.trained else self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next pass go on after those batches, if it is over the same epoch."""
        self.resume = dict(state)


def collate(samples: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Default collation of those samples that are not None (unreadable, to be skipped).

    Raises:
        MediaError: there is none.
    """
    read = [sample for sample in samples if sample is not None]
    if not read:
        raise MediaError(f"none of the {len(samples)} clips of a batch can be read; the warnings before this name them")
    return default_collate(read)
