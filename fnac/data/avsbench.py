"""AVSBench as its authors give it out: frames of videos, each with the mask of what sounds (Zhou et al., ECCV 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fnac.data.annotations import Annotation
from fnac.data.clip import Clip, ClipList
from fnac.data.ids import read_rows

FRAMES = 5  # of a video, one a second; those of training have a mask for the first alone
META_DATA = "_meta_data.csv"


@dataclass(frozen=True)
class AVSBench:
    """A split of a subset, S4 (single source) or MS3 (multiple sources).

    Below ``root`` (``Single-source`` or ``Multi-sources``) lie ``s4_meta_data.csv`` and ``s4_data``, or ``ms3_``
    instead of ``s4_``: a csv of videos with headings, of which ``split`` is one, ``category`` another in S4, and the
    video's name comes first; and ``visual_frames``, ``gt_masks`` and ``audio_wav``.

    Args:
        root: folder of the subset.
        split: "train", "val" or "test".
    """

    root: str
    split: str


def is_avsbench(root: str | Path) -> bool:
    """Whether the folder holds a subset of AVSBench."""
    return any(Path(root).glob(f"*{META_DATA}"))


def list_frames(subset: AVSBench) -> ClipList:
    """The frames of a split as clips: ``<video>_<k>``, k = 1 .. 5, to which the sound's k-th second belongs.

    Of training videos the first frame, without its mask.

    Raises:
        FileNotFoundError: there is no csv.
        ValueError: there are several, or it has no ``split``, or no video of this one.
    """
    found = sorted(Path(subset.root).glob(f"*{META_DATA}"))
    if len(found) != 1:
        raise ValueError(
            f"root: {subset.root} should hold one subset of AVSBench, s4{META_DATA} or ms3{META_DATA}, got "
            f"{[path.name for path in found]}"
        )
    folder = found[0].with_name(found[0].name.replace(META_DATA, "_data"))
    clips = [clip for video in _videos(found[0], subset.split) for clip in _frames(folder, subset.split, *video)]
    missing = []
    for clip in clips:
        files = {"frame": clip.frame, "sound": clip.sound, "mask": clip.annotation and clip.annotation.mask}
        if lacking := [what for what, path in files.items() if path and not path.is_file()]:
            missing.append(f"{clip.name} ({' and '.join(lacking)})")
    return ClipList(clips, missing)


def _videos(path: Path, split: str) -> list[tuple[str, str]]:
    headings, *rows = read_rows(path) or [[]]
    if "split" not in headings:
        raise ValueError(f"{path} should have a column split, its headings are {headings}")
    listed = [dict(zip(headings, row, strict=False)) for row in rows]
    videos = [(row[headings[0]], row.get("category") or "") for row in listed if row.get("split") == split]
    if not videos:
        raise ValueError(f"{path} lists no videos of split {split!r}")
    return videos


def _frames(folder: Path, split: str, video: str, category: str) -> Iterator[Clip]:
    images = folder / "visual_frames"
    images = images / split / category / video if category else images / video
    for k in range(1, 2 if split == "train" else FRAMES + 1):
        mask = None if split == "train" else folder / "gt_masks" / split / category / video / f"{video}_{k}.png"
        yield Clip(
            name=f"{video}_{k}",
            frame=images / (f"{video}_{k}.png" if category else f"{video}.mp4_{k}.png"),
            sound=folder / "audio_wav" / split / category / f"{video}.wav",
            annotation=Annotation(category, mask=mask),
            moment=k - 0.5,
        )
