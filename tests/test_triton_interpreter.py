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
    table = ("tests/test_backends.py", "-k", "triton")
    done = interpret("-m", "pytest", "-q", "-x", "-n", "2", "-p", "no:cacheprovider", *table)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


NON_FINITE = """
import itertools, torch, fnac_kernels as fk
VALUES, DTYPES = (float("nan"), float("inf")), (torch.float32, torch.bfloat16)
SIDES = 3, 17  # of a map whose image is one program, and of a larger one
for where, value, dtype, side in itertools.product(("img", "aud"), VALUES, DTYPES, SIDES):
    torch.manual_seed(0)
    img, aud = torch.randn(3, 8, side, side).to(dtype), torch.randn(3, 8).to(dtype)
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


FIRST = """
import itertools, sys, torch, fnac_kernels
from fnac_kernels.backends import triton as backend
from fnac_kernels.backends.triton import tuning
nan, inf = float("nan"), float("inf")
line = tuning.TABLE[90]["max_logits"]
tiles = tuning.max_logits, lambda img, n, m, cells: tuning.fit_max_logits(line, cells)
shapes = (1, 3), (5, 5), (7, 7), (8, 8), (9, 9), (14, 14)
for tile, dtype, (h, w) in itertools.product(tiles, (torch.float32, torch.bfloat16), shapes):
    tuning.max_logits = tile
    torch.manual_seed(0)
    # Small whole numbers: their sums are exact, and many of them equal.
    img, aud = torch.randint(-2, 3, (5, 16, h * w)).to(dtype), torch.randint(-1, 2, (6, 16)).to(dtype)
    img[0], img[1, :, -1] = 0, nan
    img[2, 3, 1:3], img[2, :, 0] = nan, inf
    img[3, 0, 2], img[3, 1, 2], img[4, 0] = inf, -inf, -inf
    aud[1], aud[2, 4], aud[3, 5], aud[4] = 0, inf, nan, 1
    logits, argmax = backend.max_logits(img.view(5, 16, h, w), aud, 1.0)
    every = torch.einsum("ncp,mc->nmp", img.double(), aud.double())
    top = every.max(2).values
    wins = torch.where(top.isnan()[..., None], every.isnan(), every == top[..., None])
    torch.testing.assert_close(logits.double(), top, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(argmax.long(), wins.to(torch.int8).argmax(2)), (dtype, h, w)
"""


def test_the_first_cell_of_a_maximum_wins_and_of_nan_the_first():
    done = interpret("-c", FIRST)
    assert done.returncode == 0, done.stderr[-3000:]


ROWS = """
import itertools, torch, fnac_kernels
from fnac_kernels.backends.triton.rows import cells_as_rows
shapes = (3, 5, 7, 7), (2, 70, 7, 7), (1, 64, 14, 14), (2, 130, 3, 3), (1, 3, 1, 4), (2, 1, 5, 5), (1, 17, 17, 17)
for dtype, (n, c, h, w) in itertools.product((torch.float32, torch.bfloat16, torch.float16), shapes):
    img = torch.randn(n, c, h, w).to(dtype)
    img.view(-1)[3] = float("nan")
    last = img.contiguous(memory_format=torch.channels_last)
    for x in (img, last, img.tensor_split(2)[0], img.transpose(2, 3), torch.cat((img, img), 1)[:, ::2]):
        wanted, got = x.contiguous(memory_format=torch.channels_last), cells_as_rows(x)
        torch.testing.assert_close(got, wanted, equal_nan=True, rtol=0, atol=0, check_stride=True)
    assert cells_as_rows(last) is last
"""


def test_rows_of_cells_are_what_pytorch_makes_of_them():
    done = interpret("-c", ROWS)
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


MEDIUM = """
import sys, numpy, torch
sys.path.insert(0, "tests")
from samples import BF16, FP16, OPS, Sample
from tolerance import run
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
multiply = InterpreterBuilder.create_dot

def cut(x):
    bits = numpy.ascontiguousarray(x.data).view(numpy.uint32) & numpy.uint32(0xFFFFE000)
    return TensorHandle(bits.view(numpy.float32), x.dtype)

def in_tensor_float(self, a, b, total, precision, *options):  # the interpreter does not look at the precision
    if a.data.dtype == numpy.float32 and precision.name == "TF32":
        a, b = cut(a), cut(b)
    return multiply(self, a, b, total, precision, *options)

InterpreterBuilder.create_dot = in_tensor_float
loss = next(op for op in OPS if op.name == "fnac_loss")
for dtype in (BF16, FP16):
    results = []
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        got = run(loss, Sample(9, 9, 40, 2, 2, dtype=dtype, kind="saturated"), "triton")
        results.append((*got.outputs, got.dimg, got.daud))
    for highest, medium in zip(*results):
        assert torch.equal(highest, medium), (dtype, (highest.double() - medium.double()).norm() / highest.norm())
"""


def test_the_precision_of_float32_products_is_not_that_of_16_bit_features():
    done = interpret("-c", MEDIUM)
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
