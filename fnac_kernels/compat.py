"""Make the official FNAC_AVL model class run on these kernels.

Facts about that class (github.com/OpenNLPLab/FNAC_AVL, ``model.py``): ``FNAC.calculate_loss(img, aud, name)`` returns
``[nce, loss1, loss2, loss3], Slogits`` with ``Slogits`` of shape ``(N, M, H, W)``; the model keeps its temperature in
``tau`` and the foreground threshold in ``high_conf_thresh``; its ``forward`` reads nothing of ``Slogits`` but the
matched pairs, ``Slogits[arange(B), arange(B)]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnac_kernels.functional import fnac_loss, similarity_maps


class LazySimilarity:
    """Stands in for ``Slogits``: matched pairs come from the maps at hand, anything else builds the whole tensor once.

    It is read as a tensor is, by indexing, operators, attributes, methods and torch functions (but ``torch.as_tensor``
    and ``torch.vmap``), and not written to.
    """

    def __init__(self, img: Tensor, aud: Tensor, tau: float, maps: Tensor) -> None:
        self._img, self._aud, self._tau, self._maps = img, aud, tau, maps
        self._whole: Tensor | None = None
        self._recorded = torch.is_grad_enabled()
        self._versions = self._versions_now()

    def _versions_now(self) -> list[int]:
        return [x._version for x in (self._img, self._aud) if not x.is_inference()]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self._img), len(self._aud), *self._img.shape[2:]))

    def __len__(self) -> int:
        return len(self._img)

    def tensor(self) -> Tensor:
        """The whole ``(N, M, H, W)`` tensor, built when first asked for: under the autocast of then, with gradients if
        they were recorded when the loss was computed.

        Raises:
            RuntimeError: the features were changed in place since then.
        """
        if self._whole is None:
            if self._versions_now() != self._versions:
                raise RuntimeError(
                    "img or aud was changed in place before Slogits was read; read it first, or clone them"
                )
            with torch.inference_mode(False), torch.set_grad_enabled(self._recorded):
                self._whole = similarity_maps(self._img, self._aud, self._tau)
        return self._whole

    def __getitem__(self, index: Any) -> Tensor:
        if (
            isinstance(index, tuple)
            and len(index) == 2
            and _is_arange(index[0], len(self))
            and _is_arange(index[1], len(self))
        ):
            return self._maps[index[0]]  # a new tensor, which under no_grad needs no gradient: callers make it numpy
        return self.tensor()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        def whole(x: Any) -> Any:
            if isinstance(x, cls):
                return x.tensor()
            return type(x)(map(whole, x)) if isinstance(x, (list, tuple)) else x

        return func(*map(whole, args), **{k: whole(v) for k, v in (kwargs or {}).items()})


def _operator(name: str) -> Callable[..., Any]:
    """Python looks operators up in the class, not by ``__getattr__``."""
    return lambda self, *others: getattr(self.tensor(), name)(*others)


for _names in (
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul",
    "neg pos abs bool",
    "lt le gt ge eq ne",
):
    for _name in _names.split():
        setattr(LazySimilarity, f"__{_name}__", _operator(f"__{_name}__"))


def _is_arange(index: Any, length: int) -> bool:
    return (
        isinstance(index, Tensor)
        and index.shape == (length,)
        and index.dtype in (torch.int64, torch.int32)
        and torch.equal(index.cpu(), torch.arange(length, dtype=index.dtype, device="cpu"))
    )


def patch_fnac_avl(model_class: type, *, backend: str | None = None) -> type:
    """Replace ``calculate_loss`` of the official ``FNAC`` class by the fused loss; returns the class.

    ``patch_fnac_avl(FNAC)`` is the one line a training script needs. The class's own ``tau`` and ``high_conf_thresh``
    are read at each call, results and their order are the official ones, and ``Slogits`` is never built unless the
    caller uses it otherwise than by indexing the matched pairs or asking for its shape.

    Raises:
        TypeError: ``model_class`` is not a class with a ``calculate_loss`` method.
    """
    if not (isinstance(model_class, type) and callable(getattr(model_class, "calculate_loss", None))):
        raise TypeError(f"model_class is {model_class!r}; it should be the official FNAC class, with calculate_loss")

    def calculate_loss(self: Any, img: Tensor, aud: Tensor, name: Any = None) -> tuple[list[Tensor], LazySimilarity]:
        out = fnac_loss(img, aud, self.tau, fg_threshold=self.high_conf_thresh, weights=(1, 1, 1, 1), backend=backend)
        return [out.nce, out.fns_audio, out.tne, out.fns_visual], LazySimilarity(img, aud, self.tau, out.maps)

    model_class.calculate_loss = calculate_loss  # type: ignore[attr-defined]
    return model_class
