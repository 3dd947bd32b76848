"""Files that a full disk cuts off: an error that names them, what was there before, and nothing half written."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from fnac.callbacks import WholeFiles
from fnac.checkpoints import save_weights
from fnac.data.generate import make_data
from fnac.files import once_whole, write_wav
from fnac.prediction import PredictionWriter
from fnac.results import write_text


@contextmanager
def no_room(size: int = 50_000) -> Iterator[None]:
    """Files end at so many bytes, as they do on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def predict(path: Path) -> None:
    prediction = {"name": [path.stem], "map": torch.rand(1, 224, 224)}
    image = torch.rand(1, 3, 48, 48)
    writer = PredictionWriter(str(path.parent))
    writer.write_on_batch_end(Trainer(logger=False), None, prediction, None, {"image": image}, 0, 0)  # type: ignore[arg-type]


def write_sound(path: Path) -> None:
    with once_whole(path) as partial:
        write_wav(partial, np.zeros(50_000, np.float32), 16_000)


WEIGHTS = {"a": torch.zeros(100_000)}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.txt", lambda path: write_text(path, 100_000 * "a")),
        ("a.pt", lambda path: save_weights(WEIGHTS, path)),
        ("a.ckpt", lambda path: WholeFiles().save_checkpoint(WEIGHTS, path)),
        ("a.npy", predict),
        ("a.wav", write_sound),
    ],
)
def test_what_does_not_fit_on_the_disk_leaves_what_was_there(tmp_path, name, write):
    path = tmp_path / name
    path.write_bytes(b"before")
    with no_room(), pytest.raises(OSError, match=f"{name} cannot be written: .*(too large|is there room for it)"):
        write(path)
    assert [left.name for left in tmp_path.iterdir()] == [name]
    assert path.read_bytes() == b"before"
    write(path)
    assert path.stat().st_size > 50_000


def test_sounds_that_do_not_fit_on_the_disk_are_told_in_words(tmp_path):
    """Python's words: libsndfile's are "System error."."""
    with no_room(), pytest.raises(OSError, match="File too large"):
        make_data(tmp_path / "a", train=1, val=0, test=0, single=0, seconds=2, workers=0, progress=False)
    assert list(tmp_path.iterdir()) == []
