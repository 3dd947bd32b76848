"""How time and peak memory grow, on log axes: a picture for light pages and one for dark pages."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import CASES, Case
from bench.results import Row, Run
from bench.rivals import CONTENDERS

#: What a curve runs over: the label of its axis and a case's place on it.
SERIES = {
    "batch": ("batch size (7x7 cells)", lambda case: case.n),
    "cells": ("cells of a map (batch 128)", lambda case: case.cells),
}
#: Ink of each theme, and colours that stay apart for the colour-blind (Okabe and Ito).
THEMES = {"light": "#24292f", "dark": "#d0d7de"}
COLOURS = ("#999999", "#e69f00", "#56b4e9", "#cc79a7")
OURS = ("#009e73", "#d55e00", "#0072b2")


def names(rows: Sequence[Row]) -> list[str]:
    """The pictures that a machine's rows give, without theme and suffix."""
    return ["growth"] if "batch" in _grown(rows) else []


def draw(runs: Sequence[Run], folder: Path) -> None:
    """Write the pictures of a machine's runs."""
    rows = [row for run in runs for row in run.rows]
    limit = next((run.settings["memory_limit"] for run in runs if "memory_limit" in run.settings), None)
    for name in names(rows):
        for theme, ink in THEMES.items():
            _figure(rows, limit, ink, folder / f"{name}-{theme}.png")


def _case(row: Row) -> Case:
    """One that is in no series where the row's name is more than a case's."""
    return CASES.get(row.case, CASES["tiny"])


def _dtype(rows: Sequence[Row]) -> str:
    """That of most cases; of equally many float32."""
    cases = {(row.dtype, row.case) for row in rows if row.op == "fnac_loss" and _case(row).series}
    dtypes = [dtype for dtype, _ in cases]
    return max(sorted(set(dtypes), key=lambda dtype: dtype != "float32"), key=dtypes.count, default="float32")


def _curves(rows: Sequence[Row], series: str, field: str) -> dict[str, list[tuple[float, float | None]]]:
    """Per contender its points of the loss in the dtype that is drawn; None where it ran out of memory."""
    place = SERIES[series][1]
    dtype = _dtype(rows)
    curves: dict[str, list[tuple[float, float | None]]] = {}
    for row in rows:
        if row.op != "fnac_loss" or row.dtype != dtype or series not in _case(row).series:
            continue
        case = _case(row)
        value = getattr(row, field)
        if value is not None or row.status == "out of memory":
            curves.setdefault(row.contender, []).append((place(case), value))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in curves.items()}


def _grown(rows: Sequence[Row]) -> list[str]:
    """The series of which some contender has more than a point."""
    return [name for name in SERIES if any(len(points) > 1 for points in _curves(rows, name, "p50").values())]


def _figure(rows: Sequence[Row], limit: float | None, ink: str, path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "text.color": ink,
        "axes.edgecolor": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        grown = _grown(rows)
        times = {series: _curves(rows, series, "p50") for series in grown}
        peaks = {series: _curves(rows, series, "peak_bytes") for series in grown}
        lines = 2 if any(y for curves in peaks.values() for points in curves.values() for _, y in points) else 1
        colours = _colours({name for curves in (*times.values(), *peaks.values()) for name in curves})
        size = (4.5 * len(grown) if len(grown) > 1 else 6, 0.5 + 3 * lines)
        figure = Figure(size, layout="constrained")
        axes = figure.subplots(lines, len(grown), sharex="col", sharey="row", squeeze=False)
        for column, series in zip(axes.T, grown, strict=True):
            _panel(column[0], times[series], colours, 1.0)
            if lines == 2:
                _panel(column[1], peaks[series], colours, 1e-6)
                if limit is not None:
                    column[1].axhline(limit * 1024**3 / 1e6, color=ink, linewidth=0.8, linestyle=":")
            places = sorted({x for points in times[series].values() for x, _ in points})
            column[-1].set_xticks(places, [f"{x:,}" for x in places])
            column[-1].minorticks_off()
            column[-1].set_xlabel(SERIES[series][0])
        axes[0, 0].set_ylabel(f"forward + backward, {_dtype(rows)}, ms")
        if lines == 2:
            axes[1, 0].set_ylabel("peak memory beyond inputs, MB")
        named = {name: line for axis in axes.flat for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
        columns = min(len(named), 2 * len(grown))
        figure.legend(named.values(), named, loc="outside upper center", ncols=columns, frameon=False)
        temporary = path.with_name(path.name + ".tmp")
        figure.savefig(temporary, format="png", dpi=110, transparent=True, metadata={"Software": None})
    os.replace(temporary, path)


def _colours(drawn: set[str]) -> dict[str, str]:
    """One for each contender, in all panels: some may lack it."""
    colours, ours = iter(COLOURS), iter(OURS)
    return {name: next(ours if CONTENDERS[name].ours else colours) for name in CONTENDERS if name in drawn}


def _panel(
    axis: Any, curves: dict[str, list[tuple[float, float | None]]], colours: dict[str, str], unit: float
) -> None:
    above = itertools.cycle((7, -14))  # points: rivals often end close to each other
    for name, colour in colours.items():
        points = [(x, y * unit) for x, y in curves.get(name, ()) if y is not None]
        if not points:  # out of memory everywhere, or not measured
            continue
        mine = CONTENDERS[name].ours
        label = f"fnac_kernels, {name}" if mine else name
        axis.loglog(*zip(*points, strict=True), "o-", color=colour, label=label, linewidth=2.5 if mine else 1.5, ms=4)
        full = [x for x, y in curves[name] if y is None]
        if full:
            x, y = min(full), points[-1][1]
            axis.plot([points[-1][0], x], [y, y], color=colour, linestyle=":", linewidth=1.5)
            axis.plot([x], [y], "x", color=colour, ms=9, mew=2)
            axis.annotate(
                "out of memory", (x, y), (0, next(above)), textcoords="offset points", ha="right", color=colour, size=8
            )
    axis.grid(alpha=0.25)
