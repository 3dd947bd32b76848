"""Scores by masks against a loop over thresholds, and AVSBench's folders as its authors lay them out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from fnac.audio import LogSpectrogram, MediaError, load_audio
from fnac.cli import main
from fnac.data.avsbench import AVSBench, list_frames
from fnac.data.dataset import ClipDataset, load_mask
from fnac.segmentation import SegmentationScores, f_curves, mask_iou, oracle, scaled

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
)

CLASSES = {"dog_barking": ["a1_0_5000", "b2_1000_6000"], "helicopter": ["c3_0_5000"]}


def samples(count=6, size=12):
    rng = np.random.default_rng(3)
    masks = (rng.random((count, size, size)) < 0.3).astype(np.float32)
    masks[1] = 0
    return torch.from_numpy(rng.standard_normal((count, size, size)).astype(np.float32) + masks), torch.from_numpy(
        masks
    )


def loop_f_curve(heat, mask):
    """Each threshold by itself, precision and recall as AVSBench's code has them."""
    curve = []
    for cut in torch.linspace(0, 1, 255):
        predicted = heat >= cut
        hit = float((predicted * mask).sum())
        precision, recall = hit / max(int(predicted.sum()), 1e-20), hit / float(mask.sum())
        curve.append(1.3 * precision * recall / (0.3 * precision + recall) if hit else 0.0)
    return curve


def test_f_scores_equal_a_loop_over_thresholds():
    maps, masks = samples()
    curves = f_curves(scaled(maps), masks)
    for heat, mask, curve in zip(scaled(maps), masks, curves, strict=True):
        assert curve.tolist() == pytest.approx(loop_f_curve(heat, mask) if mask.any() else [0.0] * 255, abs=1e-12)


def test_iou_of_masks_and_of_nothing():
    mask = torch.zeros(3, 4, 4)
    mask[0, 0], mask[1, :2] = 1, 1
    maps = torch.zeros(3, 4, 4)
    maps[:, :2, :2] = 0.6
    maps[:, 3, 3] = 0.5  # not above
    # Two of six pixels in common; four of eight; nothing there, and 12 of 16 pixels that say so.
    assert mask_iou(maps, mask).tolist() == [2 / 6, 4 / 8, 12 / 16]


def test_a_constant_map_marks_every_pixel():
    mask = torch.zeros(1, 4, 4)
    mask[0, 0] = 1
    assert mask_iou(scaled(torch.full((1, 4, 4), 0.3)), mask).tolist() == [0.25]


def test_nothing_beats_the_oracle():
    masks = samples()[1]
    masks[2] = 1
    before = masks.clone()
    metric = SegmentationScores()
    metric.update(oracle(masks), masks, torch.arange(6))
    summary, clips = metric.compute()
    assert clips["iou"].tolist() == [1, 1 - 1 / 144, 1, 1, 1, 1]  # nothing is in the second
    assert float(summary["f_score"]) == pytest.approx(1)
    assert torch.equal(masks, before)


def test_a_map_that_is_not_finite_has_no_score():
    maps, masks = samples()
    maps[2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="maps must be finite, got NaN"):
        SegmentationScores().update(maps, masks, torch.arange(6))


def test_the_data_sets_f_score_does_not_depend_on_batches_and_the_batches_does():
    maps, masks = samples()
    found = {}
    for size in (1, 2, 6):
        metric = SegmentationScores()
        for part in torch.arange(6).flip(0).split(size):
            metric.update(maps[part], masks[part], part)
        found[size], clips = metric.compute()
        assert torch.equal(clips["iou"], mask_iou(scaled(maps), masks))
    curves = f_curves(scaled(maps), masks)[masks.flatten(1).any(1)]
    for summary in found.values():
        assert float(summary["f_score"]) == pytest.approx(float(curves.mean(dim=0).max()))
        assert float(summary["miou"]) == pytest.approx(float(mask_iou(scaled(maps), masks).mean()))
    # One by one it is the mean of each clip's own best cut, and 0 for the clip without a source.
    assert float(found[1]["f_score_of_batches"]) == pytest.approx(float(curves.max(dim=1).values.sum()) / 6)
    assert float(found[6]["f_score_of_batches"]) == pytest.approx(float(found[6]["f_score"]))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_a_mask_is_what_is_not_black_in_any_mode(tmp_path, mode):
    pixels = np.zeros((448, 224), dtype=np.uint8)
    pixels[:224] = 255 if mode in ("1", "L") else 1
    image = Image.fromarray(pixels.astype(np.uint16) if mode == "I;16" else pixels)
    if mode == "P":
        image.putpalette([0, 0, 0, 128, 0, 0])
    elif mode in ("1", "RGB"):
        image = image.convert(mode)
    image.save(tmp_path / "mask.png")
    mask = load_mask(tmp_path / "mask.png")
    assert mask.dtype == torch.float32
    assert mask[:112].min() == 1
    assert mask[112:].max() == 0
    with pytest.raises(MediaError, match=r"cannot read image .*nowhere\.png"):
        load_mask(tmp_path / "nowhere.png")


def write_video(folder, split, category, video, *, frame, rng):
    images = folder / "visual_frames" / (f"{split}/{category}/{video}" if category else video)
    masks, sounds = (folder / name / split / category for name in ("gt_masks", "audio_wav"))
    for made in (images, masks / video, sounds):
        made.mkdir(parents=True, exist_ok=True)
    for k in range(1, 6):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{frame}_{k}.png")
        if split != "train" or k == 1:
            mask = np.zeros((224, 224), dtype=np.uint8)
            mask[:100, : 40 * (k - 1)] = 1  # nothing in the first frame
            image = Image.fromarray(mask)
            image.putpalette([0, 0, 0, 128, 0, 0])
            image.save(masks / video / f"{video}_{k}.png")
    seconds = np.repeat(np.arange(5), 16_000) / 10
    soundfile.write(sounds / f"{video}.wav", seconds + 0.01 * rng.standard_normal(len(seconds)), 16_000)


@pytest.fixture
def single(tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / "Single-source"
    lines = ["name,start_time,category,split"]
    for split in ("train", "val", "test"):
        for category, videos in CLASSES.items():
            for video in videos:
                write_video(root / "s4_data", split, category, f"{split}_{video}", frame=f"{split}_{video}", rng=rng)
                lines.append(f"{split}_{video},0,{category},{split}")
    (root / "s4_meta_data.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def multiple(tmp_path):
    root = tmp_path / "Multi-sources"
    write_video(root / "ms3_data", "test", "", "x9_3", frame="x9_3.mp4", rng=np.random.default_rng(0))
    (root / "ms3_meta_data.csv").write_text("name,split\nx9_3,test\n")
    return root


def test_each_frame_is_a_clip_with_its_second_of_the_sound(single):
    clips = ClipDataset(AVSBench(str(single), "test"), image_size=32, clip_seconds=1.0)
    assert clips.names[:6] == [f"test_a1_0_5000_{k}" for k in range(1, 6)] + ["test_b2_1000_6000_1"]
    sample = clips[2]
    assert sample["label"] == "dog_barking"
    assert sample["mask"].sum() == 100 * 80
    assert "gt" not in sample
    waveform, _ = load_audio(clips.audio_path(2))
    assert torch.equal(sample["audio"], LogSpectrogram(16_000)(waveform[32_000:48_000])[None])


def test_the_moment_of_a_sound_stays_within_it(single):
    (sound,) = (single / "s4_data").glob("audio_wav/test/*/test_a1_0_5000.wav")
    whole, _ = load_audio(sound)
    for moment, start in ((0.5, 0), (2.5, 16_000), (4.5, 32_000)):
        assert torch.equal(load_audio(sound, seconds=3.0, moment=moment)[0], whole[start : start + 48_000])
    assert len(load_audio(sound, seconds=7.0, moment=4.5)[0]) == 7 * 16_000


def test_training_takes_the_first_frame_of_a_video(single):
    found = list_frames(AVSBench(str(single), "train"))
    assert [clip.name for clip in found.clips] == [
        "train_a1_0_5000_1", "train_b2_1000_6000_1", "train_c3_0_5000_1",
    ]  # fmt: skip
    assert not found.missing


def test_the_multiple_source_subset_is_laid_out_otherwise(multiple):
    sample = ClipDataset(AVSBench(str(multiple), "test"), image_size=32, clip_seconds=1.0)[4]
    assert (sample["name"], sample["label"]) == ("x9_3_5", "")
    assert sample["mask"].sum() == 100 * 160


def test_what_a_subset_lacks_is_named(single):
    with pytest.raises(ValueError, match=r"s4_meta_data\.csv lists no videos of split 'valid'"):
        list_frames(AVSBench(str(single), "valid"))
    (single / "s4_data/gt_masks/test/helicopter/test_c3_0_5000/test_c3_0_5000_2.png").unlink()
    (single / "s4_data/audio_wav/test/dog_barking/test_a1_0_5000.wav").unlink()
    missing = list_frames(AVSBench(str(single), "test")).missing
    with pytest.raises(FileNotFoundError, match=r"lack files: test_a1.*take the videos' lines out of the csv"):
        ClipDataset(AVSBench(str(single), "test"))
    assert missing == [*(f"test_a1_0_5000_{k} (sound)" for k in range(1, 6)), "test_c3_0_5000_2 (mask)"]
    (single / "s4_meta_data.csv").write_text("name,part\nx,test\n")
    with pytest.raises(ValueError, match=r"should have a column split, its headings are \['name', 'part'\]"):
        list_frames(AVSBench(str(single), "test"))
    (single / "s4_meta_data.csv").write_text("name,split\ncafé,test\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"s4_meta_data\.csv must be text in UTF-8"):
        list_frames(AVSBench(str(single), "test"))
    (single / "ms3_meta_data.csv").touch()
    with pytest.raises(ValueError, match=r"should hold one subset of AVSBench, .*got \['ms3_.*', 's4_.*'\]"):
        list_frames(AVSBench(str(single), "test"))


def test_training_and_testing_by_the_command(single, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ["--model.dim=16", "--model.image_stages=1", "--model.audio_stages=1", "--trainer.accelerator=cpu"]
    settings += [f"--data.root={single}", "--data.image_size=48", "--data.clip_seconds=0.25", "--data.batch_size=2"]
    settings += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    main(["fit", *settings, "--trainer.max_epochs=1"])
    (best,) = tmp_path.glob("runs/*/*/checkpoints/best.ckpt")
    assert torch.load(best, weights_only=True)["callbacks"]["BestAndLast"]["monitor"] == "val/miou"
    capsys.readouterr()
    main(["test", *settings, f"--ckpt_path={best}", "--results=scores.json"])
    printed = capsys.readouterr().out
    assert "mIoU" in printed
    assert "AP50" not in printed
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["clips"] == 15
    assert scores["scores"]["oracle"]["f_score"] == 1
    assert scores["scores"]["oracle"]["miou"] == pytest.approx(1, abs=1 / 224**2)
    # The whole frame: nothing right in the three empty first frames, the mask's area in the others.
    areas = [100 * 40 * k / 224**2 for k in range(5)]
    assert scores["scores"]["whole frame"]["miou"] == pytest.approx(np.mean(areas))
    assert (tmp_path / "scores.csv").read_text().startswith("row,clip,iou\nmodel,test_a1_0_5000_1,")
