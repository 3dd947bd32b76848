"""Clips whose sound has no source in the frame: does a model know? (Mo and Morgado, NeurIPS 2022)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fnac.data.annotations import Annotation
from fnac.data.clip import SILENCE, Clip
from fnac.data.ids import clip_id, clip_rows

KINDS = ("silent", "mismatched")


def make_negatives(
    wanted: str, clips: Sequence[Clip], frames: Mapping[str, Path], sounds: Mapping[str, Path]
) -> tuple[list[Clip], list[str]]:
    """Negatives of a set, and which of a list's lack a file.

    Args:
        wanted: kinds, separated by commas: ``silent`` takes each frame without sound, ``mismatched`` each with the
            sound of a clip of another class (of another clip, where classes are not known). Or a csv of frame and
            sound ids; of rows with a third field only those that say ``non-sounding`` are taken.
        clips: the positives.
        frames, sounds: all files of the folder by id.

    Raises:
        FileNotFoundError, ValueError: there is no such kind or file, it lists nothing, or all clips are of one class.
    """
    kinds = [kind.strip() for kind in wanted.split(",")]
    if not set(kinds) <= set(KINDS):
        if not Path(wanted).is_file():
            raise FileNotFoundError(f"negatives is {wanted!r}; it should be {', '.join(KINDS)}, both, or a csv file")
        return _listed(Path(wanted), frames, sounds)
    made = []
    if "silent" in kinds:
        made += [_negative(clip.name, clip.frame, "silence", SILENCE) for clip in clips]
    if "mismatched" in kinds:
        made += [_mismatched(clips, i) for i in range(len(clips))]
    return made, []


def _negative(frame: str, frame_path: Path, sound: str, sound_path: Path) -> Clip:
    return Clip(f"{frame}+{sound}", frame_path, sound_path, Annotation(""), positive=False)


def _mismatched(clips: Sequence[Clip], index: int) -> Clip:
    """With the next clip's sound that is of another class, from half the set further on: lists are often sorted."""
    clip, count = clips[index], len(clips)
    for step in range(count):
        other = clips[(index + count // 2 + step) % count]
        if other is not clip and (not _label(other) or _label(other) != _label(clip)):
            assert other.sound is not None
            return replace(_negative(clip.name, clip.frame, other.name, other.sound), moment=other.moment)
    raise ValueError(f"negatives is 'mismatched', but no clip is of another class than {clip.name}, {_label(clip)!r}")


def _label(clip: Clip) -> str:
    return clip.annotation.label if clip.annotation else ""


def _listed(path: Path, frames: Mapping[str, Path], sounds: Mapping[str, Path]) -> tuple[list[Clip], list[str]]:
    rows = [row for row in clip_rows(path) if len(row) > 1 and (len(row) == 2 or row[2].strip() == "non-sounding")]
    pairs = [(clip_id(row[0]), clip_id(row[1])) for row in rows]
    if not pairs:
        raise ValueError(f"negatives: {path} lists none; it should have rows of a frame's id and a sound's")
    lacking = [f"{frame}+{sound}" for frame, sound in pairs if frame not in frames or sound not in sounds]
    present = [(frame, sound) for frame, sound in pairs if frame in frames and sound in sounds]
    return [_negative(frame, frames[frame], sound, sounds[sound]) for frame, sound in dict.fromkeys(present)], lacking
