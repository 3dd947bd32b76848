"""What processes exchange for the loss of all of their batches together: vectors and sums, never feature maps.

Each process owns the rows of its images. Columns are the sounds of all, its own first and then those of the ranks
after it, around: the positive of row n is column n on every process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fnac_kernels._validate import DTYPES
from fnac_kernels.reference import Terms, false_negatives

_WANTED = "requires_grad"


@dataclass(frozen=True)
class Shares:
    """How many rows each process of ``group`` has, and which of them this one is."""

    sizes: tuple[int, ...]
    rank: int
    group: Any = None

    @property
    def first(self) -> int:
        """Where this process's rows begin among those of all."""
        return sum(self.sizes[: self.rank])


def processes(group: Any) -> int:
    """How many processes share the batch: 1 where ``torch.distributed`` is not in use."""
    count = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    if count < 1:
        raise ValueError("process_group does not contain this process; only its own processes should call this")
    return count


def agree(img: Tensor, aud: Tensor, group: Any, **settings: float | Sequence[float] | None) -> Shares:
    """Learn how many rows each process has.

    Raises:
        ValueError: the processes differ in the embeddings' size or dtype, in what wants a gradient, or in a setting; on
            every one of them, where otherwise some would wait for the others, here or in the backward pass.
    """
    said: dict[str, Sequence[float]] = {"numbers of channels": [aud.shape[1]], "dtypes": [DTYPES.index(aud.dtype)]}
    said |= {
        f"{_WANTED} of {name}": [torch.is_grad_enabled() and x.requires_grad]
        for name, x in (("img", img), ("aud", aud))
    }
    said |= {name: _numbers(value) for name, value in settings.items()}
    mine = torch.tensor([len(aud), *(x for values in said.values() for x in values)], dtype=torch.float64)
    all_said = aud.new_empty(dist.get_world_size(group) * len(mine), dtype=torch.float64)
    dist.all_gather_into_tensor(all_said, mine.to(aud.device), group)
    sizes, *columns = all_said.view(-1, len(mine)).T.tolist()
    names = [name for name, values in said.items() for _ in values]
    for name, column in zip(names, columns, strict=True):
        if len(set(column)) > 1:
            by_rank = ", ".join(_shown(name, x) for x in column)
            raise ValueError(f"the processes have different {name}: {by_rank} by rank; they should have the same")
    return Shares(tuple(map(int, sizes)), dist.get_rank(group), group)


def _numbers(value: float | Sequence[float] | None) -> Sequence[float]:
    if value is None:
        return [math.inf]  # finite numbers alone are settings
    return value if isinstance(value, Sequence) else [value]


def _shown(name: str, value: float) -> str:
    if name == "dtypes":
        return str(DTYPES[int(value)])
    if name.startswith(_WANTED):
        return str(bool(value))
    return "None" if value == math.inf else repr(value).removesuffix(".0")


class _Gather(torch.autograd.Function):
    """Rows of all processes, by rank; the gradient of a row is the sum of what all make of it.

    They travel as they are and arrive in float32 at least, or what each process makes of a gradient would be rounded.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Shares) -> Tensor:
        ctx.shares, ctx.dtype, ctx.wide = shares, x.dtype, torch.promote_types(x.dtype, torch.float32)
        most = max(shares.sizes)
        sent, received = x.new_zeros(most, x.shape[1]), x.new_empty(most * len(shares.sizes), x.shape[1])
        sent[: len(x)] = x
        # As bytes: not every backend of torch.distributed knows every dtype.
        dist.all_gather_into_tensor(received.view(torch.uint8), sent.view(torch.uint8), shares.group)
        parts = [rows[:size] for rows, size in zip(received.split(most), shares.sizes, strict=True)]
        return torch.cat(parts).to(ctx.wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shares = ctx.shares
        # A sum of all rows instead of scattered ones: every backend has it, and vectors are small beside maps.
        grad = grad.to(ctx.wide, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=shares.group)
        return grad[shares.first :][: shares.sizes[shares.rank]].to(ctx.dtype), None


def gather(x: Tensor, shares: Shares) -> Tensor:
    """The rows of ``x (n, C)`` of all processes ``(N, C)``, this one's first and then those of the ranks after it.

    Those of 16 bits become float32.
    """
    return _Gather.apply(x, shares).roll(-shares.first, 0)


def adjacency_contrastive(
    logits: Tensor,
    aud: Tensor,
    img_avg: Tensor,
    foreground: Tensor,
    tau: float,
    weights: Sequence[float],
    adjacency_threshold: float | None,
    shares: Shares,
) -> Terms:
    """The four terms of the whole batch, by rows in plain PyTorch; a term of weight 0 is not computed and is 0.

    Args:
        logits: ``(n, N)``, this process's rows.
        aud: ``(N, C)``, gathered.
        img_avg, foreground: ``(n, C)``, this process's own; they are gathered where a term wants them.
    """
    n, total = logits.shape
    aud = aud.to(logits.dtype)

    def adjacency(features: Tensor) -> Tensor:
        return torch.softmax(features[:n] @ features.T / tau, dim=1)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().sum() / total**2

    # What this process has of each term, of the log-sum-exp of each column of the logits, and of their positives.
    nce = fns_audio = tne = fns_visual = logits.new_zeros(())
    columns = positives = logits.new_empty(0)
    if weights[0]:
        kept = logits
        if adjacency_threshold is not None:
            kept = logits.masked_fill(false_negatives(aud, adjacency_threshold, n), -math.inf)
        nce = -kept.log_softmax(1).diagonal().sum() / total
        # In two parts, maximum and log of the sum above it, because one float32 has too few digits for both.
        high = kept.detach().amax(0)
        log = (kept - _finite(high)).logsumexp(0)
        columns = torch.cat((high.roll(shares.first), log.roll(shares.first)))
        positives = torch.nn.functional.pad(kept.diagonal(), (0, total - n)).roll(shares.first)
    if weights[1] or weights[2]:
        of_aud = adjacency(aud)
    if weights[1] or weights[3]:
        of_logits = torch.softmax(logits, dim=1)
    if weights[2] or weights[3]:
        img_avg, foreground = gather(torch.cat((img_avg, foreground), 1), shares).tensor_split(2, 1)
    if weights[1]:
        fns_audio = distance(of_aud, of_logits)
    if weights[2]:
        tne = distance(of_aud, adjacency(foreground))
    if weights[3]:
        fns_visual = distance(adjacency(img_avg), of_logits)

    own = torch.cat((torch.stack((nce, fns_audio, tne, fns_visual)), columns, positives))
    # By rank, so that all processes sum up in one order.
    parts = _Gather.apply(own[None], Shares((1,) * len(shares.sizes), shares.rank, shares.group))
    sums = parts[:, :4].sum(0)
    nce, fns_audio, tne, fns_visual = (sums[i] for i in range(4))  # unbind's views nobody may change in place
    if weights[0]:
        high, log, positives = parts[:, 4:].tensor_split(3, 1)
        high = high.detach()
        highest = high.amax(0)
        log = (high - _finite(highest) + log).logsumexp(0)
        nce = nce + ((highest - positives.sum(0)) + log).mean()
    return Terms(nce, fns_audio, tne, fns_visual)


def _finite(high: Tensor) -> Tensor:
    """Maxima to subtract: 0 for those of nothing but -inf."""
    return high.masked_fill(high == -math.inf, 0)
