"""Types of the commands' flags: with what cannot be measured nothing is begun."""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {text}; it should be at least 1")
    return value


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"is {text}; it should be positive and finite")
    return value


def device(text: str) -> str:
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("is cuda; torch sees no CUDA device")
    return text


def add_device(parser: argparse.ArgumentParser) -> None:
    """The flag of the device to measure on, by default CUDA where there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, choices=("cpu", "cuda"), default=default)


def output(text: str) -> Path:
    """A file that can be written once the results are there."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"is {text}, a folder; it should name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"is {text}, whose folder cannot be made or written to: {error}") from error
    return path
