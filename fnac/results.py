"""Scores as a table to read and as a file to keep."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fnac.files import once_whole

Table = Mapping[str, Mapping[str, float]]  # row -> score -> value in 0..1

HEADINGS = {
    "ap50": "AP50 (cIoU)",
    "ciou": "mean cIoU",
    "auc": "AUC",
    "pointing": "pointing",
    "adaptive_ciou": "adaptive cIoU",
}


def render(table: Table) -> str:
    """The scores in percent, one row a line."""
    width = max(map(len, table))
    lines = [" " * width + "".join(f"{heading:>15}" for heading in HEADINGS.values())]
    for row, scores in table.items():
        lines.append(f"{row:<{width}}" + "".join(f"{100 * scores[name]:>15.1f}" for name in HEADINGS))
    return "\n".join(lines)


def environment() -> dict[str, str]:
    """What results depend on besides settings: machine, threads and versions."""
    packages = ("fnac-kernels", "torch", "torchvision", "torchaudio", "lightning")
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    return {
        "machine": f"{platform.machine()} {cpu}",
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def write_text(path: str | Path, text: str) -> None:
    """Write a file; it appears under its name only once it is whole."""
    with once_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_results(path: str | Path, table: Table, **facts: Any) -> None:
    """Write scores, what they were measured with, and the environment, as JSON."""
    write_text(path, json.dumps({"scores": table, **facts, "environment": environment()}, indent=2) + "\n")
