"""START HERE: the public functions. Each checks its arguments, chooses a backend, and calls one operator.

Common to all: ``img`` is the image feature map ``(N, C, H, W)``, contiguous or channels_last, ``aud`` the audio
embedding ``(M, C)``, both usually L2-normalised over C by the caller (nothing here needs that). Both are float32,
bfloat16 or float16 (float64 runs on the reference). Results are float32 (float64 for float64), gradients have their
input's dtype. Under autocast the features are rounded to the autocast dtype first, as ``einsum`` would cast them.
Of a float32 ``img``, ``cpu`` rounds what it multiplies in bfloat16 and nothing else.

``backend``: None takes what ``use_backend`` or ``FNAC_BACKEND`` orders, else chooses by device (CPU tensors: ``cpu``;
CUDA tensors: ``triton``, then ``cuda``, on Hopper ``cuda`` first; ``reference`` where none is usable); a name is an
order, never falls back, and says why it cannot be followed.

Bad arguments raise ValueError or TypeError that name the argument, before any kernel runs. NaN and inf propagate as
they do in plain PyTorch, except that a gradient that reads the chosen cells alone is finite where only others are not;
one-hot products (of ``triton``, and of ``cuda`` on Hopper) multiply the others by 0, as PyTorch does. Gradients of a
distance that is NaN may be NaN where PyTorch, whose sign of NaN is 0, has numbers.
Second derivatives, and derivatives in forward mode, exist on ``backend="reference"`` only, and not of
:func:`distributed_fnac_loss`. ``torch.func`` takes first ones in reverse mode (``grad``, ``vjp``, ``jacrev``) of all
functions but that one. Under ``torch.compile`` each other ``tau`` or ``weights`` compiles anew.

Source of every formula: arXiv 2303.11302; :mod:`fnac_kernels.reference` spells them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fnac_kernels import _dispatch, _distributed, _ops, _validate, reference
from fnac_kernels.reference import FNACOutput, Terms

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Backends that round a float32 feature map to the products' dtype while they read it: a cast of the map before would
#: cost more than the products, and its gradient another one.
_ROUNDS_ITSELF = ("cpu",)
_CPU = torch.device("cpu")


@_dispatch.constant_when_compiled
def _has_autocast(device: str) -> bool:
    """Whether PyTorch has autocast for a kind of device: it has none for meta tensors, say."""
    return torch.amp.is_autocast_available(device)


def _autocast_dtype(img: Tensor, aud: Tensor) -> torch.dtype | None:
    """What autocast rounds these features to; None where it leaves them alone."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device = img.device.type
    if torch.float64 in (img.dtype, aud.dtype) or not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _autocast(backend: str, img: Tensor, aud: Tensor) -> tuple[Tensor, Tensor]:
    """The features in the dtype that autocast asks for on their device; unchanged outside autocast.

    Float32 maps stay as they are for a backend that rounds them itself: the embeddings' dtype tells it what to.

    Raises:
        TypeError: autocast leaves them as they are, and their dtypes differ.
    """
    dtype = _autocast_dtype(img, aud)
    if dtype is None:
        _validate.one_dtype(aud, "aud", img, "img")
        return img, aud
    keeps = backend in _ROUNDS_ITSELF and img.dtype == torch.float32
    return img if keeps else img.to(dtype), aud.to(dtype)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    device = x.device.type
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()


def _backend(requested: str | None, x: Tensor) -> str:
    # What makes the string of device.type takes as long as the rest of the choice.
    device = "cuda" if x.is_cuda else "cpu" if x.device == _CPU else x.device.type
    return _dispatch.select(_dispatch.requested(requested), device, x.dtype)


def fnac_loss(
    img: Tensor,
    aud: Tensor,
    tau: float = 0.03,
    *,
    fg_threshold: float = 0.6,
    weights: Sequence[float] = (1, 100, 100, 100),
    adjacency_threshold: float | None = None,
    backend: str | None = None,
) -> FNACOutput:
    """The FNAC loss of a batch of N matched pairs, without building the ``N x N x H x W`` similarity tensor.

    ``loss = weights . (nce, fns_audio, tne, fns_visual)``. ``nce`` is the sum of both InfoNCE directions over the
    max-pooled logits; the three others are mean absolute differences between row-softmaxed adjacency matrices (audio
    and logits, audio and foreground, mean image and logits). The mean divides by N*N, so the published weight 100
    belongs to a batch of 256: at another batch size the same weight weighs the terms differently.

    Args:
        img: ``(N, C, H, W)``, at most 65535 cells.
        aud: ``(N, C)``.
        tau: temperature, positive.
        fg_threshold: cells whose min-max normalised similarity exceeds it are foreground (no gradient through it).
        weights: of nce, fns_audio, tne, fns_visual. A term of weight 0 is not computed and is returned as 0.
        adjacency_threshold: pairs (n, m), n != m, whose ``aud[n] . aud[m]`` reaches it leave both InfoNCE
            denominators (hard false-negative masking). None is the published method.
        backend: see the module's docstring.

    Returns:
        FNACOutput of scalars ``loss, nce, fns_audio, tne, fns_visual`` and ``maps (N, H, W)``, the similarity of each
        matched pair divided by tau. All are differentiable, but for terms of weight 0, whose gradient is 0 (from
        ``reference`` they are constants).

    Raises:
        ValueError, TypeError: an argument is not as described here.
        RuntimeError: the requested backend is not usable.
    """
    _validate.features(img, aud, paired=True)
    tau, fg_threshold, weights, adjacency_threshold = _validate.settings(
        tau, fg_threshold, weights, adjacency_threshold
    )
    name = _backend(backend, img)
    img, aud = _autocast(name, img, aud)
    if name == _dispatch.REFERENCE:
        with _without_autocast(img):
            return reference.fnac_loss(
                img,
                aud,
                tau,
                fg_threshold=fg_threshold,
                weights=weights,
                adjacency_threshold=adjacency_threshold,
            )
    return FNACOutput(*_ops.fnac_loss(img, aud, tau, fg_threshold, weights, adjacency_threshold, name))


@torch._disable_dynamo  # torch.compiler.disable would import the compiler at once
def distributed_fnac_loss(
    img: Tensor,
    aud: Tensor,
    tau: float = 0.03,
    *,
    fg_threshold: float = 0.6,
    weights: Sequence[float] = (1, 100, 100, 100),
    adjacency_threshold: float | None = None,
    backend: str | None = None,
    process_group: ProcessGroup | None = None,
) -> FNACOutput:
    """:func:`fnac_loss` of the N pairs that the processes of a group hold together: the sounds of all are negatives.

    Feature maps stay where they are. Processes exchange embeddings, pooled features and sums; each computes the rows
    of its own images, ``(n, N)`` logits, with the backend's kernels, and its share of the terms in plain PyTorch.
    All call it together, with at least one pair each; their numbers may differ.

    Args:
        img: ``(n, C, H, W)``, this process's share.
        aud: ``(n, C)``.
        process_group: None is the default group. Where ``torch.distributed`` is not in use, or the group is of one
            process, this is :func:`fnac_loss`.

    The other arguments are :func:`fnac_loss`'s. The weights belong to the whole batch: distances are means over N*N.

    Returns:
        FNACOutput: terms of the whole batch, the same on each process, and ``maps (n, H, W)`` of its own pairs.
        Gradients of the terms are summed over processes: if each of W calls ``loss.backward()``, its features get W
        times the gradient of the loss, and the mean over the processes that DistributedDataParallel takes of the
        parameters' gradients is the gradient of the loss.

    Raises:
        ValueError: beyond :func:`fnac_loss`'s, settings, C, dtype or ``requires_grad`` differ between processes; all of
            them raise it.

    Errors of one process alone leave the others waiting, as everywhere in ``torch.distributed``. ``torch.compile``
    leaves the call to Python. No CUDA graph can hold it: it waits for the others' numbers of pairs.
    """
    if _distributed.processes(process_group) == 1:
        return fnac_loss(
            img,
            aud,
            tau,
            fg_threshold=fg_threshold,
            weights=weights,
            adjacency_threshold=adjacency_threshold,
            backend=backend,
        )
    _validate.features(img, aud, paired=True)
    tau, fg_threshold, weights, adjacency_threshold = _validate.settings(
        tau, fg_threshold, weights, adjacency_threshold
    )
    name = _backend(backend, img)
    img, aud = _autocast(name, img, aud)
    shares = _distributed.agree(
        img,
        aud,
        process_group,
        tau=tau,
        fg_threshold=fg_threshold,
        weights=weights,
        adjacency_threshold=adjacency_threshold,
    )
    with _without_autocast(img):
        sounds = _distributed.gather(aud, shares)
        if name == _dispatch.REFERENCE:
            logits = reference.max_logits(img, sounds, tau)
            maps = reference.paired_maps(img, aud, tau)
            foreground = reference.foreground_pool(img, maps, fg_threshold)
            img_avg = img.mean(dim=(2, 3), dtype=logits.dtype)
        else:
            pooled = bool(weights[2] or weights[3])
            # Of 16 bits again, as the kernels take them with the images: nothing is lost, they were gathered as that.
            logits, maps, img_avg, foreground, *_ = _ops.pooled_features(
                img, sounds.to(aud.dtype), tau, fg_threshold, pooled, name
            )
        terms = _distributed.adjacency_contrastive(
            logits, sounds, img_avg, foreground, tau, weights, adjacency_threshold, shares
        )
        loss = reference.weighted_sum(weights, terms)
    return FNACOutput(loss, *terms, maps)


def max_logits(img: Tensor, aud: Tensor, tau: float = 0.03, *, backend: str | None = None) -> Tensor:
    """``L[n, m] = max over cells of <img[n, :, h, w], aud[m]> / tau``: logits ``(N, M)``, N and M free.

    The gradient of a logit goes to its winning cell, the first of equal ones.
    """
    _validate.features(img, aud)
    tau = _validate.temperature(tau)
    name = _backend(backend, img)
    img, aud = _autocast(name, img, aud)
    if name == _dispatch.REFERENCE:
        with _without_autocast(img):
            return reference.max_logits(img, aud, tau)
    return _ops.max_logits(img, aud, tau, name)[0]


def similarity_maps(img: Tensor, aud: Tensor, tau: float = 0.03, *, backend: str | None = None) -> Tensor:
    """``S[n, m, h, w] = <img[n, :, h, w], aud[m]> / tau``: the whole tensor ``(N, M, H, W)``, for those who want it.

    It is one matrix product and nothing else, so every backend leaves it to PyTorch's GEMM.
    """
    _validate.features(img, aud)
    tau = _validate.temperature(tau)
    _backend(backend, img)  # an order that cannot be followed is an error here too
    img, aud = _autocast(_dispatch.REFERENCE, img, aud)
    with _without_autocast(img):
        return reference.similarity_maps(img, aud, tau)


def paired_maps(img: Tensor, aud: Tensor, tau: float = 0.03, *, backend: str | None = None) -> Tensor:
    """``maps[n] = <img[n, :, h, w], aud[n]> / tau``: the localization map of each matched pair, ``(N, H, W)``."""
    _validate.features(img, aud, paired=True)
    tau = _validate.temperature(tau)
    name = _backend(backend, img)
    img, aud = _autocast(name, img, aud)
    if name == _dispatch.REFERENCE:
        with _without_autocast(img):
            return reference.paired_maps(img, aud, tau)
    return _ops.pool_pairs(img, aud, tau, 0.0, False, name)[0]


def foreground_pool(img: Tensor, maps: Tensor, threshold: float = 0.6, *, backend: str | None = None) -> Tensor:
    """Mean over *all* H*W cells of ``img * [minmax(maps) > threshold]``: foreground features ``(N, C)``.

    ``minmax(x) = (x - min) / (max - min + 1e-5)`` per map. ``maps`` is ``(N, H, W)`` of any floating dtype and gets no
    gradient.
    """
    _validate.tensor(img, "img", 4, "(N, C, H, W)")
    _validate.cells(*img.shape[2:])
    _validate.tensor(maps, "maps", 3, "(N, H, W)")
    _validate.one_device(maps, "maps", img, "img")
    _validate.shape(maps, "maps", (img.shape[0], *img.shape[2:]), "img's (N, H, W)")
    threshold = _validate.number(threshold, "threshold")
    name = _backend(backend, img)
    img, _ = _autocast(name, img, img)
    if name == _dispatch.REFERENCE:
        with _without_autocast(img):
            return reference.foreground_pool(img, maps, threshold)
    return _ops.foreground_pool(img, maps.detach(), threshold, name)[0]


def adjacency_contrastive(
    logits: Tensor,
    aud: Tensor,
    img_avg: Tensor,
    foreground: Tensor,
    tau: float = 0.03,
    *,
    weights: Sequence[float] = (1, 1, 1, 1),
    adjacency_threshold: float | None = None,
    backend: str | None = None,
) -> Terms:
    """The four terms of :func:`fnac_loss` from the pooled quantities.

    Args:
        logits: ``(N, N)``, from :func:`max_logits`.
        aud, img_avg, foreground: ``(N, C)``: audio embeddings, mean image features, foreground features.
        tau: temperature of the adjacency matrices (the logits carry theirs already).
        weights: only whether each is 0 matters here: that term is not computed and is returned as 0.
        adjacency_threshold, backend: as in :func:`fnac_loss`.
    """
    _validate.tensor(logits, "logits", 2, "(N, N)")
    n = logits.shape[0]
    _validate.shape(logits, "logits", (n, n), "(N, N)")
    for x, label in ((aud, "aud"), (img_avg, "img_avg"), (foreground, "foreground")):
        _validate.tensor(x, label, 2, "(N, C)")
        _validate.one_device(x, label, logits, "logits")
        _validate.shape(x, label, (n, aud.shape[1]), "(N, C)")
    tau = _validate.temperature(tau)
    weights = _validate.weights(weights)
    adjacency_threshold = _validate.optional_number(adjacency_threshold, "adjacency_threshold")
    wide = any(x.dtype == torch.float64 for x in (logits, aud, img_avg, foreground))
    name = _dispatch.select(_dispatch.requested(backend), logits.device.type, torch.float64 if wide else torch.float32)
    if not wide:
        aud = aud.to(_autocast_dtype(logits, aud) or aud.dtype)  # the one of them that is given, not computed
    if name == _dispatch.REFERENCE:
        with _without_autocast(logits):
            if wide:
                logits, aud, img_avg, foreground = (x.double() for x in (logits, aud, img_avg, foreground))
            return reference.adjacency_contrastive(
                logits, aud, img_avg, foreground, tau, weights=weights, adjacency_threshold=adjacency_threshold
            )
    _, terms, *_ = _ops.adjacency_contrastive(logits, aud, img_avg, foreground, tau, weights, adjacency_threshold, name)
    return Terms(*_ops.scalars(terms))
