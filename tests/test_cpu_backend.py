"""What only the CPU backend has: instruction sets chosen at run time, threads, forks, NaN and inf, bounded memory."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forks import holds_in_a_forked_child
from samples import OPS, Sample
from tolerance import assert_as_good_as_torch, run
from torch import Tensor
from torch.nn import functional as F

import fnac_kernels as fk
from fnac_kernels import _dispatch

pytestmark = pytest.mark.skipif(_dispatch.BACKENDS["cpu"].problem is not None, reason="the cpu backend is not built")

ISAS = fk.info()["cpu"]["available"]


def features(n: int = 37, c: int = 64, side: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    img = F.normalize(torch.randn(n, c, side, side, generator=generator), dim=1)
    return img, F.normalize(torch.randn(n, c, generator=generator), dim=1)


def loss_and_gradients(img: Tensor, aud: Tensor) -> list[Tensor]:
    img, aud = img.clone().requires_grad_(), aud.clone().requires_grad_()
    out = fk.fnac_loss(img, aud, backend="cpu")
    out.loss.backward()
    return [out.loss.detach(), out.maps.detach(), img.grad, aud.grad]


def run_pinned(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"FNAC_CPU_ISA": isa, "OMP_NUM_THREADS": "2"}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_passes_the_table(isa):
    if isa == fk.info()["cpu"]["instruction_set"]:
        pytest.skip("this one is what test_backends.py runs on")
    table = Path(__file__).with_name("test_backends.py")
    own = (
        test_a_batch_of_many_panels_is_as_good_as_torch,
        test_long_sums_round_no_more_than_short_ones,
        test_a_gradient_past_the_caches_is_the_same_as_through_them,
        test_what_the_forward_pass_keeps_is_what_the_backward_pass_would_compute,
        test_there_is_room_for_what_the_forward_pass_keeps_up_to_a_batch_where_it_would_be_much,
    )
    large = [f"{__file__}::{test.__name__}" for test in own]
    done = run_pinned(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(table), *large, "-k", "cpu")
    assert done.returncode == 0, done.stdout[-3000:]


#: Rows of several strips and columns of many panels, whatever the width of a panel, and a rest.
LARGE = Sample(421, 421, 24, 2, 2)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("op", [op for op in OPS if op.name.startswith(("adjacency", "fnac_loss"))], ids=str)
def test_a_batch_of_many_panels_is_as_good_as_torch(op, threads):
    exact, by_torch = run(op, LARGE, "reference", dtype=torch.float64), run(op, LARGE, "reference")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = run(op, LARGE, "cpu")
    finally:
        torch.set_num_threads(before)
    assert_as_good_as_torch(got, by_torch, exact, LARGE.dtype)


def test_long_sums_round_no_more_than_short_ones():
    """One after the other, 512 products of vectors alike or 600 random rows round three times as much as this."""

    def error(got: Tensor, exact: Tensor) -> float:
        return float((got.double() - exact).norm() / exact.norm())

    img, aud = Sample(200, 200, 512, 2, 2, kind="clustered").features()
    exact = fk.max_logits(img.double(), aud.double(), backend="reference")
    assert error(fk.max_logits(img, aud, backend="cpu"), exact) < 1.5e-7

    img, aud = Sample(600, 300, 64, 2, 2).features()

    def gradient(img: Tensor, aud: Tensor, backend: str) -> Tensor:
        aud.requires_grad_()
        return torch.autograd.grad(fk.max_logits(img, aud, backend=backend).square().sum(), aud)[0]

    assert error(gradient(img, aud, "cpu"), gradient(img.double(), aud.double(), "reference")) < 2.2e-7


#: More bytes than a gradient that goes through the caches may have: slices of whole lines of memory, rests, neither.
STREAMED = [(40, 512, 15), (90, 500, 10), (180, 500, 7)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("n", "c", "side"), STREAMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_past_the_caches_is_the_same_as_through_them(n, c, side, layout, dtype):
    img, aud = features(n, c, side)
    img, aud = img.to(dtype).contiguous(memory_format=layout), aud.to(dtype)[:20]
    weight = torch.linspace(-1, 1, n * len(aud)).sin().view(n, -1)

    def gradient(rows: slice) -> Tensor:
        part = img[rows].detach().requires_grad_()
        (fk.max_logits(part, aud, backend="cpu") * weight[rows]).sum().backward()
        return part.grad

    assert img.numel() * 4 > 16 << 20
    halves = torch.cat([gradient(slice(0, n // 3)), gradient(slice(n // 3, n))])
    assert torch.equal(gradient(slice(0, n)), halves)


@pytest.mark.parametrize("weights", [(1, 100, 100, 100), (1, 0, 100, 0), (1, 0, 0, 100), (1, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("n", [1, 9, 32, 311])
def test_what_the_forward_pass_keeps_is_what_the_backward_pass_would_compute(n, weights, monkeypatch):
    img, aud = (x.requires_grad_() for x in features(n, 24, 2))
    backend = _dispatch.BACKENDS["cpu"].load()
    threads = torch.get_num_threads()

    def gradients(times: int, backward_threads: int = threads) -> list[Tensor]:
        loss = fk.fnac_loss(img, aud, 0.1, weights=weights, backend="cpu").loss
        torch.set_num_threads(backward_threads)
        try:
            for _ in range(times):
                found = torch.autograd.grad(loss, (img, aud), retain_graph=True)
        finally:
            torch.set_num_threads(threads)
        return list(found)

    once, twice, by_others = gradients(1), gradients(2), gradients(1, 2 * threads + 1)
    monkeypatch.setattr(backend, "row_stats_columns", lambda *_: 16)
    anew = gradients(1)
    for got in (twice, anew):
        assert all(map(torch.equal, got, once))
    torch.testing.assert_close(by_others, anew)


@pytest.mark.parametrize(
    ("weights", "threshold"), [((1.0, 1.0, 1.0, 1.0), None), ((1.0, 0.0, 0.0, 1.0), 0.5)], ids=["all", "masked"]
)
@pytest.mark.parametrize("n", [1, 31, 33, 100, 257, 2048, 2049, 5000])
def test_there_is_room_for_what_the_forward_pass_keeps_up_to_a_batch_where_it_would_be_much(n, weights, threshold):
    backend = _dispatch.BACKENDS["cpu"].load()
    logits, aud = torch.zeros(n, n), torch.zeros(n, 1)
    _, _, row_stats, _ = backend.adjacency(logits, aud, aud, aud, 0.1, weights, threshold)
    rows_of_a_strip = row_stats.view(-1)[16 * n]
    assert (rows_of_a_strip > 0) == (n <= 2048)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (1.0, 0.0, 0.0, 1.0), (1.0, 1.0, 0.0, 0.0)], ids=str)
@pytest.mark.parametrize(("n", "cells"), [(1, 1), (3, 7), (31, 49), (33, 1), (257, 5), (2048, 1)])
def test_the_state_of_the_loss_has_room_for_it_too(n, cells, weights):
    backend = _dispatch.BACKENDS["cpu"].load()
    *_, state = backend.loss(torch.zeros(n, 3, 1, cells), torch.zeros(n, 3), 0.1, 0.6, weights, None)
    pieces = [4 * n * n, 2 * n * n, 4 * 2 * n, 4 * 16 * n]  # bytes of logits, argmax, col_lse, row_stats
    if weights[2] or weights[3]:
        pieces += [n * cells, 4 * 3 * n, 4 * 3 * n]  # mask, mean, foreground
    rows_of_a_strip = state[sum(-(-piece // 64) * 16 for piece in pieces)]
    assert rows_of_a_strip > 0


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_pins_the_instruction_set(isa):
    done = run_pinned(isa, "-c", "import fnac_kernels as fk; print(fk.info()['cpu']['instruction_set'])")
    assert done.stdout.strip() == isa


def test_info_says_that_an_unknown_instruction_set_makes_the_backend_useless():
    done = run_pinned("sse", "-m", "fnac_kernels")
    assert re.search(r"backend cpu +not usable: FNAC_CPU_ISA is 'sse'; this machine and build run", done.stdout)


def test_an_unknown_instruction_set_is_an_error_that_names_those_there_are():
    done = run_pinned(
        "mmx", "-c", "import torch, fnac_kernels as fk; fk.max_logits(torch.ones(1,1,1,1), torch.ones(1,1))"
    )
    assert done.returncode != 0
    assert "FNAC_CPU_ISA is 'mmx'" in done.stderr
    assert all(isa in done.stderr for isa in ISAS)
    told = run_pinned("mmx", "-m", "fnac_kernels")  # the command that is to say what is wrong
    assert told.returncode == 0, told.stderr
    assert re.search("cpu instruction_set +FNAC_CPU_ISA is 'mmx'; this machine and build run ", told.stdout)


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_results_are_the_same_run_to_run_and_nearly_so_at_any_number_of_threads(count):
    img, aud = features()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        first, again = (loss_and_gradients(img, aud) for _ in range(2))
        torch.set_num_threads(1)
        alone = loss_and_gradients(img, aud)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    *same, daud = zip(first, alone, strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    torch.testing.assert_close(*daud, rtol=1e-5, atol=1e-5)  # added up over the images in parts


def test_several_python_threads_may_call_at_once():
    img, aud = features()
    expected = loss_and_gradients(img, aud)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: loss_and_gradients(img, aud), range(12)):
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_other_python_threads_go_on_meanwhile():
    img, aud = (x.requires_grad_() for x in features(512, 512, 7))
    out = fk.fnac_loss(img, aud, backend="cpu")

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def lets_others_go_on(call: Callable[[], object]) -> bool:
        with ThreadPoolExecutor(1) as pool:
            longest, last = 0.0, time.perf_counter()
            took = pool.submit(seconds, call)
            while not took.done():
                time.sleep(1e-3)
                now = time.perf_counter()
                longest, last = max(longest, now - last), now
        return longest < took.result() / 2

    calls = (
        lambda: fk.fnac_loss(img, aud, backend="cpu"),
        lambda: out.loss.backward(retain_graph=True),
        lambda: fk.max_logits(img, aud, backend="cpu"),
    )
    for call in calls:
        assert any(lets_others_go_on(call) for _ in range(5))  # the machine may hold this thread up too


def test_a_forked_child_computes_too():
    img, aud = features()
    expected = fk.max_logits(img, aud, backend="cpu")
    assert holds_in_a_forked_child(lambda: torch.equal(fk.max_logits(img, aud, backend="cpu"), expected))


@pytest.mark.parametrize("used", ["not at all", "by one thread"])
def test_a_child_of_a_process_that_has_threads_of_torchs_alone_computes_too(used):
    code = f"""
import sys, torch
sys.path.append({str(Path(__file__).parent)!r})
from forks import holds_in_a_forked_child
torch.set_num_threads(2)
torch.ones(1 << 20).exp()  # torch's threads
import fnac_kernels as fk
img, aud = torch.ones(37, 64, 7, 7), torch.ones(37, 64)
if {used == "by one thread"}:
    torch.set_num_threads(1)
    fk.max_logits(img, aud, 1.0, backend="cpu")
    torch.set_num_threads(2)
assert holds_in_a_forked_child(lambda: fk.max_logits(img, aud, 1.0, backend="cpu").tolist() == [[64.0] * 37] * 37)
"""
    subprocess.run([sys.executable, "-c", code], timeout=300, check=True)


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer needs the address space")
def test_where_no_thread_can_be_started_the_caller_computes_alone():
    img, aud = features()
    expected = fk.max_logits(img, aud, backend="cpu")

    def child() -> bool:
        torch.set_num_threads(1)
        fk.max_logits(img, aud, backend="cpu")  # its memory is there from now on
        torch.set_num_threads(12)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (4 << 20)  # a stack takes more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return torch.equal(fk.max_logits(img, aud, backend="cpu"), expected)

    assert holds_in_a_forked_child(child)


@pytest.fixture
def _flushed_denormals():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


def test_all_threads_flush_denormals_where_the_caller_does(request):
    img, aud = torch.full((512, 256, 7, 7), 1e-39), torch.full((512, 256), 1e10)
    assert bool((fk.paired_maps(img, aud, 1.0, backend="cpu") > 0).all())
    request.getfixturevalue("_flushed_denormals")
    for _ in range(5):
        assert not fk.paired_maps(img, aud, 1.0, backend="cpu").any()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads MXCSR where glibc keeps it on x86-64")
@pytest.mark.parametrize("isa", ISAS)
def test_the_callers_floating_point_mode_and_signal_mask_are_as_before(isa):
    code = """
import ctypes, signal, torch, fnac_kernels as fk
from fnac_kernels import _native
libm = ctypes.CDLL("libm.so.6")
def state():
    environment = (ctypes.c_uint32 * 8)()
    libm.fegetenv(environment)
    sticky = 0x3F  # what has happened since somebody cleared it, set by any arithmetic
    return environment[7] & ~sticky, signal.pthread_sigmask(signal.SIG_BLOCK, [])
torch.set_flush_denormal(True)
libm.fesetround(0x800)  # upward
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
before = state()
assert before == (0xDFC0, {signal.SIGUSR1}), before  # flushing, upward, no traps
img, aud = torch.randn(33, 40, 7, 7, requires_grad=True), torch.randn(33, 40)
for threads in (1, 2):
    torch.set_num_threads(threads)
    loss = fk.fnac_loss(img, aud, backend="cpu").loss
    assert state() == before, state()
    loss.backward()
    assert state() == before, state()
    try:
        _native.module().loss((0, 0, 4, 4, 4, 4, 1), 0, 0.1, 0.6, (1, 1, 1, 1), None, (0,) * 5, 0, 0, 0, False, threads)
    except ValueError:
        assert state() == before, state()
    else:
        raise AssertionError("a state without room is an error")
"""
    done = run_pinned(isa, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("isa", ISAS)
def test_a_float16_denormal_is_no_float32_denormal(isa):
    code = """
import torch, fnac_kernels as fk
torch.set_flush_denormal(True)
for value in (2.0**-24, 1000 * 2.0**-24, 2.0**-14, -3 * 2.0**-24):
    img, aud = torch.full((2, 64, 5, 5), value, dtype=torch.float16), torch.ones(2, 64, dtype=torch.float16)
    assert fk.max_logits(img, aud, 1.0, backend="cpu").tolist() == [[64 * value] * 2] * 2, value
"""
    done = run_pinned(isa, "-c", code)
    assert done.returncode == 0, done.stderr


FIRST_CALL = """
import torch, fnac_kernels as fk
from torch._subclasses.fake_tensor import FakeTensorMode
img, aud = torch.randn(4, 8, 3, 3), torch.randn(4, 8)
def call(img, aud):
    return fk.fnac_loss(img, aud, 0.1, backend="cpu")
{first}
got, wanted = call(img, aud), fk.fnac_loss(img, aud, 0.1, backend="reference")
torch.testing.assert_close(tuple(got), tuple(wanted), rtol=1e-3, atol=1e-3)
"""


@pytest.mark.parametrize(
    "first",
    [
        "torch.set_default_dtype(torch.float64)",
        "torch.set_default_dtype(torch.bfloat16)",
        "with torch.device('meta'): call(img, aud)",
        "with FakeTensorMode() as mode: call(mode.from_tensor(img), mode.from_tensor(aud))",
    ],
)
def test_what_the_first_call_meets_stays_with_it(first):
    """Defaults and modes at the time when the backend is imported."""
    code = FIRST_CALL.format(first=first)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_propagate_as_in_the_reference(value, layout):
    img, aud = features()
    img[3, 5, 2, 4] = value
    img = img.contiguous(memory_format=layout)
    for op in (fk.max_logits, fk.paired_maps):
        got, expected = op(img, aud, backend="cpu"), op(img, aud, backend="reference")
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    aud[7, 1] = value
    got, expected = fk.max_logits(img, aud, backend="cpu"), fk.max_logits(img, aud, backend="reference")
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert fk.fnac_loss(img, aud, backend="cpu").loss.isnan()


def test_nothing_of_the_size_of_all_similarities_is_made():
    # In a process of its own: the peak of the resident set, over what the features and their gradients take.
    code = """
import resource, torch, fnac_kernels as fk
img, aud = torch.randn(512, 128, 7, 7).requires_grad_(), torch.randn(512, 128).requires_grad_()
small = fk.fnac_loss(img[:8], aud[:8], backend='cpu').loss.backward()
img.grad = aud.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fk.fnac_loss(img, aud, backend='cpu').loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    gradient, similarities = 512 * 128 * 49 * 4 / 1024, 512 * 512 * 49 * 4 / 1024  # KiB: 12544 and 50176
    assert int(done.stdout) < gradient + similarities / 2


@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="AddressSanitizer holds what is freed")
def test_a_step_needs_little_more_than_its_gradient():
    code = """
import re, torch, fnac_kernels as fk
def megabytes(field):
    return int(re.search(field + r":\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024 / 1e6
img, aud = torch.randn(1024, 512, 7, 7).requires_grad_(), torch.randn(1024, 512).requires_grad_()
fk.fnac_loss(img[:8], aud[:8], backend="cpu").loss.backward()
img.grad = aud.grad = None
before = megabytes("VmRSS")
for _ in range(3):
    fk.fnac_loss(img, aud, backend="cpu").loss.backward()
    img.grad = aud.grad = None
print(megabytes("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    gradient = 1024 * 512 * 49 * 4 / 1e6
    assert gradient < float(done.stdout) < gradient + 50


def test_autocast_rounds_the_products_of_float32_maps_and_copies_nothing():
    img, aud = (x.requires_grad_() for x in features())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fk.fnac_loss(img, aud, backend="cpu")
    rounded = fk.reference.paired_maps(img.detach(), aud.detach().bfloat16(), 0.03)
    torch.testing.assert_close(out.maps.detach(), rounded)
    kept = [saved for saved in out.loss.grad_fn.saved_tensors if saved.shape == img.shape]
    assert [saved.data_ptr() for saved in kept] == [img.data_ptr()]
    dimg, daud = torch.autograd.grad(out.loss, (img, aud))
    exact = [x.detach().double().requires_grad_() for x in (img, aud)]
    wanted = torch.autograd.grad(fk.fnac_loss(*exact).loss, exact)
    for got, want in zip((dimg, daud), wanted, strict=True):
        assert got.dtype == torch.float32
        assert float((got - want).norm() / want.norm()) < 0.2  # a few argmaxes differ
