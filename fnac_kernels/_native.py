"""The only file that touches the compiled module ``fnac_kernels._C``. Loading is lazy and its failure is remembered."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("fnac_kernels._C"), None
    except ImportError as error:
        return None, (
            f"the compiled module is missing or does not load ({error}); "
            "build it with `pip install -e .` in the repository (needs a C++20 compiler)"
        )


def module() -> ModuleType:
    """The compiled module; raises RuntimeError with the cause where there is none."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


def problem() -> str | None:
    """Why the compiled module cannot be used, or None."""
    return _load()[1]


def cuda_problem() -> str | None:
    """Why the CUDA part of the compiled module cannot be used, or None."""
    loaded, reason = _load()
    if loaded is None:
        return reason
    return "the compiled module was built without CUDA (rebuild with nvcc on PATH and FNAC_CUDA=on)"


def cpu_features() -> dict[str, Any]:
    """The instruction set in use and those that this machine could run."""
    loaded, _ = _load()
    if loaded is None:
        return {"instruction_set": None, "available": []}
    return {"instruction_set": loaded.isa(), "available": loaded.isas()}


def cuda_features() -> dict[str, Any]:
    """The architectures compiled in."""
    return {"architectures": []}
