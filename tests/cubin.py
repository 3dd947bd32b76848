"""What compiled kernels cost, read from their binaries by cuobjdump (the toolkit's or Triton's): no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """One kernel on one chip. ``stack`` is where spilled registers go; ``shared`` is what is known at compile time."""

    architecture: str
    function: str
    registers: int
    stack: int
    shared: int


def cuobjdump() -> Path | None:
    """The tool, or None where there is none."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which("cuobjdump", path=Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return None if found is None else Path(found)


def usage(binary: Path) -> list[Usage]:
    """Every kernel of a cubin, or of a library that holds some."""
    rows = []
    architecture = function = ""
    for line in _dump(binary, "--dump-resource-usage"):
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            function = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            rows.append(Usage(architecture, function, *map(int, match.groups())))
    return rows


def instructions(binary: Path, architecture: str, pattern: str) -> dict[str, set[str]]:
    """The machine instructions of each kernel whose name matches ``pattern``."""
    found: dict[str, set[str]] = {}
    function = ""
    for line in _dump(binary, "-arch", architecture, "--dump-sass"):
        if match := re.match(r"\s*Function : (\S+)", line):
            function = match[1]
            found[function] = set()
        elif match := re.search(rf"\*/\s+(?:@!?U?P\d+ )?({pattern}[\w.]*)", line):
            found[function].add(match[1])
    return found


def render(rows: Sequence[NamedTuple]) -> str:
    """One row a line, with a head."""
    cells = [type(rows[0])._fields, *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in cells
    )


def _dump(binary: Path, *arguments: str) -> list[str]:
    tool = cuobjdump()
    assert tool is not None, "there is no cuobjdump"
    env = os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}  # it calls nvdisasm
    command = [tool, *arguments, binary]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
