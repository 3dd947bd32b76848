"""Maps, foreground mask, mean and foreground feature of matched pairs: one program per image."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fnac_kernels.backends.triton import tuning
from fnac_kernels.backends.triton.launch import image_strides, on, run


@triton.jit
def map_kernel(img, aud, maps, C, P, stride_c, stride_p, scale, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """``maps[n, p] = <img[n, :, p], aud[n]> * scale`` for BLOCK_P cells of an image."""
    n = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        cells = tl.load(
            img + n * C * P + p[:, None] * stride_p + c[None, :] * stride_c,
            mask=(p[:, None] < P) & (c[None, :] < C), other=0.0,
        )  # fmt: skip
        sound = tl.load(aud + n * C + c, mask=c < C, other=0.0)
        total += tl.sum(cells.to(tl.float32) * sound.to(tl.float32)[None, :], axis=1)
    tl.store(maps + n * P + p, total * scale, mask=p < P)


@triton.jit
def pool_kernel(
    img, maps, mask, avg, foreground, C, P, stride_c, stride_p, threshold,
    HAS_AVG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mask, mean and foreground feature of BLOCK_C channels of an image, given its map."""
    n = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    low = tl.full((BLOCK_P,), float("inf"), tl.float32)
    high = tl.full((BLOCK_P,), float("-inf"), tl.float32)
    nans = tl.zeros((BLOCK_P,), tl.int32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        value = tl.load(maps + n * P + p, mask=p < P, other=0.0)
        low = tl.where(p < P, tl.minimum(low, value), low)
        high = tl.where(p < P, tl.maximum(high, value), high)
        nans += ((p < P) & (value != value)).to(tl.int32)
    lowest = tl.min(low, axis=0)
    highest = tl.max(high, axis=0)
    # A NaN anywhere makes the smallest and the largest NaN, and every comparison false.
    whole = tl.sum(nans, axis=0) == 0
    everything = tl.zeros((BLOCK_C,), tl.float32)
    kept = tl.zeros((BLOCK_C,), tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        value = tl.load(maps + n * P + p, mask=p < P, other=0.0)
        inside = ((value - lowest) / (highest - lowest + 1e-5) > threshold) & whole & (p < P)
        if block == 0:
            tl.store(mask + n * P + p, inside.to(tl.int8), mask=p < P)
        cells = tl.load(
            img + n * C * P + p[:, None] * stride_p + c[None, :] * stride_c,
            mask=(p[:, None] < P) & (c[None, :] < C), other=0.0,
        ).to(tl.float32)  # fmt: skip
        everything += tl.sum(cells, axis=0)
        # A product, not a choice: a NaN in the background reaches the mean as it does in PyTorch.
        kept += tl.sum(cells * inside.to(tl.float32)[:, None], axis=0)
    if HAS_AVG:
        tl.store(avg + n * C + c, everything / P, mask=c < C)
    tl.store(foreground + n * C + c, kept / P, mask=c < C)


def _maps(img: Tensor, aud: Tensor, tau: float) -> Tensor:
    n, c, h, w = img.shape
    maps = torch.empty((n, h, w), dtype=torch.float32, device=img.device)
    blocks = tuning.pooling(h * w)
    grid = (n, triton.cdiv(h * w, blocks.sizes["BLOCK_P"]))
    run(map_kernel, grid, img, aud, maps, c, h * w, *image_strides(img), 1 / tau, **blocks.options)
    return maps


def _pool(img: Tensor, maps: Tensor, threshold: float, avg: Tensor | None) -> tuple[Tensor, Tensor]:
    n, c, h, w = img.shape
    mask = torch.empty((n, h, w), dtype=torch.bool, device=img.device)
    foreground = torch.empty((n, c), dtype=torch.float32, device=img.device)
    blocks = tuning.pooling(h * w)
    grid = (n, triton.cdiv(c, blocks.sizes["BLOCK_C"]))
    run(
        pool_kernel, grid, img, maps, mask.view(torch.int8), avg, foreground, c, h * w, *image_strides(img), threshold,
        HAS_AVG=avg is not None, **blocks.options,
    )  # fmt: skip
    return mask, foreground


def pool_pairs(
    img: Tensor, aud: Tensor, tau: float, threshold: float, pooled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = img.shape
    with on(img):
        maps = _maps(img, aud, tau)
        avg = torch.empty((n if pooled else 0, c), dtype=torch.float32, device=img.device)
        if not pooled:
            return maps, torch.empty((0, h, w), dtype=torch.bool, device=img.device), avg, torch.empty_like(avg)
        mask, foreground = _pool(img, maps, threshold, avg)
    return maps, mask, avg, foreground


def foreground_pool(img: Tensor, maps: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    with on(img):
        mask, foreground = _pool(img, maps, threshold, None)
    return foreground, mask
