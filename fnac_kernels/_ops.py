"""Operator schemas, fake kernels, autograd formulas, and how an operator is called; nothing else.

Each operator takes the name of its backend, looks the primitives up in ``_dispatch`` and composes them. The
differentiable operators have explicit backward operators, so ``torch.compile`` sees both directions as opaque calls.
``fnac_loss`` is an operator of its own so that all gradients of the image features meet in one write.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from fnac_kernels import _dispatch

#: Columns of ``row_stats``, of backends that have no ``row_stats_columns``.
ROW_STATS = 16

_lib = torch.library.Library("fnac_kernels", "DEF")

#: Dispatch keys under which a call of an operator is its autograd formula and its kernel and nothing else.
_PLAIN_KEYS = [
    "ADInplaceOrView",
    "BackendSelect",
    *(f"{key}{x}" for key in ("", "Autograd", "Autocast") for x in ("CPU", "CUDA")),
]
_PLAIN = functools.reduce(
    operator.or_, (torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[key]).raw_repr() for key in _PLAIN_KEYS)
)


def _plain(tensors: list[Tensor]) -> bool:
    """Whether no mode, transform, tracer, tangent or tensor subclass would see a call with these tensors."""
    if torch.compiler.is_dynamo_compiling() or forward_ad._current_level >= 0:
        return False
    keys = torch._C._dispatch_tls_local_include_set().raw_repr()
    for x in tensors:
        keys |= torch._C._dispatch_keys(x).raw_repr()
    return not keys & ~_PLAIN and not has_torch_function(tensors)


def _no_forward_mode(*_: Any) -> Any:
    raise NotImplementedError(
        "fnac_kernels' compiled backends have no derivatives in forward mode; use backend='reference' where you need "
        "them"
    )


def _no_tangents(tensors: list[Tensor]) -> None:
    """An operator in Python that has no derivative in forward mode would drop tangents without a word."""
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        _no_forward_mode()


def _recorded(tensors: list[Tensor]) -> bool:
    """Whether autograd wants to know of a call with these tensors."""
    return torch.is_grad_enabled() and bool([x for x in tensors if x.requires_grad])


def _function(name: str, run: Any, setup_context: Any, results: Any, backward: Any) -> Any:
    """``results(*run(*args))`` and its backward for autograd."""

    def forward(ctx: Any, *args: Any) -> Any:
        outputs = run(*args)
        if setup_context is not None:
            setup_context(ctx, args, outputs)
        return _no_views(results(*outputs))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


def _transformable(name: str, run: Any, setup_context: Any, backward: Any) -> Any:
    """``run`` and its backward for autograd as ``torch.func`` wants it: the context is set up apart from the run."""
    methods = {
        "forward": lambda *args: _no_views(run(*args)),
        "setup_context": setup_context or (lambda ctx, inputs, output: None),
        "backward": backward,
        "jvp": _no_forward_mode,
    }
    static = {key: staticmethod(method) for key, method in methods.items()}
    return type(name, (torch.autograd.Function,), {**static, "generate_vmap_rule": True})


def scalars(terms: Tensor) -> list[Tensor]:
    """The elements of ``terms (4,)``, one by one: autograd lets nobody change one of ``unbind``'s views in place."""
    return [terms[i] for i in range(4)]


def _no_views(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each output as a tensor of its own: autograd lets nobody change in place a view that a Function made."""
    return tuple(x.data if x._is_view() else x for x in outputs)


def _all(*outputs: Tensor) -> tuple[Tensor, ...]:
    return outputs


def _first(*outputs: Tensor) -> tuple[Tensor, ...]:
    return outputs[:1]


def _define(
    schema: str,
    kernel: Any,
    fake: Any,
    backward: Any,
    setup_context: Any = None,
    *,
    given: int | None = None,
    results: Any = _all,
    direct: tuple[Any, Any, Any, Any] | None = None,
) -> Any:
    """Define a differentiable operator; returns the function that calls it.

    PyTorch's way to a kernel in Python (dispatcher, ``torch.library.register_autograd``, dispatcher) takes as long as
    the kernels of a small batch. So a call that nothing but autograd and the kernel would see does not take it.

    Args:
        given: how many of the arguments may hold tensors of the caller's; those after them hold the forward pass's.
        results: makes of the outputs what the caller gets; outputs for the backward pass alone are not among it.
        direct: kernel, ``setup_context``, ``results`` and ``backward`` of a call that does not take it, where they are
            others.
    """
    name = schema.partition("(")[0]
    _lib.define(schema)
    _lib.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fnac_kernels::{name}", fake, lib=_lib)
    op = getattr(torch.ops.fnac_kernels, name).default

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    run, *others = direct or (kernel, setup_context, results, backward)
    dispatched = _transformable(name, below_autograd, setup_context, backward)
    # Of Function.apply the part below Python: what is above it serves transforms, which see no plain call.
    record = super(torch.autograd.Function, _function(name, run, *others)).apply
    direct_results = others[1]

    def autograd(*args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        _no_tangents(tensors)
        return dispatched.apply(*args) if _recorded(tensors) else below_autograd(*args)

    _lib.impl(name, autograd, "Autograd")

    def call(*args: Any) -> Any:
        tensors = [x for x in args[:given] if isinstance(x, Tensor)]
        if _plain(tensors):
            return record(*args) if _recorded(tensors) else direct_results(*run(*args))
        # Transforms take a Function before the dispatcher has seen the call; what compiles takes the operator.
        transformed = not torch.compiler.is_dynamo_compiling() and torch._C._are_functorch_transforms_active()
        return results(*(dispatched.apply if transformed else op)(*args))

    return call


def _primitives(backend: str) -> Any:
    return _dispatch.BACKENDS[backend].load()


def _dense(img: Tensor, backend: str) -> Tensor:
    """``img`` in NCHW or channels_last memory; a copy only where its strides are neither, to what the backend reads."""
    if img.is_contiguous() or img.is_contiguous(memory_format=torch.channels_last):
        return img
    reads = torch.channels_last if _dispatch.BACKENDS[backend].channels_last else torch.contiguous_format
    return img.contiguous(memory_format=reads)


def _like_features(
    img: Tensor, aud: Tensor | None, need_img: bool, need_aud: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Fake gradients; an unwanted one is an empty tensor, because an operator cannot return None."""
    dimg = torch.empty_like(_dense(img, backend)) if need_img else img.new_empty(0)
    daud = (
        torch.empty_like(aud, memory_format=torch.contiguous_format)
        if need_aud and aud is not None
        else img.new_empty(0)
    )
    return dimg, daud


def _float(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _no_double_backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "fnac_kernels' compiled backends have no second derivative; use backend='reference' where you need one"
    )


def _wanted(ctx: Any, *positions: int) -> list[bool]:
    return [ctx.needs_input_grad[i] for i in positions]


# --- features: the one backward that serves max_logits, pool_pairs and foreground_pool ------------------------------


def _feature_backward(
    img: Tensor,
    aud: Tensor | None,
    tau: float,
    grad_logits: Tensor | None,
    argmax: Tensor | None,
    grad_maps: Tensor | None,
    mask: Tensor | None,
    grad_avg: Tensor | None,
    grad_foreground: Tensor | None,
    need_img: bool,
    need_aud: bool,
    backend: str,
    grad_aud: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    def dense(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous()

    img = _dense(img, backend)
    dimg, daud = _primitives(backend).feature_backward(
        img,
        dense(aud),
        tau,
        grad_logits=dense(grad_logits),
        argmax=argmax,
        grad_maps=dense(grad_maps),
        mask=mask,
        grad_avg=dense(grad_avg),
        grad_foreground=dense(grad_foreground),
        grad_aud=grad_aud,
        need_img=need_img,
        need_aud=need_aud and aud is not None,
    )
    return img.new_empty(0) if dimg is None else dimg, img.new_empty(0) if daud is None else daud


def _feature_backward_fake(img, aud, *args):
    return _like_features(img, aud, *args[-3:])


feature_backward = _define(
    "feature_backward(Tensor img, Tensor? aud, float tau, Tensor? grad_logits, Tensor? argmax, Tensor? grad_maps, "
    "Tensor? mask, Tensor? grad_avg, Tensor? grad_foreground, bool need_img, bool need_aud, str backend) "
    "-> (Tensor, Tensor)",
    _feature_backward,
    _feature_backward_fake,
    _no_double_backward,
)


def _call_feature_backward(
    ctx: Any,
    img: Tensor,
    aud: Tensor | None,
    need_img: bool,
    need_aud: bool,
    **grads: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    names = ("grad_logits", "argmax", "grad_maps", "mask", "grad_avg", "grad_foreground")
    dimg, daud = feature_backward(
        img, aud, ctx.tau, *(grads.get(name) for name in names), need_img, need_aud, ctx.backend
    )
    return dimg if need_img else None, daud if need_aud else None


# --- max_logits -----------------------------------------------------------------------------------------------------


def _max_logits(img: Tensor, aud: Tensor, tau: float, backend: str) -> tuple[Tensor, Tensor]:
    return _primitives(backend).max_logits(_dense(img, backend), aud.contiguous(), tau)


def _max_logits_fake(img: Tensor, aud: Tensor, tau: float, backend: str) -> tuple[Tensor, Tensor]:
    n, _, h, w = img.shape
    narrow = h * w <= 256 and _dispatch.BACKENDS[backend].narrow_argmax
    argmax = img.new_empty((n, aud.shape[0]), dtype=torch.uint8 if narrow else torch.uint16)
    return _float(img, *argmax.shape), argmax


def _max_logits_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    img, aud, ctx.tau, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(img, aud, output[1])


def _max_logits_backward(ctx: Any, grad_logits: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_logits is None:
        return None, None, None, None
    img, aud, argmax = ctx.saved_tensors
    need = _wanted(ctx, 0, 1)
    return *_call_feature_backward(ctx, img, aud, *need, grad_logits=grad_logits, argmax=argmax), None, None


max_logits = _define(
    "max_logits(Tensor img, Tensor aud, float tau, str backend) -> (Tensor, Tensor)",
    _max_logits,
    _max_logits_fake,
    _max_logits_backward,
    _max_logits_setup,
    results=_first,
)


# --- pool_pairs -----------------------------------------------------------------------------------------------------


def _pool_pairs(
    img: Tensor, aud: Tensor, tau: float, threshold: float, pooled: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _primitives(backend).pool_pairs(_dense(img, backend), aud.contiguous(), tau, threshold, pooled)


def _pool_pairs_fake(
    img: Tensor, aud: Tensor, tau: float, threshold: float, pooled: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = img.shape
    rows = n if pooled else 0
    return (
        _float(img, n, h, w),
        img.new_empty((rows, h, w), dtype=torch.bool),
        _float(img, rows, c),
        _float(img, rows, c),
    )


def _pool_pairs_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    img, aud, ctx.tau, _, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(img, aud, output[1])


def _pool_pairs_backward(
    ctx: Any, grad_maps: Tensor | None, _: Any, grad_avg: Tensor | None, grad_foreground: Tensor | None
) -> tuple[Tensor | None, ...]:
    img, aud, mask = ctx.saved_tensors
    dimg, daud = _call_feature_backward(
        ctx,
        img,
        aud,
        *_wanted(ctx, 0, 1),
        grad_maps=grad_maps,
        mask=mask if grad_foreground is not None else None,
        grad_avg=grad_avg,
        grad_foreground=grad_foreground,
    )
    return dimg, daud, None, None, None, None


pool_pairs = _define(
    "pool_pairs(Tensor img, Tensor aud, float tau, float threshold, bool pooled, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _pool_pairs,
    _pool_pairs_fake,
    _pool_pairs_backward,
    _pool_pairs_setup,
)


# --- pooled_features ------------------------------------------------------------------------------------------------


def _pooled_features(
    img: Tensor, aud: Tensor, tau: float, threshold: float, pooled: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    primitives = _primitives(backend)
    img, aud = _dense(img, backend), aud.contiguous()
    logits, argmax = primitives.max_logits(img, aud, tau)
    maps, mask, img_avg, foreground = primitives.pool_pairs(img, aud[: len(img)], tau, threshold, pooled)
    return logits, maps, img_avg, foreground, argmax, mask


def _pooled_features_fake(
    img: Tensor, aud: Tensor, tau: float, threshold: float, pooled: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits, argmax = _max_logits_fake(img, aud, tau, backend)
    maps, mask, img_avg, foreground = _pool_pairs_fake(img, aud, tau, threshold, pooled, backend)
    return logits, maps, img_avg, foreground, argmax, mask


def _pooled_features_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    img, aud, ctx.tau, _, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(img, aud, *output[4:])


def _pooled_features_backward(
    ctx: Any,
    grad_logits: Tensor | None,
    grad_maps: Tensor | None,
    grad_avg: Tensor | None,
    grad_foreground: Tensor | None,
    *_: Any,
) -> tuple[Tensor | None, ...]:
    img, aud, argmax, mask = ctx.saved_tensors
    need_img, need_aud = _wanted(ctx, 0, 1)
    dimg, daud = _call_feature_backward(
        ctx,
        img,
        aud,
        need_img,
        need_aud,
        grad_logits=grad_logits,
        argmax=argmax if grad_logits is not None else None,
        mask=mask if grad_foreground is not None else None,
        grad_avg=grad_avg,
        grad_foreground=grad_foreground,
    )
    if grad_maps is not None:  # rare, so a second pass may do it: that of the backends pairs all rows of aud
        n = len(img)
        dimg_maps, daud_maps = _call_feature_backward(ctx, img, aud[:n], need_img, need_aud, grad_maps=grad_maps)
        if dimg is not None and dimg_maps is not None:
            dimg = dimg + dimg_maps
        if daud is not None and daud_maps is not None:
            daud = torch.cat((daud[:n] + daud_maps, daud[n:]))
    return dimg, daud, None, None, None, None


pooled_features = _define(
    "pooled_features(Tensor img, Tensor aud, float tau, float threshold, bool pooled, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pooled_features,
    _pooled_features_fake,
    _pooled_features_backward,
    _pooled_features_setup,
    results=lambda *outputs: outputs[:4],
)


# --- foreground_pool ------------------------------------------------------------------------------------------------


def _foreground_pool(img: Tensor, maps: Tensor, threshold: float, backend: str) -> tuple[Tensor, Tensor]:
    if maps.dtype == torch.float64:  # of which min-max leaves digits that float32 has not
        maps = maps - maps.amin((1, 2), keepdim=True)
    return _primitives(backend).foreground_pool(_dense(img, backend), maps.float().contiguous(), threshold)


def _foreground_pool_fake(img: Tensor, maps: Tensor, threshold: float, backend: str) -> tuple[Tensor, Tensor]:
    n, c, h, w = img.shape
    return _float(img, n, c), img.new_empty((n, h, w), dtype=torch.bool)


def _foreground_pool_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    img, _, _, ctx.backend = inputs
    ctx.tau = 1.0
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(img, output[1])


def _foreground_pool_backward(ctx: Any, grad_foreground: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_foreground is None or not ctx.needs_input_grad[0]:
        return None, None, None, None
    img, mask = ctx.saved_tensors
    dimg = _call_feature_backward(ctx, img, None, True, False, mask=mask, grad_foreground=grad_foreground)[0]
    return dimg, None, None, None


foreground_pool = _define(
    "foreground_pool(Tensor img, Tensor maps, float threshold, str backend) -> (Tensor, Tensor)",
    _foreground_pool,
    _foreground_pool_fake,
    _foreground_pool_backward,
    _foreground_pool_setup,
    results=_first,
)


# --- adjacency_contrastive ------------------------------------------------------------------------------------------


def _adjacency(
    logits: Tensor,
    aud: Tensor,
    img_avg: Tensor,
    foreground: Tensor,
    tau: float,
    weights: Sequence[float],
    adjacency_threshold: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pooled = (x.float().contiguous() for x in (logits, aud, img_avg, foreground))
    return _primitives(backend).adjacency(*pooled, tau, tuple(weights), adjacency_threshold)


def _adjacency_fake(
    logits: Tensor,
    aud: Tensor,
    img_avg: Tensor,
    foreground: Tensor,
    tau: float,
    weights: Sequence[float],
    adjacency_threshold: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = logits.shape[0]
    columns = getattr(_primitives(backend), "row_stats_columns", lambda *_: ROW_STATS)(n, weights, adjacency_threshold)
    return _float(logits), _float(logits, 4), _float(logits, n, columns), _float(logits, 2, n)


def _adjacency_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, aud, img_avg, foreground, ctx.tau, ctx.weights, ctx.adjacency_threshold, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, aud, img_avg, foreground, output[2], output[3])


def _adjacency_backward(
    ctx: Any, grad_loss: Tensor | None, grad_terms: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    grads = adjacency_backward(
        grad_loss, grad_terms, *ctx.saved_tensors, ctx.tau, ctx.weights, ctx.adjacency_threshold, ctx.backend
    )
    wanted = (grad if needed else None for grad, needed in zip(grads, _wanted(ctx, 0, 1, 2, 3), strict=True))
    return *wanted, None, None, None, None


def _adjacency_backward_op(
    grad_loss: Tensor | None,
    grad_terms: Tensor | None,
    logits: Tensor,
    aud: Tensor,
    img_avg: Tensor,
    foreground: Tensor,
    row_stats: Tensor,
    col_lse: Tensor,
    tau: float,
    weights: Sequence[float],
    adjacency_threshold: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (logits, aud, img_avg, foreground)
    grads = _primitives(backend).adjacency_backward(
        grad_loss,
        None if grad_terms is None else grad_terms.contiguous(),
        *(x.float().contiguous() for x in inputs),
        row_stats,
        col_lse,
        tau,
        tuple(weights),
        adjacency_threshold,
    )
    dlogits, daud, davg, dforeground = (g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))
    return dlogits, daud, davg, dforeground


def _adjacency_backward_fake(grad_loss, grad_terms, logits, aud, img_avg, foreground, *_):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (logits, aud, img_avg, foreground))


adjacency_contrastive = _define(
    "adjacency_contrastive(Tensor logits, Tensor aud, Tensor img_avg, Tensor foreground, float tau, float[] weights, "
    "float? adjacency_threshold, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _adjacency,
    _adjacency_fake,
    _adjacency_backward,
    _adjacency_setup,
    results=lambda *outputs: outputs[:2],
)
adjacency_backward = _define(
    "adjacency_backward(Tensor? grad_loss, Tensor? grad_terms, Tensor logits, Tensor aud, Tensor img_avg, "
    "Tensor foreground, Tensor row_stats, Tensor col_lse, float tau, float[] weights, float? adjacency_threshold, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _adjacency_backward_op,
    _adjacency_backward_fake,
    _no_double_backward,
    given=6,
)


# --- fnac_loss ------------------------------------------------------------------------------------------------------


def _needs_pooled(weights: Sequence[float]) -> bool:
    """Whether a term reads the mean or the foreground feature."""
    return bool(weights[2] or weights[3])


def _fnac_loss(
    img: Tensor,
    aud: Tensor,
    tau: float,
    threshold: float,
    weights: Sequence[float],
    adjacency_threshold: float | None,
    backend: str,
) -> tuple[Tensor, ...]:
    primitives, img, aud = _primitives(backend), _dense(img, backend), aud.contiguous()
    logits, argmax = primitives.max_logits(img, aud, tau)
    maps, mask, img_avg, foreground = primitives.pool_pairs(img, aud, tau, threshold, _needs_pooled(weights))
    loss, terms, row_stats, col_lse = primitives.adjacency(
        logits, aud, img_avg, foreground, tau, tuple(weights), adjacency_threshold
    )
    return loss, terms, maps, logits, argmax, mask, img_avg, foreground, row_stats, col_lse


def _fnac_loss_fake(
    img: Tensor,
    aud: Tensor,
    tau: float,
    threshold: float,
    weights: Sequence[float],
    adjacency_threshold: float | None,
    backend: str,
) -> tuple[Tensor, ...]:
    logits, argmax = _max_logits_fake(img, aud, tau, backend)
    maps, mask, avg, foreground = _pool_pairs_fake(img, aud, tau, threshold, _needs_pooled(weights), backend)
    loss, terms, row_stats, col_lse = _adjacency_fake(
        logits, aud, avg, foreground, tau, weights, adjacency_threshold, backend
    )
    return loss, terms, maps, logits, argmax, mask, avg, foreground, row_stats, col_lse


def _fnac_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    img, aud, ctx.tau, _, ctx.weights, ctx.adjacency_threshold, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(img, aud, *output[3:])


def _fnac_loss_backward(
    ctx: Any, grad_loss: Tensor | None, grad_terms: Tensor | None, grad_maps: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    need_img, need_aud = _wanted(ctx, 0, 1)
    dimg, daud = fnac_loss_backward(
        grad_loss,
        grad_terms,
        grad_maps,
        *ctx.saved_tensors,
        ctx.tau,
        ctx.weights,
        ctx.adjacency_threshold,
        need_img,
        need_aud,
        ctx.backend,
    )
    return dimg if need_img else None, daud if need_aud else None, None, None, None, None, None


def _fnac_loss_backward_op(
    grad_loss: Tensor | None,
    grad_terms: Tensor | None,
    grad_maps: Tensor | None,
    img: Tensor,
    aud: Tensor,
    logits: Tensor,
    argmax: Tensor,
    mask: Tensor,
    img_avg: Tensor,
    foreground: Tensor,
    row_stats: Tensor,
    col_lse: Tensor,
    tau: float,
    weights: Sequence[float],
    adjacency_threshold: float | None,
    need_img: bool,
    need_aud: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dlogits = daud_adjacency = dimg_avg = dforeground = None
    if grad_loss is not None or grad_terms is not None:
        dlogits, daud_adjacency, dimg_avg, dforeground = _primitives(backend).adjacency_backward(
            grad_loss,
            None if grad_terms is None else grad_terms.contiguous(),
            logits,
            aud.contiguous(),
            img_avg,
            foreground,
            row_stats,
            col_lse,
            tau,
            tuple(weights),
            adjacency_threshold,
        )
    pooled = dforeground is not None and _needs_pooled(weights)
    return _feature_backward(
        img,
        aud,
        tau,
        dlogits,
        argmax if dlogits is not None else None,
        grad_maps,
        mask if pooled else None,
        dimg_avg if pooled else None,
        dforeground if pooled else None,
        need_img,
        need_aud,
        backend,
        daud_adjacency,
    )


def _fnac_loss_backward_fake(grad_loss, grad_terms, grad_maps, img, aud, *args):
    return _like_features(img, aud, *args[-3:])


def _direct_loss(
    img: Tensor,
    aud: Tensor,
    tau: float,
    threshold: float,
    weights: Sequence[float],
    adjacency_threshold: float | None,
    backend: str,
) -> tuple[Tensor, ...]:
    """The loss, its terms one by one, the maps, and then what the backward pass reads, in the backend's own form."""
    primitives = _primitives(backend)
    if hasattr(primitives, "loss"):
        return primitives.loss(_dense(img, backend), aud.contiguous(), tau, threshold, weights, adjacency_threshold)
    loss, terms, maps, *state = _fnac_loss(img, aud, tau, threshold, weights, adjacency_threshold, backend)
    return loss, *scalars(terms), maps, *state


def _direct_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    img, aud, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(img, aud, *output[6:])


def _direct_loss_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_loss, *of_terms, grad_maps = grads
    given = [x for x in of_terms if x is not None]
    grad_terms = torch.stack([torch.zeros_like(given[0]) if x is None else x for x in of_terms]) if given else None
    need_img, need_aud = ctx.needs_input_grad[:2]
    img, aud, *state = ctx.saved_tensors
    tau, _, weights, adjacency_threshold, backend = ctx.settings
    primitives = _primitives(backend)
    if hasattr(primitives, "loss"):
        if _plain([img, aud, *[x for x in grads if x is not None]]) and not torch.is_grad_enabled():
            dimg, daud = primitives.loss_backward(
                grad_loss,
                grad_terms,
                None if grad_maps is None else grad_maps.contiguous(),
                _dense(img, backend),
                aud.contiguous(),
                *state,
                tau,
                weights,
                adjacency_threshold,
                need_img,
                need_aud,
            )
            return dimg, daud, None, None, None, None, None
        # Whoever records or traces this gets it from the operators, which know nothing of such a state.
        with torch.no_grad():
            _, _, _, *state = torch.ops.fnac_kernels.fnac_loss(img, aud, *ctx.settings)
    dimg, daud = fnac_loss_backward(
        grad_loss,
        grad_terms,
        grad_maps,
        img,
        aud,
        *state,
        tau,
        weights,
        adjacency_threshold,
        need_img,
        need_aud,
        backend,
    )
    return dimg if need_img else None, daud if need_aud else None, None, None, None, None, None


fnac_loss = _define(
    "fnac_loss(Tensor img, Tensor aud, float tau, float threshold, float[] weights, float? adjacency_threshold, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fnac_loss,
    _fnac_loss_fake,
    _fnac_loss_backward,
    _fnac_loss_setup,
    given=2,
    results=lambda loss, terms, maps, *_: (loss, *scalars(terms), maps),
    direct=(_direct_loss, _direct_loss_setup, lambda *outputs: outputs[:6], _direct_loss_backward),
)
fnac_loss_backward = _define(
    "fnac_loss_backward(Tensor? grad_loss, Tensor? grad_terms, Tensor? grad_maps, Tensor img, Tensor aud, "
    "Tensor logits, Tensor argmax, Tensor mask, Tensor img_avg, Tensor foreground, Tensor row_stats, "
    "Tensor col_lse, float tau, float[] weights, float? adjacency_threshold, bool need_img, bool need_aud, "
    "str backend) -> (Tensor, Tensor)",
    _fnac_loss_backward_op,
    _fnac_loss_backward_fake,
    _no_double_backward,
    given=5,
)
