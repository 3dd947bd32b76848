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


SATURATED = """
import torch, fnac_kernels as fk
for n, dtype in ((1, torch.float32), (20, torch.float32), (20, torch.bfloat16)):
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(n, 100), dim=1)
    aud = x.to(dtype)
    inputs = [y.requires_grad_() for y in (x @ x.T / 0.03, aud, 0.9 * aud.float(), 0.95 * aud.float())]
    _, terms, *_ = torch.ops.fnac_kernels.adjacency_contrastive(*inputs, 0.03, (0.0, 1.0, 1.0, 1.0), None, "triton")
    for grad in torch.autograd.grad(terms.sum(), inputs):
        assert grad.abs().max() < 1e-6 / 0.03 / n**2, (n, dtype, grad.abs().max())
"""


def test_rows_that_one_pair_has_to_itself_get_no_gradient_from_rounding():
    """Their softmaxes are 1 but for rounding, which is not the same forward and backward."""
    done = interpret("-c", SATURATED)
    assert done.returncode == 0, done.stderr[-3000:]


SWEEP = """
import torch, fnac_kernels as fk
from fnac_kernels.backends.triton import sweep, tuning
img, aud = torch.randn(2, 16, 3, 3).bfloat16().requires_grad_(), torch.randn(2, 16).bfloat16().requires_grad_()
sweep._CALLS = 1
for _ in range(2):
    fk.fnac_loss(img, aud, backend="triton").loss.backward()
line = tuning.TABLE[90]["max_logits"]
assert all(len(list(sweep.neighbours(line))) <= 11 for line in tuning.TABLE[90].values())
assert line not in list(sweep.neighbours(line))
"""


def test_the_sweep_prints_a_line_of_the_table_once_and_only_if_asked(monkeypatch):
    assert "Blocks(" not in interpret("-c", SWEEP).stderr
    monkeypatch.setenv("FNAC_TRITON_SWEEP", "1")
    done = interpret("-c", SWEEP)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = ("max_logits", "image_gradient", "audio_share")
    for kernel in (*kernels, "adjacency", "adjacency_weights", "adjacency_features"):
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
audio_gradient.ONE_COPY = 0
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
