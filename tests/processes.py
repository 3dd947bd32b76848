"""Three processes that share a batch, and what each of them computes; ``test_distributed_loss.py`` compares it."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from samples import BF16, Sample
from tolerance import cotangent
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fnac_kernels as fk

WORLD = 3


@dataclass(frozen=True)
class Shared:
    """A sample whose rows the processes share out by ``sizes``; ``wanted``: whose gradients, img's and aud's."""

    sample: Sample
    sizes: tuple[int, ...]
    backend: str | None = "cpu"
    dtype: torch.dtype | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    wanted: tuple[bool, bool] = (True, True)

    def rows(self, rank: int) -> slice:
        return slice(sum(self.sizes[:rank]), sum(self.sizes[: rank + 1]))

    def features(self) -> tuple[Tensor, Tensor]:
        img, aud = self.sample.features()
        return img.to(self.dtype or img.dtype), aud.to(self.dtype or aud.dtype)


NCE_ALONE = {"weights": (1, 0, 0, 0)}
TWELVE = Sample(12, 12, 32, 4, 4)
CASES = {
    "even": Shared(TWELVE, (4, 4, 4)),
    "uneven": Shared(TWELVE, (3, 7, 2)),
    "one row each": Shared(Sample(3, 3, 24, 3, 5), (1, 1, 1)),
    "1x1 maps": Shared(Sample(9, 9, 40, 1, 1), (2, 3, 4)),
    "clustered": Shared(Sample(16, 16, 64, 7, 7, layout="channels_last", kind="clustered"), (5, 6, 5)),
    "bfloat16": Shared(Sample(13, 13, 48, 7, 7, dtype=BF16), (4, 4, 5)),
    "reference": Shared(TWELVE, (3, 7, 2), backend="reference"),
    "reference, bfloat16": Shared(Sample(13, 13, 48, 7, 7, dtype=BF16), (4, 4, 5), backend="reference"),
    "images alone": Shared(TWELVE, (3, 7, 2), wanted=(True, False)),
    "sounds alone": Shared(TWELVE, (3, 7, 2), wanted=(False, True)),
    "sounds alone, reference": Shared(TWELVE, (3, 7, 2), backend="reference", wanted=(False, True)),
    "float64": Shared(TWELVE, (3, 7, 2), backend=None, dtype=torch.float64),
    "masked": Shared(TWELVE, (3, 7, 2), settings={"adjacency_threshold": 0.1}),
    "all masked": Shared(TWELVE, (3, 7, 2), settings={"adjacency_threshold": -2.0}),
    "NCE only": Shared(TWELVE, (3, 7, 2), settings=NCE_ALONE),
    "without NCE": Shared(TWELVE, (3, 7, 2), settings={"weights": (0, 30, 0, 50)}),
    "TNE alone": Shared(TWELVE, (3, 7, 2), settings={"weights": (0, 0, 20, 0), "fg_threshold": 0.3}),
}
#: Of the two processes that make a group: none is the default.
PAIRS_SETTINGS: dict[str, Any] = {
    "tau": 0.2,
    "fg_threshold": 0.4,
    "weights": (2, 30, 40, 50),
    "adjacency_threshold": 0.05,
    "backend": "reference",
}


def step(case: Shared, rows: slice, loss: Callable[..., fk.FNACOutput], terms: int = 1) -> dict[str, Any]:
    """Outputs and gradients of those rows, under the sample's cotangents, the terms' divided by ``terms``."""
    img, aud = (x[rows].requires_grad_(wanted) for x, wanted in zip(case.features(), case.wanted, strict=True))
    out = loss(img, aud, case.sample.tau, backend=case.backend, **case.settings)
    whole = out.maps.new_zeros(case.sample.n, *out.maps.shape[1:])
    weights = [cotangent(i, x) / terms for i, x in enumerate(out[:-1])] + [cotangent(5, whole)[rows]]
    sum((x * weight).sum() for x, weight in zip(out, weights, strict=True)).backward()
    return {"outputs": tuple(x.detach() for x in out), "dimg": img.grad, "daud": aud.grad}


def far_from_zero(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features whose logits are 900, and 909 for the positive pairs, without any rounding."""
    rows = torch.cat((torch.full((12, 1), 30.0), 3 * torch.eye(12)), 1).to(dtype)
    return rows[:, :, None, None].clone().requires_grad_(), rows.clone().requires_grad_()


class Encoders(nn.Module):
    """What DistributedDataParallel averages the gradients of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.img, self.aud = nn.Conv2d(TWELVE.c, 16, 1), nn.Linear(TWELVE.c, 16)

    def forward(self, img: Tensor, aud: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.normalize(self.img(img), dim=1), nn.functional.normalize(self.aud(aud), dim=1)


def trained(encoders: nn.Module, loss: nn.Module, rows: slice = slice(None)) -> list[Tensor]:
    """Gradients of the parameters."""
    img, aud = TWELVE.features()
    loss(*encoders(img[rows], aud[rows])).loss.backward()
    return [parameter.grad for parameter in encoders.parameters()]


def error(**settings: Any) -> str:
    """What a call with settings that differ says; all processes get there."""
    channels, dtype = settings.pop("channels", 8), settings.pop("dtype", torch.float32)
    wanted = settings.pop("wanted", (False, False))
    features = [torch.ones(2, channels, *size, dtype=dtype) for size in ((2, 2), ())]
    try:
        fk.distributed_fnac_loss(*(x.requires_grad_(y) for x, y in zip(features, wanted, strict=True)), **settings)
    except ValueError as raised:
        return str(raised)
    return "no error"


def work(rank: int, folder: str) -> None:
    """One process's part."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=60)
    )
    found: dict[str, Any] = {
        name: step(case, case.rows(rank), fk.distributed_fnac_loss, WORLD) for name, case in CASES.items()
    }
    case = CASES["uneven"]
    img, aud = (x[case.rows(rank)] for x in case.features())
    with torch.no_grad():
        found["no_grad"] = tuple(fk.distributed_fnac_loss(img, aud))
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = tuple(fk.distributed_fnac_loss(img, aud))
    found["compiled"] = tuple(
        torch.compile(lambda i, a: fk.distributed_fnac_loss(i * 2, a * 2), backend="eager")(img, aud)
    )
    found["twice as large"] = tuple(fk.distributed_fnac_loss(img * 2, aud * 2))
    img, aud = (x.detach()[case.rows(rank)].requires_grad_() for x in far_from_zero(torch.float32))
    fk.distributed_fnac_loss(img, aud, 1.0, **NCE_ALONE).loss.backward()
    found["far from zero"] = (img.grad / WORLD, aud.grad / WORLD)
    pair = dist.new_group([0, 2])
    half = slice(0, 5) if rank == 0 else slice(5, 12)
    if rank == 1:
        found["outside"] = error(process_group=pair)
    else:
        loss = fk.FNACLoss(distributed=True, process_group=pair, **PAIRS_SETTINGS)
        img, aud = (x[half].requires_grad_() for x in TWELVE.features())
        out = loss(img, aud)
        (out.loss / 2).backward()
        found["pair"] = tuple(x.detach() for x in (*out[:-1], img.grad, aud.grad))
    encoders = DistributedDataParallel(Encoders())
    found["trained"] = trained(encoders, fk.FNACLoss(distributed=True), CASES["even"].rows(rank))
    found["errors"] = [
        error(tau=0.1 + rank),
        error(weights=(1, 2, 3, 4 if rank else 5)),
        error(adjacency_threshold=None if rank else 0.5),
        error(channels=8 if rank else 9),
        error(dtype=torch.bfloat16 if rank else torch.float16),
        error(wanted=(True, rank != 1)),
        error(wanted=(rank == 2, True)),
    ]
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
