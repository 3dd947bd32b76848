"""Every CUDA kernel as compiled for every chip: spills, tensor cores where they belong, and the table's figures."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import cubin
import cuda_resources
import pytest

from fnac_kernels import _native

TABLE = Path(__file__).parent / "data" / "cuda_resources.txt"
TESTED_WITH = "13.0.88"
SHARED_LIMIT = 48 * 1024  # what a kernel may take without asking for more at launch
#: Bytes of stack: two registers each, where the launch bounds leave one chip too few. No other kernel spills.
SPILLS = {
    ("sm_120", "audio_gradient<BFloat16>"): 8,
    ("sm_120", "audio_gradient<Float16>"): 8,
}
CHIPS = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120"}
HOPPER = "sm_90a"  # has kernels of its own, and no others

pytestmark = [
    pytest.mark.skipif(
        _native.problem() is not None or not hasattr(_native.module(), "cuda"), reason="built without CUDA"
    ),
    pytest.mark.skipif(not (cubin.cuobjdump() and shutil.which("c++filt")), reason="no cuobjdump or no c++filt here"),
]


@pytest.fixture(scope="module")
def costs():
    return cuda_resources.table(Path(str(_native.module().__file__)))


def test_every_kernel_is_there_for_every_chip(costs):
    chips = {name for name in _native.cuda_features()["architectures"] if name.startswith("sm_")}
    others = [row for row in costs if row.chip != HOPPER]
    kernels = {row.kernel for row in others}
    assert {row.chip for row in others} == chips
    assert len(others) == len(chips) * len(kernels)
    assert all(("_hopper" in row.kernel) == (row.chip == HOPPER) for row in costs)
    assert any(row.chip == HOPPER for row in costs) == ("sm_90" in chips)


def test_no_more_spills_than_known_and_shared_memory_within_the_limit(costs):
    assert [row for row in costs if row.stack > SPILLS.get((row.chip, row.kernel), 0)] == []
    assert [row for row in costs if row.shared > SHARED_LIMIT] == []


def test_products_of_16_bit_and_tensor_float_32_run_on_the_tensor_cores(costs):
    wanted = {"BFloat16": "HMMA.16816.F32.BF16", "Float16": "HMMA.16816.F32", "TensorFloat32": "HMMA.1688.F32.TF32"}
    products = [(row, match[1]) for row in costs if (match := re.match(r"max_logits<TensorTile<(\w+)>", row.kernel))]
    assert {operands for _, operands in products} == set(wanted)
    for row, operands in products:
        assert row.tensor_cores == wanted[operands], row


def test_products_on_hopper_are_those_of_a_warpgroup(costs):
    for row in costs:
        assert (row.chip == HOPPER) == ("HGMMA" in row.tensor_cores), row


def test_the_table_is_what_the_kernels_use(costs):
    """After a change: ``python tests/cuda_resources.py > tests/data/cuda_resources.txt``, and look at the diff."""
    compiler = _native.cuda_features()["compiler"]
    if compiler != TESTED_WITH or {row.chip for row in costs} != CHIPS:
        pytest.skip("the table was made with another nvcc or for other chips")
    assert cubin.render(costs) == TABLE.read_text()
