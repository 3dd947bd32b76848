"""The primitives on CUDA tensors: allocate the outputs, enqueue the compiled kernels. Contracts: README.md.

Everything runs on the tensors' device and its current stream, without waiting for it. Memory, workspace included, is of
PyTorch's allocator, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnac_kernels import _native
from fnac_kernels._precision import bfloat16_allowed

_kernels = _native.cuda()  # this is imported where it is usable alone
_ROW_STATS = 16


def _enqueue(kernel: Callable[..., None], x: Tensor, *arguments: Any) -> None:
    """Call a kernel with a device, ``x``'s, and its stream, and an allocator of workspace.

    CPU tensors are for the emulated kernels.
    """
    device = x.device
    allocate = functools.partial(torch.empty, dtype=torch.uint8, device=device)
    if not x.is_cuda:
        kernel(*arguments, (0, 0), allocate)
        return
    # Of torch.cuda.current_stream(device) this is the handle alone, without the object around it.
    place = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    if device.index == torch.cuda.current_device():
        kernel(*arguments, place, allocate)
    else:  # PyTorch knows how to come back to a device that nobody has used: without a context there
        with torch.cuda.device(device):
            kernel(*arguments, place, allocate)


def _precision() -> int:
    """Of products of float32: TensorFloat-32 where PyTorch is allowed bfloat16, otherwise exact."""
    return int(bfloat16_allowed("cuda"))


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(*shape, dtype=torch.float32)  # sizes one by one are read faster than a tuple of them


def max_logits(img: Tensor, aud: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    n, m = len(img), len(aud)
    logits, argmax = _floats(img, n, m), img.new_empty(n, m, dtype=torch.uint16)
    _enqueue(
        _kernels.max_logits,
        img,
        _native.image(img),
        aud.data_ptr(),
        m,
        tau,
        _precision(),
        logits.data_ptr(),
        argmax.data_ptr(),
    )
    return logits, argmax


def pool_pairs(
    img: Tensor, aud: Tensor, tau: float, threshold: float, pooled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = img.shape
    rows = n if pooled else 0
    maps, mask = _floats(img, n, h, w), img.new_empty(rows, h, w, dtype=torch.bool)
    img_avg, foreground = _floats(img, rows, c), _floats(img, rows, c)
    outputs = (mask.data_ptr(), img_avg.data_ptr(), foreground.data_ptr()) if pooled else (0, 0, 0)
    features = _native.image(img), aud.data_ptr()
    _enqueue(_kernels.pool, img, *features, tau, threshold, maps.data_ptr(), *outputs)
    return maps, mask, img_avg, foreground


def foreground_pool(img: Tensor, maps: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    n, c, h, w = img.shape
    foreground, mask = _floats(img, n, c), img.new_empty(n, h, w, dtype=torch.bool)
    outputs = (mask.data_ptr(), 0, foreground.data_ptr())
    _enqueue(_kernels.pool, img, _native.image(img), 0, 1.0, threshold, maps.data_ptr(), *outputs)
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
    dimg = torch.empty_like(img) if need_img else None
    daud = torch.empty_like(aud) if need_aud and aud is not None else None
    _enqueue(
        _kernels.feature_backward,
        img,
        _native.image(img),
        _native.address(aud),
        0 if aud is None else aud.shape[0],
        tau,
        _precision(),
        *_native.addresses(grad_logits, argmax, grad_maps, mask, grad_avg, grad_foreground, grad_aud, dimg, daud),
    )
    return dimg, daud


def adjacency(
    logits: Tensor,
    aud: Tensor,
    img_avg: Tensor,
    foreground: Tensor,
    tau: float,
    weights: tuple[float, ...],
    adjacency_threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = aud.shape[0]
    row_stats, col_lse = _floats(logits, n, _ROW_STATS), _floats(logits, 2, n)
    loss, terms = logits.new_empty(()), _floats(logits, 4)
    _enqueue(
        _kernels.adjacency,
        logits,
        _native.addresses(logits, img_avg, foreground),
        _native.vectors(aud),
        tau,
        _precision(),
        weights,
        adjacency_threshold,
        *_native.addresses(row_stats, col_lse, loss, terms),
    )
    return loss, terms, row_stats, col_lse


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
    if row_stats.data_ptr() % 16:  # a hook of saved tensors may put it anywhere; kernels read four numbers at a time
        row_stats = row_stats.clone()
    # A gradient that no wanted term reaches is not written by the kernels.
    written = (True, weights[1] or weights[2], weights[3], weights[2])
    like = (logits, aud, img_avg, foreground)
    grads = tuple(
        (torch.empty_like if w else torch.zeros_like)(x, dtype=torch.float32)
        for x, w in zip(like, written, strict=True)
    )
    _enqueue(
        _kernels.adjacency_backward,
        logits,
        _native.addresses(logits, img_avg, foreground),
        _native.vectors(aud),
        tau,
        _precision(),
        weights,
        adjacency_threshold,
        *_native.addresses(row_stats, col_lse, grad_loss, grad_terms),
        _native.addresses(*grads),
    )
    return grads  # type: ignore[return-value]
