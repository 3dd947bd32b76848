"""Clips as a map-style data set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from fnac.audio import LogSpectrogram, Masks, MediaError, load_audio, mask_spectrogram
from fnac.data.annotations import ground_truth, has_extent
from fnac.data.avsbench import AVSBench, list_frames
from fnac.data.clip import SILENCE, Clip, some
from fnac.data.layout import ClipFolder, list_clips
from fnac.seeding import mixed, seeded
from fnac.threads import one_thread

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZE_MARGIN = 1.1  # training crops from a frame resized to this many times the side

OnBadClip = Literal["error", "skip"]


@dataclass(frozen=True)
class Augmentation:
    """What training varies, besides a random crop.

    Args:
        flip: mirror half of the frames.
        masks: how bands of the spectrogram are hidden, see :func:`fnac.audio.mask_spectrogram`.
        mask_width: bound of their widths.
    """

    flip: bool = True
    masks: Masks = "mean"
    mask_width: int = 10

    def __post_init__(self) -> None:
        if self.masks not in ("mean", "official", "none"):
            raise ValueError(f'masks must be "mean", "official" or "none", got {self.masks!r}')
        if self.mask_width < 1:
            raise ValueError(f"mask_width must be at least 1, got {self.mask_width!r}")


class ClipDataset(Dataset[dict[str, Any] | None]):
    """Clips as dicts of

    - ``image``: float32 ``(3, S, S)``, ImageNet-normalised,
    - ``audio``: float32 ``(1, 257, T)``, log spectrogram (absent if the folder has no sounds),
    - ``name``: the clip's id, and ``index``: its place in the set,
    - ``label``: the class, where annotated,
    - ``gt``: float32 ``(224, 224)`` in 0..1, where annotated with boxes and not augmented, or ``mask``: float32
      ``(224, 224)`` of 0 and 1, where with masks,
    - ``positive``: whether the sound's source is in the frame, where the folder has negatives.

    An item is asked for by index, or by (epoch, index): what augmentation draws depends on the seed, epoch and index
    alone, not on the worker, the rank or what was drawn before.

    Args:
        folder: where the clips are.
        image_size: side S of the images.
        sample_rate: of the sounds in Hz; files of another rate are resampled.
        clip_seconds: taken from the middle of each sound, repeated if it is shorter.
        augmentation: for training: frames are resized to 1.1 times the size (shorter side), cropped and varied.
            None resizes to the square.
        seed: of the augmentation.
        on_bad_clip: ``"error"`` raises for missing files (here) and unreadable ones (when read). ``"skip"``, for
            training only, leaves missing ones out with a warning and gives None for unreadable ones.
        cache: keep what is decoded in memory (in each worker's), as large as the images (uint8) and spectrograms.
        names: use only these clips, in this order.

    Raises:
        FileNotFoundError: files of listed clips are missing; the first few are named.
        ValueError: see :func:`fnac.data.layout.list_clips` and :func:`fnac.data.avsbench.list_frames`.
    """

    def __init__(
        self,
        folder: ClipFolder | AVSBench,
        *,
        image_size: int = 224,
        sample_rate: int = 16_000,
        clip_seconds: float = 3.0,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        on_bad_clip: OnBadClip = "error",
        cache: bool = False,
        names: Sequence[str] | None = None,
    ) -> None:
        if on_bad_clip == "skip" and augmentation is None:
            raise ValueError(
                "on_bad_clip='skip' is for training only: an evaluation that leaves clips out is another one"
            )
        found = list_frames(folder) if isinstance(folder, AVSBench) else list_clips(folder)
        if found.missing:
            message = f"{folder.root}: clips lack files: {some(found.missing)}"
            if on_bad_clip == "error":
                raise FileNotFoundError(f"{message}; {_remedy(folder, augmentation is not None)}")
            warnings.warn(f"left out: {message}", stacklevel=2)
        self.clips: list[Clip] = found.clips
        if names is not None:
            by_name = {clip.name: clip for clip in found.clips}
            self.clips = [by_name[name] for name in names]
        self.has_negatives = not all(clip.positive for clip in self.clips)
        if augmentation is None:
            _warn_of_empty_ground_truth(self.clips)
        elif self.has_negatives:
            raise ValueError("negatives are for evaluation; training compares the clips of a batch")
        self.sample_rate, self.clip_seconds = sample_rate, clip_seconds
        self.augmentation, self.seed, self.on_bad_clip = augmentation, seed, on_bad_clip
        self.spectrogram = LogSpectrogram(sample_rate)
        size: list[int] = [image_size, image_size] if augmentation is None else [int(image_size * RESIZE_MARGIN)]
        self.resize = v2.Resize(size, InterpolationMode.BICUBIC)
        self.vary = v2.Identity()
        if augmentation is not None:
            self.vary = v2.Compose(
                [v2.RandomCrop(image_size), v2.RandomHorizontalFlip(0.5 if augmentation.flip else 0.0)]
            )
        self.normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
        self._decoded: dict[int, tuple[Tensor, Tensor | None]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def names(self) -> list[str]:
        """The clips' ids, in order."""
        return [clip.name for clip in self.clips]

    def audio_path(self, index: int) -> Path:
        """The sound file of a clip.

        Raises:
            ValueError: it has none.
        """
        sound = self.clips[index].sound
        if sound is None or sound == SILENCE:
            raise ValueError(f"clip {self.clips[index].name} has no sound")
        return sound

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any] | None:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        clip = self.clips[index]
        try:
            with one_thread():
                image, spectrogram = self._decode(index)
        except MediaError as error:
            if self.on_bad_clip == "error":
                raise
            warnings.warn(f"skipped: {error}", stacklevel=2)
            return None
        sample: dict[str, Any] = {"name": clip.name, "index": index}
        if self.has_negatives:
            sample["positive"] = clip.positive
        with seeded(mixed(self.seed, epoch, index)):  # torch's generator serves torchvision and torchaudio
            sample["image"] = self.normalize(self.vary(image))
            if spectrogram is not None:
                augmentation = self.augmentation or Augmentation(masks="none")
                sample["audio"] = mask_spectrogram(spectrogram, augmentation.masks, augmentation.mask_width)
        if clip.annotation is not None:
            sample["label"] = clip.annotation.label
            if self.augmentation is None and clip.annotation.mask is not None:
                sample["mask"] = load_mask(clip.annotation.mask)
            elif self.augmentation is None:
                sample["gt"] = ground_truth(clip.annotation)
        return sample

    def _decode(self, index: int) -> tuple[Tensor, Tensor | None]:
        """The resized frame, uint8 (3, H, W), and the spectrogram (1, 257, T): all that does not vary."""
        if self._decoded is not None and index in self._decoded:
            return self._decoded[index]
        clip = self.clips[index]
        image = v2.functional.pil_to_tensor(self.resize(load_image(clip.frame)))
        spectrogram = None
        if clip.sound == SILENCE:
            spectrogram = self.spectrogram(torch.zeros(round(self.clip_seconds * self.sample_rate)))[None]
        elif clip.sound is not None:
            waveform, _ = load_audio(
                clip.sound, seconds=self.clip_seconds, moment=clip.moment, sample_rate=self.sample_rate
            )
            spectrogram = self.spectrogram(waveform)[None]
        if self._decoded is not None:
            self._decoded[index] = (image, spectrogram)
        return image, spectrogram


def _warn_of_empty_ground_truth(clips: Sequence[Clip]) -> None:
    # Not an error: VGG-SS has two such clips, and published scores count them.
    boxed = [clip for clip in clips if clip.positive and clip.annotation is not None and clip.annotation.mask is None]
    if empty := [clip.name for clip in boxed if not has_extent(clip.annotation)]:  # type: ignore[arg-type]
        warnings.warn(
            f"{len(empty)} of {len(boxed)} clips have an empty ground truth, so they score 0 in every row, the "
            f"oracle's too: {some(empty)}",
            stacklevel=3,
        )


def _remedy(folder: ClipFolder | AVSBench, training: bool) -> str:
    if training:
        return "to train without them, set --data.on_bad_clip skip"
    fewer = "list their ids in a file and give it as --data.test.ids (or --data.val.ids)"
    if isinstance(folder, AVSBench):
        fewer = "take the videos' lines out of the csv"
    return f"to evaluate on those that are there, {fewer}; scores over fewer clips are other scores"


def _high_byte(wide: np.ndarray) -> np.ndarray:
    return (wide >> 8).astype(np.uint8)


def load_image(path: str | Path, narrow: Callable[[np.ndarray], np.ndarray] = _high_byte) -> Image.Image:
    """Read an image of any format that Pillow knows, upright and as RGB.

    Args:
        path: the file.
        narrow: makes 8 bits of a grey image's 16; Pillow's conversion would cut what exceeds 255 off.

    Raises:
        MediaError: it is missing or cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):
                return Image.fromarray(narrow(np.asarray(image))).convert("RGB")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"cannot read image {path}: {error}") from error


def load_mask(path: str | Path, size: int = 224) -> Tensor:
    """A mask file as float32 ``(size, size)``: 1 where a pixel is not black.

    Raises:
        MediaError: it is missing or cannot be decoded.
    """
    image = load_image(path, narrow=lambda wide: wide > 0)
    mask = np.asarray(image.resize((size, size), Image.Resampling.NEAREST)).max(axis=2) > 0
    return torch.from_numpy(mask).float()
