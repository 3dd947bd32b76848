"""The primitives on CPU tensors: allocate the outputs, hand pointers to the compiled module. Contracts: README.md."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fnac_kernels import _native
from fnac_kernels._precision import bfloat16_allowed

_kernels = _native.module()  # this is imported where it is usable alone
_ROW_STATS = 16
_MOST_KEPT = 2048
#: Bytes from which a result lies in memory that is kept for the next. Why: csrc/cpu/kept_memory.h.
_KEPT_FROM: int = _kernels.kept_from


def row_stats_columns(n: int, weights: Sequence[float], adjacency_threshold: float | None) -> int:
    """16 statistics, and room for half of each of A, F and I that a weighted term reads.

    That is in strips of up to 64 rows, columns in panels of up to 32. Of more than ``_MOST_KEPT`` rows they do
    not fit, and the backward pass computes them again. There is no branch, because ``n`` is symbolic where a program
    is traced for any batch size; nor a minimum, of which torch 2.6 makes one.
    """
    nce, fns_audio, tne, fns_visual = map(bool, weights)
    masked = nce and adjacency_threshold is not None
    matrices = (fns_audio or tne or masked) + tne + fns_visual
    kept = n // (1 + (n - 1) // _MOST_KEPT * n)  # n, or of more rows 0
    return _ROW_STATS + matrices * (kept // 2 + 145 + 3008 // n)


def _floats(like: Tensor, *shape: int) -> Tensor:
    """Room for floats."""
    if 4 * math.prod(shape) < _KEPT_FROM:
        return like.new_empty(*shape, dtype=torch.float32)  # sizes one by one are read faster than a tuple of them
    strides = [math.prod(shape[i:]) for i in range(1, len(shape) + 1)]
    return from_dlpack(_kernels.kept((shape, strides), 0))


def _gradient_of(x: Tensor) -> Tensor:
    """Room for a gradient of dense ``x``."""
    if x.nbytes < _KEPT_FROM:
        return torch.empty_like(x)
    return from_dlpack(_kernels.kept((x.shape, x.stride()), _native.DTYPES[x.dtype]))


def _wide(x: Tensor) -> Tensor:
    """Dense ``x`` in float32."""
    return x if x.dtype == torch.float32 else _floats(x, *x.shape).copy_(x)


def _narrow(gradient: Tensor, x: Tensor) -> Tensor:
    """A gradient of ``x`` in its dtype."""
    return gradient if gradient.dtype == x.dtype else _gradient_of(x).copy_(gradient)


def _bfloat16_products(img: Tensor, aud: Tensor) -> bool:
    if img.dtype == aud.dtype == torch.float32:
        return bfloat16_allowed("cpu")
    return torch.bfloat16 in (img.dtype, aud.dtype)


def max_logits(img: Tensor, aud: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    n, m, wide = len(img), len(aud), _wide(aud)
    outputs = _floats(img, n, m), img.new_empty(n, m, dtype=torch.uint16)
    _kernels.max_logits(
        _native.image(img),
        wide.data_ptr(),
        m,
        tau,
        _native.addresses(*outputs),
        _bfloat16_products(img, aud),
        torch.get_num_threads(),
    )
    return outputs


def pool_pairs(
    img: Tensor, aud: Tensor, tau: float, threshold: float, pooled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, c, h, w), wide = img.shape, _wide(aud)
    rows = n if pooled else 0
    outputs = (
        _floats(img, n, h, w),
        img.new_empty(rows, h, w, dtype=torch.bool),
        _floats(img, rows, c),
        _floats(img, rows, c),
    )
    _kernels.pool(
        _native.image(img), wide.data_ptr(), tau, threshold, _native.addresses(*outputs), torch.get_num_threads()
    )
    return outputs


def foreground_pool(img: Tensor, maps: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    n, c, h, w = img.shape
    foreground, mask = _floats(img, n, c), img.new_empty(n, h, w, dtype=torch.bool)
    outputs = _native.addresses(maps, mask, None, foreground)
    _kernels.pool(_native.image(img), 0, 1.0, threshold, outputs, torch.get_num_threads())
    return foreground, mask


def feature_backward(
    img: Tensor,
    aud: Tensor | None,
    tau: float,
    *,
    grad_logits: Tensor | None,
    argmax: Tensor | None,
    grad_maps: Tensor | None,
    mask: Tensor | None,
    grad_avg: Tensor | None,
    grad_foreground: Tensor | None,
    grad_aud: Tensor | None,
    need_img: bool,
    need_aud: bool,
) -> tuple[Tensor | None, Tensor | None]:
    dimg = _gradient_of(img) if need_img else None
    wide = None if aud is None else _wide(aud)
    daud = _gradient_of(wide) if need_aud and wide is not None else None
    _kernels.feature_backward(
        _native.image(img),
        _native.address(wide),
        0 if wide is None else wide.shape[0],
        tau,
        *_native.addresses(grad_logits, argmax, grad_maps, mask, grad_avg, grad_foreground, grad_aud, dimg, daud),
        torch.get_num_threads(),
    )
    return dimg, daud if daud is None or aud is None else _narrow(daud, aud)


def adjacency(
    logits: Tensor,
    aud: Tensor,
    img_avg: Tensor,
    foreground: Tensor,
    tau: float,
    weights: tuple[float, ...],
    adjacency_threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, c), wide = aud.shape, _wide(aud)
    columns = row_stats_columns(n, weights, adjacency_threshold)
    outputs = (
        aud.new_empty((), dtype=torch.float32),
        _floats(aud, 4),
        _floats(aud, n, columns),
        _floats(aud, 2, n),
    )
    _kernels.adjacency(
        _native.addresses(logits, wide, img_avg, foreground),
        n,
        c,
        tau,
        weights,
        adjacency_threshold,
        _native.addresses(*outputs),
        columns,
        torch.get_num_threads(),
    )
    return outputs


def adjacency_backward(
    grad_loss: Tensor | None,
    grad_terms: Tensor | None,
    logits: Tensor,
    aud: Tensor,
    img_avg: Tensor,
    foreground: Tensor,
    row_stats: Tensor,
    col_lse: Tensor,
    tau: float,
    weights: tuple[float, ...],
    adjacency_threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c = aud.shape
    inputs = (logits, _wide(aud), img_avg, foreground)
    # A gradient that no wanted term reaches is not written by the kernel.
    written = (True, weights[1] or weights[2], weights[3], weights[2])
    grads = [_gradient_of(x) if w else torch.zeros_like(x) for x, w in zip(inputs, written, strict=True)]
    _kernels.adjacency_backward(
        _native.addresses(*inputs),
        n,
        c,
        tau,
        weights,
        adjacency_threshold,
        row_stats.data_ptr(),
        row_stats.shape[1],
        *_native.addresses(col_lse, grad_loss, grad_terms),
        _native.addresses(*grads),
        torch.get_num_threads(),
    )
    return tuple(grads)  # type: ignore[return-value]


def _state_floats(n: int, c: int, cells: int, weights: Sequence[float], adjacency_threshold: float | None) -> int:
    """Room for what the kernels' ``LossState`` holds, with 7 pieces to be rounded up to 16 floats."""
    pooled = weights[2] or weights[3]
    pools = (2 * n * c + n * cells // 4) if pooled else 0
    return 3 * n * n // 2 + pools + n * (2 + row_stats_columns(n, weights, adjacency_threshold)) + 7 * 16


def loss(
    img: Tensor,
    aud: Tensor,
    tau: float,
    threshold: float,
    weights: tuple[float, ...],
    adjacency_threshold: float | None,
) -> tuple[Tensor, ...]:
    """``max_logits``, ``pool_pairs`` and ``adjacency`` in one call: Python between kernels starts from cold caches."""
    n, c, h, w = img.shape
    floats = _state_floats(n, c, h * w, weights, adjacency_threshold)
    maps, state, wide = _floats(img, n, h, w), _floats(img, floats), _wide(aud)
    # Views of one tensor would have to be made, and made independent of each other. A scalar kept for all calls would
    # be of the default dtype and the mode that the first one met.
    scalar = img.new_empty((), dtype=torch.float32)
    values = [scalar, *[torch.empty_like(scalar) for _ in range(4)]]
    _kernels.loss(
        _native.image(img),
        wide.data_ptr(),
        tau,
        threshold,
        weights,
        adjacency_threshold,
        _native.addresses(*values),
        maps.data_ptr(),
        state.data_ptr(),
        floats,
        _bfloat16_products(img, aud),
        torch.get_num_threads(),
    )
    return *values, maps, state


def loss_backward(
    grad_loss: Tensor | None,
    grad_terms: Tensor | None,
    grad_maps: Tensor | None,
    img: Tensor,
    aud: Tensor,
    state: Tensor,
    tau: float,
    weights: tuple[float, ...],
    adjacency_threshold: float | None,
    need_img: bool,
    need_aud: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """``adjacency_backward`` and ``feature_backward`` in one call."""
    n, c = aud.shape
    keeps = need_img and img.nbytes >= _KEPT_FROM
    dimg, wide = torch.empty_like(img) if need_img and not keeps else None, _wide(aud)
    daud, scratch = _gradient_of(wide) if need_aud else None, _floats(img, n * n + 3 * n * c)
    capsule = _kernels.loss_backward(
        *_native.addresses(grad_loss, grad_terms, grad_maps),
        _native.image(img),
        wide.data_ptr(),
        tau,
        weights,
        adjacency_threshold,
        state.data_ptr(),
        len(state),
        scratch.data_ptr(),
        _native.address(dimg),
        (img.shape, img.stride()) if keeps else None,
        _native.address(daud),
        torch.get_num_threads(),
    )
    if keeps:
        dimg = from_dlpack(capsule)
    return dimg, None if daud is None else _narrow(daud, aud)
