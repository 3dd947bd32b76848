"""Torch's threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Without torch's other threads: waiting for them costs more than a clip's small transforms take.

    Measured on two cores busy with other work: 5 ms a clip instead of 45. Loader workers have one thread anyway.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
