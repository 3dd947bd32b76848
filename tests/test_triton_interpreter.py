"""The Triton kernels over the whole table, in Triton's interpreter: values and gradients, without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_backends.py runs the compiled kernels here"),
]
ROOT = Path(__file__).parent.parent


def interpret(*command: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Prescott"}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_interpreter_passes_the_table():
    done = interpret("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_backends.py", "-k", "triton")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


NON_FINITE = """
import itertools, torch, fnac_kernels as fk
VALUES, DTYPES = (float("nan"), float("inf")), (torch.float32, torch.bfloat16)
for where, value, dtype in itertools.product(("img", "aud"), VALUES, DTYPES):
    torch.manual_seed(0)
    img, aud = torch.randn(3, 8, 3, 3).to(dtype), torch.randn(3, 8).to(dtype)
    (img if where == "img" else aud).view(-1)[11] = value
    got, wanted = (fk.fnac_loss(img, aud, 0.5, backend=name) for name in ("triton", "reference"))
    for x, y in zip(got, wanted):
        torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-3, atol=1e-4)
    logits = [fk.max_logits(img, aud, 0.5, backend=name) for name in ("triton", "reference")]
    torch.testing.assert_close(*logits, equal_nan=True, rtol=1e-3, atol=1e-4)
"""


def test_values_that_are_not_finite():
    done = interpret("-c", NON_FINITE)
    assert done.returncode == 0, done.stderr[-3000:]


BROKEN = """
import torch, fnac_kernels as fk
from fnac_kernels.backends.triton import launch
class Kernel:
    __name__ = "max_logits_kernel"
    def __getitem__(self, grid):
        raise ValueError("out of resource: shared memory")
try:
    launch.run(Kernel(), (1,))
except RuntimeError as error:
    print(error)
"""


def test_a_kernel_that_cannot_run_says_which_and_what_would_serve():
    done = interpret("-c", BROKEN)
    assert "max_logits_kernel cannot run on this device: ValueError: out of resource: shared memory" in done.stdout
    assert "backend='cuda' or backend='reference' would serve" in done.stdout


SWEEP = """
import torch, fnac_kernels as fk
from fnac_kernels.backends.triton import sweep, tuning
img, aud = torch.randn(2, 16, 3, 3).bfloat16().requires_grad_(), torch.randn(2, 16).bfloat16().requires_grad_()
for _ in range(2):
    fk.max_logits(img, aud, backend="triton").sum().backward()
line = tuning.TABLE[90]["max_logits"]
assert all(len(list(sweep.neighbours(line))) <= 9 for line in tuning.TABLE[90].values())
assert line not in list(sweep.neighbours(line))
"""


def test_the_sweep_prints_a_line_of_the_table_once_and_only_if_asked(monkeypatch):
    assert "Blocks(" not in interpret("-c", SWEEP).stderr
    monkeypatch.setenv("FNAC_TRITON_SWEEP", "1")
    done = interpret("-c", SWEEP)
    assert done.returncode == 0, done.stderr[-3000:]
    for kernel in ("max_logits", "image_gradient", "audio_share"):
        assert done.stderr.count(f'"{kernel}": Blocks({{') == 1, done.stderr


LARGE = """
import sys, torch, fnac_kernels as fk
from fnac_kernels.backends.triton import audio_gradient, tuning
table = tuning.TABLE[90]
narrow = table["max_logits"].sized(BLOCK_M=16, GROUP=2)
tuning.max_logits = lambda img, n, m, cells: tuning.fit_max_logits(narrow, cells)
tuning.image_gradient = lambda img, n, cells: tuning.fit_image_gradient(table["image_gradient"], cells)
tuning._sized = lambda aud, name: name
# The package's attribute of this name is the function.
sys.modules["fnac_kernels.backends.triton.adjacency_backward"].rows_at_a_time = lambda n: n // 6
audio_gradient.LARGEST_COPY = 81 * 24 * 49 * 2 // 3  # three pieces, of the larger maps four
torch.manual_seed(0)
for cells in ((7, 7), (9, 10)):
    img, aud = torch.randn(81, 24, *cells), torch.randn(81, 24)
    img, aud = (torch.nn.functional.normalize(x, dim=1).bfloat16() for x in (img, aud))
    results = []
    for name in ("triton", "reference"):
        x, y = img.clone().requires_grad_(), aud.clone().requires_grad_()
        out = fk.fnac_loss(x, y, backend=name)
        out.loss.backward()
        results.append((*out, x.grad, y.grad))
    for got, wanted in zip(*results):
        error = (got.double() - wanted.double()).norm() / wanted.double().norm()
        # The interpreter cuts to bfloat16 where a device rounds, weights as well as results.
        assert error < (1e-2 if got.dtype == torch.bfloat16 else 1e-5), error
"""


def test_what_only_large_batches_do():
    """Large tiles, groups of sounds, ranges of rows, copies in pieces: with a batch that the interpreter can bear."""
    done = interpret("-c", LARGE)
    assert done.returncode == 0, done.stderr[-3000:]
