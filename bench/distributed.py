"""``python -m bench.distributed``: the loss of a batch that processes share, beside plain PyTorch and one process.

Each process has about an equal share of the pairs, and of this machine's threads or a CUDA device of its own.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fnac_kernels
from bench import flags, machine, rivals, work
from bench.cases import CASES, TAU, Case
from bench.report import table
from bench.results import Row, Run, conditions
from bench.timer import timing

#: The whole batch in one process, which has all threads, while the others wait.
ALONE = "one process"


def step(loss: Callable[..., Any], img: Tensor, aud: Tensor, **backend: str) -> Callable[[], work.Result]:
    """Forward and backward."""
    img, aud = (x.clone(memory_format=torch.preserve_format).requires_grad_() for x in (img, aud))

    def run() -> work.Result:
        value = loss(img, aud, TAU, **backend).loss
        return work.Result((value.detach(),), torch.autograd.grad(value, (img, aud)))

    return run


def measure(case: Case, device: torch.device, rounds: int) -> list[Row]:
    """The rows of a case, for the process of rank 0; the others take part."""
    rank, processes, threads = dist.get_rank(), dist.get_world_size(), torch.get_num_threads()
    img, aud = case.features(str(device))
    share = slice(rank * case.n // processes, (rank + 1) * case.n // processes)
    # The baseline: the same division into rows in plain PyTorch.
    backends = {rivals.BASELINE: "reference", **{name: name for name in rivals.ours(device.type)}}
    steps: dict[str, Callable[[], work.Result | None]] = {
        name: step(fnac_kernels.distributed_fnac_loss, img[share], aud[share], backend=backend)
        for name, backend in backends.items()
    }
    alone = step(fnac_kernels.fnac_loss, img, aud)

    def by_one() -> work.Result | None:
        if rank:
            return None
        torch.set_num_threads(threads * processes)
        result = alone()
        torch.set_num_threads(threads)
        return result

    steps[ALONE] = by_one
    exact = steps[rivals.BASELINE]()
    assert exact is not None
    for name, run in steps.items():
        got = run()
        if got is None:
            continue
        if name == ALONE:  # each process's gradients are of the sum of all processes' losses
            got = work.Result(got.outputs, tuple(processes * x[share] for x in got.grads))
        error = work.error(got, exact)
        if not error.acceptable(torch.float32):
            raise SystemExit(f"{case.name}: {name} differs from {rivals.BASELINE}: {error}; not timed")
    del exact, got
    samples: dict[str, list[float]] = {name: [] for name in steps}
    orders = random.Random(0)  # the same in all processes
    for _ in range(rounds):
        for name in orders.sample(list(steps), len(steps)):
            dist.barrier()
            start = time.perf_counter()
            steps[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            dist.barrier()  # the slowest counts
            samples[name].append((time.perf_counter() - start) * 1e3)
    times = {name: timing(values) for name, values in samples.items()}
    base = times[rivals.BASELINE]
    full = f"{case.name}, {processes} processes" + conditions(keep_memory=False)
    return [Row("distributed_fnac_loss", full, "float32", name).timed(t, base) for name, t in times.items()]


def process(rank: int, options: argparse.Namespace, store: str) -> None:
    """One process."""
    device = torch.device(f"cuda:{rank}" if options.device == "cuda" else "cpu")
    if options.device == "cuda":
        torch.cuda.set_device(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // options.processes))
    dist.init_process_group(
        "nccl" if options.device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=options.processes,
    )
    rows: list[Row] = []
    for name in options.cases:
        found = measure(CASES[name], device, options.rounds)
        rows += found
        if rank == 0:
            print(f"{name}, {options.processes} processes\n{table(found)}\n", flush=True)
    if rank == 0 and options.out:
        torch.set_num_threads(threads)
        Run(machine.facts(options.device), {"rounds": options.rounds, "processes": options.processes}, {}, rows).write(
            options.out
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES.values() if c.paired],
                        default=["published", "b1024-7x7", "b256-14x14"], metavar="CASE")  # fmt: skip
    flags.add_device(parser)
    parser.add_argument("--rounds", type=flags.count, default=9)
    parser.add_argument("--out", type=flags.output, help="write the results here, as JSON")
    options = parser.parse_args()
    if options.device == "cuda" and torch.cuda.device_count() < options.processes:
        parser.error(f"--processes is {options.processes}; there are {torch.cuda.device_count()} CUDA devices")
    if options.processes < 2:
        parser.error(f"--processes is {options.processes}; it should be at least 2")
    for name in options.cases:
        if CASES[name].n < options.processes:
            parser.error(f"--processes is {options.processes}; {name} has {CASES[name].n} pairs to share")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (options, f"{folder}/store"), nprocs=options.processes)


if __name__ == "__main__":
    main()
