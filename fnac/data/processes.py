"""Many clips at once, in several processes or in this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import starmap
from typing import Any


def available_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def sigterm_ends_all() -> Iterator[None]:
    """SIGTERM is an error: half files are removed and processes ended. By default it ends this process alone."""
    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def in_processes(
    work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int, chunksize: int
) -> Iterator[Iterator[Any]]:
    """``work(*job)`` of each job, in order; in this process where there are not two ``workers``."""
    with sigterm_ends_all():
        if workers < 2:
            yield starmap(work, jobs)
            return
        # Not forked: the caller may have threads (torch's, for one) that a fork would break.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupt)
        try:
            yield pool.map(work, *zip(*jobs, strict=True), chunksize=chunksize)
        except BrokenProcessPool as error:
            raise RuntimeError("a process was ended, as a rule for want of memory; try fewer workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _ignore_interrupt() -> None:
    """Ctrl-C goes to all processes; the one that started the others ends them, once their work is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
