"""Clips whose sound has no source in the frame."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fnac.audio import LogSpectrogram
from fnac.data.annotations import Annotation
from fnac.data.clip import Clip
from fnac.data.dataset import Augmentation, ClipDataset
from fnac.data.layout import ClipFolder, list_clips
from fnac.data.negatives import make_negatives

FRAMES, SOUNDS = ({name: Path(f"{kind}/{name}") for name in "abcdef"} for kind in ("frames", "audio"))


def positives(labels):
    return [
        Clip(name, FRAMES[name], SOUNDS[name], Annotation(label)) for name, label in zip("abcdef", labels, strict=False)
    ]


def test_mismatched_sounds_are_of_another_class():
    clips = positives(["dog", "dog", "dog", "cat", "dog", "dog"])
    made, lacking = make_negatives("mismatched", clips, FRAMES, SOUNDS)
    labels = {SOUNDS[clip.name]: clip.annotation.label for clip in clips}
    assert not lacking
    assert len(made) == 6
    for clip, negative in zip(clips, made, strict=True):
        assert negative.frame == clip.frame
        assert labels[negative.sound] != clip.annotation.label
        assert not negative.positive
    assert make_negatives("mismatched", clips, FRAMES, SOUNDS)[0] == made
    with pytest.raises(ValueError, match="no clip is of another class than a, 'dog'"):
        make_negatives("mismatched", positives(["dog"] * 3), FRAMES, SOUNDS)


def test_where_classes_are_not_known_sounds_are_another_clips():
    made, _ = make_negatives("mismatched", positives([""] * 4), FRAMES, SOUNDS)
    assert [negative.name for negative in made] == ["a+c", "b+d", "c+a", "d+b"]


def test_listed_pairs_are_found_and_others_named(tmp_path):
    listed = tmp_path / "test_plus_silent.csv"
    listed.write_text("a,b,non-sounding\nb,b,sounding\nc.jpg,d.wav,non-sounding\na,lost,non-sounding\n")
    made, lacking = make_negatives(str(listed), positives(["dog"]), FRAMES, SOUNDS)
    assert [(negative.name, negative.frame, negative.sound) for negative in made] == [
        ("a+b", FRAMES["a"], SOUNDS["b"]), ("c+d", FRAMES["c"], SOUNDS["d"]),
    ]  # fmt: skip
    assert lacking == ["a+lost"]
    listed.write_text("frame,sound\n# of the second test set\n\na,b\n")
    assert [negative.name for negative in make_negatives(str(listed), positives(["dog"]), FRAMES, SOUNDS)[0]] == ["a+b"]
    listed.write_text("a\n")
    with pytest.raises(ValueError, match=r"silent\.csv lists none; it should have rows of a frame's id and a sound's"):
        make_negatives(str(listed), positives(["dog"]), FRAMES, SOUNDS)
    listed.write_text("a,café\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"silent\.csv must be text in UTF-8"):
        make_negatives(str(listed), positives(["dog"]), FRAMES, SOUNDS)


def test_silence_is_no_sound_at_all(generated):
    test = f"{generated}/test"
    folder = ClipFolder(test, annotations=f"{test}/annotations.json", negatives="silent")
    clips = ClipDataset(folder, image_size=48, clip_seconds=0.25)
    assert len(clips) == 14
    sample, silent = clips[0], clips[7]
    assert (sample["positive"], silent["positive"]) == (True, False)
    assert torch.equal(sample["image"], silent["image"])
    assert torch.equal(silent["audio"], LogSpectrogram(16_000)(torch.zeros(4000))[None])
    assert sample["gt"].any()
    assert not silent["gt"].any()
    with pytest.raises(ValueError, match=r"clip test_000000\+silence has no sound"):
        clips.audio_path(7)
    with pytest.raises(ValueError, match="negatives are for evaluation"):
        ClipDataset(folder, augmentation=Augmentation())
    with pytest.raises(ValueError, match="negatives is 'silent', which only annotated clips with sounds can have"):
        list_clips(ClipFolder(test, negatives="silent"))
