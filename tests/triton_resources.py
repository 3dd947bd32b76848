"""``python tests/triton_resources.py > tests/data/triton_resources.txt``: what every Triton kernel costs on each chip.

Kernels are compiled ahead of time, which needs no GPU; registers, stack and shared memory are read from the binary with
the cuobjdump that comes with Triton. Stack is where spilled registers go.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cubin
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fnac_kernels.backends.triton import tuning

CAPABILITIES = (80, 90, 100)
CELLS = 49
SIZES = ("N", "M", "C", "P", "stride_c", "stride_p")
NUMBERS = ("scale", "threshold", "w0", "w1", "w2", "w3")
DISTANCES = {"S1": True, "S2": True, "S3": True}
GRADIENTS = {"LOSS": True, "TERMS": True}


class Cost(NamedTuple):
    """A row of the table."""

    capability: int
    dtype: str
    kernel: str
    registers: int
    stack: int
    shared: int
    tensor_cores: str


def _module(name: str) -> Any:
    return importlib.import_module(f"fnac_kernels.backends.triton.{name}")


def variants(dtype: str) -> Iterator[tuple[str, Any, tuning.Blocks, dict[str, Any]]]:
    """Name, kernel, blocks and constants of the kernels that read features, and for float32 of all others."""
    precision = {"PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    both = {"LOGITS": True, "MAPS": True}
    logits, pooling, backward, terms = map(_module, ("max_logits", "pooling", "feature_backward", "adjacency"))
    yield (
        "max_logits",
        logits.max_logits_kernel,
        tuning.max_logits(CELLS, wide=dtype == "fp32"),
        {**precision, "WIDEN": False},
    )
    yield "map", pooling.map_kernel, tuning.pooling(CELLS), {}
    yield "pool", pooling.pool_kernel, tuning.pooling(CELLS), {"HAS_AVG": True}
    image = {**both, "AVG": True, "FOREGROUND": True, **precision}
    yield "image_gradient", backward.image_gradient_kernel, tuning.image_gradient(CELLS), image
    yield "audio_gradient", backward.audio_gradient_kernel, tuning.audio_gradient(CELLS), {**both, **precision}
    if dtype != "fp32":
        return
    forward = {"NCE": True, **DISTANCES, "MASKED": True, **precision}
    yield "adjacency", terms.forward_kernel, tuning.adjacency(), forward
    yield "finish", terms.finish_kernel, tuning.Blocks({"BLOCK": 256}, 4, 3), {"NCE": True, **DISTANCES}
    logit = {**GRADIENTS, "NCE": True, "S1": True, "S3": True, "MASKED": True, **precision}
    yield "logit_gradient", terms.logit_gradient_kernel, tuning.adjacency_gradient(), logit
    for which in "afi":
        constants = {"WHICH": which, **GRADIENTS, **DISTANCES, **precision}
        yield f"feature_gradient_{which}", terms.feature_gradient_kernel, tuning.adjacency_gradient(), constants


def cost(capability: int, dtype: str, name: str, kernel: Any, blocks: tuning.Blocks, constants: dict[str, Any]) -> Cost:
    """Compile one variant, with the divisibility of C = 512 and of allocated tensors, and read what it uses."""
    constants = constants | blocks.sizes
    features = f"*{dtype}"
    pointers = {"img": features, "aud": features, "dimg": features, "daud": features, "argmax": "*u16", "mask": "*i8"}

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        return "i32" if argument in SIZES else "fp32" if argument in NUMBERS else pointers.get(argument, "*fp32")

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, type_) in enumerate(signature.items())
        if type_.startswith("*") or argument == "C"
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": blocks.num_warps, "num_stages": blocks.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        (used,) = cubin.usage(Path(file.name))
    instructions = [i for i in ("mma.sync", "wgmma", "tcgen05.mma") if i in compiled.asm["ptx"]]
    return Cost(
        capability, dtype, name, used.registers, used.stack, compiled.metadata.shared, " ".join(instructions) or "-"
    )


def table() -> list[Cost]:
    """All variants on all chips."""
    return [
        cost(capability, dtype, *variant)
        for capability in CAPABILITIES
        for dtype in ("fp32", "bf16", "fp16")
        for variant in variants(dtype)
    ]


if __name__ == "__main__":
    print(cubin.render(table()), end="")
