"""The one memory meter: the peak of one call in a fresh process, which also shows who runs out of memory."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import resource
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bench.cases import CASES, OPS
from bench.rivals import CONTENDERS
from bench.work import leaves, step
from fnac_kernels import empty_cache

GIB = 1 << 30
_STATUS = Path("/proc/self/status")


class OutOfMemory(Exception):
    """The call does not fit under the limit."""


@contextlib.contextmanager
def limited(device: str, size: int) -> Iterator[None]:
    """Within it this process gets at most ``size`` bytes more: asking for more fails instead of swapping."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + min(size, free)) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_status_bytes("VmData") + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def is_exhaustion(problem: BaseException) -> bool:
    """Whether an exception means that memory ran out; torch's CPU allocator has no type of its own for it."""
    text = str(problem)
    return (
        isinstance(problem, (OutOfMemory, MemoryError, torch.OutOfMemoryError))
        or "allocate memory" in text
        or "bad_alloc" in text
    )


def peak(op: str, case: str, contender: str, dtype: torch.dtype, device: str, size: int) -> int:
    """Bytes that a call needs beyond its inputs, its results included, in a fresh process with ``size`` bytes.

    It has this one's number of threads and precision of float32 products.

    Raises:
        OutOfMemory: they do not suffice.
        RuntimeError: the call fails in another way.
    """
    context = multiprocessing.get_context("forkserver")
    # torch is imported once, and each child is a fork that has run nothing.
    context.set_forkserver_preload(["bench.memory"])
    here, there = context.Pipe(duplex=False)
    settings = torch.get_num_threads(), torch.get_float32_matmul_precision()
    child = context.Process(target=_child, args=(there, op, case, contender, dtype, device, size, *settings))
    child.start()
    there.close()
    try:
        answer = here.recv()
    except EOFError:
        child.join()
        # A library that does not check an allocation dies of it, and so does the victim of the system's own limit.
        raise OutOfMemory(f"the process died with exit code {child.exitcode}") from None
    child.join()
    if isinstance(answer, int):
        return answer
    kind, text = answer
    raise (OutOfMemory if kind == "memory" else RuntimeError)(text)


def _child(
    there: Connection,
    op: str,
    case: str,
    contender: str,
    dtype: torch.dtype,
    device: str,
    size: int,
    threads: int,
    matmul_precision: str,
) -> None:
    try:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(matmul_precision)
        inputs = leaves(OPS[op], CASES[case], device)
        with limited(device, size):
            run = step(OPS[op], CONTENDERS[contender], inputs, dtype)
            run()  # compiles, loads libraries, grows their caches: none of that is the call's memory
            there.send(_measured(run, device))
    except Exception as problem:
        there.send(("memory" if is_exhaustion(problem) else "other", f"{type(problem).__name__}: {problem}"))


def _measured(run: Callable[[], object], device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    empty_cache()
    ctypes.CDLL(None).malloc_trim(0)  # what the first call freed would otherwise be resident already
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")
