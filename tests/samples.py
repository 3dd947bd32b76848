"""The one table of inputs and the operations that run on them: values, gradients, opcheck and every backend use it.

A sample is a pair of features of some shape, dtype, memory format and kind of data. An operation is a function of
(img, aud, backend) to a tuple of tensors; run on ``backend="reference"`` in float64 it is the oracle.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import fnac_kernels as fk
from fnac_kernels import _dispatch, _ops, reference

#: The backends that run here, each on the tensors that it takes.
USABLE = [name for name, backend in _dispatch.BACKENDS.items() if backend.problem is None]
TAU = 0.03
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Sample:
    """``layout``: contiguous, channels_last or strided. ``kind``: see :func:`_data`."""

    n: int
    m: int
    c: int
    h: int
    w: int
    dtype: torch.dtype = FP32
    layout: str = "contiguous"
    kind: str = "random"

    def __str__(self) -> str:
        size = f"{self.n}x{self.m}c{self.c}-{self.h}x{self.w}"
        return f"{size}-{str(self.dtype).removeprefix('torch.')}-{self.layout}-{self.kind}"

    @property
    def paired(self) -> bool:
        return self.n == self.m

    @property
    def tau(self) -> float:
        """A power of two where ties must stay exact."""
        return 0.03125 if self.kind == "ties" else TAU

    def features(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """``img (n, c, h, w)`` and ``aud (m, c)``: the same numbers at every call."""
        generator = torch.Generator().manual_seed(zlib.crc32(str(self).encode()))
        img, aud = _data(self, generator)
        img, aud = img.to(self.dtype).to(device), aud.to(self.dtype).to(device)
        if self.layout == "channels_last":
            img = img.contiguous(memory_format=torch.channels_last)
        elif self.layout == "strided":
            img = torch.stack((img, torch.zeros_like(img)), dim=-1)[..., 0]
            aud = torch.cat((aud, torch.zeros_like(aud)), dim=1)[:, : self.c]
        return img, aud


def _data(sample: Sample, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, m, c, h, w = sample.n, sample.m, sample.c, sample.h, sample.w
    img, aud = randn(n, c, h, w), randn(m, c)
    match sample.kind:
        case "random":
            pass
        case "clustered":  # a few classes, as after training: false negatives, near-equal rows
            centres = randn(3, c)
            img = img * 0.5 + 2 * centres[torch.arange(n) % 3, :, None, None]
            aud = aud * 0.5 + 2 * centres[torch.arange(m) % 3]
        case "smooth":  # neighbouring cells alike
            img = F.avg_pool2d(F.pad(img, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        case "constant":  # every cell of a map equal: all cells tie, min-max divides 0 by epsilon
            img = img[:, :, :1, :1].expand(n, c, h, w).clone()
        case "ties":  # small integers: sums are exact in every dtype, so ties are ties
            return torch.randint(-1, 2, img.shape, generator=generator).double() / 4, (
                torch.randint(-1, 2, aud.shape, generator=generator).double() / 4
            )
        case "scaled":  # not normalised, norms over six decades
            return img * 10 ** (randn(n, 1, 1, 1) - 1), aud * 10 ** (randn(m, 1) - 1)
        case "saturated":  # one pair has each row of a softmax to itself; the first two images have each other's sound
            aud = F.normalize(aud, dim=1)
            own = torch.arange(n) % m
            own[:2] = own[:2].flip(0)
            return 4 * (aud[own, :, None, None] + 0.3 * F.normalize(img, dim=1)), aud
        case "twins":  # the same, and the last two pairs are alike: they share a row of each softmax, half and half
            aud = F.normalize(aud, dim=1)
            aud[-2:] = aud[-1].clone()
            own = torch.arange(n) % m
            own[:2] = own[:2].flip(0)
            img = 4 * (aud[own, :, None, None] + 0.3 * F.normalize(img, dim=1))
            img[-2:] = img[-1].clone()
            return img, aud
        case _:
            raise ValueError(f"kind is {sample.kind!r}")
    return F.normalize(img, dim=1), F.normalize(aud, dim=1)


SAMPLES = [
    Sample(4, 4, 8, 3, 3),
    Sample(1, 1, 1, 1, 1),
    Sample(1, 1, 16, 7, 7),
    Sample(2, 2, 5, 1, 1),
    Sample(8, 8, 32, 5, 4),
    Sample(17, 17, 33, 7, 7),
    Sample(33, 33, 48, 4, 5, layout="channels_last"),
    Sample(16, 16, 64, 7, 7, layout="channels_last", kind="clustered"),
    Sample(16, 16, 64, 7, 7, kind="smooth"),
    Sample(6, 6, 24, 14, 14, layout="strided"),
    Sample(5, 5, 40, 1, 37),
    Sample(3, 3, 20, 29, 31, layout="channels_last"),
    Sample(12, 12, 16, 4, 4, kind="ties"),
    Sample(9, 9, 32, 5, 5, kind="ties", layout="channels_last"),
    Sample(6, 6, 32, 6, 6, kind="constant"),
    Sample(7, 7, 19, 5, 3, kind="scaled"),
    Sample(20, 20, 100, 2, 2, kind="saturated"),
    Sample(2, 2, 24, 3, 1, kind="saturated", layout="channels_last"),
    Sample(20, 20, 100, 2, 2, kind="twins"),
    Sample(4, 4, 24, 3, 1, kind="twins", layout="channels_last"),
    Sample(8, 8, 100, 2, 2, dtype=BF16, kind="twins"),
    Sample(40, 40, 96, 7, 7, dtype=BF16),
    Sample(19, 19, 70, 7, 7, dtype=BF16, layout="channels_last", kind="clustered"),
    Sample(9, 9, 17, 3, 5, dtype=BF16, layout="strided"),
    Sample(12, 12, 32, 4, 4, dtype=BF16, kind="ties"),
    Sample(8, 8, 100, 2, 2, dtype=BF16, kind="saturated"),
    Sample(21, 21, 64, 7, 7, dtype=FP16),
    Sample(10, 10, 24, 6, 5, dtype=FP16, layout="channels_last"),
    Sample(18, 18, 33, 1, 1, dtype=FP16, kind="clustered"),
    # rectangular: only the ops that do not pair rows
    Sample(3, 50, 24, 5, 5),
    Sample(37, 2, 24, 7, 7, layout="channels_last"),
    Sample(5, 66, 31, 2, 9, kind="ties"),
    Sample(61, 70, 40, 1, 1),
    Sample(20, 35, 64, 7, 7, dtype=BF16),
    Sample(2, 18, 33, 9, 2, dtype=FP16, layout="channels_last"),
]


def _foreground_pool(img: Tensor, aud: Tensor, tau: float, backend: str | None) -> tuple[Tensor, ...]:
    # The maps are an input here: computed once in float64, so that every backend sees the same mask.
    maps = reference.paired_maps(img.detach().double(), aud.detach().double(), tau)
    return (fk.foreground_pool(img, maps.to(torch.promote_types(img.dtype, FP32)), 0.6, backend=backend),)


def _adjacency(img: Tensor, aud: Tensor, tau: float, backend: str | None) -> tuple[Tensor, ...]:
    # Its inputs come from the reference, so that only this part's own error shows.
    maps = reference.paired_maps(img.detach().double(), aud.detach().double(), tau)
    logits = reference.max_logits(img, aud, tau)
    foreground = reference.foreground_pool(img, maps, 0.6)
    img_avg = reference.foreground_pool(img, maps, -1.0)
    return tuple(fk.adjacency_contrastive(logits, aud, img_avg, foreground, tau, backend=backend))


def _pooled_features(img: Tensor, aud: Tensor, tau: float, backend: str | None) -> tuple[Tensor, ...]:
    # One operator for the distributed loss: more sounds than images, the images' own first.
    img = img[: len(aud)]
    if backend != _dispatch.REFERENCE:
        return _ops.pooled_features(img, aud, tau, 0.6, True, backend)[:4]
    maps = reference.paired_maps(img, aud[: len(img)], tau)
    pooled = (reference.foreground_pool(img, maps, threshold) for threshold in (-1.0, 0.6))
    return reference.max_logits(img, aud, tau), maps, *pooled


def _loss(**settings: object) -> Callable[..., tuple[Tensor, ...]]:
    def run(img: Tensor, aud: Tensor, tau: float, backend: str | None) -> tuple[Tensor, ...]:
        return tuple(fk.fnac_loss(img, aud, tau, backend=backend, **settings))

    return run


@dataclass(frozen=True)
class Op:
    """``run(img, aud, tau, backend)``; ``paired`` ops need n == m."""

    name: str
    run: Callable[..., tuple[Tensor, ...]]
    paired: bool = True

    def __str__(self) -> str:
        return self.name


OPS = [
    Op("max_logits", lambda img, aud, tau, backend: (fk.max_logits(img, aud, tau, backend=backend),), paired=False),
    Op(
        "similarity_maps",
        lambda img, aud, tau, backend: (fk.similarity_maps(img, aud, tau, backend=backend),),
        paired=False,
    ),
    Op("paired_maps", lambda img, aud, tau, backend: (fk.paired_maps(img, aud, tau, backend=backend),)),
    Op("foreground_pool", _foreground_pool),
    Op("pooled_features", _pooled_features, paired=False),
    Op("adjacency_contrastive", _adjacency),
    Op("fnac_loss", _loss()),
    Op("fnac_loss_nce_only", _loss(weights=(1, 0, 0, 0))),
    Op("fnac_loss_without_nce", _loss(weights=(0, 30, 0, 50))),
    Op("fnac_loss_hard_masked", _loss(adjacency_threshold=0.25)),
]

CASES = [(op, sample) for op in OPS for sample in SAMPLES if sample.paired or not op.paired]
CASE_IDS = [f"{op}-{sample}" for op, sample in CASES]
