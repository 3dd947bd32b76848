"""How lists write a clip's id, brought to one form."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

FRAME_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
SOUND_SUFFIXES = frozenset({".aif", ".aiff", ".flac", ".mp3", ".ogg", ".opus", ".wav"})
VIDEO_SUFFIXES = frozenset({".avi", ".mkv", ".mov", ".mp4", ".webm"})
MEDIA_SUFFIXES = FRAME_SUFFIXES | SOUND_SUFFIXES | VIDEO_SUFFIXES | {".m4a"}

HEADINGS = frozenset(
    {"clip", "file", "filename", "frame", "id", "image", "name", "video", "video_id", "youtube_id", "ytid"}
)
VIDEO = re.compile(r"(?!\d+$)[\w-]{11}", re.ASCII)  # YouTube's; Flickr's may be as long but are numbers
CLIP = re.compile(r"([\w-]{11})_(\d{1,6})", re.ASCII)  # VGG-Sound's: the video and the second
SECOND = re.compile(r"\d{1,6}(\.0*)?", re.ASCII)


def clip_id(name: str) -> str:
    """The id in a file's name: without folders and a media file's suffix."""
    name = re.split(r"[/\\]", name.strip())[-1]
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in MEDIA_SUFFIXES else name


def read_rows(path: Path) -> list[list[str]]:
    """The rows of a csv file.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it is not UTF-8, or no csv.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as csv (a quotation mark that is not closed?): {error}") from error


def clip_rows(path: Path) -> list[list[str]]:
    """The rows of a csv that lists clips: without headings, empty lines and comments."""
    rows = [row for row in read_rows(path) if row and row[0].strip() and not row[0].startswith("#")]
    return rows[1:] if rows and row_id(rows[0]).lower() in HEADINGS else rows


def row_id(row: Sequence[str]) -> str:
    """The id of a csv's row: its first column; of VGG-Sound's and AudioSet's lists, which have four, with the second.

    What follows VGG-Sound's ids after a space, or any after a tab, is no part of them.
    """
    words = row[0].split()
    if words and CLIP.fullmatch(first := clip_id(words[0])):
        return first
    name = clip_id(row[0].split("\t")[0])
    if len(row) > 3 and VIDEO.fullmatch(name) and SECOND.fullmatch(second := row[1].strip()):
        return f"{name}_{int(float(second)):06d}"
    return name


def comparable(name: str) -> str:
    """The id with VGG-Sound's second in six digits, as its lists have it and files often have not."""
    clip = CLIP.fullmatch(name)
    return f"{clip[1]}_{int(clip[2]):06d}" if clip else name


def commonest_form(names: Collection[str]) -> str:
    """How most of the ids are written: VGG-Sound's form, a number, with spaces, or otherwise."""
    return Counter(_form(name) for name in names).most_common(1)[0][0]


def example(names: Collection[str]) -> str:
    """The first id that is written as most are."""
    form = commonest_form(names)
    return next(name for name in names if _form(name) == form)


def _form(name: str) -> str:
    if CLIP.fullmatch(name):
        return "VGG-Sound's"
    if name.isdigit():
        return "number"
    return "with spaces" if " " in name else "other"
