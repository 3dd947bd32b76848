"""What is known about a clip: the class of its sound, boxes around its source, the ground truth they make."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnac.data.ids import clip_id

Box = tuple[float, float, float, float]

ROUNDING = 0.01  # how far outside 0..1 a side may lie: two or three pixels of a small frame
# Twelve boxes of vggss.json have sides that overflowed: the least 64-bit integer, over frames 320 pixels wide.
OVERFLOWED = -(2.0**63) / 320


@dataclass(frozen=True)
class Annotation:
    """The class of a clip's sound and the boxes (x1, y1, x2, y2) of its source, in 0..1 but for overflowed sides."""

    label: str
    boxes: list[Box]


def read_annotations(path: str | Path) -> dict[str, Annotation]:
    """Annotations by clip id, in the file's order.

    Args:
        path: json, a list of ``{"file": id, "class": label, "bbox": [[x1, y1, x2, y2], ...]}``; other fields are
            ignored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not json of this form, a box lies outside 0..1 or ends before it begins (but for the
            overflowed sides that ``vggss.json`` has), or a clip occurs twice; the message names file and entry.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid json: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list of annotations, got {type(entries).__name__}")
    annotations: dict[str, Annotation] = {}
    for number, entry in enumerate(entries):
        try:
            name, annotation = _parse_entry(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, entry {number}: {type(error).__name__}: {error} in {entry!r:.200}") from error
        if name in annotations:
            raise ValueError(f"{path}, entry {number}: {name} is annotated twice")
        annotations[name] = annotation
    return annotations


def _parse_entry(entry: Any) -> tuple[str, Annotation]:
    boxes = [_parse_box(box) for box in entry["bbox"]]
    return clip_id(str(entry["file"])), Annotation(str(entry["class"]), boxes)


def _parse_box(box: Any) -> Box:
    x1, y1, x2, y2 = (float(side) for side in box)
    for low, high in ((x1, x2), (y1, y2)):
        inside = all(-ROUNDING <= side <= 1 + ROUNDING or side == OVERFLOWED for side in (low, high))
        if not inside or (low > high and OVERFLOWED not in (low, high)):
            raise ValueError(
                f"box {box} should be [x1, y1, x2, y2] with x1 <= x2 and y1 <= y2, as shares of the frame's width and "
                "height in 0..1, not in pixels"
            )
    return x1, y1, x2, y2


def ground_truth(boxes: Iterable[Box], size: int = 224) -> Tensor:
    """Union of boxes as a float32 map ``(size, size)`` of 0 and 1.

    Coordinates are clipped to 0..1, scaled and truncated, as published. What is then empty (degenerate boxes, or
    boxes out of range) covers nothing, so the map may be all 0.
    """
    gt = torch.zeros(size, size)
    for box in boxes:
        x1, y1, x2, y2 = (int(min(max(side, 0.0), 1.0) * size) for side in box)
        gt[y1:y2, x1:x2] = 1
    return gt
