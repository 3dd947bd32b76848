"""What only a device can show: graph capture, launches, streams, devices, no waiting, determinism, large sizes, memory.

Skipped where torch sees no CUDA device. The values over the table are in ``test_backends.py``, on the same backends.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from samples import USABLE
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import fnac_kernels as fk
from fnac_kernels import _dispatch

GPU = [name for name in USABLE if _dispatch.BACKENDS[name].takes == "cuda"]
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.parametrize("backend", GPU),
]
FLOAT, BF16 = torch.float32, torch.bfloat16
SECOND = 1_500_000_000  # cycles of a device, roughly; torch.cuda._sleep keeps a stream busy for so long


def features(n: int, c: int = 512, side: int = 7, dtype: torch.dtype = FLOAT, device: str = "cuda", seed: int = 0):
    generator = torch.Generator(device).manual_seed(seed)
    img = F.normalize(torch.randn(n, c, side, side, generator=generator, device=device), dim=1)
    aud = F.normalize(torch.randn(n, c, generator=generator, device=device), dim=1)
    return img.to(dtype).requires_grad_(), aud.to(dtype).requires_grad_()


def forward(img: Tensor, aud: Tensor, backend: str) -> fk.FNACOutput:
    return fk.fnac_loss(img, aud, backend=backend)


def step(img: Tensor, aud: Tensor, backend: str) -> list[Tensor]:
    """Loss, maps and both gradients."""
    out = forward(img, aud, backend)
    return [out.loss.detach(), out.maps.detach(), *torch.autograd.grad(out.loss, (img, aud))]


def assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    for name, x, y in zip(("loss", "maps", "dimg", "daud"), got, wanted, strict=True):
        assert torch.equal(x, y), f"{name} differs by up to {(x.double() - y.double()).abs().max().item()}"


def test_forward_and_backward_are_captured_in_a_cuda_graph(backend):
    img, aud = features(64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(img, aud, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(img, aud, backend)
    others = features(64, seed=1)
    with torch.no_grad():
        img.copy_(others[0])
        aud.copy_(others[1])
    graph.replay()
    assert_equal(captured, step(*others, backend))


def launches(call: Callable[[], object]) -> list[str]:
    """What the device was made to do, by name."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_device = (event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return [event.name for event in on_device if not event.is_user_annotation]


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_a_step_is_a_few_launches(backend, dtype):
    img, aud = features(256, dtype=dtype)
    step(img, aud, backend)
    seen = launches(lambda: forward(img, aud, backend))
    assert 1 <= len(seen) <= 8, seen
    loss = forward(img, aud, backend).loss
    one = torch.ones_like(loss)
    seen = launches(lambda: torch.autograd.grad(loss, (img, aud), one))
    assert 1 <= len(seen) <= 8, seen


def test_everything_runs_on_the_current_stream_and_nothing_waits(backend):
    img, aud = features(64)
    expected = step(img, aud, backend)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(img, aud, backend)  # fills the allocator's pool of this stream
    torch.cuda.synchronize()
    torch.cuda._sleep(SECOND)  # on the default stream, which the call must not need
    with torch.cuda.stream(stream):
        got = step(img, aud, backend)
    stream.synchronize()
    assert not torch.cuda.default_stream().query(), "the call waited for, or ran on, another stream"
    assert_equal(got, expected)


def test_the_host_does_not_wait_for_the_device(backend):
    img, aud = features(64)
    expected = step(img, aud, backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # refuses PyTorch's own waits
    try:
        torch.cuda._sleep(SECOND)
        got = step(img, aud, backend)
        returned_early = not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert returned_early
    assert_equal(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_a_device_that_is_not_the_current_one(backend):
    expected = step(*features(64), backend)
    got = step(*(x.detach().to("cuda:1").requires_grad_() for x in features(64)), backend)
    assert torch.cuda.current_device() == 0
    assert {x.device.index for x in got} == {1}
    assert_equal([x.to("cuda:0") for x in got], expected)


@pytest.mark.parametrize("dtype", [FLOAT, BF16, torch.float16], ids=str)
def test_runs_agree_to_the_bit(backend, dtype):
    img, aud = features(300, dtype=dtype)
    first = step(img, aud, backend)
    for _ in range(3):
        assert_equal(step(img, aud, backend), first)


@pytest.mark.parametrize("where", ["img", "aud"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_values_that_are_not_finite_propagate_as_in_the_reference(backend, dtype, value, where):
    img, aud = (x.detach() for x in features(9, 24, 3, dtype))
    (img if where == "img" else aud).view(-1)[11] = value
    for op in (fk.max_logits, fk.paired_maps):
        got, wanted = op(img, aud, 0.5, backend=backend), op(img, aud, 0.5, backend="reference")
        torch.testing.assert_close(got.float(), wanted.float(), equal_nan=True, rtol=2e-2, atol=2e-2)
    assert forward(img, aud, backend).loss.isnan()


def free_gib() -> float:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / 2**30


def test_features_beyond_32_bit_offsets(backend):
    n, sounds = 90_000, 8
    if free_gib() < 16:
        pytest.skip("needs 16 GiB")
    img = torch.empty(n, 512, 7, 7, dtype=BF16, device="cuda").normal_().requires_grad_()
    aud = torch.randn(sounds, 512, device="cuda").to(BF16)
    assert img.numel() > 2**31
    weight = torch.randn(n, sounds, device="cuda")
    logits = fk.max_logits(img, aud, backend=backend)
    (dimg,) = torch.autograd.grad(logits, img, weight)
    last = img[-5:].detach().requires_grad_()
    expected = fk.max_logits(last, aud, backend=backend)
    torch.testing.assert_close(logits[-5:], expected)
    torch.testing.assert_close(dimg[-5:], torch.autograd.grad(expected, last, weight[-5:])[0])


def test_pairs_beyond_32_bit_offsets(backend):
    n = 46_400
    if free_gib() < 40:
        pytest.skip("needs 40 GiB")
    img, aud = torch.randn(n, 8, 1, 1, device="cuda").requires_grad_(), torch.randn(n, 8, device="cuda")
    assert n * n > 2**31
    logits = fk.max_logits(img, aud, backend=backend)
    torch.testing.assert_close(logits[-3:], fk.max_logits(img[-3:], aud, backend="reference"), rtol=1e-4, atol=1e-4)
    (dimg,) = torch.autograd.grad(logits, img, torch.ones_like(logits))
    wanted = (aud.double().sum(0) / 0.03).expand(3, 8)
    torch.testing.assert_close(dimg[-3:].flatten(1).double(), wanted, rtol=1e-3, atol=1.0)


def test_the_whole_loss_of_32768_pairs(backend):
    n, last = 32_768, slice(-3, None)
    if free_gib() < 40:
        pytest.skip("needs 40 GiB")
    img = torch.empty(n, 512, 7, 7, dtype=BF16, device="cuda").normal_()
    img = F.normalize(img, dim=1).requires_grad_()
    aud = F.normalize(torch.randn(n, 512, device="cuda"), dim=1).to(BF16).requires_grad_()
    loss, maps, dimg, daud = step(img, aud, backend)
    assert torch.isfinite(loss)
    wanted = fk.paired_maps(img[last], aud[last], backend="reference")
    torch.testing.assert_close(maps[last], wanted.detach(), rtol=1e-4, atol=1e-4)
    for grad in (dimg, daud):
        assert grad.isfinite().all()
        assert grad[last].any()


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_memory_is_the_gradients_and_12_bytes_a_pair(backend, dtype):
    n, c = 4096, 512
    img, aud = features(n, c, dtype=dtype)
    step(*features(8, c, dtype=dtype), backend)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step(img, aud, backend)
    peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(x.numel() * x.element_size() for x in results[2:])
    # Of cuda, logits, argmax and the logits' gradient are 10 bytes a pair. Beyond the pairs: a row of C floats for the
    # mean, the foreground, the gradients of both and the adjacency terms' gradient of the sound, and aud widened.
    rows = 0 if backend == "triton" else 6 * n * c * 4
    assert peak <= gradients + rows + 12 * n * n, f"{peak / 2**20:.0f} MiB"
