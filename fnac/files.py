"""Files that are never half there."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile


def check_writable(path: str | Path) -> None:
    """Make the folder of a file that is to be written later.

    Raises:
        OSError: it cannot be made or written to, or the file's name is a folder's.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; it should be a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no permission to write in {path.parent}")


def write_wav(path: Path, waveform: np.ndarray, sample_rate: int) -> None:
    """Write a sound ``(samples,)``, of 16 bits.

    Raises:
        OSError: it cannot be written; libsndfile's own error would not say why.
    """
    content = io.BytesIO()
    soundfile.write(content, waveform, sample_rate, subtype="PCM_16", format="WAV")
    path.write_bytes(content.getbuffer())


@contextmanager
def once_whole(path: str | Path) -> Iterator[Path]:
    """Another name to write a file under; it appears as ``path`` only if that succeeds. Makes the folder.

    Raises:
        OSError: it cannot be written, for one where the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch, libsndfile and numpy do not tell of a full disk in words
        reason = getattr(error, "strerror", None) or f"is there room for it? ({error})"
        raise OSError(f"{path} cannot be written: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)
