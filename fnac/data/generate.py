"""A generated data set in the VGG-SS layout: START HERE for data that needs no download.

::

    root/manifest.json                       what it was made with
    root/{train,val,test}/frames/<id>.png    two objects, of which exactly one sounds
    root/{train,val,test}/audio/<id>.wav     that one's timbre, 16 kHz, 16 bits
    root/{train,val,test}/annotations.json   [{file, class, bbox, silent_class, silent_bbox}], boxes in 0..1
    root/single/frames, annotations.json     one object each, no sound: to warm an image encoder up

``file``, ``class`` and ``bbox`` are the fields of ``vggss.json``; the silent ones name the object that a model must not
choose. Each clip's random numbers come from (seed, split, index), so splits share nothing and a clip does not depend
on how many others there are, or on the number of processes. Pixels and samples are the same on every machine.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fnac.data.processes import available_cores, in_processes
from fnac.data.scene import CLASSES, Box, draw_boxes, draw_frame
from fnac.data.timbre import SAMPLE_RATE, draw_sound
from fnac.files import write_wav

SPLITS = ("train", "val", "test", "single")
FORMAT = 1  # raise it whenever the same parameters give other bytes


@dataclass(frozen=True)
class Recipe:
    """What a generated data set is made with."""

    seed: int
    train: int
    val: int
    test: int
    single: int
    image_size: int
    seconds: float

    def __post_init__(self) -> None:
        for name, least in {"seed": 0, "train": 0, "val": 0, "test": 0, "single": 0, "image_size": 32}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not 0.1 <= self.seconds <= 60:
            raise ValueError(f"seconds must be between 0.1 and 60, got {self.seconds!r}")

    def manifest(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "sample_rate": SAMPLE_RATE, "classes": list(CLASSES)}


def make_data(
    root: str | Path,
    *,
    seed: int = 0,
    train: int = 3000,
    val: int = 200,
    test: int = 400,
    single: int = 1500,
    image_size: int = 112,
    seconds: float = 1.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write the data set to ``root``, or reuse what is there if it was made with the same parameters.

    Args:
        root: folder to make; it appears under its name only once it is whole.
        seed: of everything drawn.
        train: training clips.
        val: validation clips.
        test: test clips.
        single: single-object frames (without sound).
        image_size: side of the square frames in pixels.
        seconds: length of each sound.
        workers: processes; by default one for each available core. 0 works in this process. A script that asks for
            more needs the usual ``if __name__ == "__main__":``, for they are spawned.
        overwrite: replace a generated data set made with other parameters.
        progress: show a progress bar.

    Returns:
        ``root`` as a path.

    Raises:
        ValueError: a parameter is out of range, or ``root`` is the current folder.
        FileExistsError: ``root`` holds a data set made with other parameters (and ``overwrite`` is not set), or
            something that is not a generated data set (which is never overwritten).
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be None or at least 0, got {workers}")
    recipe = Recipe(seed, train, val, test, single, image_size, float(seconds))
    root = Path(root)
    if _is_reusable(root, recipe.manifest(), overwrite):
        return root
    place = root.resolve()  # of a link, what it leads to: perhaps another disk, where there is room
    if place == Path.cwd():
        raise ValueError(f"root must not be the current folder, which would be replaced, got {str(root)!r}")
    partial_root = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        _write(partial_root, recipe, available_cores() if workers is None else workers, progress)
        if place.exists():
            shutil.rmtree(place)
        partial_root.rename(place)
    finally:
        shutil.rmtree(partial_root, ignore_errors=True)
    return root


def _is_reusable(root: Path, wanted: dict[str, Any], overwrite: bool) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    found = _read_manifest(root / "manifest.json")
    if found is None:
        raise FileExistsError(f"root: {root} exists and is not a generated data set (it has no manifest.json of one)")
    if found == wanted:
        return True
    if not overwrite:
        differ = [f"{k}={found.get(k)!r} (asked for {wanted.get(k)!r})" for k in wanted if found.get(k) != wanted[k]]
        raise FileExistsError(
            f"root: {root} holds a data set made with {', '.join(differ)}; choose another folder or ask to overwrite it"
        )
    return False


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """None if there is none, or another program's: web applications have files of that name too."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) and {"format", "classes"} <= found.keys() else None


def _write(root: Path, recipe: Recipe, workers: int, progress: bool) -> None:
    clips = [(split, index) for split in SPLITS for index in range(getattr(recipe, split))]
    splits = [split for split in SPLITS if getattr(recipe, split)]
    root.mkdir(parents=True)
    for split in splits:
        (root / split / "frames").mkdir(parents=True)
        if split != "single":
            (root / split / "audio").mkdir()
    annotations: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
    # Starting a process costs about as much as a hundred clips.
    several = workers if len(clips) >= 256 else 0
    with in_processes(partial(_write_clip, root, recipe), clips, several, chunksize=32) as entries:
        bar = tqdm(entries, total=len(clips), desc="making data", unit="clip", disable=not progress)
        for (split, _), entry in zip(clips, bar, strict=True):
            annotations[split].append(entry)
    for split, found in annotations.items():
        (root / split / "annotations.json").write_text(json.dumps(found, indent=0))
    (root / "manifest.json").write_text(json.dumps(recipe.manifest(), indent=2))


def _write_clip(root: Path, recipe: Recipe, split: str, index: int) -> dict[str, Any]:
    """Draw one clip, write its files, return its annotation."""
    rng = np.random.default_rng([recipe.seed, SPLITS.index(split), index])
    name = f"{split}_{index:06d}"
    count = 1 if split == "single" else 2
    labels = [CLASSES[i] for i in rng.choice(len(CLASSES), count, replace=False)]
    boxes = draw_boxes(rng, recipe.image_size, count)
    frame = draw_frame(rng, recipe.image_size, list(zip(labels, boxes, strict=True)))
    Image.fromarray(frame).save(root / split / "frames" / f"{name}.png", compress_level=1)

    def scaled(box: Box) -> list[list[float]]:
        return [[side / recipe.image_size for side in box]]

    entry = {"file": name, "class": labels[0], "bbox": scaled(boxes[0])}
    if split != "single":
        sound = draw_sound(rng, labels[0], round(recipe.seconds * SAMPLE_RATE))
        write_wav(root / split / "audio" / f"{name}.wav", sound, SAMPLE_RATE)
        entry |= {"silent_class": labels[1], "silent_bbox": scaled(boxes[1])}
    return entry
