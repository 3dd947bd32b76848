"""What is known about a clip: the class of its sound, boxes around its source, the ground truth they make.

VGG-SS has one json file, Flickr-SoundNet a folder of XML files, one a clip, with boxes of several annotators.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

from fnac.data.ids import clip_id

Box = tuple[float, float, float, float]

ROUNDING = 0.01  # how far outside 0..1 a side may lie: two or three pixels of a small frame
# Twelve boxes of vggss.json have sides that overflowed: the least 64-bit integer, over frames 320 pixels wide.
OVERFLOWED = -(2.0**63) / 320
FLICKR_FRAME, FLICKR_AGREEMENT = 256, 2


@dataclass(frozen=True)
class Annotation:
    """The class of a clip's sound and the boxes (x1, y1, x2, y2) of its source, in 0..1 but for overflowed sides.

    ``agreement`` is how many boxes must share a pixel for it to count fully: 1 makes their union. Where there is a file
    with the source's ``mask``, there are no boxes.
    """

    label: str
    boxes: list[Box] = field(default_factory=list)
    agreement: int = 1
    mask: Path | None = None


def read_annotations(path: str | Path, names: Collection[str] | None = None) -> dict[str, Annotation]:
    """Annotations by clip id, in the file's order, or the folder's sorted.

    Args:
        path: json, a list of ``{"file": id, "class": label, "bbox": [[x1, y1, x2, y2], ...]}``; other fields are
            ignored. Or a folder of ``<id>.xml`` as Flickr-SoundNet has them, see :func:`_read_xml`.
        names: of a folder, read only these clips' files (it holds 5,000, a test list 250).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not json of this form, a box lies outside 0..1 or ends before it begins (but for the
            overflowed sides that ``vggss.json`` has), or a clip occurs twice; the message names file and entry.
    """
    if Path(path).is_dir():
        return _read_folder(Path(path), names)
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


def _read_folder(folder: Path, names: Collection[str] | None) -> dict[str, Annotation]:
    paths = {path.stem: path for path in sorted(folder.glob("*.xml"))}
    if not paths:
        raise ValueError(f"{folder} holds no annotations; it should hold a file <id>.xml for each clip")
    wanted = paths.keys() if names is None else set(names)
    read = {name: _read_xml(path) for name, path in paths.items() if name in wanted}
    if read and not any(annotation.boxes for annotation in read.values()):
        raise ValueError(f"{folder}: no <bbox> in any of {len(read)} files; boxes should be marked so, as in Flickr's")
    return read


def _read_xml(path: Path) -> Annotation:
    """The boxes of a clip of Flickr-SoundNet, which has no classes.

    Assumed is what the official evaluation assumes: each ``<bbox>``, at any depth and beside what is no box, holds
    ``<xmin> <ymin> <xmax> <ymax>`` in pixels of a frame of 256 x 256, and a pixel counts ``min(boxes / 2, 1)``,
    whoever drew them.
    """
    try:
        boxes = [_parse_xml_box(box) for box in ElementTree.parse(path).iter("bbox")]
    except (ElementTree.ParseError, LookupError, TypeError, ValueError) as error:  # LookupError: an unknown encoding
        raise ValueError(f"{path}: {error}") from error
    return Annotation("", boxes, FLICKR_AGREEMENT)


def _parse_xml_box(box: ElementTree.Element) -> Box:
    texts = [box.findtext(side) for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        sides = [float(text or "") for text in texts]
        x1, y1, x2, y2 = _parse_box([side / FLICKR_FRAME for side in sides])
    except ValueError:
        raise ValueError(
            f"a <bbox> has xmin, ymin, xmax, ymax {texts}; they should be pixels in 0..{FLICKR_FRAME}, with "
            "xmin <= xmax and ymin <= ymax"
        ) from None
    return x1, y1, x2, y2


def ground_truth(annotation: Annotation, size: int = 224) -> Tensor:
    """Ground truth as a float32 map ``(size, size)``: how many boxes hold a pixel / agreement, at most 1.

    Coordinates are clipped to 0..1, scaled and truncated, as published. What is then empty (degenerate boxes, or
    overflowed ones) covers nothing, so the map may be all 0.
    """
    count = torch.zeros(size, size)
    for box in annotation.boxes:
        x1, y1, x2, y2 = _pixels(box, size)
        count[y1:y2, x1:x2] += 1
    return (count / annotation.agreement).clamp(max=1)


def has_extent(annotation: Annotation, size: int = 224) -> bool:
    """Whether the ground truth has a pixel that counts."""
    return any(x1 < x2 and y1 < y2 for x1, y1, x2, y2 in (_pixels(box, size) for box in annotation.boxes))


def _pixels(box: Box, size: int) -> tuple[int, ...]:
    return tuple(int(min(max(side, 0.0), 1.0) * size) for side in box)
