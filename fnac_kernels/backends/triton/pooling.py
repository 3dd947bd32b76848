"""Maps, foreground mask, mean and foreground feature of matched pairs.

What is pooled over a map needs its minimum and maximum first, so an image is looked at twice. A program that takes a
whole image finds it in the cache the second time; of large maps many programs make one, and the image is read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fnac_kernels._native import image_strides
from fnac_kernels.backends.triton import tuning
from fnac_kernels.backends.triton.launch import on_image, run


@triton.jit(do_not_specialize=["P"])
def image_kernel(
    img, aud, maps, mask, avg, foreground, C, P, stride_c, stride_p, scale, threshold,
    MAPS: tl.constexpr, AVG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A whole image. With MAPS the map is made, else it is given. What is pooled reads the image again, from cache."""
    n = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    block = tl.arange(0, BLOCK_C)
    image = img + n * C * P + p[:, None] * stride_p
    if MAPS:
        value = tl.zeros((BLOCK_P,), tl.float32)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + block
            cells = tl.load(image + c[None, :] * stride_c, mask=(p[:, None] < P) & (c[None, :] < C), other=0.0)
            sound = tl.load(aud + n * C + c, mask=c < C, other=0.0)
            value += tl.sum(cells.to(tl.float32) * sound.to(tl.float32)[None, :], axis=1)
        value *= scale
        tl.store(maps + n * P + p, value, mask=p < P)
    else:
        value = tl.load(maps + n * P + p, mask=p < P, other=0.0)
    low = tl.min(tl.where(p < P, value, float("inf")), axis=0)
    high = tl.max(tl.where(p < P, value, float("-inf")), axis=0)
    # A NaN anywhere makes the smallest and the largest NaN, and every comparison false.
    whole = tl.sum(((p < P) & (value != value)).to(tl.int32), axis=0) == 0
    inside = (tl.div_rn(value - low, high - low + 1e-5) > threshold) & whole & (p < P)
    tl.store(mask + n * P + p, inside.to(tl.int8), mask=p < P)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + block
        cells = tl.load(
            image + c[None, :] * stride_c, mask=(p[:, None] < P) & (c[None, :] < C), other=0.0
        ).to(tl.float32)  # fmt: skip
        if AVG:
            tl.store(avg + n * C + c, tl.sum(cells, axis=0) / P, mask=c < C)
        # A product, not a choice: a NaN in the background reaches the mean as it does in PyTorch.
        kept = tl.sum(cells * inside.to(tl.float32)[:, None], axis=0)
        tl.store(foreground + n * C + c, kept / P, mask=c < C)


@triton.jit(do_not_specialize=["P"])
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


@triton.jit(do_not_specialize=["P"])
def pool_kernel(
    img, maps, mask, avg, foreground, C, P, stride_c, stride_p, threshold,
    AVG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
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
    whole = tl.sum(nans, axis=0) == 0
    everything = tl.zeros((BLOCK_C,), tl.float32)
    kept = tl.zeros((BLOCK_C,), tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        value = tl.load(maps + n * P + p, mask=p < P, other=0.0)
        inside = (tl.div_rn(value - lowest, highest - lowest + 1e-5) > threshold) & whole & (p < P)
        if block == 0:
            tl.store(mask + n * P + p, inside.to(tl.int8), mask=p < P)
        cells = tl.load(
            img + n * C * P + p[:, None] * stride_p + c[None, :] * stride_c,
            mask=(p[:, None] < P) & (c[None, :] < C), other=0.0,
        ).to(tl.float32)  # fmt: skip
        everything += tl.sum(cells, axis=0)
        kept += tl.sum(cells * inside.to(tl.float32)[:, None], axis=0)
    if AVG:
        tl.store(avg + n * C + c, everything / P, mask=c < C)
    tl.store(foreground + n * C + c, kept / P, mask=c < C)


def _maps(img: Tensor, aud: Tensor, tau: float) -> Tensor:
    n, c, h, w = img.shape
    maps = torch.empty((n, h, w), dtype=torch.float32, device=img.device)
    blocks = tuning.part_of_image(h * w)
    grid = (n, triton.cdiv(h * w, blocks.sizes["BLOCK_P"]))
    run(map_kernel, grid, img, aud, maps, c, h * w, *image_strides(img), 1 / tau, **blocks.options)
    return maps


def _pool(
    img: Tensor, aud: Tensor | None, maps: Tensor | None, tau: float, threshold: float, avg: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The maps (made where they are None), the mask and the foreground feature; fills ``avg``, if given."""
    n, c, h, w = img.shape
    mask = torch.empty((n, h, w), dtype=torch.bool, device=img.device)
    foreground = torch.empty((n, c), dtype=torch.float32, device=img.device)
    outputs = (mask.view(torch.int8), avg, foreground)
    whole = tuning.whole_image(h * w)
    if whole is not None:
        given = maps
        maps = torch.empty((n, h, w), dtype=torch.float32, device=img.device) if given is None else given
        run(
            image_kernel, (n,), img, aud, maps, *outputs, c, h * w, *image_strides(img), 1 / tau, threshold,
            MAPS=given is None, AVG=avg is not None, **whole.options,
        )  # fmt: skip
        return maps, mask, foreground
    if maps is None:
        assert aud is not None
        maps = _maps(img, aud, tau)
    blocks = tuning.part_of_image(h * w)
    run(
        pool_kernel, (n, triton.cdiv(c, blocks.sizes["BLOCK_C"])), img, maps, *outputs, c, h * w, *image_strides(img),
        threshold, AVG=avg is not None, **blocks.options,
    )  # fmt: skip
    return maps, mask, foreground


def pool_pairs(
    img: Tensor, aud: Tensor, tau: float, threshold: float, pooled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = img.shape
    avg = torch.empty((n if pooled else 0, c), dtype=torch.float32, device=img.device)
    with on_image(img):
        if not pooled:
            return (
                _maps(img, aud, tau),
                torch.empty((0, h, w), dtype=torch.bool, device=img.device),
                avg,
                torch.empty_like(avg),
            )
        maps, mask, foreground = _pool(img, aud, None, tau, threshold, avg)
    return maps, mask, avg, foreground


def foreground_pool(img: Tensor, maps: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    with on_image(img):
        _, mask, foreground = _pool(img, None, maps, 1.0, threshold, None)
    return foreground, mask
