"""How many kernels a call of the Triton backend launches and compiles, and what it allocates: counted without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if importlib.util.find_spec("triton.backends.nvidia") is None:
    pytest.skip("this Triton has no NVIDIA backend", allow_module_level=True)

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def counted():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(HERE.parent)
    command = [sys.executable, HERE / "triton_launches.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_whole_loss_launches_at_most_eight_kernels_each_way(counted):
    assert len(counted["launches"]) == 8
    for case, (forward, backward) in counted["launches"].items():
        assert 4 <= len(forward) <= 8, (case, forward)
        assert 4 <= len(backward) <= 8, (case, backward)


def test_channels_last_features_are_read_in_place(counted):
    for case, directions in counted["launches"].items():
        copies = [launches.count("aten::clone") for launches in directions]
        assert copies == ([0, 0] if "channels_last" in case else [1, 1]), case


@pytest.mark.parametrize("changing", ["batch", "ragged batch", "channels", "map", "everything"])
def test_shapes_of_a_class_share_their_compiled_kernels(counted, changing):
    """Six kernels each way, whatever the batch, the (aligned) channels and the cells of a tile. Batches divisible by
    16 are one class, the others another.
    """
    assert counted["variants"][changing] == [6, 6]


def test_a_step_of_4096_allocates_at_most_the_gradients_and_12_bytes_a_pair(counted):
    n, features = 4096, 4096 * 512
    assert len(counted["peaks"]) == 4
    for case, peak in counted["peaks"].items():
        gradients = (49 + 1) * features * (4 if "float32" in case else 2)
        assert gradients < peak <= gradients + 12 * n * n, (case, peak / 2**20)
