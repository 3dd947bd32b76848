"""Tables and plots from results: the table of a run, and README.md's."""

from __future__ import annotations

from collections.abc import Sequence

from bench.results import Row


def table(rows: Sequence[Row]) -> str:
    """The rows of one case as text, a contender each."""
    lines: list[tuple[str, ...]] = [
        ("", "ms p50", "p20", "p80", "x eager", "limit", "peak MB", "err value", "err grad")
    ]
    for row in rows:
        if row.p50 is None:
            lines.append((row.contender, f"  {row.status}: {row.detail}"))
            continue
        lines.append(
            (
                row.contender,
                *(_number(t) for t in (row.p50, row.p20, row.p80, row.ratio)),
                "" if row.fraction is None else f"{row.fraction:.0%}",
                "" if row.peak_bytes is None else _number(row.peak_bytes / 1e6),
                f"{row.value_error:.0e}",
                f"{row.grad_error:.0e}",
            )
        )
    return "\n".join("  ".join(_aligned(cells)) for cells in lines)


def _aligned(cells: tuple[str, ...]) -> list[str]:
    name, *figures = cells
    return [f"{name:<26}", *(f"{figure:>9}" for figure in figures)]


def _number(x: float | None) -> str:
    """Three significant digits, plainly."""
    if x is None:
        return ""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}" if x >= 10 else f"{x:.2f}"
