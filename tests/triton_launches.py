"""What a call launches, allocates and compiles, without a GPU: launches are recorded, nothing runs.

Run as ``python tests/triton_launches.py``; prints JSON. A process of its own, because it replaces Triton's driver.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, compute_cache_key

from fnac_kernels import _dispatch, _ops

#: PyTorch's operators that move no data.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "view", "unbind", "detach", "select", "alias", "as_strided",
    "expand", "transpose", "t", "permute", "slice", "split", "split_with_sizes", "unsqueeze", "squeeze", "_unsafe_view",
    "lift_fresh",
}  # fmt: skip


class Hopper:
    """A driver of a device that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Meter(TorchDispatchMode):
    """The largest sum of bytes that live tensors made under it take: what PyTorch's allocator would hand out."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {StorageWeakRef(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.live = {storage: size for storage, size in self.live.items() if not storage.expired()}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (storage := StorageWeakRef(x.untyped_storage())) not in inputs:
                self.live[storage] = x.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return result


class Recorder(TorchDispatchMode):
    """The kernels launched while it is active: Triton's by name, PyTorch's as aten operators."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.compiled: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.removeprefix("aten::") not in FREE:
            self.launches.append(name)
        return func(*args, **(kwargs or {}))

    def record(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Stands for ``JITFunction.run``: binds the arguments as it does, up to the key of the compiled kernel."""
        _, keys, _, _, binder = kernel.device_caches[0]
        _, specialization, options = binder(*args, **options, debug=False, instrumentation_mode="")
        self.launches.append(kernel.fn.__name__)
        self.compiled.add(kernel.fn.__name__ + compute_cache_key(keys, specialization, options))


def call(
    n: int, c: int, h: int, w: int, dtype: torch.dtype, layout: torch.memory_format | None, meter: Meter | None = None
) -> tuple[Recorder, Recorder]:
    """The whole loss and its gradients: what its two operators do. A layout of None is strides of no memory format."""
    if layout is None:
        img = torch.zeros(n, 2 * c, h, w, dtype=dtype)[:, ::2]
    else:
        img = torch.zeros(n, c, h, w, dtype=dtype).contiguous(memory_format=layout)
    aud = torch.zeros(n, c, dtype=dtype)
    settings = (0.03, 0.6, (1.0, 100.0, 100.0, 100.0), None)
    forward, backward = Recorder(), Recorder()
    JITFunction.run = lambda kernel, *a, **k: forward.record(kernel, *a, **k)
    with meter or contextlib.nullcontext(), forward:
        loss, _, _, *saved = _ops._fnac_loss(img, aud, *settings, "triton")
    grad = torch.ones_like(loss)
    tau, _, weights, threshold = settings
    JITFunction.run = lambda kernel, *a, **k: backward.record(kernel, *a, **k)
    with meter or contextlib.nullcontext(), backward:
        _ops._fnac_loss_backward_op(
            grad, None, None, img, aud, *saved, tau, weights, threshold, True, True, "triton"
        )  # fmt: skip
    return forward, backward


def compiled(shapes: list[tuple[int, int, int, int]], dtype: torch.dtype, layout: torch.memory_format) -> list[int]:
    """How many kernels calls of these shapes compile, forward and backward."""
    calls = [call(*shape, dtype, layout) for shape in shapes]
    return [len(set().union(*(r.compiled for r in pair))) for pair in zip(*calls, strict=True)]


def peak(dtype: torch.dtype, layout: torch.memory_format) -> int:
    """The most that a step of 4096 pairs takes beside its inputs, in bytes."""
    meter = Meter()
    call(4096, 512, 7, 7, dtype, layout, meter)
    return meter.peak


def main() -> None:
    driver.set_active(Hopper())
    _dispatch.BACKENDS["triton"].__dict__["problem"] = None
    nchw, last = torch.contiguous_format, torch.channels_last
    launches = {}
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for precision, dtype, layout in itertools.product(("highest", "high", "medium"), dtypes, (nchw, last, None)):
        torch.set_float32_matmul_precision(precision)
        # 17 x 17: more cells than one program takes.
        for n, side in ((1, 7), (31, 7), (32, 7), (256, 7), (256, 14), (32, 17), (256, 28)):
            forward, backward = call(n, 512, side, side, dtype, layout)
            launches[f"{n} {side} {dtype} {precision} {layout}"] = [forward.launches, backward.launches]
    torch.set_float32_matmul_precision("highest")
    variants = {}
    for name, shapes in {
        "batch": [(n, 512, 7, 7) for n in (256, 272, 304, 384, 496, 512)],
        "ragged batch": [(n, 512, 7, 7) for n in (257, 260, 300, 388, 510, 511)],
        "channels": [(256, c, 7, 7) for c in (128, 256, 512, 1024)],
        "map": [(256, 512, h, w) for h, w in ((7, 7), (6, 8), (5, 10), (8, 8 - 1))],
        "everything": [(n, c, h, 7) for n in (256, 304, 400) for c in (64, 512) for h in (5, 6, 7)],
    }.items():
        variants[name] = compiled(shapes, torch.bfloat16, last)
    variants |= {f"{dtype} {layout}": compiled(shapes, dtype, layout) for dtype in dtypes for layout in (nchw, last)}
    peaks = {
        f"{dtype} {layout}": peak(dtype, layout) for dtype in (torch.bfloat16, torch.float32) for layout in (nchw, last)
    }
    print(json.dumps({"launches": launches, "variants": variants, "peaks": peaks}))


if __name__ == "__main__":
    main()
