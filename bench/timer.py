"""The one timer. Contenders take turns in one process, so that what else the machine does meets them all alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

#: A sample lasts at least this long: short calls are repeated within one.
SAMPLE_SECONDS = 2e-3


@dataclass(frozen=True)
class Timing:
    """Percentiles of the milliseconds of one call, over ``rounds`` samples."""

    p20: float
    p50: float
    p80: float
    rounds: int


def interleave(
    steps: Mapping[str, Callable[[], object]], device: str = "cpu", *, rounds: int = 25, seconds: float = 10.0
) -> dict[str, Timing]:
    """Time each step ``rounds`` times, each round in another order; fewer where ``seconds`` run out, at least 3 times.

    Orders are shuffled, the same ones in every run: in a fixed or a rotating order a step would always follow the same
    one, whose code may be its own. A step has been called before (compiled, caches of its own filled). On CUDA the L2
    cache is overwritten before each sample; on the CPU the turns of the others do that.
    """
    sample = _cuda_sample if device == "cuda" else _cpu_sample
    repeats = {name: _repeats(sample, step) for name, step in steps.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    orders = random.Random(0)
    end = time.perf_counter() + seconds
    enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in orders.sample(list(steps), len(steps)):
                samples[name].append(sample(steps[name], repeats[name]))
            if turn >= 2 and time.perf_counter() > end:
                break
    finally:
        if enabled:
            gc.enable()
    return {name: timing(values) for name, values in samples.items()}


def _repeats(sample: Callable[[Callable[[], object], int], float], step: Callable[[], object]) -> int:
    return max(1, round(SAMPLE_SECONDS * 1e3 / max(sample(step, 1), 1e-3)))


def _cpu_sample(step: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) * 1e3 / repeats


def _cuda_sample(step: Callable[[], object], repeats: int) -> float:
    torch.empty(1 << 28, dtype=torch.int8, device="cuda").zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def timing(milliseconds: list[float]) -> Timing:
    """Percentiles of samples."""
    p20, p50, p80 = torch.tensor(milliseconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    return Timing(p20.item(), p50.item(), p80.item(), len(milliseconds))
