"""``FNACLoss``: the loss as a module."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fnac_kernels import _dispatch, _validate
from fnac_kernels.functional import distributed_fnac_loss, fnac_loss
from fnac_kernels.reference import FNACOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FNACLoss(nn.Module):
    """:func:`fnac_kernels.fnac_loss` with its settings kept; it has no parameters.

    ``weights`` can be set between steps: ``(1, 0, 0, 0)`` during the NCE-only warm-up epochs, the published
    ``(1, 100, 100, 100)`` after them. Settings are checked when the module is made, and ``weights`` whenever it is set.

    With ``distributed`` it is :func:`fnac_kernels.distributed_fnac_loss` over ``process_group``.
    """

    def __init__(
        self,
        tau: float = 0.03,
        *,
        fg_threshold: float = 0.6,
        weights: Sequence[float] = (1, 100, 100, 100),
        adjacency_threshold: float | None = None,
        backend: str | None = None,
        distributed: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.tau = _validate.temperature(tau)
        self.fg_threshold = _validate.number(fg_threshold, "fg_threshold")
        self.weights = weights
        self.adjacency_threshold = _validate.optional_number(adjacency_threshold, "adjacency_threshold")
        if backend is not None:
            _dispatch.check_name(backend, "backend")
        self.backend = backend
        self.distributed, self.process_group = distributed, process_group
        if process_group is not None and not distributed:
            raise ValueError("process_group is given; distributed should then be True, it is False")

    @property
    def weights(self) -> Sequence[float]:
        return self._weights

    @weights.setter
    def weights(self, values: Sequence[float]) -> None:
        self._weights = _validate.weights(values)

    def forward(self, img: Tensor, aud: Tensor) -> FNACOutput:
        loss = fnac_loss
        if self.distributed:
            loss = functools.partial(distributed_fnac_loss, process_group=self.process_group)
        return loss(
            img,
            aud,
            self.tau,
            fg_threshold=self.fg_threshold,
            weights=self.weights,
            adjacency_threshold=self.adjacency_threshold,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"tau={self.tau}, fg_threshold={self.fg_threshold}, weights={self.weights}, "
            f"adjacency_threshold={self.adjacency_threshold}, backend={self.backend!r}, distributed={self.distributed}"
        )
