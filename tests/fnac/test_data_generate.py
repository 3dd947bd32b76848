"""The generated data set: what is on disk, that it is reproducible, and that nothing but the sound tells the answer."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from fnac.data.generate import make_data
from fnac.data.processes import in_processes
from fnac.data.scene import CLASSES, MAX_AREA, MAX_OVERLAP, MIN_AREA, OUTLINES, TEXTURES, draw_boxes, draw_frame
from fnac.data.timbre import SAMPLE_RATE, TIMBRES, draw_sound

SMALL = {"train": 6, "val": 2, "test": 4, "single": 3, "image_size": 48, "seconds": 0.25, "progress": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("generated") / "set", seed=3, workers=0, **SMALL)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_every_annotated_clip_has_a_frame_and_a_sound_of_the_asked_size(root):
    for split in ("train", "val", "test"):
        entries = json.loads((root / split / "annotations.json").read_text())
        assert len(entries) == SMALL[split]
        for entry in entries:
            assert entry["class"] in CLASSES
            assert entry["silent_class"] in set(CLASSES) - {entry["class"]}
            with Image.open(root / split / "frames" / f"{entry['file']}.png") as frame:
                assert (frame.size, frame.mode) == ((48, 48), "RGB")
            info = soundfile.info(root / split / "audio" / f"{entry['file']}.wav")
            assert (info.frames, info.samplerate, info.channels, info.subtype) == (4000, 16000, 1, "PCM_16")


def test_single_object_frames_have_a_label_and_no_sound(root):
    entries = json.loads((root / "single" / "annotations.json").read_text())
    assert {f"{entry['file']}.png" for entry in entries} == {p.name for p in (root / "single" / "frames").iterdir()}
    assert not (root / "single" / "audio").exists()


def test_no_frame_and_no_sound_occurs_in_two_splits(root):
    media = [p for p in root.rglob("*") if p.suffix in {".png", ".wav"}]
    assert len({p.read_bytes() for p in media}) == len(media)
    assert len({p.name for p in media}) == len(media)


def test_a_clip_depends_only_on_seed_split_and_index(root, tmp_path):
    more = make_data(tmp_path / "more", seed=3, workers=0, **SMALL | {"train": 8, "val": 0})
    ours, theirs = contents(root), contents(more)
    shared = [name for name in ours if name in theirs and "0000" in name]
    assert len(shared) == 2 * (6 + 4) + 3
    assert all(ours[name] == theirs[name] for name in shared)
    other = contents(make_data(tmp_path / "other", seed=4, workers=0, **SMALL))
    assert not any(ours[name] == other[name] for name in ours if "0000" in name)


def test_processes_write_the_same_files_as_one_process(tmp_path):
    sizes = SMALL | {"train": 250, "image_size": 32, "seconds": 0.1}
    alone = contents(make_data(tmp_path / "alone", workers=0, **sizes))
    assert contents(make_data(tmp_path / "together", workers=2, **sizes)) == alone


def test_pixels_and_samples_are_the_ones_of_the_first_release():
    """A changed digest means other data under the same parameters: raise ``generate.FORMAT`` with it."""
    digest = hashlib.sha256()
    for name in CLASSES:
        rng = np.random.default_rng(7)
        digest.update(draw_frame(rng, 40, [(name, draw_boxes(rng, 40, 1)[0])]).tobytes())
        digest.update(draw_sound(rng, name, 3000).astype("<i2").tobytes())
    assert digest.hexdigest() == "3fa5a3957ce8eb25f014c94ca5da8ecf1cb8f52f9f16e99f16c8a393b0896def"


def test_the_same_parameters_reuse_what_is_there(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert make_data(root, seed=3, **SMALL) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_other_parameters_need_leave_to_overwrite(tmp_path):
    made = make_data(tmp_path / "set", seed=1, workers=0, **SMALL)
    with pytest.raises(FileExistsError, match=r"seed=1 \(asked for 2\)"):
        make_data(made, seed=2, workers=0, **SMALL)
    make_data(made, seed=2, workers=0, overwrite=True, **SMALL)
    assert json.loads((made / "manifest.json").read_text())["seed"] == 2


@pytest.mark.parametrize("manifest", [None, '{"name": "an application"}', "[]", '{"for'])
def test_a_folder_that_is_not_a_generated_set_is_never_replaced(tmp_path, manifest):
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(FileExistsError, match=r"no manifest\.json"):
        make_data(tmp_path, overwrite=True, workers=0, **SMALL)
    assert (tmp_path / "holiday.jpg").read_bytes() == b"precious"


def test_where_a_link_leads_the_data_set_is_made(tmp_path):
    (tmp_path / "disk" / "set").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "set")
    for seed in (1, 2):
        made = make_data(tmp_path / "link", seed=seed, workers=0, overwrite=True, **SMALL)
        assert made.is_symlink()
        assert json.loads((tmp_path / "disk" / "set" / "manifest.json").read_text())["seed"] == seed


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"root must not be the current folder, .* got '\.'"):
        make_data(".", workers=0, **SMALL)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch, number, raised):
    monkeypatch.setattr("fnac.data.generate.draw_sound", lambda *_: signal.raise_signal(number))
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    before = signal.getsignal(number)
    try:
        with pytest.raises(raised):
            make_data(tmp_path / "set", workers=0, **SMALL)
        assert signal.getsignal(number) == before
    finally:
        signal.signal(signal.SIGINT, ours)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", -1), ("train", 2.5), ("image_size", 8), ("seconds", 0), ("single", True), ("workers", -1)],
)
def test_a_bad_parameter_is_named_with_its_value(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
        make_data(tmp_path / "set", **SMALL | {name: value})


def test_boxes_are_near_half_the_frame_and_nearly_disjoint():
    rng = np.random.default_rng(0)
    for _ in range(200):
        first, second = draw_boxes(rng, 112, 2)
        for box in (first, second):
            assert MIN_AREA <= box.area / 112**2 <= MAX_AREA
            assert 0 <= box.x1 < box.x2 <= 112
            assert 0 <= box.y1 < box.y2 <= 112
        assert first.overlap(second) <= MAX_OVERLAP * min(first.area, second.area)


def test_the_sounding_box_lies_anywhere_in_the_frame():
    """Place is independent of which object sounds: each ninth of the frame is covered about as often by either."""
    rng = np.random.default_rng(0)
    cover = np.zeros((2, 12, 12))
    for _ in range(400):
        for which, box in enumerate(draw_boxes(rng, 12, 2)):
            cover[which, box.y1 : box.y2, box.x1 : box.x2] += 1 / 400
    assert np.abs(cover[0] - cover[1]).max() < 0.15  # six standard errors of a difference of two rates
    assert cover.min() > 0.2
    assert cover.max() < 0.65


def test_each_class_has_an_outline_a_texture_and_a_timbre():
    assert tuple(OUTLINES) == tuple(TEXTURES) == tuple(TIMBRES) == CLASSES


@pytest.mark.parametrize("name", CLASSES)
def test_sounds_vary_within_a_class_and_stay_in_range(name):
    sounds = [draw_sound(np.random.default_rng(seed), name, SAMPLE_RATE) for seed in range(8)]
    peaks = [int(abs(sound.astype(int)).max()) for sound in sounds]
    assert min(peaks) >= 3_500
    assert max(peaks) < 32_767  # no clipping
    assert max(peaks) > 1.5 * min(peaks)  # level varies
    assert len({sound.tobytes() for sound in sounds}) == 8


def end_this_process(_):
    os._exit(9)


def test_a_process_that_is_ended_is_told():
    with (
        pytest.raises(RuntimeError, match=r"a process was ended, .* try fewer workers"),
        in_processes(end_this_process, [(1,)] * 3, workers=2, chunksize=1) as results,
    ):
        list(results)
