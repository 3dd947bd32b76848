"""How the operators behave under PyTorch's machinery: opcheck, compile, autocast, grad modes, layouts.

Every test runs on each backend that is usable here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch.utils.checkpoint
from samples import OPS, USABLE, Sample
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fnac_kernels as fk
from fnac_kernels import _dispatch, reference

kernels = torch.ops.fnac_kernels
SMALL = [
    Sample(5, 5, 12, 3, 4),
    Sample(6, 6, 16, 4, 4, layout="channels_last", kind="clustered"),
    Sample(4, 4, 8, 3, 3, dtype=torch.bfloat16),
]


@pytest.fixture(params=USABLE, autouse=True)
def backend(request):
    with fk.use_backend(request.param):
        yield request.param


def device() -> str:
    return _dispatch.BACKENDS[_dispatch.requested(None)].takes


def features(sample: Sample = SMALL[0], *, img: bool = True, aud: bool = True):
    image, audio = sample.features(device())
    return image.requires_grad_(img), audio.requires_grad_(aud)


@pytest.mark.parametrize("sample", SMALL, ids=str)
@pytest.mark.parametrize(
    "name", ["max_logits", "pool_pairs", "foreground_pool", "pooled_features", "adjacency_contrastive", "fnac_loss"]
)
def test_opcheck(name, sample, backend):
    img, aud = features(sample)
    maps = reference.paired_maps(img.detach(), aud.detach(), 0.1)
    logits = reference.max_logits(img.detach(), aud.detach(), 0.1).requires_grad_()
    pooled = [torch.randn(sample.n, sample.c, device=device(), requires_grad=True) for _ in range(2)]
    arguments = {
        "max_logits": (img, aud, 0.1, backend),
        "pool_pairs": (img, aud, 0.1, 0.6, True, backend),
        "foreground_pool": (img, maps, 0.6, backend),
        "pooled_features": (img[:3], aud, 0.1, 0.6, True, backend),
        "adjacency_contrastive": (logits, aud, *pooled, 0.1, [1.0, 2.0, 3.0, 4.0], None, backend),
        "fnac_loss": (img, aud, 0.1, 0.6, [1.0, 2.0, 3.0, 4.0], 0.5, backend),
    }
    torch.library.opcheck(getattr(kernels, name).default, arguments[name])


def step(img, aud, run):
    outputs = run(img, aud)
    total = sum(out.square().sum() for out in outputs)
    return (*outputs, *torch.autograd.grad(total, (img, aud)))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_compiled_whole_equals_eager(op, backend):
    def run(img, aud):
        return op.run(img, aud, 0.1, backend)

    if op.name in ("foreground_pool", "adjacency_contrastive"):
        pytest.skip("the table's op prepares its inputs in float64, outside of the operator; opcheck covers both")
    torch._dynamo.reset()
    img, aud = features()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(step(img, aud, compiled), step(img, aud, run), strict=True):
        assert torch.equal(got, wanted)


def test_compiled_by_inductor_with_code_around_it():
    torch._dynamo.reset()

    def run(img, aud):
        normalized = torch.nn.functional.normalize(img, dim=1)
        return fk.fnac_loss(normalized, aud * 2, 0.1, weights=(1, 10, 10, 10)).loss

    img, aud = features()
    compiled = torch.compile(run, fullgraph=True)
    for got, wanted in zip(
        torch.autograd.grad(compiled(img, aud), (img, aud)), torch.autograd.grad(run(img, aud), (img, aud)), strict=True
    ):
        torch.testing.assert_close(got, wanted)


HEAP = """
import torch, fnac_kernels as fk
for dtype, n in ((torch.float32, 6), (torch.float64, 5)):
    img, aud = torch.randn(n, 16, 3, 5, dtype=dtype), torch.randn(n, 16, dtype=dtype)
    run = lambda i, a: fk.fnac_loss(i, a, backend="reference").loss
    compiled = torch.compile(run, fullgraph=True)
    for _ in range(10):
        loss = compiled(img, aud)
    torch.testing.assert_close(loss, run(img, aud))
"""


def test_the_reference_compiled_by_inductor_leaves_the_heap_whole():
    environment = os.environ | {"MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "85"}
    done = subprocess.run([sys.executable, "-c", HEAP], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_with_settings_and_sizes_that_change(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda i, a, tau: fk.fnac_loss(i, a, tau).loss, fullgraph=True, dynamic=dynamic, backend="eager"
    )
    for tau, sample in ((0.1, SMALL[0]), (0.2, SMALL[0]), (0.2, Sample(7, 7, 12, 5, 4))):
        img, aud = features(sample)
        assert torch.equal(compiled(img, aud, tau), fk.fnac_loss(img, aud, tau).loss)


@pytest.mark.parametrize("compiled", [False, True])
def test_any_result_may_be_changed_in_place(compiled):
    torch._dynamo.reset()
    img, aud = features()

    def gradient(scale):
        out = fk.fnac_loss(img, aud, 0.1)
        for result in out:
            scale(result)
        return torch.autograd.grad(sum(result.sum() for result in out), img)[0]

    changing = torch.compile(gradient, backend="eager") if compiled else gradient
    torch.testing.assert_close(changing(lambda x: x.mul_(2)), 2 * gradient(lambda x: x))


def test_autocast_takes_features_of_different_dtypes_as_einsum_does():
    img, aud = features()
    wanted = fk.fnac_loss(img.bfloat16(), aud.bfloat16(), 0.1).loss
    with torch.autocast(device(), dtype=torch.bfloat16):
        torch.testing.assert_close(fk.fnac_loss(img.bfloat16(), aud, 0.1).loss, wanted)
        torch.testing.assert_close(fk.fnac_loss(img, aud.bfloat16(), 0.1).loss, wanted, rtol=1e-2, atol=0.0)
        with pytest.raises(TypeError, match=r"aud is torch\.float64, img is torch\.float32"):
            fk.fnac_loss(img, aud.double(), 0.1)


def test_derivatives_in_forward_mode_are_refused():
    img, aud = features(img=False, aud=False)
    with pytest.raises(NotImplementedError, match="use backend='reference'"):
        torch.func.jvp(lambda x: fk.fnac_loss(x, aud, 0.1).loss, (img,), (img,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="use backend='reference'"):
        fk.max_logits(img, forward_ad.make_dual(aud, aud), 0.1)
    with forward_ad.dual_level():  # of others' numbers
        fk.max_logits(img, aud, 0.1)


def test_autocast_multiplies_in_its_dtype_and_returns_float32():
    img, aud = features()
    with torch.autocast(device(), dtype=torch.bfloat16):
        out = fk.fnac_loss(img, aud, 0.1)
    expected = fk.fnac_loss(img.bfloat16(), aud.bfloat16(), 0.1)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-2, atol=0.0)  # a backend may round products alone
    dimg, daud = torch.autograd.grad(out.loss, (img, aud))
    assert dimg.dtype == daud.dtype == torch.float32
    by_reference = torch.autograd.grad(fk.fnac_loss(img.bfloat16(), aud.bfloat16(), 0.1, backend="reference").loss, img)
    torch.testing.assert_close(dimg, by_reference[0], rtol=2e-2, atol=2e-2 * float(dimg.abs().max()))


def test_autocast_rounds_the_sounds_of_the_terms_alone_too():
    img, aud = features()
    with torch.autocast(device(), dtype=torch.bfloat16):
        out, logits = fk.fnac_loss(img, aud, 0.1), fk.max_logits(img, aud, 0.1)
        terms = fk.adjacency_contrastive(logits, aud, aud, aud, 0.1)
    torch.testing.assert_close(terms.fns_audio, out.fns_audio)
    assert terms.fns_audio != fk.adjacency_contrastive(logits, aud, aud, aud, 0.1).fns_audio
    assert torch.autograd.grad(terms.fns_audio, aud)[0].dtype == torch.float32


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(mode):
    img, aud = features()
    with mode():
        out = fk.fnac_loss(img, aud)
    assert not any(x.requires_grad for x in out)
    assert out.loss.grad_fn is None
    assert torch.equal(out.loss, fk.fnac_loss(img, aud).loss)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "expanded", "transposed"])
def test_layouts_do_not_change_values(layout):
    img, aud = (x.detach() for x in features(Sample(6, 6, 16, 4, 5)))
    if layout == "expanded":
        img = img[:1].expand(6, -1, -1, -1)
    base_img, base_aud = img.contiguous(), aud.contiguous()
    img = {
        "contiguous": lambda x: x,
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "strided": lambda x: torch.stack((x, x), dim=-1)[..., 1],
        "expanded": lambda x: x,
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout](img)
    img, base_img = img.detach().requires_grad_(), base_img.requires_grad_()
    aud = aud.t().contiguous().t().requires_grad_()
    base_aud.requires_grad_()
    got, wanted = fk.fnac_loss(img, aud), fk.fnac_loss(base_img, base_aud)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-6, atol=0)
    for gradient, base in zip(
        torch.autograd.grad(got.loss, (img, aud)), torch.autograd.grad(wanted.loss, (base_img, base_aud)), strict=True
    ):
        torch.testing.assert_close(gradient, base, rtol=1e-4, atol=1e-5 * float(base.abs().max()))


def test_a_channels_last_gradient_is_channels_last():
    img, aud = features(SMALL[1])
    (dimg,) = torch.autograd.grad(fk.fnac_loss(img, aud).loss, img)
    assert dimg.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_gradient_for_one_input_alone(op, backend):
    both = step(*features(), lambda i, a: op.run(i, a, 0.1, backend))[-2:] if op.name != "foreground_pool" else None
    for position, wanted in (("img", 0), ("aud", 1)):
        if both is None and position == "aud":
            continue
        img, aud = features(img=position == "img", aud=position == "aud")
        outputs = op.run(img, aud, 0.1, backend)
        total = sum(out.square().sum() for out in outputs)
        (gradient,) = torch.autograd.grad(total, (img, aud)[wanted])
        assert gradient.abs().sum() > 0
        if both is not None:
            assert torch.equal(gradient, both[wanted])


@pytest.mark.parametrize("name", ["max_logits", "paired_maps", "fnac_loss"])
def test_second_derivatives_are_refused(name):
    img, aud = features()
    out = getattr(fk, name)(img, aud)
    value = out.loss if name == "fnac_loss" else out.sum()
    (first,) = torch.autograd.grad(value, img, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        first.sum().backward()


def test_a_recorded_backward_pass_is_the_same(backend):
    img, aud = features()
    out = fk.fnac_loss(img, aud, 0.1, backend=backend)
    total = out.loss + 2 * out.tne + out.maps.square().sum()
    plain, recorded = (
        torch.autograd.grad(total, (img, aud), retain_graph=True, create_graph=recorded) for recorded in (False, True)
    )
    assert all(map(torch.equal, plain, recorded))


def test_a_term_of_weight_zero_is_not_computed(monkeypatch, backend):
    img, aud = (x.detach() for x in features())
    out = fk.fnac_loss(img, aud, weights=(1, 0, 0, 0))
    assert out.loss == out.nce
    assert out.fns_audio == out.tne == out.fns_visual == 0
    primitives = _dispatch.BACKENDS[backend].load()
    asked = []
    pool_pairs = primitives.pool_pairs

    def noting(img, aud, tau, threshold, pooled):
        asked.append(pooled)
        return pool_pairs(img, aud, tau, threshold, pooled)

    monkeypatch.setattr(primitives, "pool_pairs", noting)
    for weights in ((1, 1, 0, 0), (1, 0, 1, 0)):
        torch.ops.fnac_kernels.fnac_loss(img, aud, 0.1, 0.6, weights, None, backend)
    assert asked == [False, True]


def test_maps_in_float64_are_masked_by_all_their_digits(backend):
    img, maps = torch.randn(1, 4, 2, 2), 1e9 + torch.arange(4.0, dtype=torch.float64).view(1, 2, 2)
    got, wanted = (fk.foreground_pool(img, maps, 0.5, backend=name) for name in (backend, "reference"))
    torch.testing.assert_close(got, wanted)


def test_hard_masked_pairs_leave_the_denominators():
    img, aud = (x.detach() for x in features(Sample(6, 6, 16, 4, 4, kind="clustered")))
    aud[3] = aud[0]
    masked = fk.fnac_loss(img, aud, 0.1, weights=(1, 0, 0, 0), adjacency_threshold=0.999)
    logits = reference.max_logits(img, aud, 0.1)
    keep = (aud @ aud.T < 0.999) | torch.eye(6, dtype=torch.bool, device=device())
    assert not keep.all()
    expected = torch.logsumexp(logits.masked_fill(~keep, -torch.inf), 1).mean()
    expected += torch.logsumexp(logits.masked_fill(~keep, -torch.inf), 0).mean() - 2 * logits.diagonal().mean()
    torch.testing.assert_close(masked.nce, expected)


@pytest.mark.parametrize("terms", [("nce",), ("fns_audio",), ("tne",), ("fns_visual",), ("fns_audio", "fns_visual")])
def test_terms_that_the_loss_does_not_join_have_their_gradients(terms, backend):
    img, aud = features()
    got, expected = (
        torch.autograd.grad(sum((getattr(out, name) for name in terms), out.maps[0, 0, 0]), (img, aud))
        for out in (fk.fnac_loss(img, aud, 0.1, backend=name) for name in (backend, "reference"))
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_gradients_add_up_over_outputs_and_calls():
    img, aud = features()
    first, second = fk.fnac_loss(img, aud, 0.1), fk.max_logits(img, aud, 0.1)
    together = torch.autograd.grad(first.loss + 3 * first.maps.sum() + second.sum(), img)[0]
    apart = sum(
        torch.autograd.grad(value, img)[0]
        for value in (
            fk.fnac_loss(img, aud, 0.1).loss,
            3 * fk.paired_maps(img, aud, 0.1).sum(),
            fk.max_logits(img, aud, 0.1).sum(),
        )
    )
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5 * float(apart.abs().max()))


class Noting(TorchDispatchMode):
    """Notes the operators that are called below it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class Tagged(torch.Tensor):
    """A subclass that changes nothing and notes the functions that it is given to."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def loss_and_maps(img, aud):
    out = fk.fnac_loss(img, aud, 0.1)
    return out.loss, out.maps


def equal(got, wanted) -> bool:
    return all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def test_an_ordinary_call_goes_past_the_dispatcher():
    with torch.autograd.profiler.profile() as ordinary:
        plain = step(*features(), loss_and_maps)
    names = {event.name for event in ordinary.function_events}
    assert {"fnac_loss", "fnac_lossBackward"} <= names
    assert not any(name.startswith("fnac_kernels::") for name in names)
    with Noting() as mode:
        observed = step(*features(), loss_and_maps)
    assert {"fnac_kernels::fnac_loss", "fnac_kernels::fnac_loss_backward"} <= set(mode.seen)
    assert equal(observed, plain)


def test_a_tensor_subclass_sees_the_operator():
    img, aud = (x.detach() for x in features())
    Tagged.seen.clear()
    out = fk.fnac_loss(img.as_subclass(Tagged), aud, 0.1)
    assert isinstance(out.loss, Tagged)
    assert any("fnac_kernels.fnac_loss" in name for name in Tagged.seen)
    assert torch.equal(out.loss.as_subclass(torch.Tensor), fk.fnac_loss(img, aud, 0.1).loss)


def test_a_lazily_negated_input_is_negated():
    img, aud = (x.detach() for x in features())
    negated = torch._neg_view(-img)  # what the imaginary part of a conjugated tensor is
    assert negated.is_neg()
    assert negated.is_contiguous()
    assert equal(fk.fnac_loss(negated, aud, 0.1), fk.fnac_loss(img, aud, 0.1))


def test_a_default_device_elsewhere_changes_nothing():
    img, aud = features()
    with torch.device("meta"):
        got = step(img, aud, loss_and_maps)
    assert equal(got, step(img, aud, loss_and_maps))


def test_vmap_calls_it_for_each():
    img, aud = (x.detach() for x in features())
    both = torch.func.vmap(lambda i, a: fk.fnac_loss(i, a, 0.1).loss)(
        torch.stack((img, img / 2)), torch.stack((aud, aud))
    )
    assert equal(both, (fk.fnac_loss(img, aud, 0.1).loss, fk.fnac_loss(img / 2, aud, 0.1).loss))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_transforms_take_gradients(op, backend):
    """As ``torch.func`` does, of one call and of each of several."""
    img, aud = (x.detach() for x in features())
    several = torch.stack((img, img / 2)), torch.stack((aud, aud))

    def gradients(name):
        return torch.func.grad(lambda i, a: sum(x.square().sum() for x in op.run(i, a, 0.1, name)), (0, 1))

    for transformed, inputs in ((lambda g: g, (img, aud)), (torch.func.vmap, several)):
        got, wanted = (transformed(gradients(name))(*inputs) for name in (backend, "reference"))
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (torch.func.hessian, "no derivatives in forward mode; use backend='reference'"),
        (lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sum()), "no second derivative; use backend='ref"),
    ],
)
def test_transforms_of_gradients_are_refused(transform, message):
    img, aud = (x.detach() for x in features())
    with pytest.raises((NotImplementedError, RuntimeError), match=message):
        transform(lambda a: fk.fnac_loss(img, a, 0.1).loss)(aud)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_calls_the_operator(strict):
    class Module(torch.nn.Module):
        def forward(self, img, aud):
            return fk.fnac_loss(img, aud, 0.1).loss

    img, aud = (x.detach() for x in features())
    any_batch = {0: torch.export.Dim("n")}
    program = torch.export.export(Module(), (img, aud), strict=strict, dynamic_shapes=(any_batch, any_batch))
    assert "fnac_kernels.fnac_loss" in program.graph_module.code
    img, aud = img[:-1] / 2, aud[:-1]
    assert torch.equal(program.module()(img, aud), fk.fnac_loss(img, aud, 0.1).loss)


def test_a_checkpointed_call_is_the_same():
    def checkpointed(img, aud):
        return torch.utils.checkpoint.checkpoint(loss_and_maps, img, aud, use_reentrant=False)

    assert equal(step(*features(), checkpointed), step(*features(), loss_and_maps))


def test_compiled_autograd_traces_the_backward_operator():
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        got = step(*features(), loss_and_maps)
    assert equal(got, step(*features(), loss_and_maps))
