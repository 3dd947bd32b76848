"""The only file that touches the compiled module ``fnac_kernels._C``. Loading is lazy and its failure is remembered."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

#: Names the CUDA kernels compiled for the host (``tests/emulation``): the cuda backend then takes CPU tensors.
CUDA_EMULATION = "FNAC_CUDA_EMULATION"
#: Of a process that is a fork of this one, torch's OpenMP threads have not come along.
_IMPORTED_BY = os.getpid()
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        loaded = importlib.import_module("fnac_kernels._C")
    except ImportError as error:
        return None, (
            f"the compiled module is missing or does not load ({error}); "
            "build it with `pip install -e .` in the repository (needs a C++20 compiler)"
        )
    if os.getpid() != _IMPORTED_BY:
        loaded.forked()
    return loaded, None


def module() -> ModuleType:
    """The compiled module; raises RuntimeError with the cause where there is none."""
    return _there(*_load())


def problem() -> str | None:
    """Why the compiled module cannot be used, or None."""
    return _load()[1]


@functools.cache
def _load_cuda() -> tuple[ModuleType | None, str | None]:
    emulated = os.environ.get(CUDA_EMULATION)
    if emulated:
        return _load_emulated(Path(emulated))
    loaded, reason = _load()
    if loaded is None:
        return None, reason
    if not hasattr(loaded, "cuda"):
        return None, f"the compiled module was built without CUDA: {loaded.cuda_left_out}"
    return loaded.cuda, None


def _load_emulated(path: Path) -> tuple[ModuleType | None, str | None]:
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    try:
        if spec is None or spec.loader is None:
            raise ImportError("not the name of a compiled module")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    except ImportError as error:
        return None, f"{CUDA_EMULATION} is {str(path)!r}, which does not load: {error}"
    return loaded, None


def cuda() -> ModuleType:
    """The CUDA part of the compiled module; raises RuntimeError with the cause where there is none."""
    return _there(*_load_cuda())


def cuda_problem() -> str | None:
    """Why the CUDA kernels cannot be used, or None. One device that can run them suffices."""
    loaded, reason = _load_cuda()
    if loaded is None or os.environ.get(CUDA_EMULATION):
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device" if torch.version.cuda else "this torch was built without CUDA"
    problems = [loaded.problem(device) for device in range(torch.cuda.device_count())]
    return None if "" in problems else problems[0]


def cpu_features() -> dict[str, Any]:
    """The instruction set in use, or why the one that is ordered cannot be; those that this machine could run; and
    which the build lacks."""
    loaded, _ = _load()
    if loaded is None:
        return {"instruction_set": None, "available": [], "left_out": None}
    used = isa_problem() or loaded.isa()
    return {"instruction_set": used, "available": loaded.isas(), "left_out": loaded.cpu_left_out}


def isa_problem() -> str | None:
    """Why the instruction set that ``FNAC_CPU_ISA`` orders cannot be used, or None."""
    loaded, _ = _load()
    try:
        if loaded is not None:
            loaded.isa()
    except RuntimeError as error:
        return str(error)
    return None


def empty_cache() -> None:
    """Give memory that the ``cpu`` backend keeps, and no tensor uses, back to the system.

    Results (gradients, logits, maps, what the loss keeps for its backward pass) and scratch of 64 KiB or more lie in
    memory that is kept when they are freed, at most 512 MiB of it, because giving pages back and filling fresh ones
    takes up to a third of the loss's time. A result of 8 MiB or more that fits none of the blocks kept frees them
    first, so the loss's own peak is what it was; what the process does between two steps has that much less.
    """
    loaded, _ = _load()
    if loaded is not None:
        loaded.release_kept()


def cuda_features() -> dict[str, Any]:
    """The devices, each with its architecture and whether this build serves it; nvcc's version, and its targets."""
    loaded, _ = _load_cuda()

    def describe(device: int) -> str:
        major, minor = torch.cuda.get_device_capability(device)
        served = loaded is not None and not loaded.problem(device)
        return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}, {'served' if served else 'not served'})"

    return {
        "devices": [describe(device) for device in range(torch.cuda.device_count())],
        "compiler": getattr(loaded, "compiler", None),
        "architectures": [] if loaded is None else loaded.architectures(),
    }


def image_strides(img: Tensor) -> tuple[int, int]:
    """Strides of ``img (N, C, H, W)`` over channels and over cells; it is dense in NCHW or channels_last."""
    _, c, h, w = img.shape
    return (h * w, 1) if img.is_contiguous() and h * w > 1 else (1, c)


def image(img: Tensor) -> tuple[int, int, int, int, int, int, int]:
    """What the kernels learn of a dense feature map: address, dtype, n, c, cells, strides over channels and cells."""
    n, c, h, w = img.shape
    return (img.data_ptr(), DTYPES[img.dtype], n, c, h * w, *image_strides(img))


def vectors(x: Tensor) -> tuple[int, int, int, int, int, int, int]:
    """:func:`image` of contiguous vectors ``(N, C)``: maps of one cell."""
    n, c = x.shape
    return (x.data_ptr(), DTYPES[x.dtype], n, c, 1, 1, c)


def address(x: Tensor | None) -> int:
    """Where the tensor's data lies; 0 for None."""
    return 0 if x is None else x.data_ptr()


def addresses(*tensors: Tensor | None) -> list[int]:
    """:func:`address` of each."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def _there(loaded: ModuleType | None, reason: str | None) -> ModuleType:
    if loaded is None:
        raise RuntimeError(reason)
    return loaded
