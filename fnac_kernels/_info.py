"""What this machine and this installation offer: ``fnac_kernels.info()`` and ``python -m fnac_kernels``."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

import fnac_kernels
from fnac_kernels import _dispatch, _native


def info() -> dict[str, Any]:
    """Versions, devices, instruction sets, per backend None (usable) or the reason why it is not, the automatic choice,
    and the backend that is ordered instead, if one is."""
    backends = _dispatch.explain()
    backends["cpu"] = backends["cpu"] or _native.isa_problem()  # an order, which every call of it will refuse
    return {
        "versions": {
            "fnac_kernels": fnac_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _triton_version(),
        },
        "cpu": {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            **_native.cpu_features(),
        },
        "cuda": _native.cuda_features(),
        "backends": backends,
        "ordered": _ordered(),
        "automatic": {device: _dispatch.automatic(device) or _dispatch.REFERENCE for device in _dispatch.DEVICES},
    }


def _ordered() -> str | None:
    """The backend that :class:`use_backend` or ``FNAC_BACKEND`` orders, or why that cannot be followed."""
    try:
        name = _dispatch.requested(None)
        if name is not None and name != _dispatch.REFERENCE:
            _dispatch.BACKENDS[name].load()
        return name
    except (ValueError, RuntimeError) as error:
        return str(error)


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def render() -> str:
    """:func:`info` as text, a line each."""
    facts = info()
    lines = [f"{name:<14}{version}" for name, version in facts["versions"].items()]
    for section in ("cpu", "cuda"):
        for key, value in facts[section].items():
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            lines.append(f"{section + ' ' + key:<24}{shown or 'none'}")
    lines.append("")
    for name, problem in facts["backends"].items():
        lines.append(f"backend {name:<12}{'usable' if problem is None else 'not usable: ' + problem}")
    lines += [f"{device} tensors run on {name}" for device, name in facts["automatic"].items()]
    if facts["ordered"] is not None:
        lines.append(f"ordered instead: {facts['ordered']}")
    return "\n".join(lines)
