"""What PyTorch is told of float32 products, in its general words or in a device's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

#: What is said, and whether products of bfloat16 are then allowed on the CPU and on CUDA.
SAID = {
    "pass": (False, False),
    'torch.set_float32_matmul_precision("high")': (False, False),
    'torch.set_float32_matmul_precision("medium")': (True, True),
}
IN_ITS_OWN_WORDS = {
    'torch.backends.mkldnn.matmul.fp32_precision = "bf16"': (True, False),
    'torch.backends.mkldnn.matmul.fp32_precision = "tf32"': (False, False),
    'torch.backends.cuda.matmul.fp32_precision = "tf32"': (False, False),
    'torch.backends.fp32_precision = "tf32"': (False, False),
    'torch.backends.fp32_precision = "ieee"': (False, False),
}
if hasattr(torch.backends.mkldnn, "matmul"):  # from torch 2.9 on
    SAID |= IN_ITS_OWN_WORDS
ASK = """
import torch, fnac_kernels as fk
from fnac_kernels._precision import bfloat16_allowed
{}
fk.fnac_loss(torch.randn(4, 8, 3, 3, requires_grad=True), torch.randn(4, 8), backend="cpu").loss.backward()
print(bfloat16_allowed("cpu"), bfloat16_allowed("cuda"))
"""


@pytest.mark.parametrize("said", SAID)
def test_products_of_bfloat16_are_made_where_pytorch_may_make_them(said):
    done = subprocess.run([sys.executable, "-c", ASK.format(said)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(allowed) for allowed in SAID[said]]
