"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, within the chip's means."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("triton")
if importlib.util.find_spec("triton.backends.nvidia") is None:
    pytest.skip("this Triton has no NVIDIA backend", allow_module_level=True)

import cubin
import triton
import triton_resources

TABLE = Path(__file__).parent / "data" / "triton_resources.txt"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TESTED_WITH = "3.6.0"


@pytest.fixture(scope="module")
def costs():
    return triton_resources.table()


def test_no_spills_and_shared_memory_within_the_limit(costs):
    assert len(costs) == 3 * (11 + 5 + 5)
    for row in costs:
        assert row.stack == 0, row
        assert row.shared <= SHARED_LIMIT[row.capability], row


def test_16_bit_products_run_on_the_tensor_cores(costs):
    wanted = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
    products = [row for row in costs if row.dtype != "fp32" and row.kernel not in ("map", "pool")]
    assert len(products) == 18
    for row in products:
        assert row.tensor_cores == wanted[row.capability], row


@pytest.mark.skipif(triton.__version__ != TESTED_WITH, reason="the table was made with another Triton")
def test_the_table_is_what_the_kernels_use(costs):
    """After a change: ``python tests/triton_resources.py > tests/data/triton_resources.txt``, and look at the diff."""
    assert cubin.render(costs) == TABLE.read_text()
