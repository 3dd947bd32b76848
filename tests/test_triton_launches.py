"""How many kernels a call of the Triton backend launches and compiles, and what it allocates: counted without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.5", reason="an older Triton binds arguments in another way")
if importlib.util.find_spec("triton.backends.nvidia") is None:
    pytest.skip("this Triton has no NVIDIA backend", allow_module_level=True)

HERE = Path(__file__).parent


def on_no_device(*command: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, in which kernels are compiled, not interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join((str(HERE.parent), str(HERE)))
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def counted():
    done = on_no_device(str(HERE / "triton_launches.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


BROKEN = """
import sys, types, torch, triton_launches
from triton.runtime import driver
from fnac_kernels import _dispatch, _ops
from fnac_kernels.backends.triton import tuning
device = triton_launches.Hopper()
device.launcher_cls = lambda *_: None
device.utils = types.SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 4096})
driver.set_active(device)
_dispatch.BACKENDS["triton"].__dict__["problem"] = None
blocks = tuning.fit_max_logits(tuning.TABLE[90]["max_logits"], 49).sized(BLOCK_C=int(sys.argv[1]))
tuning.max_logits = lambda *_: blocks
try:
    img = torch.zeros(2, 64, 7, 7).bfloat16().contiguous(memory_format=torch.channels_last)
    _ops._max_logits(img, torch.zeros(2, 64).bfloat16(), 1.0, "triton")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("channels", "cause"),
    [(48, "CompilationError"), (64, "OutOfResources: out of resource: shared memory")],
    ids=["does not compile", "does not fit"],
)
def test_a_kernel_that_cannot_run_says_which_why_and_what_would_serve(channels, cause):
    done = on_no_device("-c", BROKEN, str(channels))
    assert f"the Triton kernel max_logits_kernel cannot run on this device: {cause}" in done.stdout, done.stderr[-3000:]
    assert done.stdout.endswith("backend='cuda' or backend='reference' would serve\n")


def test_the_whole_loss_launches_at_most_eight_kernels_each_way(counted):
    assert len(counted["launches"]) == 3 * 3 * 3 * 7
    for case, (forward, backward) in counted["launches"].items():
        assert 4 <= len(forward) <= 8, (case, forward)
        assert 4 <= len(backward) <= 8, (case, backward)


def test_the_host_waits_for_nothing(counted):
    """PyTorch is asked for copies of odd strides and one addition: nothing that reads a value."""
    for case, directions in counted["launches"].items():
        operators = {name for launches in directions for name in launches if name.startswith("aten::")}
        assert operators <= {"aten::clone", "aten::add_"}, (case, operators)


def test_channels_last_features_are_read_in_place_and_others_copied_once(counted):
    for case, directions in counted["launches"].items():
        copies = [[launches.count(how) for launches in directions] for how in ("rows_kernel", "aten::clone")]
        ours, torchs = ([int(case.endswith(layout))] * 2 for layout in ("torch.contiguous_format", "None"))
        assert copies == [ours, torchs], case


@pytest.mark.parametrize("changing", ["batch", "ragged batch", "channels", "map", "everything"])
def test_shapes_of_a_class_share_their_compiled_kernels(counted, changing):
    """Six kernels each way, whatever the batch, the (aligned) channels and the cells of a tile. Batches divisible by
    16 are one class, the others another.
    """
    assert counted["variants"][changing] == [6, 6]


@pytest.mark.parametrize(("dtype", "backward"), [("bfloat16", 6), ("float16", 6), ("float32", 5)])
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_so_they_do_in_every_dtype_and_memory_format(counted, dtype, backward, layout):
    """float32 features need no parts. NCHW is copied to channels_last, both ways by the same kernel."""
    copied = int(layout == "contiguous_format")
    assert counted["variants"][f"torch.{dtype} torch.{layout}"] == [6 + copied, backward + copied]


def test_a_step_of_4096_allocates_at_most_the_gradients_and_12_bytes_a_pair(counted):
    n, features = 4096, 4096 * 512
    assert len(counted["peaks"]) == 4
    for case, peak in counted["peaks"].items():
        gradients = (49 + 1) * features * (4 if "float32" in case else 2)
        assert gradients < peak <= gradients + 12 * n * n, (case, peak / 2**20)


def test_an_image_beyond_32_bits_is_refused():
    triton_launch = pytest.importorskip("fnac_kernels.backends.triton.launch")
    img = torch.empty(1, 2**16, 2**8, 2**7, device="meta")
    with pytest.raises(ValueError, match=r"img has 2147483648 elements an image .* takes fewer than 2\*\*31"):
        triton_launch.on_image(img)
    triton_launch.on_image(img[:, 1:])
