"""One contender's work on one case as a function without arguments, and the check that it is the right work."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Case, ChunkedReference, Op
from bench.rivals import Contender

#: Errors beyond which a result counts as another result: of values relative to the largest, of gradients in relative
#: L2. They leave room for argmax flips between near-equal cells, which plain PyTorch has as well.
TOLERANCE = {torch.float32: (1e-4, 2e-2), torch.float16: (1e-2, 0.2), torch.bfloat16: (3e-2, 0.5)}


@dataclass(frozen=True)
class Result:
    outputs: tuple[Tensor, ...]
    grads: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Error:
    """Distance from the oracle: the worst value relative to the largest, the worst gradient in relative L2."""

    value: float
    grad: float

    def acceptable(self, dtype: torch.dtype) -> bool:
        value, grad = TOLERANCE[dtype]
        return self.value <= value and self.grad <= grad  # False for NaN


def leaves(op: Op, case: Case, device: str) -> tuple[Tensor, ...]:
    """The inputs of ``op``, leaves that want gradients where its backward is part of the work."""
    with torch.no_grad():
        inputs = op.inputs(*case.features(device))
    return tuple(x.detach().requires_grad_(op.backward) for x in inputs)


def step(op: Op, contender: Contender, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Callable[[], Result]:
    """Forward, and backward where ``op`` has one. A dtype below float32 means autocast, of float32 features."""
    forward = contender.prepare(op, inputs)
    device = inputs[0].device.type
    cotangent = _cotangent(inputs) if op.dense else None

    def run() -> Result:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32), torch.set_grad_enabled(op.backward):
            outputs = forward()
        if not op.backward:
            return Result(outputs)
        start = None if cotangent is None else cotangent.to(outputs[0].dtype)
        return Result(tuple(o.detach() for o in outputs), torch.autograd.grad(outputs[0], inputs, start))

    return run


def _cotangent(inputs: tuple[Tensor, ...]) -> Tensor:
    """The gradient that the logits ``(n, m)`` receive: dense, as from the loss."""
    n, m = len(inputs[0]), len(inputs[1])
    return torch.linspace(-1, 1, n * m, device=inputs[0].device).sin().view(n, m) / n


def oracle(op: Op, inputs: tuple[Tensor, ...]) -> Result:
    """What every contender should compute: the reference in float32, in chunks where the tensor would not fit."""
    return step(op, Contender("oracle", lambda op, x: lambda: op.run(ChunkedReference, *x)), inputs, torch.float32)()


def error(got: Result, exact: Result) -> Error:
    def largest(x: Tensor) -> float:
        return x.abs().max().item()

    values = [largest(g - e) / max(largest(e), 1e-6) for g, e in zip(got.outputs, exact.outputs, strict=True)]
    grads = [((g - e).norm() / e.norm()).item() for g, e in zip(got.grads, exact.grads, strict=True)]
    if any(math.isnan(x) for x in (*values, *grads)):  # max() would lose it
        return Error(math.nan, math.nan)
    return Error(max(values), max(grads, default=0.0))
