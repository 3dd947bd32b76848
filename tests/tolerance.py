"""How close is close enough: a kernel's error against float64 may not exceed torch's own in that dtype by much.

Torch's own error is that of the reference run in float32 (on inputs of the sample's dtype), whose gradients are
rounded to that dtype. Argmax flips and cells at the mask threshold are discontinuities, not rounding: ``flips``
counts them apart. Gradients are compared as vectors, and the worst element is named.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from samples import Op, Sample
from torch import Tensor

#: What rounding may add to torch's own error, relative to the largest value (values) or to the norm (gradients).
VALUE_SLACK = {torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
GRAD_SLACK = {torch.float32: 3e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
FACTOR = 2.0


@dataclass
class Run:
    """Outputs of an op and the gradients of their weighted sum."""

    outputs: tuple[Tensor, ...]
    dimg: Tensor | None
    daud: Tensor | None


def run(
    op: Op,
    sample: Sample,
    backend: str | None,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    grads: bool = True,
) -> Run:
    """One forward and backward of ``op`` on ``sample``; ``dtype`` widens the inputs first (the oracle's float64)."""
    img, aud = sample.features(device)
    if dtype is not None:
        img, aud = img.to(dtype), aud.to(dtype)
    img.requires_grad_(grads)
    aud.requires_grad_(grads)
    outputs = op.run(img, aud, sample.tau, backend)
    if grads:
        total = sum((out * cotangent(i, out)).sum() for i, out in enumerate(outputs))
        if total.requires_grad:
            total.backward()
    return Run(tuple(o.detach() for o in outputs), img.grad, aud.grad)


def cotangent(position: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(position)
    weight = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return weight.to(like.device, like.dtype)


def assert_as_good_as_torch(got: Run, torch_run: Run, exact: Run, dtype: torch.dtype) -> None:
    """Values and gradients of ``got`` are about as close to ``exact`` (float64) as torch's are."""
    for i, (g, t, e) in enumerate(zip(got.outputs, torch_run.outputs, exact.outputs, strict=True)):
        assert_value(g, t, e, dtype, f"output {i}")
    assert_gradient(got.dimg, torch_run.dimg, exact.dimg, dtype, "dimg")
    assert_gradient(got.daud, torch_run.daud, exact.daud, dtype, "daud")


def assert_value(got: Tensor, by_torch: Tensor, exact: Tensor, dtype: torch.dtype, name: str) -> None:
    got, by_torch, exact = got.double().cpu(), by_torch.double().cpu(), exact.cpu()
    assert got.shape == exact.shape, f"{name} has shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    error = (got - exact).abs()
    allowed = FACTOR * (by_torch - exact).abs().max() + VALUE_SLACK[dtype] * exact.abs().max().clamp(min=1e-3)
    worst = _worst(error)
    assert bool((error <= allowed).all()), (
        f"{name}{worst} is {got[worst].item():.9g}, exact {exact[worst].item():.9g}: "
        f"error {error[worst].item():.3g}, allowed {allowed.item():.3g}"
    )


def assert_gradient(
    got: Tensor | None, by_torch: Tensor | None, exact: Tensor | None, dtype: torch.dtype, name: str
) -> None:
    if exact is None:
        assert got is None or not got.any(), f"{name} should have no gradient"
        return
    assert got is not None, f"{name} has no gradient"
    assert by_torch is not None
    assert got.shape == exact.shape
    got, by_torch, exact = got.double().cpu(), by_torch.double().cpu(), exact.cpu()
    norm = exact.norm().clamp(min=1e-12)
    error = ((got - exact).norm() / norm).item()
    allowed = FACTOR * ((by_torch - exact).norm() / norm).item() + GRAD_SLACK[dtype]
    worst = _worst((got - exact).abs())
    assert error <= allowed, (
        f"{name}: relative L2 error {error:.3g}, allowed {allowed:.3g}; worst at {worst}: "
        f"{got[worst].item():.6g}, exact {exact[worst].item():.6g}"
    )


def _worst(error: Tensor) -> tuple[int, ...]:
    flat = int(error.nan_to_num(nan=float("inf")).argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))


def flips(argmax: Tensor, img: Tensor, aud: Tensor) -> int:
    """Pairs whose chosen cell is not the float64 argmax (the first on a tie)."""
    similarity = torch.einsum("nchw,mc->nmhw", img.detach().double().cpu(), aud.detach().double().cpu()).flatten(2)
    return int((similarity.argmax(-1) != argmax.cpu().to(torch.int64)).sum())
