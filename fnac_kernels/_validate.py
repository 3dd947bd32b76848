"""Checks of the public functions' arguments: name the argument, what it is, what it should be."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_CELLS = 65535  # a cell's index is kept in 16 bits


def features(img: Tensor, aud: Tensor, *, paired: bool = False) -> None:
    """``img`` is a feature map (N, C, H, W) and ``aud`` an embedding (M, C) on the same device.

    Whether their dtypes may differ depends on autocast: see :func:`one_dtype`.
    """
    tensor(img, "img", 4, "(N, C, H, W)")
    tensor(aud, "aud", 2, "(M, C)")
    one_device(aud, "aud", img, "img")
    (n, c, h, w), (m, channels) = img.shape, aud.shape
    if c != channels:
        raise ValueError(f"aud has {channels} channels, img has {c}; they should be equal")
    cells(h, w)
    if paired and n != m:
        raise ValueError(
            f"aud has {m} rows, img has {n}; this function pairs row n of img with row n of aud, so N should equal M"
        )


def cells(h: int, w: int) -> None:
    if h * w > MAX_CELLS:
        raise ValueError(f"img has {h} x {w} = {h * w} cells; at most {MAX_CELLS} are supported")


def tensor(x: Tensor, name: str, dims: int, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it should be a torch.Tensor of shape {shape}")
    if x.is_nested:
        raise TypeError(f"{name} is a nested tensor; it should be dense, as its to_padded_tensor() is")
    if x.layout != torch.strided:
        raise TypeError(f"{name} is a tensor of layout {x.layout}; it should be dense, as its to_dense() is")
    if x.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it should be {shape}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}; it should be float32, bfloat16, float16 or float64")
    if x.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, which is empty; every size should be at least 1")


def one_device(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, {other_name} on {other.device}; they should be on one device")


def one_dtype(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    if x.dtype != other.dtype:
        raise TypeError(f"{name} is {x.dtype}, {other_name} is {other.dtype}; they should have one dtype")


def shape(x: Tensor, name: str, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it should be {meaning} = {expected}")


def temperature(tau: float) -> float:
    tau = number(tau, "tau")
    if not tau > 0:
        raise ValueError(f"tau is {tau}; it should be positive")
    return tau


def number(value: float, name: str) -> float:
    # Comparisons, because math.isfinite of a number that changes between calls is nothing that torch.compile traces.
    if type(value) is float and -math.inf < value < math.inf:
        return value
    if isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:  # an integer
            value = math.inf
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name} is {value}; it should be finite")
        return value
    if isinstance(value, Tensor):
        raise TypeError(f"{name} is a tensor; it should be a Python number (it gets no gradient)")
    raise TypeError(f"{name} is {value!r}; it should be a number")


def optional_number(value: float | None, name: str) -> float | None:
    return None if value is None else number(value, name)


def weights(values: Sequence[float]) -> tuple[float, float, float, float]:
    # A tuple needs no look at the abstract class; a tensor is no Sequence.
    if not isinstance(values, (tuple, Sequence)) or len(values) != 4:
        raise ValueError(f"weights is {values!r}; it should be four numbers (nce, fns_audio, tne, fns_visual)")
    nce, fns_audio, tne, fns_visual = map(number, values, ("weights[0]", "weights[1]", "weights[2]", "weights[3]"))
    return nce, fns_audio, tne, fns_visual


def settings(
    tau: float, fg_threshold: float, weights_: Sequence[float], adjacency_threshold: float | None
) -> tuple[float, float, tuple[float, float, float, float], float | None]:
    """The settings of the loss, checked."""
    return (
        temperature(tau),
        number(fg_threshold, "fg_threshold"),
        weights(weights_),
        optional_number(adjacency_threshold, "adjacency_threshold"),
    )
