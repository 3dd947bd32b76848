"""Which backend runs a call, and why another one does not.

A backend is a module below ``fnac_kernels.backends`` that offers the primitives of ``backends/README.md``.
It is imported when it is first asked for; a failure is remembered and explained, not raised at import.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

REFERENCE = "reference"
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Backend:
    """One way to run the kernels: its module, the tensors it takes, and a probe that says why it is not usable.

    ``emulation`` is the variable of the environment under which its kernels run on CPU tensors, for tests. With
    ``narrow_argmax`` the argmax of ``max_logits`` is uint8 where a map has at most 256 cells. With ``channels_last``
    features whose strides are of no memory format are copied to channels_last, where the backend would copy NCHW too.
    """

    name: str
    module: str
    device: str
    probe: Callable[[], str | None]
    emulation: str | None = None
    narrow_argmax: bool = False
    channels_last: bool = False

    @property
    def emulated(self) -> bool:
        value = os.environ.get(self.emulation, "") if self.emulation else ""
        return value.lower() not in ("", "0", "false", "off")

    @property
    def takes(self) -> str:
        """The kind of device whose tensors it takes here."""
        return "cpu" if self.emulated else self.device

    @functools.cached_property
    def problem(self) -> str | None:
        """None when usable here, otherwise one sentence that says why not and what would help."""
        reason = self.probe()
        if reason is None:
            try:
                _ = self._imported
            except Exception as error:  # of whatever kind: a package that it needs may be of another version
                reason = f"it does not import: {type(error).__name__}: {error}"
        return reason

    @functools.cached_property
    def _imported(self) -> Any:
        return importlib.import_module(self.module)

    def load(self) -> Any:
        """The module; raises RuntimeError with the cause and a way out when the backend is not usable."""
        if self.problem is not None:
            raise RuntimeError(f"fnac_kernels backend {self.name!r} is not available: {self.problem}")
        return self._imported


def constant_when_compiled(function: F) -> F:
    """``torch.compiler.assume_constant_result``, which imports the compiler at once: two seconds that a program may
    never need."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _probe_cpu() -> str | None:
    from fnac_kernels import _native

    return _native.problem()


def _probe_cuda() -> str | None:
    from fnac_kernels import _native

    return _native.cuda_problem()


def _probe_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not torch.cuda.is_available() and not BACKENDS["triton"].emulated:
        return "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels in Triton's slow interpreter)"
    return None


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("cpu", "fnac_kernels.backends.cpu", "cpu", _probe_cpu),
        Backend(
            "triton",
            "fnac_kernels.backends.triton",
            "cuda",
            _probe_triton,
            "TRITON_INTERPRET",
            narrow_argmax=True,
            channels_last=True,
        ),
        Backend("cuda", "fnac_kernels.backends.cuda", "cuda", _probe_cuda, "FNAC_CUDA_EMULATION"),
    )
}
NAMES = (REFERENCE, *BACKENDS)
DEVICES = ("cpu", "cuda")


@functools.cache
def preference(device: str) -> tuple[str, ...]:
    """What is tried for a kind of device, in this order. On Hopper ``cuda`` is faster, by ``bench/results/h100`` (but
    for a large batch in float32); other chips have not been measured, and there its kernels lack what Triton uses for
    large batches.
    """
    if device == "cpu":
        return ("cpu",)
    if device != "cuda":
        return ()
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return ("cuda", "triton") if hopper else ("triton", "cuda")


# Read once: each look at the environment costs as much as a check of all arguments.
_FROM_ENVIRONMENT = os.environ.get("FNAC_BACKEND") or None
_override: str | None = None


class use_backend:
    """Make every call use one backend, from here on or for a ``with`` block. ``None`` takes an order back:
    ``FNAC_BACKEND``'s holds again, or the automatic choice.

    Like ``torch.set_grad_enabled`` it takes effect when called; as a context manager it puts the previous choice back.
    The choice is the process's. ``FNAC_BACKEND``, read at import, sets it from outside; the ``backend`` argument goes
    before both.

    Raises:
        ValueError: ``name`` is not a backend.
        RuntimeError: the backend is not usable here; the message says why and what would help.
    """

    def __init__(self, name: str | None) -> None:
        global _override
        if name is not None:
            check_name(name, "name")
            if name != REFERENCE:
                BACKENDS[name].load()
        self._name, self._previous = name, _override
        _override = name

    def __enter__(self) -> use_backend:
        global _override
        _override = self._name  # again: the block may be its second
        return self

    def __exit__(self, *_: object) -> None:
        global _override
        _override = self._previous


def check_name(name: str, argument: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{argument} is {name!r}; it should be one of {', '.join(map(repr, NAMES))}, or None")


def requested(backend: str | None) -> str | None:
    """The backend that the caller asks for by argument, by :class:`use_backend` or by ``FNAC_BACKEND``."""
    if backend is not None:
        check_name(backend, "backend")
        return backend
    if _override is not None:
        return _override
    if _FROM_ENVIRONMENT is not None:
        check_name(_FROM_ENVIRONMENT, "FNAC_BACKEND")
    return _FROM_ENVIRONMENT


@constant_when_compiled
def select(name: str | None, device: str, dtype: torch.dtype) -> str:
    """The backend that serves tensors of this device and dtype. A request (``name``) never falls back.

    Raises:
        RuntimeError: the requested backend is not usable here.
        ValueError, TypeError: the requested backend does not take this device or dtype.
    """
    if name == REFERENCE:
        return REFERENCE
    if name is not None:
        backend = BACKENDS[name]
        backend.load()
        if dtype == torch.float64:
            raise TypeError(
                f"backend {name!r} takes float32, bfloat16 and float16, the tensors are float64; "
                "backend='reference' takes float64"
            )
        if device != backend.takes:
            raise ValueError(
                f"backend {name!r} takes tensors on {backend.takes}, these are on {device}; "
                f"move them, or use backend={automatic(device) or REFERENCE!r}"
            )
        return name
    if dtype == torch.float64:
        return REFERENCE
    name = automatic(device)
    if name is None:
        _warn_reference(device)
    return name or REFERENCE


def automatic(device: str) -> str | None:
    """The first usable backend for a kind of device, or None: then it is the reference."""
    for name in preference(device):
        backend = BACKENDS[name]
        if backend.problem is None and backend.takes == device:
            return name
    return None


@functools.cache
def _warn_reference(device: str) -> None:
    candidates = (BACKENDS[name] for name in preference(device))
    reasons = "; ".join(f"{b.name}: {b.problem or f'takes tensors on {b.takes} here'}" for b in candidates)
    warnings.warn(
        f"fnac_kernels runs plain PyTorch on {device} tensors: no compiled backend is usable there "
        f"({reasons or 'none exists'})",
        stacklevel=2,
    )


def explain() -> dict[str, str | None]:
    """Every backend's name with None where it is usable, otherwise the reason why it is not."""
    return {REFERENCE: None, **{name: backend.problem for name, backend in BACKENDS.items()}}
