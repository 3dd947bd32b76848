"""What is measured: named cases (sizes), and operations written once for any library that offers the functions.

An operation calls ``library.fnac_loss`` and its like; the library is ``fnac_kernels`` or ``fnac_kernels.reference``,
which take the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fnac_kernels import reference

TAU = 0.03
#: Similarities per chunk of :class:`ChunkedReference`: 64 MiB of float32.
CHUNK = 1 << 24


@dataclass(frozen=True)
class Case:
    """``n`` feature maps ``(c, h, w)`` against ``m`` embeddings ``(c)``; ``series``: its growth curves."""

    name: str
    n: int
    m: int
    h: int = 7
    w: int = 7
    c: int = 512
    kind: str = "random"
    layout: str = "contiguous"
    series: tuple[str, ...] = ()

    @property
    def cells(self) -> int:
        return self.h * self.w

    @property
    def paired(self) -> bool:
        return self.n == self.m

    def features(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Normalised float32 ``img (n, c, h, w)`` and ``aud (m, c)``: the same numbers at every call."""
        generator = torch.Generator().manual_seed(0)
        img = torch.randn(self.n, self.c, self.h, self.w, generator=generator)
        aud = torch.randn(self.m, self.c, generator=generator)
        if self.kind == "smooth":  # neighbouring cells and pairs alike, as after training: more near-ties to resolve
            img = F.avg_pool2d(F.pad(img, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
            img[: min(self.n, self.m)] += 0.03 * aud[: min(self.n, self.m), :, None, None]
        img, aud = F.normalize(img, dim=1).to(device), F.normalize(aud, dim=1).to(device)
        if self.layout == "channels_last":
            img = img.contiguous(memory_format=torch.channels_last)
        return img, aud


def _square(b: int, side: int = 7, **more: Any) -> Case:
    return Case(f"b{b}-{side}x{side}", b, b, side, side, **more)


_BOTH = ("batch", "cells")
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _square(32, series=("batch",)),
        _square(64, series=("batch",)),
        _square(128, series=_BOTH),
        Case("published", 256, 256, series=("batch",)),
        _square(512, series=("batch",)),
        _square(1024, series=("batch",)),
        _square(2048, series=("batch",)),
        _square(4096, series=("batch",)),
        _square(8192, series=("batch",)),
        _square(32768),
        _square(128, 4, series=("cells",)),
        _square(128, 14, series=("cells",)),
        _square(128, 28, series=("cells",)),
        _square(128, 56, series=("cells",)),
        _square(256, 14),
        _square(256, 28),
        Case("published-smooth", 256, 256, kind="smooth"),
        Case("published-channels-last", 256, 256, layout="channels_last"),
        Case("frames", 1920, 1920),  # 128 clips of 15 frames
        Case("tall", 4096, 64),  # many images, few sounds
        Case("wide", 64, 4096),  # a few images against a library of sounds
        _square(1024, 1),
        _square(8192, 1),
        Case("tiny", 8, 8, 3, 3, 32),
        Case("tiny-1x1", 8, 8, 1, 1, 32),
    )
}


@dataclass(frozen=True)
class Op:
    """``run(library, *inputs, **backend)``; ``inputs`` makes them from the features.

    ``backward``: the gradients of the first output to all inputs are part of the work. ``dense``: that output is the
    matrix of logits, not a scalar. ``paired``: needs n == m.
    """

    name: str
    what: str
    run: Callable[..., tuple[Tensor, ...]]
    inputs: Callable[[Tensor, Tensor], tuple[Tensor, ...]] = lambda img, aud: (img, aud)
    backward: bool = True
    dense: bool = False
    paired: bool = True

    def __str__(self) -> str:
        return self.name

    def problem(self, case: Case) -> str | None:
        if self.paired and not case.paired:
            return "pairs every image with a sound: needs n == m"
        if self.name == "nce" and case.cells != 1:
            return "is the contrastive term alone: 1x1 maps"
        return None


def _total(terms: Any) -> tuple[Tensor, ...]:
    return terms.nce + 100 * (terms.fns_audio + terms.tne + terms.fns_visual), *terms


def _pooled(img: Tensor, aud: Tensor) -> tuple[Tensor, ...]:
    mean = img.mean(dim=(2, 3))
    return (
        ChunkedReference.max_logits(img, aud, TAU),
        aud,
        mean,
        mean * torch.linspace(0.2, 0.8, len(mean))[:, None].to(mean),
    )


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("fnac_loss", "the whole loss, forward and backward", lambda lib, *x, **b: lib.fnac_loss(*x, TAU, **b)[:5]),
        Op(
            "max_logits",
            "max-pooled logits, forward and backward",
            lambda lib, *x, **b: (lib.max_logits(*x, TAU, **b),),
            dense=True,
            paired=False,
        ),
        Op(
            "max_logits_forward",
            "max-pooled logits without gradient",
            lambda lib, *x, **b: (lib.max_logits(*x, TAU, **b),),
            backward=False,
            paired=False,
        ),
        Op(
            "paired_maps",
            "localization maps without gradient",
            lambda lib, *x, **b: (lib.paired_maps(*x, TAU, **b),),
            backward=False,
        ),
        Op(
            "adjacency_contrastive",
            "the four terms from pooled quantities, forward and backward",
            lambda lib, *x, **b: _total(lib.adjacency_contrastive(*x, TAU, **b)),
            inputs=_pooled,
        ),
        Op(
            "nce",
            "the contrastive term of 1x1 maps, forward and backward",
            lambda lib, *x, **b: (lib.fnac_loss(*x, TAU, weights=(1, 0, 0, 0), **b).loss,),
        ),
    )
}


#: What runs in a few minutes on two cores, and says whether the kernels help: the sizes around the published one.
DEFAULT = {
    "fnac_loss": ("b32-7x7", "b128-7x7", "published", "b1024-7x7", "b128-14x14"),
    "max_logits": ("published",),
    "max_logits_forward": ("published",),
}


class ChunkedReference:
    """The reference in chunks of rows, recomputed in the backward: what a careful user of plain PyTorch writes when
    memory runs out. It is a rival, and the oracle where the whole similarity tensor would not fit."""

    paired_maps = staticmethod(reference.paired_maps)
    adjacency_contrastive = staticmethod(reference.adjacency_contrastive)

    @staticmethod
    def max_logits(img: Tensor, aud: Tensor, tau: float) -> Tensor:
        rows = max(1, CHUNK // (len(aud) * img.shape[2] * img.shape[3]))
        if not (torch.is_grad_enabled() and (img.requires_grad or aud.requires_grad)):
            return torch.cat([reference.max_logits(part, aud, tau) for part in img.split(rows)])
        parts = [checkpoint(reference.max_logits, part, aud, tau, use_reentrant=False) for part in img.split(rows)]
        return torch.cat(parts)

    @staticmethod
    def fnac_loss(img: Tensor, aud: Tensor, tau: float, weights: tuple[float, ...] = (1, 100, 100, 100)) -> Any:
        maps = reference.paired_maps(img, aud, tau)
        terms = reference.adjacency_contrastive(
            ChunkedReference.max_logits(img, aud, tau),
            aud,
            img.mean(dim=(2, 3)),
            reference.foreground_pool(img, maps, 0.6),
            tau,
            weights=weights,
        )
        return reference.FNACOutput(reference.weighted_sum(weights, terms), *terms, maps)
