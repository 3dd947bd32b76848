"""What a figure depends on: the machine, the versions, the commit, and the machine's own limits."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fnac_kernels
from fnac_kernels import _native

PACKAGES = ("torch", "triton", "late-interaction-kernels", "maxsim-cpu", "inf-cl")


def facts(device: str) -> dict[str, Any]:
    """The machine and the software, as they are written beside every result."""
    info = fnac_kernels.info()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "kind": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)),
        "instruction_set": info["cpu"]["instruction_set"],
        "versions": {
            "python": platform.python_version(),
            "fnac_kernels": fnac_kernels.__version__,
            **{name: _version(name) for name in PACKAGES},
        },
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    """Its name; clouds leave the number out, by which one generation is told from the next."""
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text().partition("\n\n")[0] if cpuinfo.exists() else ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields and not re.search(r"\d", name):
        return f"{name}, family {fields['cpu family']} model {fields['model']}"
    return name


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "fnac_kernels", "csrc")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def peaks(device: str) -> dict[str, float]:
    """The machine's limits, measured: arithmetic in flop/s, ``copy`` in bytes/s (read and written both count)."""
    size = 8192 if device == "cuda" else 2048
    limits = {
        "gemm_float32": _gemm(size, torch.float32, device),
        "gemm_bfloat16": _gemm(size, torch.bfloat16, device),
        "copy": _copy(1 << (30 if device == "cuda" else 28), device),
    }
    if device == "cpu" and _native.problem() is None:
        native = _native.module()
        threads = torch.get_num_threads()
        limits["fma"] = native.peak_fma(threads, 300)
        amx = native.peak_amx(threads, 300)
        if amx:
            limits["amx_bfloat16"] = amx
    return limits


def _gemm(largest: int, dtype: torch.dtype, device: str) -> float:
    """Of square matrices, as large as ``largest``; smaller ones where the machine has no instructions for ``dtype``."""
    size, seconds = 128, 0.0
    while size < largest and seconds < 0.02:
        size *= 2
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        multiply = functools.partial(torch.mm, a, b, out=out)
        seconds = min(_seconds(multiply, device) for _ in range(2))  # the first may load a library
    return 2 * size**3 / _best_seconds(multiply, device)


def _copy(size: int, device: str) -> float:
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(call: Callable[[], object], device: str, seconds: float = 0.5) -> float:
    """The fastest of the calls that fit into ``seconds``: a limit is what the machine can do at best."""
    _seconds(call, device)
    times = [_seconds(call, device)]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        times.append(_seconds(call, device))
    return min(times)


def _seconds(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
