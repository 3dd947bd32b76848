"""A run as one HTML file that needs nothing else: scores, curves, heat maps, and each clip's sound to play."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from fnac.callbacks import History
from fnac.pictures import Example, curves, draw_example, to_png
from fnac.results import Table, headings, write_text


def write_report(
    path: str | Path,
    *,
    title: str,
    introduction: Sequence[str],
    table: Table,
    trained: Collection[str],
    notes: Sequence[str],
    runs: Mapping[str, History],
    examples: Sequence[Example],
    facts: Mapping[str, Any],
) -> None:
    """Write the report to ``path``.

    Args:
        path: the HTML file.
        title: its heading.
        introduction: paragraphs above the scores.
        table: scores by row.
        trained: the rows to stress.
        notes: paragraphs below the scores.
        runs: histories to plot, by name.
        examples: clips to show.
        facts: settings, to list at the end.
    """
    template = files("fnac").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    text = environment.from_string(template).render(
        title=title,
        introduction=introduction,
        headings=headings(table),
        table=table,
        trained=trained,
        notes=notes,
        curves=_base64(to_png(curves(runs))),
        examples=[_shown(example) for example in examples],
        facts=facts,
    )
    write_text(path, text)


def _shown(example: Example) -> dict[str, Any]:
    figure = Figure(figsize=(4.6, 2.4), layout="constrained")
    frame_axes, map_axes = figure.subplots(1, 2)
    draw_example(frame_axes, map_axes, example)
    return {
        "name": example.name,
        "label": example.label,
        "ciou": example.ciou,
        "pointing": example.pointing,
        "picture": _base64(to_png(figure)),
        "sound": _base64(example.sound.read_bytes()),
    }


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
