"""Generated frames: one or two large textured objects on a cluttered background.

A class is an outline filled with a texture; colours, size, aspect ratio and place are drawn per object and say nothing
about the class. Both objects of a frame come from the same distribution, so neither is more salient than the other.
Everything is integer arithmetic (on a canvas of twice the frame's side, averaged down): the same pixels everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

UNIT = 1024  # outlines see coordinates u, v in -UNIT..UNIT across the object's box, v downwards

# A map's upper half always counts as the prediction, so a box near half the frame leaves room above cIoU 0.5.
MIN_AREA, MAX_AREA = 0.40, 0.48
# Where boxes overlap, a peak on the wrong object would pass for the right one.
MAX_OVERLAP = 0.10

Array = np.ndarray


class Box(NamedTuple):
    """Half-open pixel box: columns ``x1:x2``, rows ``y1:y2``."""

    x1: int
    y1: int
    x2: int
    y2: int

    @property
    def area(self) -> int:
        return (self.x2 - self.x1) * (self.y2 - self.y1)

    def overlap(self, other: Box) -> int:
        """Number of pixels that both boxes cover."""
        width = min(self.x2, other.x2) - max(self.x1, other.x1)
        height = min(self.y2, other.y2) - max(self.y1, other.y1)
        return max(width, 0) * max(height, 0)


OUTLINES: dict[str, Callable[[Array, Array], Array]] = {
    "flute": lambda u, v: u**2 + v**2 <= UNIT**2,  # ellipse
    "organ": lambda u, v: (abs(u) <= UNIT) & (abs(v) <= UNIT),  # rectangle
    "bell": lambda u, v: abs(u) <= UNIT // 2 + (v + UNIT) // 4,  # trapezium
    "siren": lambda u, v: abs(u) + abs(v) <= 7 * UNIT // 5,  # octagon
    "buzzer": lambda u, v: (abs(u) <= UNIT // 2) | (abs(v) <= UNIT // 2),  # cross
    "drum": lambda u, v: abs(u) <= (UNIT + 2 * abs(v)) // 3 + UNIT // 8,  # hourglass
    "shaker": lambda u, v: abs(u) <= (v + UNIT) * 3 // 2,  # house
    "cricket": lambda u, v: (u**2 + v**2 <= UNIT**2) & (u**2 + v**2 >= UNIT**2 // 8),  # ring
}


def _mosaic(x: Array, y: Array, period: int, rng: np.random.Generator) -> Array:
    tiles = rng.integers(0, 2, (y.max() // period + 1, x.max() // period + 1), dtype=np.uint8)
    return tiles[y // period, x // period]


# Pixel coordinates x (1, w), y (h, 1) -> 0/1 ink. Mirror images look alike: training flips frames.
TEXTURES: dict[str, Callable[[Array, Array, int, np.random.Generator], Array]] = {
    "flute": lambda x, y, p, rng: y // p + 0 * x,
    "organ": lambda x, y, p, rng: x // p + 0 * y,
    "bell": lambda x, y, p, rng: (x % (2 * p) - p) ** 2 + (y % (2 * p) - p) ** 2 < p * p // 2,
    "siren": lambda x, y, p, rng: (y + (x if rng.integers(2) else -x)) // p,
    "buzzer": lambda x, y, p, rng: x // p + y // p,
    "drum": lambda x, y, p, rng: (y + abs(x % (4 * p) - 2 * p)) // p,
    "shaker": _mosaic,
    "cricket": lambda x, y, p, rng: (x % (2 * p) < p // 2) | (y % (2 * p) < p // 2),
}

CLASSES = tuple(OUTLINES)


def draw_boxes(rng: np.random.Generator, size: int, count: int) -> list[Box]:
    """Boxes of ``MIN_AREA..MAX_AREA`` of the frame, uniform over where they fit, nearly disjoint.

    Drawn until the condition holds, so no place or aspect ratio is favoured beyond what it asks for.
    """
    while True:
        sides = rng.integers(2 * size // 5, size + 1, (512, count, 2))
        area = sides.prod(axis=-1)
        fits = ((area >= MIN_AREA * size**2) & (area <= MAX_AREA * size**2)).all(axis=-1)
        for group in sides[fits]:
            corners = rng.integers(0, size - group + 1)
            boxes = [Box(int(x), int(y), int(x + w), int(y + h)) for (x, y), (w, h) in zip(corners, group, strict=True)]
            if count == 1 or boxes[0].overlap(boxes[1]) <= MAX_OVERLAP * min(boxes[0].area, boxes[1].area):
                return boxes


def draw_frame(rng: np.random.Generator, size: int, objects: list[tuple[str, Box]]) -> Array:
    """A frame ``(size, size, 3)`` uint8 with the objects (class, box) over clutter, in random order of depth."""
    canvas = _clutter(rng, 2 * size)
    for index in rng.permutation(len(objects)):
        name, box = objects[index]
        _draw_object(rng, canvas, name, Box(*(2 * side for side in box)))
    fine = canvas.reshape(size, 2, size, 2, 3).astype(np.int32).sum(axis=(1, 3)) // 4
    grain = rng.integers(-10, 11, fine.shape)
    return np.clip(fine + grain, 0, 255).astype(np.uint8)


def _clutter(rng: np.random.Generator, side: int) -> Array:
    """Many small plain patches, boxes and ellipses, over a plain ground."""
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    canvas[:] = rng.integers(0, 256, 3)
    for _ in range(60):
        width, height = rng.integers(side // 24, side // 5, 2)
        x, y = rng.integers(0, side - width), rng.integers(0, side - height)
        patch = canvas[y : y + height, x : x + width]
        colour = rng.integers(0, 256, 3)
        if rng.integers(2):
            patch[:] = colour
        else:
            patch[OUTLINES["flute"](*_unit_grid(width, height))] = colour
    return canvas


def _unit_grid(width: int, height: int) -> tuple[Array, Array]:
    u = (2 * np.arange(width) + 1) * UNIT // width - UNIT
    v = (2 * np.arange(height) + 1) * UNIT // height - UNIT
    return u[None, :], v[:, None]


def _draw_object(rng: np.random.Generator, canvas: Array, name: str, box: Box) -> None:
    width, height = box.x2 - box.x1, box.y2 - box.y1
    period = int(rng.integers(canvas.shape[0] // 28, canvas.shape[0] // 16))
    offset = rng.integers(0, 4 * period, 2)
    x, y = np.arange(width)[None, :] + offset[0], np.arange(height)[:, None] + offset[1]
    ink = TEXTURES[name](x, y, period, rng) % 2 == 1
    inside = np.broadcast_to(OUTLINES[name](*_unit_grid(width, height)), ink.shape)
    paper_colour, ink_colour = _two_colours(rng)
    patch = canvas[box.y1 : box.y2, box.x1 : box.x2]
    patch[inside & ~ink] = paper_colour
    patch[inside & ink] = ink_colour


def _two_colours(rng: np.random.Generator) -> tuple[Array, Array]:
    """Colours whose brightness differs enough for the texture to show."""
    while True:
        pair = rng.integers(0, 256, (2, 3))
        brightness = pair @ np.array([3, 6, 1])
        if abs(brightness[0] - brightness[1]) >= 900:
            return pair[0], pair[1]
