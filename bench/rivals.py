"""Who competes: plain PyTorch in its usual forms, the libraries a user would pick, and each backend of ours.

Each is called as its documentation says, on the part of the work that it can do. What it cannot do, or an absent
installation, is a sentence in the table.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fnac_kernels
from bench.cases import TAU, Case, ChunkedReference, Op
from fnac_kernels import reference

Forward = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Contender:
    """``prepare(op, inputs)`` returns the forward pass as a function without arguments; what it does first (compiling,
    a layout of its own) is not timed. ``problem(op, case, device)`` is the reason why it cannot run, or None.
    ``products``: the dtype in which it multiplies float32 features, by which its result is judged."""

    name: str
    prepare: Callable[[Op, tuple[Tensor, ...]], Forward]
    problem: Callable[[Op, Case, str], str | None] = lambda op, case, device: None
    ours: bool = False
    products: torch.dtype = torch.float32

    def judged(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of its products, where those of ``dtype`` are asked for."""
        return self.products if dtype == torch.float32 else dtype


def _calls(library: Any, **settings: Any) -> Callable[[Op, tuple[Tensor, ...]], Forward]:
    return lambda op, inputs: functools.partial(op.run, library, *inputs, **settings)


def _compiled(op: Op, inputs: tuple[Tensor, ...]) -> Forward:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it looks for a CUDA it does not need
    torch._dynamo.reset()  # every case gets a static graph of its own and none meets the recompile limit
    run = torch.compile(functools.partial(op.run, reference), dynamic=False, fullgraph=True)
    return lambda: run(*inputs)


def _missing(package: str) -> str | None:
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        return f"not installed (pip install {package})"
    return None


def _late_interaction_kernels(op: Op, inputs: tuple[Tensor, ...]) -> Forward:
    """Each sound is a query of one token, each image a document of h*w tokens. On the CPU it is its plain PyTorch."""
    scorer = importlib.import_module("late_interaction_kernels").MaxSimScorer(normalize=False)
    score = scorer if op.backward else scorer.score
    img, aud = inputs
    return lambda: (score(aud.unsqueeze(1), img.flatten(2).transpose(1, 2)).T / TAU,)


def _only_max_logits(package: str, *, forward_only: bool = False) -> Callable[[Op, Case, str], str | None]:
    def problem(op: Op, case: Case, device: str) -> str | None:
        if op.name != "max_logits_forward" and (forward_only or op.name != "max_logits"):
            return "offers the max-similarity alone" + (", without gradient" if forward_only else "")
        if forward_only and device != "cpu":
            return "runs on cpu"
        return _missing(package)

    return problem


def _maxsim_cpu(op: Op, inputs: tuple[Tensor, ...]) -> Forward:
    """One call per sound, for its API takes one query at a time; the documents lie in its layout beforehand."""
    maxsim_scores = importlib.import_module("maxsim_cpu").maxsim_scores
    img, aud = inputs
    documents = img.flatten(2).transpose(1, 2).contiguous().numpy()
    queries = aud.unsqueeze(1).numpy()
    return lambda: (torch.stack([torch.as_tensor(maxsim_scores(q, documents)) for q in queries], dim=1) / TAU,)


def _inf_cl_problem(op: Op, case: Case, device: str) -> str | None:
    if op.name != "nce":
        return "offers the contrastive term of 1x1 maps alone"
    if device != "cuda":
        return "runs on cuda"
    return _missing("inf-cl")


def _inf_cl(op: Op, inputs: tuple[Tensor, ...]) -> Forward:
    cal_flash_loss = importlib.import_module("inf_cl").cal_flash_loss
    img, aud = inputs[0].flatten(1), inputs[1]
    return lambda: (cal_flash_loss(img, aud, scale=1 / TAU).mean() + cal_flash_loss(aud, img, scale=1 / TAU).mean(),)


def _backend(name: str) -> Contender:
    def problem(op: Op, case: Case, device: str) -> str | None:
        backend = fnac_kernels._dispatch.BACKENDS[name]
        if backend.device != device:
            return f"runs on {backend.device}"
        return backend.problem

    return Contender(name, _calls(fnac_kernels, backend=name), problem, ours=True)


def _medium(name: str) -> Contender:
    """A backend where ``torch.set_float32_matmul_precision`` allows bfloat16 products of float32 features."""
    exact = _backend(name)

    def problem(op: Op, case: Case, device: str) -> str | None:
        reason = exact.problem(op, case, device)
        if reason is not None:
            return reason
        if op.name in ("paired_maps", "adjacency_contrastive"):
            return "is float32 at any precision"
        isa = fnac_kernels.info()["cpu"]["instruction_set"]
        return None if isa in ("amx", "avx512bf16") else f"{isa} has no bfloat16 products"

    def prepare(op: Op, inputs: tuple[Tensor, ...]) -> Forward:
        run = exact.prepare(op, inputs)

        def forward() -> tuple[Tensor, ...]:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")
            try:
                return run()
            finally:
                torch.set_float32_matmul_precision(before)

        return forward

    return Contender(f"{name}-medium", prepare, problem, ours=True, products=torch.bfloat16)


def ours(device: str) -> list[str]:
    """Our backends that run on a kind of device here."""
    backends = fnac_kernels._dispatch.BACKENDS.values()
    return [backend.name for backend in backends if backend.device == device and backend.problem is None]


#: The denominator of every ratio.
BASELINE = "eager"
CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender(BASELINE, _calls(reference)),
        Contender("compile", _compiled),
        Contender(
            "checkpointed",
            _calls(ChunkedReference),
            lambda op, case, device: None if op.backward and "adjacency" not in op.name else "nothing to recompute",
        ),
        Contender("late-interaction-kernels", _late_interaction_kernels, _only_max_logits("late-interaction-kernels")),
        Contender("maxsim-cpu", _maxsim_cpu, _only_max_logits("maxsim-cpu", forward_only=True)),
        Contender("inf-cl", _inf_cl, _inf_cl_problem),
        *(_backend(name) for name in fnac_kernels._dispatch.BACKENDS),
        _medium("cpu"),
    )
}
