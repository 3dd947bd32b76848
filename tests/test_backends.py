"""Every backend that is usable here computes what the reference specifies: values and gradients, over the table."""

from __future__ import annotations

import functools

import pytest
import torch
from samples import BF16, CASE_IDS, CASES, USABLE, Op, Sample
from tolerance import Run, assert_as_good_as_torch, flips, run
from torch import Tensor

import fnac_kernels as fk
from fnac_kernels import _dispatch


def run_unwritten(op: Op, sample: Sample, backend: str) -> Run:
    """:func:`run` where new memory is NaN: zeros, which it often is, hide what nobody writes or writes too late."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return run(op, sample, backend, device=_dispatch.BACKENDS[backend].takes)
    finally:
        torch.use_deterministic_algorithms(False)


@functools.cache
def exact(op: Op, sample: Sample) -> Run:
    return run(op, sample, "reference", dtype=torch.float64)


@functools.cache
def by_torch(op: Op, sample: Sample) -> Run:
    return run(op, sample, "reference")


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize(("op", "sample"), CASES, ids=CASE_IDS)
def test_values_and_gradients_are_as_good_as_torch(op, sample, backend):
    got = run_unwritten(op, sample, backend)
    assert_as_good_as_torch(got, by_torch(op, sample), exact(op, sample), sample.dtype)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("sample", sorted({s for _, s in CASES}, key=str), ids=str)
def test_the_argmax_is_the_first_of_the_largest(sample, backend):
    img, aud = sample.features(_dispatch.BACKENDS[backend].takes)
    _, argmax = torch.ops.fnac_kernels.max_logits(img, aud, sample.tau, backend)
    assert flips(argmax, img, aud) == 0


#: A term alone, and what the table's weights leave out: what is not wanted is neither read nor written.
WEIGHTS = [(2, 0, 0, 0), (0, 30, 0, 0), (0, 0, 40, 0), (0, 0, 0, 50), (1, 0, 40, 0), (0, 30, 40, 0)]
WEIGHED = [Sample(9, 9, 17, 3, 5), Sample(9, 9, 17, 3, 5, dtype=BF16, layout="channels_last", kind="clustered")]


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("sample", WEIGHED, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_terms_that_are_wanted_alone(weights, sample, backend):
    op = Op("fnac_loss", lambda *x: tuple(fk.fnac_loss(*x[:3], backend=x[3], weights=weights)))
    got = run_unwritten(op, sample, backend)
    assert_as_good_as_torch(got, by_torch(op, sample), exact(op, sample), sample.dtype)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("tau", [0.03, 0.07])
@pytest.mark.parametrize("threshold", [0.25, 0.625, 0.75])
def test_pairs_at_the_threshold_are_false_negatives(backend, tau, threshold):
    """Whatever dividing by tau makes of both: these products are exact."""
    device = _dispatch.BACKENDS[backend].takes
    img, aud = tau * torch.randn(6, 8, 3, 3, device=device), torch.eye(6, 8, device=device)  # every pair counts
    aud[1, 0] = aud[3, 2] = threshold
    settings = {"weights": (1, 0, 0, 0), "adjacency_threshold": threshold}
    got, wanted = (fk.fnac_loss(img, aud, tau, backend=name, **settings).nce for name in (backend, "reference"))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", *USABLE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_of_16_bits_are_normalised_in_float32(backend, dtype):
    """In their own digits many cells would fall on the wrong side of the threshold."""
    device = "cpu" if backend == "reference" else _dispatch.BACKENDS[backend].takes
    img, maps = torch.rand(5, 8, 6, 7, device=device), torch.randn(5, 6, 7, device=device).to(dtype)
    got, wanted = (fk.foreground_pool(img, x, backend=backend) for x in (maps, maps.float()))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", USABLE)
def test_large_logits_keep_the_digits_of_their_softmaxes(backend):
    """In one float32 a log-sum-exp of 37, of a row or of a column, would put 5e-7 of error on each element."""
    device = _dispatch.BACKENDS[backend].takes
    logits = 33 + torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).to(device)
    features = [torch.randn(40, 8, device=device) for _ in range(3)]

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        x = logits.to(dtype).requires_grad_()
        others = [f.to(dtype) for f in features]
        nce = fk.adjacency_contrastive(x, *others, weights=(1, 0, 0, 0), backend=backend).nce
        return torch.autograd.grad(nce, x)[0].double().fill_diagonal_(0)  # which is near -2

    wanted = gradient(torch.float64, "reference")
    assert float((gradient(torch.float32, backend) - wanted).norm() / wanted.norm()) < 3e-7


@pytest.mark.parametrize("backend", USABLE)
def test_nearly_uniform_softmaxes_keep_the_digits_of_their_distance(backend):
    """exp(x - max - log sum) would round a whole row by the digits of log N, four times as much."""
    device, size = _dispatch.BACKENDS[backend].takes, 64
    errors = {backend: 0.0, "reference": 0.0}
    for seed in range(10):
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
        logits, aud = (1e-3 * draw(size, size)).to(device), (0.015 * draw(size, 24)).to(device)

        def distance(name: str, dtype: torch.dtype, logits: Tensor = logits, aud: Tensor = aud) -> float:
            inputs = (logits.to(dtype), *[aud.to(dtype)] * 3)
            return float(fk.adjacency_contrastive(*inputs, weights=(0, 1, 0, 0), backend=name).fns_audio)

        exact = distance("reference", torch.float64)
        for name in errors:
            errors[name] += (distance(name, torch.float32) / exact - 1) ** 2 / 10
    assert errors[backend] ** 0.5 < 2 * errors["reference"] ** 0.5


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("lowest", [-1e4, -1e8, float("-inf")])
def test_a_positive_pair_far_below_its_row_and_column(backend, lowest):
    logits = torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).to(_dispatch.BACKENDS[backend].takes)
    logits[3, 3] = lowest
    features = [torch.ones(40, 8, device=logits.device)] * 3

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        x = logits.to(dtype).requires_grad_()
        others = [f.to(dtype) for f in features]
        nce = fk.adjacency_contrastive(x, *others, weights=(1, 0, 0, 0), backend=backend).nce
        return torch.autograd.grad(nce, x)[0].double()

    wanted = gradient(torch.float64, "reference")
    torch.testing.assert_close(gradient(torch.float32, backend), wanted, rtol=3e-6, atol=1e-8)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("left_out", [float("-inf"), -1e9])
def test_pairs_that_the_caller_left_out_of_the_logits(backend, left_out):
    """Their softmax is 0 for certain, and the sign of its distance from the other: no rounding decided it."""
    device = _dispatch.BACKENDS[backend].takes
    logits = 3 * torch.randn(6, 6, device=device)
    logits[0, 1] = logits[3, 2] = logits[5, 0] = left_out
    inputs = [logits, *(torch.randn(6, 8, device=device) for _ in range(3))]

    def gradients(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        return torch.autograd.grad(sum(fk.adjacency_contrastive(*leaves, 5.0, backend=backend)), leaves)

    for got, wanted in zip(gradients(torch.float32, backend), gradients(torch.float64, "reference"), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)


def test_the_reference_is_its_own_gradient():
    img = torch.randn(3, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    aud = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for op in {op for op, _ in CASES}:
        assert torch.autograd.gradcheck(lambda i, a, op=op: op.run(i, a, 0.5, "reference"), (img, aud))
