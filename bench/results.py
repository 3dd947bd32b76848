"""What a run leaves behind: rows of figures with the machine and the settings, as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.timer import Timing

Status = Literal["ok", "out of memory", "not run", "differs", "failed"]
DIRECTORY = Path(__file__).parent / "results"


def conditions(keep_memory: bool) -> str:
    """What ends the name of a case that was measured under other conditions than usual."""
    pinned = os.environ.get("FNAC_CPU_ISA", "")
    return f", {pinned}" * bool(pinned) + ", memory kept" * keep_memory


@dataclass
class Row:
    """One contender on one case. Times are milliseconds of a call, ``ratio`` is the baseline's median over this one's.

    ``fraction`` is the share of the machine's limit for the work that the case needs at least: see ``limits.py``.
    Errors are those against the oracle; ``peak_bytes`` is what the call needs beyond its inputs.
    """

    op: str
    case: str
    dtype: str
    contender: str
    status: Status = "ok"
    detail: str = ""
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    rounds: int = 0
    ratio: float | None = None
    fraction: float | None = None
    peak_bytes: int | None = None
    value_error: float | None = None
    grad_error: float | None = None

    def timed(self, timing: Timing, baseline: Timing | None) -> Row:
        """The row itself, with its times."""
        self.p20, self.p50, self.p80, self.rounds = timing.p20, timing.p50, timing.p80, timing.rounds
        self.ratio = baseline.p50 / timing.p50 if baseline else None
        return self


@dataclass
class Run:
    """``machine``, ``settings`` and ``peaks`` as the report shows them."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    peaks: dict[str, float]
    rows: list[Row]

    def write(self, path: Path) -> None:
        """To a temporary name first, so that a reader never meets half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(_rounded(dataclasses.asdict(self)), indent=1) + "\n")
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path) -> Run:
        fields = json.loads(path.read_text())
        return cls(**{**fields, "rows": [Row(**row) for row in fields["rows"]]})


def _rounded(x: Any) -> Any:
    """Four significant digits: more is noise."""
    if isinstance(x, float):
        return float(f"{x:.4g}")
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    return [_rounded(value) for value in x] if isinstance(x, list) else x
