"""Pictures: frames with ground truth and heat map, curves of a run. Figures are matplotlib's; nothing is shown."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fnac.callbacks import History
from fnac.data.dataset import ClipDataset, load_image
from fnac.metrics import SIZE, ciou, minmax, pointing

HEAT = colormaps["inferno"]
TRUTH = "#35d0ff"  # a colour that the heat map does not have


@dataclass(frozen=True)
class Example:
    """One clip and what a model saw in it: frame uint8 ``(S, S, 3)``, ground truth and map ``(S, S)``, S = 224."""

    name: str
    label: str
    sound: Path
    frame: np.ndarray
    gt: Tensor
    map: Tensor
    ciou: float
    pointing: float


def choose_examples(clips: ClipDataset, maps: Tensor, good: int = 6, bad: int = 4) -> list[Example]:
    """Examples from a whole evaluated split: ``good`` spread evenly over its better half, then the ``bad`` worst.

    Args:
        clips: annotated clips.
        maps: ``(len(clips), 224, 224)``, in their order.
        good, bad: how many of each, at most what there is.
    """
    gts = torch.stack([clips[i]["gt"] for i in range(len(clips))])  # type: ignore[index]
    scores, hits = ciou(maps, gts), pointing(maps, gts)
    ranked = scores.argsort(descending=True).tolist()
    better = ranked[: max(len(ranked) // 2, 1)]
    spread = np.linspace(0, len(better) - 1, min(good, len(better))).round().astype(int)
    chosen = dict.fromkeys([better[i] for i in spread] + ranked[-bad:])
    return [
        Example(
            name=clips.clips[i].name,
            label=clips.clips[i].annotation.label,
            sound=clips.audio_path(i),
            frame=np.asarray(load_image(clips.clips[i].frame).resize((SIZE, SIZE))),
            gt=gts[i],
            map=maps[i],
            ciou=float(scores[i]),
            pointing=float(hits[i]),
        )
        for i in chosen
    ]


def heat_over_frame(frame: np.ndarray, localization: Tensor, opacity: float = 0.6) -> np.ndarray:
    """The map, scaled to 0..1 and coloured, over a frame of the same size in grey: uint8 ``(S, S, 3)``."""
    heat = HEAT(minmax(localization[None].float())[0].numpy())[..., :3]
    grey = (frame @ np.array([0.299, 0.587, 0.114]) / 255)[..., None]
    return (255 * (opacity * heat + (1 - opacity) * grey)).round().astype(np.uint8)


def draw_example(frame_axes: Axes, map_axes: Axes, example: Example) -> None:
    """The frame and the heat map, both with the outline of the ground truth, the latter with the map's peak."""
    frame_axes.imshow(example.frame)
    map_axes.imshow(heat_over_frame(example.frame, example.map))
    for axes in (frame_axes, map_axes):
        axes.contour(example.gt.numpy(), levels=[0.5], colors=[TRUTH], linewidths=2)
        axes.set_axis_off()
    y, x = divmod(int(example.map.argmax()), example.map.shape[1])
    map_axes.plot(x, y, marker="x", color="white", markersize=8, markeredgewidth=2)
    frame_axes.set_title(f"sounds: {example.label}", fontsize=9)
    map_axes.set_title(f"cIoU {example.ciou:.2f}", fontsize=9)


def gallery(examples: Sequence[Example], columns: int = 3) -> Figure:
    """Several examples, frame beside heat map."""
    rows = -(-len(examples) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    pairs = grid.reshape(rows * columns, 2)
    for (frame_axes, map_axes), example in zip(pairs, examples, strict=False):
        draw_example(frame_axes, map_axes, example)
    for axes in pairs[len(examples) :].flat:
        axes.set_axis_off()
    return figure


def curves(runs: Mapping[str, History]) -> Figure:
    """Training terms by step, and validation scores by step, of one or more runs (name -> history)."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    nce_axes, distance_axes, score_axes = figure.subplots(1, 3)
    styles = ("-", "--", ":", "-.")
    for (name, history), style in zip(runs.items(), styles, strict=False):
        steps = [entry["step"] for entry in history.train]
        nce_axes.plot(steps, [entry["nce"] for entry in history.train], style, label=name, linewidth=1)
        for term, colour in (("fns_audio", "C1"), ("tne", "C2"), ("fns_visual", "C3")):
            points = [(entry["step"], entry[term]) for entry in history.train if entry[term]]
            if points:
                distance_axes.plot(
                    *zip(*points, strict=True), style, label=f"{name}: {term}", color=colour, linewidth=1
                )
        for score, colour in (("ap50", "C0"), ("pointing", "C4")):
            steps = [entry["step"] for entry in history.val]
            values = [100 * entry[score] for entry in history.val]
            score_axes.plot(steps, values, style, marker="o", markersize=3, label=f"{name}: {score}", color=colour)
    nce_axes.set(title="NCE, training", xlabel="step")
    distance_axes.set(title="L1 distances, training", xlabel="step")
    score_axes.set(title="validation, %", xlabel="step", ylim=(0, 102))
    for axes in (nce_axes, distance_axes, score_axes):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    return figure


def to_png(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
