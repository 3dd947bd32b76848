"""Where clips lie on disk: lists of ids, folders of frames and sounds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fnac.data.annotations import read_annotations
from fnac.data.clip import Clip, ClipList, some
from fnac.data.ids import FRAME_SUFFIXES, SOUND_SUFFIXES, clip_id, clip_rows, row_id
from fnac.data.negatives import make_negatives


@dataclass(frozen=True)
class ClipFolder:
    """A set of clips: for each id a frame ``<id>.jpg`` (or .png, ...) and a sound ``<id>.wav`` (or .flac, ...).

    Args:
        root: folder of the set; of a generated set's split it is known.
        frames: folder of the frames, relative to ``root`` (``.`` for the root itself) or absolute.
        audio: folder of the sounds, likewise; None for a set without sounds.
        ids: file that lists the clips to use: one id a line, or a csv with the id first. By default the annotated
            clips, or, without annotations, all that have both a frame and a sound.
        annotations: json in the format of ``vggss.json``, or a folder of XML files as Flickr-SoundNet's.
        negatives: to evaluate also whether a source is found where there is none: ``silent`` adds each frame without
            sound, ``mismatched`` each with the sound of a clip of another class, ``silent,mismatched`` both; or a csv
            of frame and sound ids, as SLAVC's ``vggss_test_plus_silent.csv``. See :mod:`fnac.data.negatives`.
    """

    root: str = ""
    frames: str = "frames"
    audio: str | None = "audio"
    ids: str | None = None
    annotations: str | None = None
    negatives: str | None = None


def read_ids(path: str | Path) -> list[str]:
    """Ids of a text or csv file, or the ``file`` fields of a json; repeats count once.

    An id stands in the first column, as VGG-Sound's also ``id,second``. Headings, lines that begin with ``#``, folders
    and media suffixes are left out.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it is not UTF-8, or it lists nothing.
    """
    path = Path(path)
    names = read_annotations(path) if path.suffix.lower() == ".json" else map(row_id, clip_rows(path))
    ids = list(dict.fromkeys(names))
    if not ids:
        raise ValueError(f"{path} lists no clips")
    return ids


def list_clips(folder: ClipFolder) -> ClipList:
    """Find the files of a set of clips.

    Raises:
        FileNotFoundError: a folder or list does not exist.
        ValueError: no clip at all is found, a listed clip has no annotation though there are annotations, or a clip
            has two frames or two sounds.
    """
    root = Path(folder.root)
    frames = _media(root / folder.frames, FRAME_SUFFIXES)
    sounds = None if folder.audio is None else _media(root / folder.audio, SOUND_SUFFIXES)
    present = frames.keys() if sounds is None else frames.keys() & sounds.keys()
    listed = None if folder.ids is None else read_ids(folder.ids)
    annotations = None if folder.annotations is None else read_annotations(folder.annotations, listed)
    names = listed or (sorted(present) if annotations is None else list(annotations))
    if not names and folder.annotations is not None:
        raise ValueError(f"{folder.annotations} annotates no clips")
    if annotations is not None and (bare := [name for name in names if name not in annotations]):
        raise ValueError(f"{folder.ids} lists clips that {folder.annotations} does not annotate: {some(bare)}")
    clips = [
        Clip(
            name=name,
            frame=frames[name],
            sound=None if sounds is None else sounds[name],
            annotation=None if annotations is None else annotations[name],
        )
        for name in names
        if name in present
    ]
    if not clips:
        places = [str(root / place) for place in (folder.frames, folder.audio) if place is not None]
        found = f"none of the {len(names)} listed ({some(names)}) has its files" if names else "no files"
        if frames and sounds and not names:
            found = f"no name is both a frame's ({some(list(frames))}) and a sound's ({some(list(sounds))})"
        raise ValueError(f"no clips found: {found} in {' and '.join(places)}")

    def lacks(name: str) -> str:
        return " and ".join(
            what for what, found in (("frame", frames), ("sound", sounds)) if found is not None and name not in found
        )

    missing = [f"{name} ({lacks(name)})" for name in names if name not in present]
    if folder.negatives is not None:
        if sounds is None or annotations is None:
            raise ValueError(f"negatives is {folder.negatives!r}, which only annotated clips with sounds can have")
        negatives, lacking = make_negatives(folder.negatives, clips, frames, sounds)
        clips, missing = clips + negatives, missing + [f"{name} (frame or sound)" for name in lacking]
    return ClipList(clips, missing)


def _media(folder: Path, suffixes: frozenset[str]) -> dict[str, Path]:
    """Files by id. One listing of the folder: asking for each of 144,000 files takes minutes on network disks."""
    found: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() in suffixes and not stem.startswith("."):
                name = clip_id(stem)  # of clip.mp4.png too
                if name in found:
                    raise ValueError(f"{folder} holds two files for clip {name}: {found[name].name} and {entry.name}")
                found[name] = folder / entry.name
    return found
