"""``python tests/cuda_resources.py > tests/data/cuda_resources.txt``: what every CUDA kernel costs on each chip.

Read from the compiled module as the build left it. From sm_90 on, 1024 bytes of shared memory are the system's own.
What a launch asks for is not in a binary: ``csrc/cuda/launch.cuh`` checks every launch against the device's limit.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cubin

from fnac_kernels import _native

#: What ``mma.sync`` becomes on every chip, and ``wgmma`` on Hopper.
TENSOR_CORES = "H(?:G)?MMA"


class Cost(NamedTuple):
    """A row of the table."""

    chip: str
    kernel: str
    registers: int
    stack: int
    shared: int
    tensor_cores: str


def table(binary: Path) -> list[Cost]:
    """All kernels of the module on all chips, in order of chip and name."""
    usages = cubin.usage(binary)
    names = _demangled(sorted({row.function for row in usages}))
    products = {
        architecture: cubin.instructions(binary, architecture, TENSOR_CORES)
        for architecture in {row.architecture for row in usages}
    }
    costs = [
        Cost(
            row.architecture,
            names[row.function],
            row.registers,
            row.stack,
            row.shared,
            " ".join(sorted(products[row.architecture].get(row.function, ()))) or "-",
        )
        for row in usages
    ]
    return sorted(costs, key=lambda cost: (int(cost.chip.removeprefix("sm_").rstrip("a")), cost.chip, cost.kernel))


def _demangled(functions: list[str]) -> dict[str, str]:
    """``max_logits<PlainTile, float, true, 4>`` for the symbol of that kernel."""
    done = subprocess.run(["c++filt", *functions], capture_output=True, text=True, check=True)
    return dict(zip(functions, map(_short, done.stdout.splitlines()), strict=True))


def _short(name: str) -> str:
    """Without namespaces, arguments and the ending that they all share."""
    name = re.sub(r"fnac::cuda::|\(anonymous namespace\)::|^void ", "", name)
    return re.sub(r"\([^()]*\)$", "", name).replace("_kernel", "")


if __name__ == "__main__":
    module = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(str(_native.module().__file__))
    print(cubin.render(table(module)), end="")
