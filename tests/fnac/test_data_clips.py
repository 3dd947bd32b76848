"""The data set's samples and the data module's batches: what is in them, what varies, what a resumed run sees."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import ExifTags, Image

from fnac.audio import LogSpectrogram, MediaError, load_audio
from fnac.data.datamodule import ClipData, generated_split, single_object_loaders
from fnac.data.dataset import Augmentation, ClipDataset, load_image
from fnac.data.generate import make_data
from fnac.data.layout import ClipFolder
from fnac.data.leakage import LeakageError

SMALL = {"image_size": 32, "sample_rate": 16_000, "clip_seconds": 0.2}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "set"
    return make_data(folder, train=14, val=5, test=3, single=12, image_size=40, seconds=0.2, workers=0, progress=False)


def dataset(root: Path, split: str = "test", **options: Any) -> ClipDataset:
    folder = generated_split(root, split)
    assert folder is not None
    return ClipDataset(folder, **SMALL | options)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def test_an_evaluation_sample_is_the_square_frame_the_spectrogram_and_the_ground_truth(root):
    clips = dataset(root)
    sample = clips[1]
    entry = json.loads((root / "test" / "annotations.json").read_text())[1]
    assert (sample["name"], sample["label"]) == (entry["file"], entry["class"])
    with Image.open(root / "test" / "frames" / f"{entry['file']}.png") as frame:
        pixels = np.asarray(frame.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(sample["image"].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    waveform, _ = load_audio(clips.audio_path(1))
    assert torch.equal(sample["audio"], LogSpectrogram(16_000)(waveform)[None])
    x1, y1, x2, y2 = (int(side * 224) for side in entry["bbox"][0])
    assert sample["gt"].shape == (224, 224)
    assert sample["gt"][y1:y2, x1:x2].min() == 1
    assert sample["gt"].sum() == (y2 - y1) * (x2 - x1)
    assert {sample[key].dtype for key in ("image", "audio", "gt")} == {torch.float32}


def test_a_training_sample_has_no_ground_truth_that_its_crop_would_belie(root):
    sample = dataset(root, "train", augmentation=Augmentation())[0]
    assert sample["image"].shape == (3, 32, 32)
    assert "gt" not in sample


def test_oblong_frames_of_other_modes_are_cropped_in_training_and_squared_in_evaluation(root, tmp_path):
    folder = shutil.copytree(root / "test", tmp_path / "test")
    for i, (mode, suffix) in enumerate((("L", "jpg"), ("P", "png"), ("RGBA", "webp"))):
        (folder / "frames" / f"test_{i:06d}.png").unlink()
        Image.new(mode, (90, 50), 128 if mode == "L" else None).save(folder / "frames" / f"test_{i:06d}.{suffix}")
    for augmentation in (None, Augmentation()):
        clips = ClipDataset(ClipFolder(str(folder)), **SMALL, augmentation=augmentation)
        assert {clips[i]["image"].shape for i in range(3)} == {(3, 32, 32)}


@pytest.mark.parametrize("high", [np.uint8, np.uint16])
def test_grey_frames_keep_their_brightness_at_any_depth(root, tmp_path, high):
    folder = shutil.copytree(root / "test", tmp_path / "test")
    pixels = np.full((40, 40), np.iinfo(high).max // 2, dtype=high)
    Image.fromarray(pixels).save(folder / "frames" / "test_000000.png")
    red = ClipDataset(ClipFolder(str(folder)), **SMALL)[0]["image"][0]
    assert red.mean() == pytest.approx((127 / 255 - 0.485) / 0.229, abs=1e-4)


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    upright = np.zeros((40, 24), dtype=np.uint8)
    upright[:20] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned a quarter, clockwise
    path = tmp_path / "photograph.jpg"
    Image.fromarray(np.rot90(upright).copy()).save(path, quality=95, exif=exif)
    read = np.asarray(load_image(path))[..., 0]
    assert read.shape == upright.shape
    assert np.abs(read.astype(int) - upright).max() < 30


def test_what_varies_depends_on_seed_epoch_and_index_alone(root):
    clips = dataset(root, "train", augmentation=Augmentation(), seed=5)
    first = clips[2, 3]
    torch.manual_seed(123)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    again = dataset(root, "train", augmentation=Augmentation(), seed=5, cache=True)
    assert same(again[2, 3], first)
    assert same(again[2, 3], first)  # this time from the cache
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    others = [clips[1, 3], dataset(root, "train", augmentation=Augmentation(), seed=6)[2, 3]]
    assert not any(same(other, first) for other in others)


def test_flip_and_masks_can_be_turned_off(root):
    still = dataset(root, "train", augmentation=Augmentation(flip=False, masks="none"))
    assert len({still[epoch, 0]["audio"].numpy().tobytes() for epoch in range(6)}) == 1
    flips = dataset(root, "train", image_size=40, augmentation=Augmentation(masks="none"))
    # A crop has 5 x 5 places, so two frames that differ in their mirror image only are rare: count left-right means.
    sides = {
        bool(flips[epoch, 0]["image"][..., :20].mean() > flips[epoch, 0]["image"][..., 20:].mean())
        for epoch in range(12)
    }
    assert sides == {True, False}


def test_sounds_of_another_rate_and_length_fit_the_batch(root, tmp_path):
    folder = shutil.copytree(root / "test", tmp_path / "test")
    soundfile.write(folder / "audio" / "test_000000.wav", np.random.default_rng(0).uniform(-1, 1, (30_000, 2)), 44_100)
    soundfile.write(folder / "audio" / "test_000001.wav", np.random.default_rng(0).uniform(-1, 1, 700), 22_050)
    clips = ClipDataset(ClipFolder(str(folder)), **SMALL)
    assert len({clips[i]["audio"].shape for i in range(3)}) == 1


@pytest.mark.parametrize("broken", ["frames/train_000003.png", "audio/train_000003.wav"])
def test_unreadable_files_are_named_or_skipped_in_training_with_a_count(root, tmp_path, broken):
    folder = shutil.copytree(root, tmp_path / "set")
    (folder / "train" / broken).write_bytes((folder / "train" / broken).read_bytes()[:30])
    clips = dataset(folder, "train", augmentation=Augmentation())
    with pytest.raises(MediaError, match=Path(broken).name):
        clips[3]
    data = ClipData(str(folder), batch_size=14, on_bad_clip="skip", **SMALL)
    with (
        pytest.warns(UserWarning, match=f"skipped: cannot read .*{Path(broken).name}"),
        pytest.warns(UserWarning, match="1 unreadable training clips were skipped"),
    ):
        batches = list(data.train_dataloader())
    assert [len(batch["name"]) for batch in batches] == [13]
    assert "train_000003" not in batches[0]["name"]
    data = ClipData(str(folder), batch_size=7, on_bad_clip="skip", **SMALL)
    with pytest.warns(UserWarning, match="epoch 0: 1 unreadable training clips were skipped"):
        next(batch for batch in data.train_dataloader() if len(batch["name"]) == 6)  # the pass may end here


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_batch_of_which_no_clip_can_be_read_is_an_error(root, tmp_path, workers):
    folder = shutil.copytree(root, tmp_path / "set")
    for frame in (folder / "train" / "frames").iterdir():
        frame.write_bytes(b"none")
    data = ClipData(str(folder), batch_size=7, on_bad_clip="skip", num_workers=workers, **SMALL)
    with pytest.raises(MediaError, match="none of the 7 clips of a batch can be read; the warnings before this name"):
        next(iter(data.train_dataloader()))


def test_missing_files_are_found_at_setup_and_named_or_left_out_of_training(root, tmp_path):
    folder = shutil.copytree(root, tmp_path / "set")
    (folder / "train" / "audio" / "train_000002.wav").unlink()
    (folder / "val" / "frames" / "val_000001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_000002 \(sound\); .*--data\.on_bad_clip skip"):
        ClipData(str(folder), batch_size=4, **SMALL).setup("fit")
    with (
        pytest.warns(UserWarning, match=r"left out: .*train_000002 \(sound\)"),
        pytest.raises(FileNotFoundError, match=r"val_000001 \(frame\); .*--data\.test\.ids"),
    ):
        ClipData(str(folder), batch_size=4, on_bad_clip="skip", **SMALL).setup("fit")
    with pytest.raises(ValueError, match="for training only"):
        dataset(root, on_bad_clip="skip")


def test_evaluation_tells_which_clips_have_an_empty_ground_truth(root, tmp_path, recwarn):
    folder = shutil.copytree(root / "test", tmp_path / "test")
    entries = json.loads((folder / "annotations.json").read_text())
    entries[0]["bbox"], entries[2]["bbox"] = [], [[0.5, 1.0, 0.75, 1.0]]
    (folder / "annotations.json").write_text(json.dumps(entries))
    clips = ClipFolder(str(folder), annotations=str(folder / "annotations.json"))
    ClipDataset(clips, **SMALL, augmentation=Augmentation())
    dataset(root)
    assert not recwarn
    with pytest.warns(UserWarning, match="2 of 3 clips have an empty ground truth.*: test_000000, test_000002$"):
        ClipDataset(clips, **SMALL)


def test_leakage_stops_training_before_it_starts(root):
    train = generated_split(root, "train")
    with pytest.raises(LeakageError, match="14 of the 14 test clips"):
        ClipData(str(root), test=train, batch_size=4, **SMALL).setup("fit")
    with pytest.warns(UserWarning, match="14 of the 14 test clips"):
        ClipData(str(root), test=train, batch_size=4, on_leakage="warn", **SMALL).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 15}, "batch_size must be at most .* got 15, with 14 clips"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"masks": "loud"}, 'masks must be "mean", "official" or "none", got \'loud\''),
        ({"mask_width": 0}, "mask_width must be at least 1, got 0"),
        ({"clip_seconds": 0.01}, "clip_seconds must give at least 512 samples, got 0.01 s at 16000 Hz"),
    ],
)
def test_bad_options_are_named(root, options, message):
    with pytest.raises(ValueError, match=message):
        ClipData(str(root), **SMALL | {"batch_size": 4} | options).setup("fit")


def test_a_folder_without_generated_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no generated data set, nor AVSBench; make one with"):
        ClipData(str(tmp_path))
    with pytest.raises(ValueError, match="train: there are no train clips"):
        ClipData().setup("fit")


def test_the_model_needs_sounds(root):
    data = ClipData(train=ClipFolder(str(root / "train"), audio=None))
    with pytest.raises(ValueError, match=r"train\.audio is null; the model needs"):
        _ = data.train_set


def test_fields_of_a_split_without_its_root_need_one(root):
    with pytest.raises(ValueError, match=r"test\.root is missing"):
        ClipData(test=ClipFolder(ids="some.txt"))
    completed = ClipData(str(root), test=ClipFolder(negatives="silent")).folders["test"]
    assert completed == replace(generated_split(root, "test"), negatives="silent")


def test_evaluating_needs_annotations_and_predicting_does_not(root):
    bare = ClipFolder(str(root / "test"))
    with pytest.raises(ValueError, match=r"test: annotations are needed to evaluate \(--data\.test\.annotations\)"):
        ClipData(test=bare, **SMALL).setup("test")
    with pytest.raises(ValueError, match="val: annotations are needed"):
        ClipData(train=generated_split(root, "train"), val=bare, batch_size=4, **SMALL).setup("fit")
    data = ClipData(test=bare, **SMALL)
    data.setup("predict")
    assert next(iter(data.predict_dataloader()))["name"] == ["test_000000", "test_000001", "test_000002"]


def test_evaluation_sees_each_clip_once_and_no_validation_is_none(root):
    data = ClipData(str(root), batch_size=2, **SMALL)
    assert [batch["name"] for batch in data.val_dataloader()] == [
        ["val_000000", "val_000001"],
        ["val_000002", "val_000003"],
        ["val_000004"],
    ]
    assert ClipData(train=generated_split(root, "train"), **SMALL).val_dataloader() == []


def test_evaluation_needs_a_clip_for_each_process(root):
    data = ClipData(str(root), batch_size=2, **SMALL)
    data.trainer = SimpleNamespace(world_size=5, global_rank=4)
    assert [batch["name"] for batch in data.val_dataloader()] == [["val_000004"]]
    data.trainer.world_size = 6
    with pytest.raises(ValueError, match=r"trainer\.devices .* got 6 processes for 5 clip"):
        data.val_dataloader()


def test_single_object_loaders_hold_a_tenth_out(root):
    train, held_out = single_object_loaders(root, image_size=32, batch_size=5, seed=0)
    names = [name for batch in train for name in batch["name"]]
    assert len(names) == 10  # of 11, in full batches
    (batch,) = list(held_out)
    assert batch["name"] == ["single_000011"]
    assert not set(names) & set(batch["name"])
    assert batch["image"].shape == (1, 3, 32, 32)
    assert "audio" not in batch
    with pytest.raises(ValueError, match="batch_size must be at most 11"):
        single_object_loaders(root, image_size=32, batch_size=12, seed=0)


class Recorder(LightningModule):
    """Learns nothing and keeps what it was given."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.stop_after = stop_after
        self.seen: list[tuple[int, tuple[str, ...], float]] = []

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        if len(self.seen) == self.stop_after:
            raise InterruptedError
        content = float(batch["image"].double().sum() + batch["audio"].double().sum())
        self.seen.append((self.current_epoch, tuple(batch["name"]), content))
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(
    root: Path, folder: Path, module: Recorder, workers: int = 0, resume: str | None = None, **options: Any
) -> Recorder:
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, filename="{step}", save_top_k=-1)],
        **options,
    )
    trainer.fit(
        module, datamodule=ClipData(str(root), batch_size=4, num_workers=workers, seed=9, **SMALL), ckpt_path=resume
    )
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("steps", "workers"), [(3, 0), (4, 0), (3, 2), (5, 2)])
def test_a_run_resumed_within_or_between_epochs_sees_the_batches_it_would_have_seen(root, tmp_path, steps, workers):
    """14 clips make 3 batches of 4: the first resumes between epochs, the others within one."""
    whole = fit(root, tmp_path / "whole", Recorder())
    assert [epoch for epoch, _, _ in whole.seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    orders = {tuple(name for e, names, _ in whole.seen if e == epoch for name in names) for epoch in range(3)}
    assert len(orders) == 3
    with pytest.raises(InterruptedError):
        fit(root, tmp_path / "killed", Recorder(stop_after=steps), workers)
    resumed = fit(
        root, tmp_path / "killed", Recorder(), workers, resume=str(tmp_path / "killed" / f"step={steps}.ckpt")
    )
    assert resumed.seen == whole.seen[steps:]


@pytest.mark.filterwarnings("ignore")
def test_a_limit_on_batches_neither_breaks_resuming_nor_overfitting(root, tmp_path):
    whole = fit(root, tmp_path / "whole", Recorder(), limit_train_batches=2)
    resumed = fit(root, tmp_path, Recorder(), resume=str(tmp_path / "whole" / "step=2.ckpt"), limit_train_batches=2)
    assert resumed.seen == whole.seen[2:]
    assert len({names for _, names, _ in fit(root, tmp_path, Recorder(), overfit_batches=1).seen}) == 1


@pytest.mark.filterwarnings("ignore")
def test_overfitting_goes_on_within_an_epoch(root, tmp_path):
    whole = fit(root, tmp_path / "whole", Recorder(), overfit_batches=3)
    resumed = fit(root, tmp_path, Recorder(), resume=str(tmp_path / "whole" / "step=4.ckpt"), overfit_batches=3)
    assert resumed.seen == whole.seen[4:]


@pytest.mark.filterwarnings("ignore")
def test_other_training_clips_are_no_run_to_go_on_with(root, tmp_path):
    fit(root, tmp_path, Recorder())
    data = ClipData(
        str(root), train=ClipFolder(f"{root}/train", ids=f"{tmp_path}/some.txt"), batch_size=4, seed=9, **SMALL
    )
    names = ClipData(str(root), **SMALL).train_set.names
    (tmp_path / "some.txt").write_text("\n".join(names[1:]))
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", max_epochs=3, logger=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    with pytest.raises(ValueError, match=r"--data\.train: the checkpoint was trained on other clips than these 13"):
        trainer.fit(Recorder(), datamodule=data, ckpt_path=str(tmp_path / "step=3.ckpt"))
