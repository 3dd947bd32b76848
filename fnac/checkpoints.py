"""Weights from files: official checkpoints, Lightning's, plain state dicts. Nothing in a file is ever executed."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar
from torch import Tensor

from fnac.files import once_whole

LIGHTNING_PREFIX = "model."  # the attribute of the Lightning module that holds the model

# Official files keep their best scores as numpy scalars, which torch's safe unpickler must be told are harmless.
_HARMLESS: list[Any] = [
    *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),  # NumPy 2 and 1 call it so
    np.dtype,
    *{type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")},
]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Parameters and buffers by name, from a checkpoint of the official code (``best.pth``), of this project, or a
    plain state dict. The prefix that DistributedDataParallel leaves (``module.``) is taken off.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or one that could only be read by executing what it contains.
    """
    found = _read(path)
    if isinstance(found, Mapping) and isinstance(found.get("model"), Mapping):
        found = found["model"]
    elif isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        states = found["state_dict"]
        found = {k.removeprefix(LIGHTNING_PREFIX): v for k, v in states.items() if k.startswith(LIGHTNING_PREFIX)}
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{path} holds no weights: expected a dict of tensors, also below 'model' or 'state_dict'")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """A checkpoint of Lightning's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or one of weights without a run.
    """
    found = _read(path)
    if not isinstance(found, Mapping) or "pytorch-lightning_version" not in found:
        raise ValueError(f"{path} is no checkpoint of `fnac fit`; weights alone are given as --model.init_from")
    return found


def _read(path: str | Path) -> Any:
    try:
        damaged = _damaged(path)
        if damaged is None:
            with torch.serialization.safe_globals(_HARMLESS):
                return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:  # whose words advise to run what the file contains
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is none, or holds other things than tensors and plain values"
        ) from error
    except Exception as error:  # arbitrary bytes read as a pickle may raise anything
        raise ValueError(f"{path} cannot be read as a checkpoint: {error!r}") from error
    raise ValueError(f"{path} is damaged: the check sum of {damaged} is wrong")


def _damaged(path: str | Path) -> str | None:
    """The first part of the file that is not what was written; torch does not look."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def save_weights(states: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state dict under its name only once it is whole."""
    with once_whole(path) as partial:
        torch.save(dict(states), partial)
