"""The encoders' names and shapes, and weights from files of several makes."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from fnac.checkpoints import read_weights, save_weights
from fnac.model import AudioVisualModel, image_encoder, load_strictly, object_maps


def official_names() -> set[str]:
    resnet = {name for name in resnet18().state_dict() if not name.startswith("fc.")}
    return {f"{net}.{name}" for net in ("imgnet", "audnet") for name in resnet} | {
        f"{projection}.{name}" for projection in ("img_proj", "aud_proj") for name in ("weight", "bias")
    }


@pytest.fixture(scope="module")
def full_model():
    return AudioVisualModel(512).eval()


def test_names_and_sizes_are_the_official_ones(full_model):
    states = full_model.state_dict()
    assert states.keys() == official_names()
    assert states["audnet.conv1.weight"].shape == (64, 1, 7, 7)
    assert states["img_proj.weight"].shape == (512, 512, 1, 1)
    assert states["aud_proj.weight"].shape == (512, 512)


@pytest.mark.parametrize(("stages", "cells"), [(4, 7), (3, 14), (2, 28)])
def test_shapes_and_norms(stages, cells):
    model = AudioVisualModel(24, image_stages=stages, audio_stages=stages).eval()
    with torch.no_grad():
        img, aud = model(torch.randn(2, 3, 224, 224), torch.randn(3, 1, 257, 66))
    assert img.shape == (2, 24, cells, cells)
    assert aud.shape == (3, 24)
    torch.testing.assert_close(img.norm(dim=1), torch.ones(2, cells, cells))
    torch.testing.assert_close(aud.norm(dim=1), torch.ones(3))


def official_file(path, states, *, prefix="module.", old_numpy=False):
    """A file as the official code writes it, with numpy scalars beside the weights."""
    content = {
        "model": {prefix + name: value for name, value in states.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 17,
        "best_cIoU": np.float64(0.395),
        "best_Auc": np.float32(0.397),
    }
    torch.save(content, path)
    if old_numpy:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                if name.endswith("data.pkl"):
                    assert b"numpy._core.multiarray" in data
                    data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                archive.writestr(name, data)
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("old_numpy", [False, True])
def test_official_checkpoints_load(tmp_path, full_model, prefix, old_numpy):
    path = official_file(tmp_path / "best.pth", full_model.state_dict(), prefix=prefix, old_numpy=old_numpy)
    loaded = AudioVisualModel(512)
    load_strictly(loaded, read_weights(path), str(path))
    for name, value in full_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_image_encoder_from_its_own_file_and_from_a_whole_model(tmp_path, full_model):
    save_weights(full_model.imgnet.state_dict(), tmp_path / "encoder.pt")
    official_file(tmp_path / "best.pth", full_model.state_dict())
    image = torch.randn(1, 3, 64, 64)
    wanted = object_maps(full_model.imgnet, image)
    for name in ("encoder.pt", "best.pth"):
        assert torch.equal(object_maps(image_encoder(4, str(tmp_path / name)).eval(), image), wanted)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"weight": torch.zeros(1)}, "surprise": Malicious()}, "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth cannot be read as a checkpoint"):
        read_weights("bad.pth")
    assert not os.path.exists("executed")


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    (tmp_path / "text.pth").write_text("hello, not a checkpoint")  # its first letter is a pickle instruction
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"text\.pth cannot be read"):
        read_weights(tmp_path / "text.pth")
    with pytest.raises(ValueError, match=r"empty\.pth holds no weights"):
        read_weights(tmp_path / "empty.pth")
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        read_weights(tmp_path / "none.pth")


def test_weights_of_another_model_are_refused(tmp_path, full_model):
    path = official_file(tmp_path / "best.pth", full_model.state_dict())
    with pytest.raises(ValueError, match=r"best\.pth does not fit the model"):
        load_strictly(AudioVisualModel(128), read_weights(path), str(path))


@pytest.mark.parametrize("stages", [0, 5])
def test_stages_are_checked(stages):
    with pytest.raises(ValueError, match=f"image_stages must be 1, 2, 3 or 4, got {stages}"):
        AudioVisualModel(8, image_stages=stages)


def test_imagenet_weights_that_cannot_be_had_are_explained(monkeypatch):
    from torchvision.models import ResNet18_Weights

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(RuntimeError, match=r"image_weights: .* cannot be downloaded \(no route to host\)"):
        AudioVisualModel(8, image_weights="imagenet")
