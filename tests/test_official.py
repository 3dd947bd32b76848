"""Agreement with the official implementation: its published figures, its recorded tensors, its class patched."""

from __future__ import annotations

import operator
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fnac_kernels as fk
from fnac_kernels import reference
from fnac_kernels.compat import LazySimilarity

# float64 figures of the official implementation (github.com/OpenNLPLab/FNAC_AVL) for inputs drawn as below:
# seed, N, C, H, W -> nce, fns_audio, tne, fns_visual
FIGURES = [
    ((0, 8, 32, 5, 4), (13.69224, 0.24709, 0.18568, 0.18976)),
    ((1, 64, 128, 7, 7), (11.19124, 0.03103, 0.03060, 0.01699)),
]
GOLDEN = Path(os.environ.get("FNAC_GOLDEN", "none"))


def official_inputs(seed, n, c, h, w):
    rng = np.random.default_rng(seed)
    img, aud = rng.standard_normal((n, c, h, w)), rng.standard_normal((n, c))
    img /= np.linalg.norm(img, axis=1, keepdims=True)
    aud /= np.linalg.norm(aud, axis=1, keepdims=True)
    return torch.from_numpy(img.astype(np.float32)), torch.from_numpy(aud.astype(np.float32))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("case", "figures"), FIGURES)
def test_the_official_figures(case, figures, backend):
    img, aud = official_inputs(*case)
    if backend == "reference":
        img, aud = img.double(), aud.double()
    out = fk.fnac_loss(img, aud, backend=backend)
    for name, figure in zip(("nce", "fns_audio", "tne", "fns_visual"), figures, strict=True):
        assert float(getattr(out, name)) == pytest.approx(figure, abs=0.6e-5, rel=1e-6), name


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=str)
def test_recorded_tensors(path):
    recorded = np.load(path)
    img, aud = (torch.from_numpy(recorded[name]) for name in ("img", "aud"))
    compare_with_recorded(recorded, img.double(), aud.double(), "reference", 1e-6)
    compare_with_recorded(recorded, img.float(), aud.float(), "cpu", 1e-4)


def compare_with_recorded(recorded, img, aud, backend, tolerance):
    img, aud = img.clone().requires_grad_(), aud.clone().requires_grad_()
    out = fk.fnac_loss(img, aud, backend=backend)
    out.loss.backward()
    found = {
        "losses": torch.stack([out.nce, out.fns_audio, out.tne, out.fns_visual]), "maps": out.maps,
        "logits": fk.max_logits(img, aud, backend=backend), "dimg": img.grad, "daud": aud.grad,
    }  # fmt: skip
    for name, value in found.items():
        wanted = torch.from_numpy(recorded[name]).double()
        error = (value.detach().double() - wanted).norm() / wanted.norm()
        assert error < tolerance, (name, float(error))


# --- patch_fnac_avl -------------------------------------------------------------------------------------------------


class Model:
    """What the patch relies on: attributes, the method's signature, what forward reads of the similarities."""

    tau, high_conf_thresh = 0.03, 0.6

    def calculate_loss(self, img, aud, name=None):
        similarity = reference.similarity_maps(img, aud, self.tau)
        out = reference.fnac_loss(img, aud, self.tau, fg_threshold=self.high_conf_thresh)
        return [out.nce, out.fns_audio, out.tne, out.fns_visual], similarity

    def forward(self, img, aud):
        loss, similarity = self.calculate_loss(img, aud, name="clip")
        with torch.no_grad():
            pairs = torch.arange(img.shape[0])
            return loss, similarity[pairs, pairs]


@pytest.fixture
def both():
    patched = fk.patch_fnac_avl(type("Patched", (Model,), {}))
    img, aud = official_inputs(0, 8, 32, 5, 4)
    return Model(), patched(), img, aud


def test_the_patched_class_gives_the_same_losses_and_gradients(both):
    plain, patched, img, aud = both
    results = []
    for model in (plain, patched):
        i, a = img.clone().requires_grad_(), aud.clone().requires_grad_()
        (nce, *distances), maps = model.forward(i, a)
        (nce + 100 * sum(distances)).backward()
        results.append([x.detach() for x in (nce, *distances, maps, i.grad, a.grad)])
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_matched_pairs_do_not_build_the_whole(both, monkeypatch):
    _, patched, img, aud = both

    def forbidden(self):
        raise AssertionError("the similarity tensor was built")

    monkeypatch.setattr(LazySimilarity, "tensor", forbidden)
    _, maps = patched.forward(img.requires_grad_(), aud)
    assert maps.shape == (8, 5, 4)
    assert not maps.requires_grad  # it was indexed under no_grad
    with pytest.raises(AssertionError, match="was built"):
        patched.calculate_loss(img, aud)[1][0, 1]


def test_any_other_use_answers_right(both):
    plain, patched, img, aud = both
    whole, lazy = plain.calculate_loss(img, aud)[1], patched.calculate_loss(img, aud)[1]
    assert lazy.shape == whole.shape
    assert len(lazy) == len(whole)
    pairs, shuffled = torch.arange(8), torch.tensor([3, 1, 2, 0, 4, 5, 6, 7])
    for index in (0, (1, 2), (pairs, shuffled), (shuffled, shuffled), (slice(None), 3), (pairs[:4], pairs[:4])):
        torch.testing.assert_close(lazy[index], whole[index], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lazy.flatten(-2, -1).max(dim=-1)[0], whole.flatten(-2, -1).max(dim=-1)[0])
    torch.testing.assert_close(F.relu(lazy), F.relu(whole), rtol=1e-5, atol=1e-5)
    for operation in (
        *(lambda x: 2 * x, lambda x: 1 - x / 2, lambda x: -x, lambda x: +(x**2)),
        *(lambda x: 2**x, lambda x: abs(x) @ x.mT),
    ):
        torch.testing.assert_close(operation(lazy), operation(whole), rtol=1e-4, atol=1e-4)
    for compare in (operator.gt, operator.le, operator.eq, operator.ne):
        assert torch.equal(compare(lazy, 0), compare(lazy.tensor(), 0))
    for operation in (operator.floordiv, operator.mod, operator.pow):  # whose steps rounding may cross
        assert torch.equal(operation(lazy, 2), operation(lazy.tensor(), 2))
        assert torch.equal(operation(2.0, lazy), operation(2.0, lazy.tensor()))
    assert hash(lazy) == hash(lazy)
    with pytest.raises(RuntimeError, match="Boolean value of Tensor"):
        bool(lazy)


def test_the_whole_is_recorded_as_the_call_was(both):
    _, patched, img, aud = both
    img = img.clone().requires_grad_()
    with torch.no_grad():
        unrecorded = patched.calculate_loss(img, aud)[1]
    recorded = patched.calculate_loss(img, aud)[1]
    assert not unrecorded[0].requires_grad
    with torch.no_grad():
        assert recorded.tensor().requires_grad
    again = patched.calculate_loss(img, aud)[1]
    with torch.inference_mode():
        assert again[0].shape == (8, 5, 4)
    again[0].sum().backward()
    assert img.grad is not None


def test_features_that_were_overwritten_are_not_read(both):
    _, patched, img, aud = both
    for changed in (img, aud):
        early, late = patched.calculate_loss(img, aud)[1], patched.calculate_loss(img, aud)[1]
        wanted = early[0].clone()
        changed.mul_(2)
        assert torch.equal(early[0], wanted)
        with pytest.raises(RuntimeError, match="img or aud was changed in place before Slogits was read"):
            late[0]
    with torch.inference_mode():
        assert patched.calculate_loss(img * 1, aud)[1][0].shape == (8, 5, 4)


def test_a_default_device_elsewhere_changes_nothing(both):
    _, patched, img, aud = both
    lazy = patched.calculate_loss(img, aud)[1]
    pairs = torch.arange(8)
    with torch.device("meta"):
        assert lazy[pairs, pairs].device.type == "cpu"


def test_only_the_official_kind_of_class_is_patched():
    for wrong in (torch.nn.Linear, Model(), None):
        with pytest.raises(TypeError, match=r"model_class is .* with calculate_loss"):
            fk.patch_fnac_avl(wrong)
