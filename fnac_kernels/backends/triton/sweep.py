"""``FNAC_TRITON_SWEEP=1``: try neighbours of the table's tile sizes on this device and print the fastest.

A shape class is swept once, on first use, and the fastest is used from then on. By default nothing is tried: the table
in ``tuning.py`` holds, a call takes the same time as the one before, and results do not depend on a race.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Hashable, Iterator

import torch

from fnac_kernels.backends.triton.tuning import Blocks, power_of_two

_fastest: dict[Hashable, Blocks] = {}
#: Sizes that may be halved or doubled; the others are tied to the map.
_FREE = ("BLOCK", "BLOCK_N", "BLOCK_M", "BLOCK_C")
_CALLS = 10


def chosen(
    kernel: str, shape_class: tuple[Hashable, ...], blocks: Blocks, launch: Callable[[Blocks], object]
) -> Blocks:
    """``blocks``, or what a sweep found faster for this kernel and shape class."""
    if os.environ.get("FNAC_TRITON_SWEEP") != "1":
        return blocks
    key = (kernel, *shape_class, blocks.key)
    if key not in _fastest:
        times = {candidate.key: (_time(launch, candidate), candidate) for candidate in (blocks, *neighbours(blocks))}
        best, fastest = min(times.values(), key=lambda timed: timed[0])
        _fastest[key] = fastest
        at = ", ".join(map(str, shape_class))
        print(f'"{kernel}": {fastest},  # {best:.4f} ms, table {times[blocks.key][0]:.4f} ms, at {at}', file=sys.stderr)
    return _fastest[key]


def shape_class(img: torch.Tensor, m: int) -> tuple[Hashable, ...]:
    """Dtype, channels, cells, and images and sounds to the next power of two."""
    n, c, h, w = img.shape
    return img.dtype, c, h * w, power_of_two(n), power_of_two(m)


def pair_class(aud: torch.Tensor) -> tuple[Hashable, ...]:
    """Dtype, channels, and pairs to the next power of two: what the adjacency kernels' time depends on."""
    n, c = aud.shape
    return aud.dtype, c, power_of_two(n)


def neighbours(blocks: Blocks) -> Iterator[Blocks]:
    """One step in each direction: eleven at most."""
    for name in _FREE:
        size = blocks.sizes.get(name)
        if size is not None:
            yield from (blocks.sized(**{name: other}) for other in (size // 2, size * 2) if other >= 16)
    for warps in (blocks.num_warps // 2, blocks.num_warps * 2):
        if 1 <= warps <= 16:
            yield blocks.changed(num_warps=warps)
    for stages in (blocks.num_stages - 1, blocks.num_stages + 1):
        if stages >= 1:
            yield blocks.changed(num_stages=stages)
    yield blocks.changed(max_registers=None if blocks.max_registers else 128)


def _time(launch: Callable[[Blocks], object], blocks: Blocks) -> float:
    """The median of some calls in milliseconds; infinite where the kernel cannot be compiled for this device."""
    times = []
    try:
        launch(blocks)
        for _ in range(_CALLS):
            _finish()
            start = time.perf_counter()
            launch(blocks)
            _finish()
            times.append(1e3 * (time.perf_counter() - start))
    except RuntimeError:
        return float("inf")
    return sorted(times)[len(times) // 2]


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
