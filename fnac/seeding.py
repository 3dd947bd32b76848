"""Random numbers that depend on what they are for, not on what was drawn before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def check_seed(seed: int, name: str = "seed") -> None:
    """Raise ValueError if a seed is not one for every generator: NumPy's take 32 bits."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"{name} must be at least 0 and less than 2**32, got {seed}")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """With torch's generator begun at ``seed``, and left as it was before.

    Not torch.manual_seed, which would also reset the generators of GPUs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
