"""Every Triton kernel compiles for sm_80, sm_86, sm_90 and sm_100 without a GPU, within the chip's means.

The table holds all variants, some 950, which take two cores 11 minutes to compile. The tests compile one of four, among
which every kernel is, and hold the others to what the table says of them.
"""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.3")
if importlib.util.find_spec("triton.backends.nvidia") is None:
    pytest.skip("this Triton has no NVIDIA backend", allow_module_level=True)

import cubin
import triton
import triton_resources
from triton.runtime.jit import JITFunction

from fnac_kernels.backends import triton as backend
from fnac_kernels.backends.triton import tuning

TABLE = Path(__file__).parent / "data" / "triton_resources.txt"
#: Kilobytes that one program may take.
SHARED_LIMIT = {80: 163, 86: 99, 90: 227, 100: 227}
TESTED_WITH = "3.6.0"
NO_PRODUCTS = (
    "rows", "image nchw", "image nhwc", "map", "pool", "audio_share_gather", "audio_gradient", "collect", "finish",
    "parts",
)  # fmt: skip
#: Tiles of 32 rows, which the newer instructions do not make.
SMALL_TILES = re.compile(r"(statistics|distances|weights)_small.*|image_gradient(_small)? (nchw|nhwc) (4|16)")


#: Of so many variants one is compiled here.
EVERY = 4


@pytest.fixture(scope="module")
def compiled():
    return triton_resources.table(EVERY)


@pytest.fixture(scope="module")
def costs(compiled):
    """The table's rows, and what this Triton makes of the sample."""
    return triton_resources.parsed(TABLE.read_text()) + compiled


@pytest.mark.parametrize("capability", tuning.TABLE)
def test_every_line_of_the_table_is_compiled(capability, monkeypatch):
    """Each line is marked in turn, and a variant has to carry the mark."""
    lines = tuning.TABLE[capability]
    for name, line in lines.items():
        with monkeypatch.context() as patch:
            patch.setitem(lines, name, line.changed(num_stages=99))
            marked = [
                v for dtype in triton_resources.DTYPES for v in triton_resources.variants(capability, dtype, (49,))
            ]
        assert any(v.blocks.num_stages == 99 for v in marked), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_map_is_served_by_a_variant_that_is_compiled(dtype):
    """600 cells are past every bound: argmaxes of two bytes, maps that one program does not take."""
    compiled = {v.key for v in triton_resources.variants(90, dtype)}
    for cells in range(1, 601):
        for variant in triton_resources.of_maps(90, dtype, cells):
            assert variant.key in compiled, variant.name


def test_every_kernel_is_compiled():
    modules = [importlib.import_module(f"{backend.__name__}.{m.name}") for m in pkgutil.iter_modules(backend.__path__)]
    kernels = {
        name
        for module in modules
        for name, x in vars(module).items()
        if isinstance(x, JITFunction) and "_kernel" in name
    }
    assert len(kernels) > 10
    assert kernels == _names(every=1) == _names(EVERY)


def _names(every: int) -> set[str]:
    return {v.kernel.__name__ for part in triton_resources.PARTS for v in triton_resources.chosen(*part, every)}


def test_no_spills_and_shared_memory_within_the_limit(costs):
    assert {row.capability for row in costs} == set(SHARED_LIMIT)
    for row in costs:
        assert row.stack == 0, row
        assert row.shared <= 1024 * SHARED_LIMIT[row.capability], row
        assert row.programs >= 1, row


def test_products_run_on_the_tensor_cores(costs):
    """float32 ones too. Tiles too small for the newer instructions use mma.sync, which every chip has."""
    newest = {80: "mma.sync", 86: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
    for row in costs:
        if row.kernel.startswith(NO_PRODUCTS):
            assert row.tensor_cores == "-", row
        elif row.dtype == "bf16" and not SMALL_TILES.fullmatch(row.kernel):
            assert row.tensor_cores == newest[row.capability], row
        else:
            assert row.tensor_cores in (newest[row.capability], "mma.sync"), row


@pytest.mark.skipif(triton.__version__ != TESTED_WITH, reason="the table was made with another Triton")
def test_the_table_is_what_the_kernels_use(compiled):
    """After a change: ``python tests/triton_resources.py > tests/data/triton_resources.txt``, and look at the diff."""
    rows = triton_resources.parsed(TABLE.read_text())
    assert cubin.render(rows) == TABLE.read_text()
    wanted = [(*part, v.name) for part in triton_resources.PARTS for v in triton_resources.variants(*part)]
    assert [row[:3] for row in rows] == wanted
    assert set(compiled) <= set(rows), set(compiled) - set(rows)
