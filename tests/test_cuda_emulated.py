"""The CUDA kernels without a GPU: the same sources compiled for the host, against ``tests/emulation``."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "emulation"
ORDERS = ("forward", "reverse", "random")
TOOLS = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
MISSING = [name for name in ("cmake", "ninja", os.environ.get("CXX", "c++")) if shutil.which(name, path=TOOLS) is None]

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_backends.py runs the real kernels here"),
    pytest.mark.skipif(bool(MISSING), reason=f"to compile the kernels for the host, {MISSING} would have to be there"),
]


@functools.cache
def built(kind: str) -> Path:
    """The folder of the compiled module and of ``self_test``; ``kind`` is plain or sanitized."""
    folder, tools = BUILD / kind, {**os.environ, "PATH": TOOLS}
    pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    configure = (
        *("cmake", "-S", ROOT / "tests" / "emulation", "-B", folder, "-GNinja"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"),
        f"-DFNAC_SANITIZE={'ON' if kind == 'sanitized' else 'OFF'}",
    )
    for command in (configure, ("cmake", "--build", folder)):
        done = subprocess.run(command, env=tools, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return folder


def preloaded() -> str:
    """What a sanitized module needs in a Python that is not sanitized."""
    compiler = os.environ.get("CXX", "g++")
    names = ("libasan.so", "libstdc++.so")
    return " ".join(subprocess.check_output([compiler, f"-print-file-name={n}"], text=True).strip() for n in names)


def emulate(*command: str, kind: str = "plain", **env: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with the emulated kernels behind ``backend="cuda"``."""
    (module,) = built(kind).glob("_cuda_emulated*.so")
    env = {**os.environ, "FNAC_CUDA_EMULATION": str(module), "OMP_NUM_THREADS": "1", "PYTHONPATH": "tests", **env}
    if kind == "sanitized":
        env |= {"LD_PRELOAD": preloaded(), "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False, cwd=ROOT)


def check(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


TABLE = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_backends.py", "-k", "cuda")


@pytest.mark.parametrize(
    ("kind", "order"), [*(("plain", order) for order in ORDERS), ("sanitized", "forward"), ("sanitized", "random")]
)
def test_the_emulated_kernels_pass_the_table(kind, order):
    out = check(emulate(*TABLE, kind=kind, FNAC_CUDA_EMULATION_ORDER=order))
    assert " passed" in out
    assert "skipped" not in out


@pytest.mark.parametrize(("kind", "order"), [*(("plain", order) for order in ORDERS), ("sanitized", "random")])
def test_the_emulated_kernels_for_hopper_pass_the_table(kind, order):
    table = (*TABLE[:-1], "cuda and (bfloat16 or float16)")  # of float32 there are none
    out = check(emulate(*table, kind=kind, FNAC_CUDA_EMULATION_ORDER=order, FNAC_CUDA_EMULATION_CHIP="sm_90a"))
    assert " passed" in out
    assert "skipped" not in out


SAMPLES = """
import torch
from samples import BF16, FP16, OPS, Sample
from tolerance import assert_as_good_as_torch, run

OP = {op.name: op for op in OPS}
last = "channels_last"

def check(samples_of):
    for name, samples in samples_of.items():
        for sample in samples:
            got, by_torch = (run(OP[name], sample, backend) for backend in ("cuda", "reference"))
            exact = run(OP[name], sample, "reference", dtype=torch.float64)
            assert_as_good_as_torch(got, by_torch, exact, sample.dtype)
"""


# What the table's small samples do not reach: large blocks of sounds, several tiles of cells, sounds sorted in more
# than one go, shares of images, panels of the larger product tiles, channels that end within a tile.
LARGER = """
POOLED = (
    Sample(3, 300, 40, 9, 9, dtype=BF16), Sample(3, 140, 40, 13, 10, dtype=BF16, layout=last),
    Sample(2, 140, 36, 5, 5), Sample(2, 140, 35, 9, 8, layout=last), Sample(70, 3, 130, 3, 3),
    Sample(2, 2200, 8, 2, 3), Sample(2, 2200, 8, 2, 3, dtype=BF16, kind="constant"),
    Sample(2, 150, 64, 12, 12, dtype=FP16),
)
PAIRED = (
    Sample(150, 150, 70, 3, 3), Sample(5, 5, 200, 20, 20, dtype=BF16), Sample(140, 140, 64, 2, 7, layout=last),
    Sample(140, 140, 64, 2, 2, dtype=BF16), Sample(130, 130, 136, 1, 1, dtype=FP16),
)
check({"max_logits": POOLED, "fnac_loss": PAIRED, "fnac_loss_hard_masked": PAIRED})
"""


@pytest.mark.parametrize("kind", ["plain", "sanitized"])
def test_larger_sizes(kind):
    check(emulate("-c", SAMPLES + LARGER, kind=kind, FNAC_CUDA_EMULATION_ORDER="reverse"))


# Several blocks of sounds, tiles, ranges of images, slices and boxes of channels; every number of images that a tile
# may touch; the tiles of 200, 248 and 256 columns; a last image, sound and channel within a tile.
HOPPER = """
POOLED = (
    Sample(21, 270, 72, 7, 7, dtype=BF16), Sample(3, 140, 512, 14, 14, dtype=FP16, layout=last),
    Sample(35, 9, 136, 4, 4, dtype=BF16), Sample(5, 130, 64, 16, 16, dtype=BF16, layout=last),
    Sample(9, 129, 64, 6, 7, dtype=FP16, kind="ties"), Sample(7, 8, 64, 10, 10, dtype=BF16, kind="constant"),
)
PAIRED = (
    Sample(138, 138, 264, 7, 7, dtype=BF16), Sample(70, 70, 72, 4, 4, dtype=BF16, layout=last),
    Sample(35, 35, 520, 8, 8, dtype=BF16, layout=last), Sample(19, 19, 64, 11, 12, dtype=BF16),
    Sample(9, 9, 64, 16, 16, dtype=BF16),
)
check({"max_logits": POOLED, "fnac_loss": PAIRED})
"""


@pytest.mark.parametrize("kind", ["plain", "sanitized"])
def test_larger_sizes_on_hopper(kind):
    done = emulate(
        *("-c", SAMPLES + HOPPER), kind=kind, FNAC_CUDA_EMULATION_ORDER="reverse", FNAC_CUDA_EMULATION_CHIP="sm_90a",
        FNAC_CUDA_EMULATION_TRACE="1",
    )  # fmt: skip
    check(done)
    for kernel, times in {"max_logits": 10, "image_gradient": 5, "audio_gradient": 5}.items():
        launched = done.stderr.count(f"launch {kernel}_hopper_kernel")
        assert launched >= times, (kernel, launched)


PANELS = """
import torch, fnac_kernels as fk
torch.manual_seed(0)
n, c = 2100, 2
logits, *features = (torch.randn(n, k, requires_grad=True) for k in (n, c, c, c))
results = []
for backend in ("cuda", "reference"):
    terms = fk.adjacency_contrastive(logits, *features, 1.0, backend=backend)
    grads = torch.autograd.grad(sum(w * t for w, t in zip((1, 3, 5, 7), terms)), (logits, *features))
    results.append((*terms, *grads))
for got, wanted in zip(*results, strict=True):
    assert (got - wanted).norm() <= 1e-3 * wanted.norm(), ((got - wanted).norm() / wanted.norm(), got.shape)
"""


def test_adjacency_in_more_than_one_panel():
    check(emulate("-c", PANELS))


DEVICES = """
import contextlib, types, torch
from fnac_kernels.backends import cuda

seen = []

@contextlib.contextmanager
def switched(device):
    seen.append(device.index)
    yield
    seen.append("back")

torch.cuda.device, torch.cuda.current_device = switched, lambda: 0
torch._C._cuda_getCurrentRawStream = lambda index: 7 + index
for index in (0, 1):
    x = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
    cuda._enqueue(lambda job, place, allocate: seen.append((job, place)), x, "job")
assert seen == [("job", (0, 7)), 1, ("job", (1, 8)), "back"], seen
"""


def test_kernels_run_on_the_tensors_device_and_its_stream():
    check(emulate("-c", DEVICES))


TENSOR_FLOAT = """
import torch, fnac_kernels as fk
torch.set_float32_matmul_precision("medium")
for shape in ((3, 24, 7, 7), (2, 33, 3, 5)):
    for layout in (torch.contiguous_format, torch.channels_last):
        img, aud = torch.randn(*shape).contiguous(memory_format=layout), torch.randn(130, shape[1])
        got, wanted = (fk.max_logits(img, aud, 1.0, backend=name) for name in ("cuda", "reference"))
        error = ((got - wanted).abs().max() / wanted.abs().max()).item()
        assert 1e-6 < error < 2e-3, error  # rounded to TensorFloat32, and no more than that
"""


def test_medium_precision_multiplies_in_tensor_float():
    check(emulate("-c", TENSOR_FLOAT))


NON_FINITE = """
import itertools, torch, fnac_kernels as fk
VALUES = (float("nan"), float("inf"), float("-inf"))
DTYPES, LAYOUTS = (torch.float32, torch.bfloat16), (torch.contiguous_format, torch.channels_last)
for where, value, dtype, layout in itertools.product(("img", "aud"), VALUES, DTYPES, LAYOUTS):
    torch.manual_seed(0)
    img, aud = torch.randn(3, 8, 4, 5).to(dtype), torch.randn(3, 8).to(dtype)
    (img if where == "img" else aud).view(-1)[11] = value
    img = img.contiguous(memory_format=layout)
    got, wanted = (fk.fnac_loss(img, aud, 0.5, backend=name) for name in ("cuda", "reference"))
    for x, y in zip(got, wanted):
        torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-3, atol=1e-4)
    logits = [fk.max_logits(img, aud, 0.5, backend=name) for name in ("cuda", "reference")]
    torch.testing.assert_close(*logits, equal_nan=True, rtol=1e-3, atol=1e-4)
"""


@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_values_that_are_not_finite(chip):
    check(emulate("-c", NON_FINITE, FNAC_CUDA_EMULATION_CHIP=chip))


SAVED = """
import torch, fnac_kernels as fk
def elsewhere(x):
    return torch.cat((x.new_zeros(1, dtype=x.dtype), x.flatten()))[1:].view(x.shape)
for dtype in (torch.float32, torch.bfloat16):
    img, aud = torch.randn(9, 16, 5, 5).to(dtype).requires_grad_(), torch.randn(9, 16).to(dtype).requires_grad_()
    losses = [fk.fnac_loss(img, aud, 1.0, backend="cuda").loss]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, elsewhere):
        losses.append(fk.fnac_loss(img, aud, 1.0, backend="cuda").loss)
    for wanted, got in zip(*(torch.autograd.grad(loss, (img, aud)) for loss in losses)):
        assert torch.equal(got, wanted)
"""


def test_saved_tensors_may_come_back_at_any_address():
    check(emulate("-c", SAVED, kind="sanitized"))


STEP = """
import hashlib, sys, torch, fnac_kernels as fk
torch.manual_seed(0)
img, aud = torch.randn(150, 72, 7, 7).bfloat16().requires_grad_(), torch.randn(150, 72).bfloat16().requires_grad_()
out = fk.fnac_loss(img, aud, 5.0, backend="cuda")
print("backward", file=sys.stderr, flush=True)
out.loss.backward()
results = [x.detach().float().numpy().tobytes() for x in (*out, img.grad, aud.grad)]
print(hashlib.sha256(b"".join(results)).hexdigest())
"""


@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_results_are_the_same_bits_in_every_order_of_the_threads(chip):
    step = [emulate("-c", STEP, FNAC_CUDA_EMULATION_ORDER=o, FNAC_CUDA_EMULATION_CHIP=chip) for o in ORDERS]
    assert len({check(done) for done in step}) == 1


@pytest.mark.parametrize(("chip", "most"), [("sm_80", 6), ("sm_90a", 7)])  # on Hopper one copies NCHW
def test_a_step_of_the_loss_is_a_few_launches_each_way(chip, most):
    done = emulate("-c", STEP, FNAC_CUDA_EMULATION_TRACE="1", FNAC_CUDA_EMULATION_CHIP=chip)
    check(done)
    launches = [
        [line for line in part.splitlines() if line.startswith("launch ")] for part in done.stderr.split("backward")
    ]
    assert [0 < len(part) <= most for part in launches] == [True, True], launches


def test_an_error_names_the_kernel_and_its_sizes():
    code = "import torch, fnac_kernels as fk; fk.max_logits(torch.ones(2, 3, 1, 1), torch.ones(4, 3), backend='cuda')"
    done = emulate("-c", code, FNAC_CUDA_EMULATION_ORDER="sideways")
    assert done.returncode != 0
    assert (
        "RuntimeError: FNAC_CUDA_EMULATION_ORDER is 'sideways', it should be forward, reverse or random" in done.stderr
    )


# --- The emulation's own promises: a mistake in a kernel is found ----------------------------------------------------


def outcomes(kernel: str, variant: str, kind: str = "plain") -> set[str]:
    """What a kernel of ``emulation/self_test.cpp`` comes to, over the orders of the threads."""

    def outcome(order: str) -> str:
        env = {**os.environ, "FNAC_CUDA_EMULATION_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0"}
        command = [str(built(kind) / "self_test"), kernel, variant]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        return (done.stdout if done.returncode == 0 else done.stderr).strip()

    return {outcome(order) for order in ORDERS}


MISTAKES = {
    "read_early": "wrong",
    "overwritten_early": "wrong",
    "lanes_read_early": "wrong",
    "unwaited_copy": "wrong",
    "unwaited_box": "wrong",
    "skipped_barrier": "threads wait at a barrier or an operation of their warp that others never reach",
    "diverged_warp": "the lanes of a warp are at different operations",
}


@pytest.mark.parametrize("kernel", MISTAKES)
def test_a_mistake_shows_in_some_order_and_its_correction_in_none(kernel):
    assert outcomes(kernel, "correct") == {"right"}
    assert any(MISTAKES[kernel] in outcome for outcome in outcomes(kernel, "broken"))


def test_shared_memory_ends_where_it_ends():
    assert outcomes("out_of_bounds", "correct", "sanitized") == {"right"}
    assert all("heap-buffer-overflow" in outcome for outcome in outcomes("out_of_bounds", "broken", "sanitized"))
