"""Tables from results: the text of a run, and the README's section between its markers (``python -m bench.report``)."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import plots
from bench.cases import CASES, OPS, Case
from bench.results import DIRECTORY, Row, Run
from bench.rivals import BASELINE, CONTENDERS

README = DIRECTORY.parents[1] / "README.md"
#: What is measured outside of ``python -m bench``, after its operations.
OTHERS = {
    "distributed_fnac_loss": "the whole loss of a batch that processes share, forward and backward",
    "training_step": "two ResNet-18, the loss and the optimizer",
}
BEGIN, END = "<!-- bench: made by python -m bench.report -->", "<!-- bench: end -->"


def table(rows: Sequence[Row]) -> str:
    """The rows of one case as text, a contender each."""
    head = ("", "ms p50", "p20", "p80", f"x {BASELINE}", "of limit", "peak MB", "err value", "err grad")
    lines = [_aligned(head)]
    for row in rows:
        if row.p50 is None:
            lines.append(f"{row.contender:<26}  {row.status}: {row.detail}")
            continue
        figures = [_number(x) for x in (row.p50, row.p20, row.p80, row.ratio)]
        figures += ["" if row.fraction is None else f"{row.fraction:.0%}", _megabytes(row.peak_bytes)]
        figures += ["" if x is None else f"{x:.0e}" for x in (row.value_error, row.grad_error)]
        lines.append(_aligned((row.contender, *figures)))
    return "\n".join(lines)


def _aligned(cells: tuple[str, ...]) -> str:
    return "  ".join((f"{cells[0]:<26}", *(f"{figure:>9}" for figure in cells[1:])))


def _number(x: float | None) -> str:
    """Three significant digits, plainly."""
    if x is None:
        return ""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def _megabytes(size: int | None) -> str:
    return "" if size is None else _number(size / 1e6)


# --- README ---------------------------------------------------------------------------------------------------------


def section(machines: Mapping[str, Sequence[Run]]) -> str:
    """Everything between the markers: GPUs, then CPUs; of each kind all but the machine measured last are folded."""
    kinds = {name: runs[0].machine["kind"] for name, runs in machines.items()}
    dates = {name: max(run.machine["date"] for run in runs) for name, runs in machines.items()}
    parts: list[str] = []
    shown: set[str] = set()
    for name in sorted(machines, key=lambda name: (kinds[name] == "cuda", dates[name]), reverse=True):
        part = _machine(name, machines[name])
        if kinds[name] in shown:
            title = _title(machines[name][0].machine)
            part = f"<details><summary>Measured before: {title}</summary>\n\n{part}\n\n</details>"
        shown.add(kinds[name])
        parts.append(part)
    return "\n\n".join(parts)


def _machine(name: str, runs: Sequence[Run]) -> str:
    """A machine's facts, a table per operation and dtype, and the curves."""
    rows = sorted((row for run in runs for row in run.rows), key=_place)
    parts = [_facts(runs)]
    for op, dtype in dict.fromkeys((row.op, row.dtype) for row in rows):
        parts.append(_markdown(op, dtype, [row for row in rows if (row.op, row.dtype) == (op, dtype)]))
    parts += filter(None, [_absent(rows)])
    parts += [_picture(f"{name}/{plot}") for plot in plots.names(rows)]
    return "\n\n".join(parts)


def _place(row: Row) -> tuple[int, int]:
    """Operations in the order of ``OPS``, the others after them; float32 first."""
    return [*OPS, *OTHERS].index(row.op), ("float32", "bfloat16", "float16").index(row.dtype)


def _title(machine: Mapping[str, Any]) -> str:
    if machine["kind"] != "cpu":
        return f"{machine['device']} (one device)"
    threads, cores = machine["threads"], machine["cores"]
    of = f" of {cores} cores" if cores > threads else ""
    return f"{machine['device']} ({threads} threads{of}, {machine['instruction_set']})"


def _facts(runs: Sequence[Run]) -> str:
    machine = runs[0].machine
    peaks = next((run.peaks for run in runs if run.peaks), {})
    names = {
        "fma": "float32 multiply-adds {:,.0f}",
        "gemm_float32": "float32 GEMM {:,.0f}",
        "gemm_bfloat16": "bfloat16 GEMM {:,.0f}",
        "amx_bfloat16": "bfloat16 tiles (AMX) {:,.0f}",
        "copy": "memory copy {:,.0f} GB/s",
    }
    limits = ", ".join(text.format(peaks[key] / 1e9) for key, text in names.items() if key in peaks)
    limits = f"Measured limits, in GFLOP/s: {limits}. " if limits else ""
    dates, commits = (", ".join(dict.fromkeys(run.machine[key] for run in runs)) for key in ("date", "commit"))
    memory = next((run.settings["memory_limit"] for run in runs if "memory_limit" in run.settings), None)
    exhausted = "" if memory is None else f"; a call that needs more than {memory:g} GiB is out of memory"
    return (
        f"### {_title(machine)}\n\n"
        f"torch {machine['versions']['torch']}, {dates}, commit {commits}. {limits}"
        f"Milliseconds are medians of interleaved runs; in brackets how many times faster than {BASELINE}. "
        f"*Of limit*: the share of the machine's limit that our kernel reaches. *Peak*: memory beyond the inputs, "
        f"results included{exhausted}."
    )


def _markdown(op: str, dtype: str, rows: Sequence[Row]) -> str:
    tried = [row for row in rows if row.status != "not run"]
    known = (*CONTENDERS, "no loss", "fnac's defaults", "one process")
    names = [name for name in known if any(row.contender == name for row in tried)]
    ours = [name for name in names if name in CONTENDERS and CONTENDERS[name].ours]
    what = OPS[op].what if op in OPS else OTHERS[op]
    limits = any(row.fraction is not None for row in tried)
    peaks = any(row.peak_bytes is not None for row in tried)
    head = ["case", *(f"**{name}**" if name in ours else name for name in names)]
    head += ["of limit"] * limits + [f"peak MB, {BASELINE}", "ours"] * peaks
    lines = [f"`{op}` in {dtype}: {what}.", "", _cells(head), _cells(["---"] + ["---:"] * (len(head) - 1))]
    for case in dict.fromkeys(row.case for row in sorted(tried, key=_size)):
        of = {row.contender: row for row in tried if row.case == case}
        exact = (of[name] for name in ours if name in of and CONTENDERS[name].products == torch.float32)
        mine = min(exact, key=lambda row: row.p50 or math.inf, default=None)
        cells = [_case(case), *(_figure(of.get(name), name in ours) for name in names)]
        if limits:
            cells.append(f"{mine.fraction:.0%}" if mine and mine.fraction is not None else "")
        if peaks:
            cells += ["" if row is None else _megabytes(row.peak_bytes) for row in (of.get(BASELINE), mine)]
        lines.append(_cells(cells))
    return "\n".join(lines)


def _absent(rows: Sequence[Row]) -> str:
    """Who ran nowhere, and why."""
    ran = {row.contender for row in rows if row.status != "not run"}
    reasons = {row.contender: row.detail for row in rows if row.contender not in ran}
    return "Not run: " + "; ".join(f"{name} ({why})" for name, why in reasons.items()) + "." if reasons else ""


def _size(row: Row) -> tuple[str, int, int]:
    name, _, note = row.case.partition(", ")
    case = CASES.get(name)
    return (note, case.cells, case.n * case.m) if case else (note, 0, 0)


def _case(full: str) -> str:
    name, _, note = full.partition(", ")
    case: Case | None = CASES.get(name)
    if case is None:
        return full
    batch = f"B={case.n}" if case.paired else f"{case.n} images, {case.m} sounds"
    notes = list(filter(None, ["" if name.startswith("b") else name, note]))
    return f"{batch}, {case.h}x{case.w}" + (f" ({', '.join(notes)})" if notes else "")


def _figure(row: Row | None, ours: bool) -> str:
    if row is None:
        return ""
    if row.p50 is None:
        return row.status
    text = f"{_number(row.p50)} ({row.ratio:.2f}x)" if row.ratio else _number(row.p50)
    return f"**{text}**" if ours else text


def _cells(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _picture(path: str) -> str:
    """GitHub shows the one that fits the reader's theme."""
    folder = DIRECTORY.relative_to(README.parent).as_posix()
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{folder}/{path}-dark.png">'
        f'<img alt="How time and peak memory of the loss grow" src="{folder}/{path}-light.png"></picture>'
    )


def read(folder: Path) -> dict[str, list[Run]]:
    """The results of each machine, a folder each, in the order of the file names. (``on_gpu.json`` tells how
    ``on_gpu.sh`` went.)

    Raises:
        ValueError: there are none, or a file is not of results.
    """
    machines: dict[str, list[Run]] = {}
    for path in sorted(path for path in folder.glob("*/*.json") if path.name != "on_gpu.json"):
        try:
            run = Run.read(path)
            section({path.parent.name: [run]})  # names what it misses
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not hold results: {type(error).__name__}: {error}") from error
        machines.setdefault(path.parent.name, []).append(run)
    if not machines:
        raise ValueError(f"{folder} has no results; it should have MACHINE/*.json")
    return machines


def with_section(text: str, made: str) -> str:
    """``text`` with what stands between the markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the markers {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument(
        "--results", type=Path, help="print the section of these results instead: FOLDER/MACHINE/*.json"
    )
    options = parser.parse_args()
    try:
        machines = read(options.results or DIRECTORY)
        if options.results:
            print(section(machines))
            return
        text = with_section(README.read_text(), section(machines))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    temporary = README.with_name(README.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, README)
    for name, runs in machines.items():
        plots.draw(runs, DIRECTORY / name)


if __name__ == "__main__":
    main()
