"""Scores as a table to read and as a file to keep."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnac.files import once_whole
from fnac_kernels import __version__

Table = Mapping[str, Mapping[str, float]]  # row -> score -> value in 0..1

HEADINGS = {
    "ap50": "AP50 (cIoU)",
    "ciou": "mean cIoU",
    "auc": "AUC",
    "pointing": "pointing",
    "adaptive_ciou": "adaptive cIoU",
    "ap": "AP",
    "max_f1": "max F1",
    "miou": "mIoU",
    "f_score": "F-score",
    "f_score_of_batches": "F of batches",
}


def headings(table: Table) -> dict[str, str]:
    """The scores that a table has, in order, and what stands above them."""
    (first, *_) = table.values()
    return {name: heading for name, heading in HEADINGS.items() if name in first}


def render(table: Table) -> str:
    """The scores in percent, one row a line."""
    width, columns = max(map(len, table)), headings(table)
    lines = [" " * width + "".join(f"{heading:>15}" for heading in columns.values())]
    for row, scores in table.items():
        lines.append(f"{row:<{width}}" + "".join(f"{100 * scores[name]:>15.1f}" for name in columns))
    return "\n".join(lines)


def environment() -> dict[str, str]:
    """What results depend on besides settings: machine, threads and versions."""
    packages = ("torch", "torchvision", "torchaudio", "lightning")
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    return {
        "machine": f"{platform.machine()} {cpu}",
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "fnac-kernels": __version__,
        **{package: importlib.metadata.version(package) for package in packages},
    }


def write_text(path: str | Path, text: str) -> None:
    """Write a file; it appears under its name only once it is whole."""
    with once_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_clips(path: str | Path, names: Sequence[str], scores: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the scores of each clip as csv, a line for each row of the table and clip.

    Args:
        path: file.
        names: of the data set's clips.
        scores: row -> score -> values (n,), with ``index``, the clips' places in the data set.
    """
    (columns, *_) = scores.values()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "clip", *(name for name in columns if name != "index")])
    for row, values in scores.items():
        found = {name: value.reshape(-1).tolist() for name, value in values.items()}
        clips = [names[int(index)] for index in found.pop("index")]
        writer.writerows([row, clip, *numbers] for clip, *numbers in zip(clips, *found.values(), strict=True))
    write_text(path, text.getvalue())


def write_results(path: str | Path, table: Table, **facts: Any) -> None:
    """Write scores, what they were measured with, and the environment, as JSON."""
    write_text(path, json.dumps({"scores": table, **facts, "environment": environment()}, indent=2) + "\n")
