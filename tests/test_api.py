"""The public API: names, choice of a backend, errors that name the argument before any kernel runs."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import fnac_kernels as fk
from fnac_kernels import _dispatch, _native

LOSSES = ["fnac_loss", "distributed_fnac_loss"]
ON_PAIRS = ["paired_maps", *LOSSES]
ON_FEATURES = ["max_logits", "similarity_maps", *ON_PAIRS]


def test_names_and_docstrings():
    for name in fk.__all__:
        assert getattr(fk, name).__doc__, name
    assert fk.FNACOutput._fields == ("loss", "nce", "fns_audio", "tne", "fns_visual", "maps")
    signature = inspect.signature(fk.fnac_loss)
    defaults = {name: p.default for name, p in signature.parameters.items() if p.default is not p.empty}
    assert defaults == {
        "tau": 0.03, "fg_threshold": 0.6, "weights": (1, 100, 100, 100), "adjacency_threshold": None, "backend": None,
    }  # fmt: skip
    for name in (*ON_FEATURES, "foreground_pool", "adjacency_contrastive"):
        assert inspect.signature(getattr(fk, name)).parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_import_is_not_that_of_the_compiler():
    """It takes two seconds, and a process that compiles nothing does without."""
    code = "import sys, fnac_kernels; print([name for name in sys.modules if name.startswith('torch._dynamo')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- errors ---------------------------------------------------------------------------------------------------------

IMG, AUD, MAPS = torch.randn(4, 8, 3, 3), torch.randn(4, 8), torch.randn(4, 3, 3)
SQUARE = torch.randn(4, 4)

FEATURE_ERRORS = [
    (("text", AUD), TypeError, r"img is a str; it should be a torch\.Tensor of shape \(N, C, H, W\)"),
    ((IMG, None), TypeError, r"aud is a NoneType"),
    ((IMG, AUD.to_sparse()), TypeError, r"aud is a tensor of layout torch\.sparse_coo; it should be dense"),
    ((torch.nested.as_nested_tensor([AUD, AUD]), AUD), TypeError, "img is a nested tensor; it should be dense"),
    ((IMG[0], AUD), ValueError, r"img has shape \(8, 3, 3\); it should be \(N, C, H, W\)"),
    ((IMG, AUD[:, :, None]), ValueError, r"aud has shape \(4, 8, 1\); it should be \(M, C\)"),
    ((IMG.long(), AUD), TypeError, r"img is torch\.int64; it should be float32, bfloat16, float16 or float64"),
    ((IMG, AUD.half()), TypeError, r"aud is torch\.float16, img is torch\.float32; they should have one dtype"),
    ((IMG, AUD[:, :5]), ValueError, r"aud has 5 channels, img has 8; they should be equal"),
    ((IMG[:0], AUD), ValueError, r"img has shape \(0, 8, 3, 3\), which is empty"),
    ((IMG, AUD[:0]), ValueError, r"aud has shape \(0, 8\), which is empty"),
    ((IMG.to("meta"), AUD), ValueError, r"aud is on cpu, img on meta; they should be on one device"),
    ((torch.zeros(1, 1, 256, 256), torch.zeros(1, 1)), ValueError, r"256 x 256 = 65536 cells; at most 65535"),
]
TAU_ERRORS = [
    (0.0, ValueError, "tau is 0.0; it should be positive"),
    (-1, ValueError, "tau is -1.0; it should be positive"),
    (float("nan"), ValueError, "tau is nan; it should be finite"),
    (10**400, ValueError, "tau is inf; it should be finite"),
    (torch.tensor(0.1), TypeError, "tau is a tensor; it should be a Python number"),
    ("0.1", TypeError, "tau is '0.1'; it should be a number"),
]


@pytest.fixture
def _no_kernel(monkeypatch):
    """Any use of a backend fails."""

    def forbidden(*_):
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(_dispatch.Backend, "load", forbidden)


@pytest.mark.usefixtures("_no_kernel")
@pytest.mark.parametrize("name", ON_FEATURES)
@pytest.mark.parametrize(("features", "error", "message"), FEATURE_ERRORS)
def test_bad_features_are_named(name, features, error, message):
    with pytest.raises(error, match=message):
        getattr(fk, name)(*features)


@pytest.mark.usefixtures("_no_kernel")
@pytest.mark.parametrize("name", ON_FEATURES)
@pytest.mark.parametrize(("tau", "error", "message"), TAU_ERRORS)
def test_bad_temperatures_are_named(name, tau, error, message):
    with pytest.raises(error, match=message):
        getattr(fk, name)(IMG, AUD, tau)


def test_numbers_may_be_numpys():
    wanted = fk.fnac_loss(IMG, AUD, 0.5, weights=(1, 2, 3, 4)).loss
    assert torch.equal(fk.fnac_loss(IMG, AUD, np.float32(0.5), weights=tuple(np.arange(1, 5))).loss, wanted)


@pytest.mark.usefixtures("_no_kernel")
@pytest.mark.parametrize("name", ON_PAIRS)
def test_pairing_needs_equal_counts(name):
    with pytest.raises(ValueError, match=r"aud has 3 rows, img has 4; .* N should equal M"):
        getattr(fk, name)(IMG, AUD[:3])


@pytest.mark.usefixtures("_no_kernel")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fk.fnac_loss(IMG, AUD, weights=(1, 2)), ValueError, r"weights is \(1, 2\); it should be four numbers"),
        (lambda: fk.fnac_loss(IMG, AUD, weights=(1, 2, "x", 0)), TypeError, r"weights\[2\] is 'x'"),
        (lambda: fk.fnac_loss(IMG, AUD, fg_threshold=None), TypeError, "fg_threshold is None; it should be a number"),
        (lambda: fk.fnac_loss(IMG, AUD, adjacency_threshold="0.5"), TypeError, "adjacency_threshold is '0.5'"),
        (
            lambda: fk.fnac_loss(IMG, AUD, backend="gpu"),
            ValueError,
            "backend is 'gpu'; it should be one of 'reference'",
        ),
        (lambda: fk.foreground_pool(IMG, MAPS[:3]), ValueError, r"maps has shape \(3, 3, 3\); it should be img's"),
        (lambda: fk.foreground_pool(IMG, MAPS, "high"), TypeError, "threshold is 'high'"),
        (lambda: fk.foreground_pool(IMG[0], MAPS), ValueError, r"img has shape \(8, 3, 3\)"),
        (lambda: fk.adjacency_contrastive(SQUARE[:3], AUD, AUD, AUD), ValueError, r"logits has shape \(3, 4\)"),
        (lambda: fk.adjacency_contrastive(SQUARE, AUD, AUD[:3], AUD), ValueError, r"img_avg has shape \(3, 8\)"),
        (lambda: fk.adjacency_contrastive(SQUARE, AUD, AUD, AUD[:, :2]), ValueError, r"foreground has shape \(4, 2\)"),
    ],
)
def test_other_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- choice of a backend --------------------------------------------------------------------------------------------


def test_an_order_is_never_replaced_by_another_backend(monkeypatch):
    broken = _dispatch.Backend("cpu", "fnac_kernels.backends.cpu", "cpu", lambda: "it was left out; rebuild it")
    monkeypatch.setitem(_dispatch.BACKENDS, "cpu", broken)
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available: it was left out; rebuild it"):
        fk.fnac_loss(IMG, AUD, backend="cpu")
    with pytest.raises(RuntimeError, match="left out"):
        fk.use_backend("cpu")
    monkeypatch.setattr(_dispatch, "_FROM_ENVIRONMENT", "cpu")
    with pytest.raises(RuntimeError, match="left out"):
        fk.fnac_loss(IMG, AUD)


def test_the_automatic_choice_falls_back_with_one_warning(monkeypatch):
    broken = _dispatch.Backend("cpu", "fnac_kernels.backends.cpu", "cpu", lambda: "it was left out")
    monkeypatch.setitem(_dispatch.BACKENDS, "cpu", broken)
    monkeypatch.setattr(_dispatch, "_FROM_ENVIRONMENT", None)
    _dispatch._warn_reference.cache_clear()
    with pytest.warns(UserWarning, match="plain PyTorch on cpu tensors: .*cpu: it was left out") as caught:
        first, _ = [fk.max_logits(IMG, AUD) for _ in range(2)]
    assert len(caught) == 1
    assert torch.equal(first, fk.max_logits(IMG, AUD, backend="reference"))
    _dispatch._warn_reference.cache_clear()


def spy(monkeypatch):
    used = []
    select = _dispatch.select

    def noting(*args):
        used.append(select(*args))
        return used[-1]

    monkeypatch.setattr(_dispatch, "select", noting)
    return used


def test_meta_tensors_have_shapes_gradients_and_no_autocast():
    img, aud = torch.empty(5, 8, 3, 4, device="meta", requires_grad=True), torch.empty(5, 8, device="meta")
    _dispatch._warn_reference.cache_clear()
    with pytest.warns(UserWarning, match="plain PyTorch on meta tensors"):
        out = fk.fnac_loss(img, aud)
    out.loss.backward()
    assert img.grad.shape == img.shape
    shapes = {
        out.maps: (5, 3, 4),
        fk.max_logits(img, aud[:3]): (5, 3),
        fk.paired_maps(img, aud): (5, 3, 4),
        fk.similarity_maps(img, aud[:3]): (5, 3, 3, 4),
        fk.foreground_pool(img, out.maps): (5, 8),
        fk.adjacency_contrastive(fk.max_logits(img, aud), aud, aud, aud).nce: (),
    }
    assert all((x.device.type, x.shape) == ("meta", shape) for x, shape in shapes.items())


def test_argument_before_block_before_environment(monkeypatch):
    used = spy(monkeypatch)
    monkeypatch.setattr(_dispatch, "_FROM_ENVIRONMENT", "reference")
    fk.max_logits(IMG, AUD)
    with fk.use_backend("cpu"):
        fk.max_logits(IMG, AUD)
        with fk.use_backend("reference"):
            fk.max_logits(IMG, AUD)
            fk.max_logits(IMG, AUD, backend="cpu")
        fk.max_logits(IMG, AUD)
    fk.max_logits(IMG, AUD)
    monkeypatch.setattr(_dispatch, "_FROM_ENVIRONMENT", "tpu")
    with pytest.raises(ValueError, match="FNAC_BACKEND is 'tpu'"):
        fk.max_logits(IMG, AUD)
    assert used == ["reference", "cpu", "reference", "cpu", "cpu", "reference"]


def test_an_order_that_is_kept_holds_in_each_block(monkeypatch):
    used = spy(monkeypatch)
    monkeypatch.setattr(_dispatch, "_FROM_ENVIRONMENT", None)
    by_reference = fk.use_backend("reference")
    for _ in range(2):
        with by_reference:
            fk.max_logits(IMG, AUD)
        fk.max_logits(IMG, AUD)
    assert used == ["reference", "cpu"] * 2


def test_float64_runs_on_the_reference(monkeypatch):
    used = spy(monkeypatch)
    monkeypatch.setattr(_dispatch, "_FROM_ENVIRONMENT", None)
    out = fk.fnac_loss(IMG.double(), AUD.double())
    assert out.loss.dtype == torch.float64
    assert used == ["reference"]
    with pytest.raises(TypeError, match="backend 'cpu' takes float32, bfloat16 and float16, the tensors are float64"):
        fk.fnac_loss(IMG.double(), AUD.double(), backend="cpu")


@pytest.mark.skipif(_dispatch.BACKENDS["triton"].problem is None, reason="Triton is usable here")
def test_gpu_backends_say_why_they_are_not_usable():
    with pytest.raises(RuntimeError, match=r"backend 'triton' is not available: "):
        fk.fnac_loss(IMG, AUD, backend="triton")


OLD_TRITON = """
import torch, triton
from fnac_kernels import _dispatch
triton.__version__, torch.cuda.is_available = "3.2.0", lambda: True
print(_dispatch.BACKENDS["triton"].problem)
"""


@pytest.mark.parametrize(("interpret", "problem"), [("0", "triton 3.2.0 cannot compile the kernels"), ("1", "None")])
def test_a_triton_that_would_end_the_process_is_not_usable_but_in_its_interpreter(interpret, problem, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    printed = subprocess.run([sys.executable, "-c", OLD_TRITON], capture_output=True, text=True, check=True).stdout
    assert problem in printed


def test_a_missing_compiled_module_is_explained(monkeypatch):
    monkeypatch.setattr(_native, "_load", lambda: (None, "the compiled module is missing"))
    assert "missing" in _native.problem()
    with pytest.raises(RuntimeError, match="missing"):
        _native.module()


class Compiled:
    """Stands for the CUDA part of the compiled module, with one device that it cannot run on."""

    NOT_SERVED = "CUDA device 0 is sm_75, this build has sm_80; rebuild for it: CMAKE_CUDA_ARCHITECTURES=75 pip install"

    def __init__(self, *served: int) -> None:
        self.served = served

    def problem(self, device: int) -> str:
        return "" if device in self.served else self.NOT_SERVED

    def architectures(self) -> list[str]:
        return ["sm_80"]


@pytest.fixture
def _two_devices(monkeypatch):
    monkeypatch.delenv(_native.CUDA_EMULATION, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"chip {device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7 + device, 5))


@pytest.mark.usefixtures("_two_devices")
def test_a_device_that_the_build_does_not_serve_is_explained_unless_another_one_is(monkeypatch):
    monkeypatch.setattr(_native, "_load_cuda", lambda: (Compiled(), None))
    assert _native.cuda_problem() == Compiled.NOT_SERVED
    assert _native.cuda_features()["devices"] == ["chip 0 (sm_75, not served)", "chip 1 (sm_85, not served)"]
    monkeypatch.setattr(_native, "_load_cuda", lambda: (Compiled(1), None))
    assert _native.cuda_problem() is None
    assert _native.cuda_features()["devices"] == ["chip 0 (sm_75, not served)", "chip 1 (sm_85, served)"]


@pytest.mark.usefixtures("_two_devices")
def test_why_cuda_is_not_usable(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_native, "_load_cuda", lambda: (Compiled(1), None))
    assert _native.cuda_problem() == "torch sees no CUDA device"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _native.cuda_problem() == "this torch was built without CUDA"
    monkeypatch.undo()
    monkeypatch.delenv(_native.CUDA_EMULATION, raising=False)
    monkeypatch.setattr(_native, "_load", lambda: (types.SimpleNamespace(cuda_left_out="FNAC_CUDA was off"), None))
    monkeypatch.setattr(_native, "_load_cuda", _native._load_cuda.__wrapped__)  # not remembered
    assert _native.cuda_problem() == "the compiled module was built without CUDA: FNAC_CUDA was off"
    with pytest.raises(RuntimeError, match="built without CUDA: FNAC_CUDA was off"):
        _native.cuda()


@pytest.mark.parametrize(("name", "cause"), [("missing.so", "cannot open"), ("notes.txt", "not the name of a")])
def test_an_emulation_that_does_not_load_is_explained(tmp_path, name, cause):
    path = str(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", "import torch, fnac_kernels as fk; fk.use_backend('cuda')"],
        env=os.environ | {_native.CUDA_EMULATION: path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"backend 'cuda' is not available: FNAC_CUDA_EMULATION is {path!r}, which does not load: " in done.stderr
    assert cause in done.stderr


def test_an_emulated_backend_takes_cpu_tensors_and_is_never_chosen_by_itself(monkeypatch):
    emulated = _dispatch.Backend("cuda", "fnac_kernels.backends.cpu", "cuda", lambda: None, "SOME_VARIABLE")
    monkeypatch.setitem(_dispatch.BACKENDS, "cuda", emulated)
    monkeypatch.delenv("SOME_VARIABLE", raising=False)
    assert emulated.takes == "cuda"
    for off in ("0", "False", "off"):
        monkeypatch.setenv("SOME_VARIABLE", off)
        assert emulated.takes == "cuda"
    monkeypatch.setenv("SOME_VARIABLE", "/a/module.so")
    assert emulated.takes == "cpu"
    assert _dispatch.select("cuda", "cpu", torch.float32) == "cuda"
    with pytest.raises(ValueError, match="backend 'cuda' takes tensors on cpu, these are on cuda"):
        _dispatch.select("cuda", "cuda", torch.float32)
    assert _dispatch.automatic("cpu") != "cuda"
    assert _dispatch.automatic("cuda") != "cuda"


def test_a_backend_that_does_not_import_is_explained_and_not_chosen(monkeypatch):
    broken = _dispatch.Backend("cpu", "fnac_kernels.backends.of_another_version", "cpu", lambda: None)
    monkeypatch.setitem(_dispatch.BACKENDS, "cpu", broken)
    assert _dispatch.automatic("cpu") is None
    with pytest.raises(
        RuntimeError, match=r"'cpu' is not available: it does not import: ModuleNotFoundError: No module"
    ):
        fk.use_backend("cpu")


@pytest.mark.parametrize(("capability", "first"), [((9, 0), "cuda"), ((8, 0), "triton"), ((10, 0), "triton")])
def test_on_hopper_cuda_comes_first_and_elsewhere_triton(monkeypatch, capability, first):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert _dispatch.preference.__wrapped__("cuda")[0] == first
    assert sorted(_dispatch.preference.__wrapped__("cuda")) == ["cuda", "triton"]


# --- info -----------------------------------------------------------------------------------------------------------


def test_info_and_its_command():
    facts = fk.info()
    assert facts["backends"]["reference"] is None
    assert facts["automatic"]["cpu"] == "cpu"
    printed = subprocess.run([sys.executable, "-m", "fnac_kernels"], capture_output=True, text=True, check=True).stdout
    for word in (torch.__version__, facts["cpu"]["instruction_set"], "backend reference", "cpu tensors run on cpu"):
        assert word in printed
    for name, problem in facts["backends"].items():
        assert f"backend {name}" in printed
        assert problem is None or problem in printed


@pytest.mark.parametrize(("name", "said"), [("reference", "reference"), ("gpu", "FNAC_BACKEND is 'gpu'; it should be")])
def test_info_names_an_order(name, said):
    env = os.environ | {"FNAC_BACKEND": name}
    done = subprocess.run([sys.executable, "-m", "fnac_kernels"], env=env, capture_output=True, text=True, check=True)
    assert f"ordered instead: {said}" in done.stdout


# --- FNACLoss -------------------------------------------------------------------------------------------------------


def test_module_equals_function_and_weights_change_between_steps():
    loss = fk.FNACLoss(0.07, fg_threshold=0.5, weights=(1, 0, 0, 0), adjacency_threshold=0.9)
    first = loss(IMG, AUD)
    assert first.fns_audio == first.tne == first.fns_visual == 0
    loss.weights = (1, 2, 3, 4)
    expected = fk.fnac_loss(IMG, AUD, 0.07, fg_threshold=0.5, weights=(1, 2, 3, 4), adjacency_threshold=0.9)
    for got, wanted in zip(loss(IMG, AUD), expected, strict=True):
        assert torch.equal(got, wanted)
    assert not list(loss.parameters())
    assert not loss.state_dict()
    assert "tau=0.07" in repr(loss)
    for clone in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(clone(IMG, AUD).loss, expected.loss)


@pytest.mark.parametrize("settings", [{"tau": 0}, {"weights": (1,)}, {"fg_threshold": "x"}, {"backend": "gpu"}])
def test_module_checks_its_settings(settings):
    (name,) = settings
    with pytest.raises((ValueError, TypeError), match=name):
        fk.FNACLoss(**settings)
    loss = fk.FNACLoss()
    with pytest.raises(ValueError, match="weights"):
        loss.weights = (1, 2, 3)
