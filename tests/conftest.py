"""For every test: the same seed, no order of a backend left over, a cache of compiled code of its own."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch

from fnac_kernels import _dispatch

# What another version of the operators compiled must not be found: the compiler's cache does not know their fakes.
_COMPILED = tempfile.TemporaryDirectory(prefix="inductor")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _COMPILED.name


@pytest.fixture(autouse=True)
def _restore_backend():
    """A test that calls ``use_backend`` leaves no trace."""
    previous = _dispatch._override
    yield
    _dispatch._override = previous


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
