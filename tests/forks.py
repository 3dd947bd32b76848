"""A check in a forked child."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable


def holds_in_a_forked_child(check: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether ``check`` is true in a fork of this process; false too where it raises or takes longer."""
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(0 if check() else 1))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
    return process.exitcode == 0
