"""A tiny generated data set and model settings, shared by the tests of training."""

from __future__ import annotations

import pytest

from fnac.data.datamodule import ClipData
from fnac.data.generate import make_data
from fnac.training import Localization

TINY_MODEL = {"dim": 16, "image_stages": 1, "audio_stages": 1}
TINY_DATA = {"batch_size": 8, "image_size": 48, "clip_seconds": 0.25}


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    """24 training, 9 validation, 7 test clips, 24 single-object frames."""
    root = tmp_path_factory.mktemp("generated") / "data"
    return make_data(root, train=24, val=9, test=7, single=24, image_size=48, seconds=0.25, workers=0, progress=False)


@pytest.fixture
def make_model():
    return lambda **options: Localization(**(TINY_MODEL | options))


@pytest.fixture
def make_clips(generated):
    return lambda **options: ClipData(str(generated), **(TINY_DATA | options))
