"""One clip: its files and what is known about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fnac.data.annotations import Annotation

SILENCE = Path("silence")  # in a sound's place: no file


@dataclass(frozen=True)
class Clip:
    """A frame, and the sound that goes with it.

    Args:
        name: its id.
        frame: image file.
        sound: sound file, :data:`SILENCE`, or None in a set without sounds.
        annotation: what is known about the source.
        moment: the frame's second in the sound; None for the middle.
        positive: whether the sound's source is in the frame.
    """

    name: str
    frame: Path
    sound: Path | None
    annotation: Annotation | None
    moment: float | None = None
    positive: bool = True


@dataclass(frozen=True)
class ClipList:
    """The clips of a set, and which of those it lists lack a file: ``"<id> (frame)"``, ``"<id> (sound)"`` or both."""

    clips: list[Clip]
    missing: list[str] = field(default_factory=list)


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few names and how many there are."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
