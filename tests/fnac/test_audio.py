"""Sounds: equal to scipy's spectrogram, read from the middle, resampled, masked, and errors that name the file."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch
from scipy import signal

from fnac import audio
from fnac.audio import LogSpectrogram, MediaError, load_audio, mask_spectrogram
from fnac.data.timbre import TIMBRES, draw_sound


def scipy_log_spectrogram(waveform: np.ndarray, rate: int) -> np.ndarray:
    _, _, density = signal.spectrogram(waveform.astype(np.float64), rate, nperseg=512, noverlap=274)
    return np.log(density + 1e-7) / 12


WAVEFORMS = {
    "noise": lambda t, rng: 0.3 * rng.standard_normal(t.size),
    "tone with an offset": lambda t, rng: 0.5 + 0.4 * np.sin(2 * np.pi * 440 * t),
    "drift": lambda t, rng: t / t.max() + 1e-3 * rng.standard_normal(t.size),
    "silence": lambda t, rng: 0 * t,
    "click": lambda t, rng: (np.arange(t.size) == 5000).astype(float),
}


@pytest.mark.parametrize("kind", WAVEFORMS)
@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100])
def test_log_spectrogram_equals_scipys(kind, rate):
    rng = np.random.default_rng(0)
    waveform = WAVEFORMS[kind](np.arange(3 * rate) / rate, rng).astype(np.float32)
    ours = LogSpectrogram(rate)(torch.from_numpy(waveform))
    expected = scipy_log_spectrogram(waveform, rate)
    assert ours.dtype == torch.float32
    assert ours.shape == expected.shape == (257, {16_000: 200, 22_050: 276, 44_100: 554}[rate])
    np.testing.assert_allclose(ours.numpy(), expected, atol=3e-6, rtol=0)


def test_log_spectrogram_takes_batches_and_refuses_less_than_a_segment():
    transform = LogSpectrogram(16_000)
    waveforms = torch.randn(2, 1, 2000)
    assert torch.allclose(transform(waveforms)[1, 0], transform(waveforms[1, 0]), atol=1e-6)
    with pytest.raises(ValueError, match="at least 512 samples, got 511"):
        transform(torch.zeros(511))


def test_the_middle_of_a_long_file_is_taken_and_channels_are_averaged(tmp_path):
    ramp = np.arange(1000) / 2000
    soundfile.write(tmp_path / "a.wav", np.stack([ramp, 0 * ramp], axis=1), 1000, subtype="FLOAT")
    waveform, rate = load_audio(tmp_path / "a.wav", seconds=0.2)
    assert rate == 1000
    np.testing.assert_allclose(waveform.numpy(), ramp[400:600] / 2, rtol=1e-6)


def test_a_short_file_is_repeated(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.array([0.1, 0.2, 0.3]), 8000)
    waveform, _ = load_audio(tmp_path / "a.flac", seconds=7 / 8000)
    np.testing.assert_allclose(waveform.numpy(), [0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1], atol=1e-4)


def test_a_whole_file_keeps_its_length(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(321), 8000)
    assert load_audio(tmp_path / "a.wav")[0].shape == (321,)


@pytest.mark.parametrize(("source", "target"), [(44_100, 16_000), (8_000, 16_000)])
def test_resampling_keeps_pitch_and_length(tmp_path, source, target):
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 1000 * np.arange(source) / source), source)
    waveform, rate = load_audio(tmp_path / "a.wav", sample_rate=target, seconds=0.5)
    assert (rate, len(waveform)) == (target, target // 2)
    middle = waveform[1000:-1000]
    expected = 0.5 * np.sin(2 * np.pi * 1000 * (np.arange(target // 2) / target + 0.25))[1000:-1000]
    np.testing.assert_allclose(middle.numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("content", [b"", b"not a sound at all", None])
def test_an_unreadable_sound_is_named(tmp_path, content):
    path = tmp_path / "broken.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=r"broken\.wav"):
        load_audio(path)


def test_a_sound_without_samples_is_named(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    with pytest.raises(MediaError, match=r"empty\.wav.*no samples"):
        load_audio(tmp_path / "empty.wav", seconds=1)


def test_samples_that_are_not_finite_are_named(tmp_path):
    soundfile.write(tmp_path / "loud.wav", np.array([0.0, np.inf, 0.5]), 8000, subtype="FLOAT")
    with pytest.raises(MediaError, match=r"loud\.wav.*NaN or infinite"):
        load_audio(tmp_path / "loud.wav")


def test_a_missing_sound_is_told_so(tmp_path):
    with pytest.raises(MediaError, match=r"cannot read sound .*none\.wav: there is no such file"):
        load_audio(tmp_path / "none.wav")


def test_a_length_that_is_not_known_is_told_so(tmp_path):
    soundfile.write(tmp_path / "streamed.flac", np.zeros(8000), 8000)
    content = bytearray((tmp_path / "streamed.flac").read_bytes())
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])  # 36 bits of the number of samples
    (tmp_path / "streamed.flac").write_bytes(content)
    for seconds in (None, 0.5):
        with pytest.raises(
            MediaError, match=r"streamed\.flac: its header does not say how long it is; convert the file"
        ):
            load_audio(tmp_path / "streamed.flac", seconds=seconds)


def test_channels_are_cut_off_at_one_before_they_are_averaged(tmp_path):
    soundfile.write(tmp_path / "loud.wav", np.array([[5.0, 0.5], [-3.0, 0.0], [0.25, 0.75]]), 8000, subtype="FLOAT")
    waveform, _ = load_audio(tmp_path / "loud.wav")
    assert waveform.tolist() == [0.75, -0.5, 0.5]


@pytest.mark.parametrize("sample_rate", [None, 16_000])
@pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
def test_a_sample_rate_that_cannot_be_is_named(tmp_path, rate, sample_rate):
    soundfile.write(tmp_path / "odd.wav", np.zeros(100), rate)
    with pytest.raises(MediaError, match=rf"odd\.wav.* {rate} Hz; it should be 1000 to 768000"):
        load_audio(tmp_path / "odd.wav", seconds=3, sample_rate=sample_rate)


def test_a_sample_rate_that_would_take_huge_filters_is_refused_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "resampler", lambda *_: pytest.fail("21 GB"))
    soundfile.write(tmp_path / "odd.wav", np.zeros(100), 44_101)
    with pytest.raises(MediaError, match=r"odd\.wav.*44101 Hz has too small a common divisor with 16000 Hz"):
        load_audio(tmp_path / "odd.wav", seconds=3, sample_rate=16_000)
    assert load_audio(tmp_path / "odd.wav")[1] == 44_101


@pytest.mark.parametrize(("source", "target"), [(44_100, 16_000), (11_025, 48_000), (47_952, 16_000)])
def test_the_filters_size_is_known_beforehand(source, target):
    assert audio._kernel_size(source, target) == audio.resampler(source, target).kernel.numel() <= audio.MAX_KERNEL


def test_the_length_a_header_claims_is_bounded_and_the_middle_of_a_long_file_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "MAX_SAMPLES", 2000)
    soundfile.write(tmp_path / "long.wav", np.zeros((1001, 2)), 8000)
    with pytest.raises(MediaError, match=r"long\.wav: 1001 samples of 2 channel\(s\) at 8000 Hz are too many"):
        load_audio(tmp_path / "long.wav")
    with pytest.raises(MediaError, match="too many"):
        load_audio(tmp_path / "long.wav", seconds=0.1, sample_rate=24_000)
    assert load_audio(tmp_path / "long.wav", seconds=0.1)[0].shape == (800,)


def masked_cells(masks: str, shape: tuple[int, int], width: int = 10, draws: int = 200) -> torch.Tensor:
    """Which cells each of many masks hid, (draws, F, T), of a spectrogram whose mean is 7."""
    torch.manual_seed(0)
    spectrogram = torch.full((1, *shape), 7.0) + torch.tensor([-1.0, 1.0]).repeat(shape[1] // 2)
    hidden = torch.stack([mask_spectrogram(spectrogram, masks, width)[0] for _ in range(draws)])
    changed = hidden != spectrogram[0]
    assert set(hidden[changed].unique().tolist()) == {7.0 if masks == "mean" else 0.0}
    return changed


def test_masks_fill_with_the_mean_and_reach_all_of_their_own_axis():
    changed = masked_cells("mean", (20, 60))
    rows, columns = changed.all(dim=2), changed.all(dim=1)
    assert rows.any(dim=0)[:-1].all()  # torchaudio rounds starts down: the last row has hardly a chance
    assert columns.any(dim=0)[:-1].all()
    assert rows.sum(dim=1).max() == columns.sum(dim=1).max() == 9  # less than the width


def test_the_official_masks_fill_with_zero_and_draw_from_the_other_axis():
    changed = masked_cells("official", (20, 60))
    rows, columns = changed.all(dim=2), changed.all(dim=1)
    assert rows.any(dim=1).float().mean() < 0.5  # starts drawn in 0..59 mostly miss the 20 rows
    assert not columns[:, 20 + 9 :].any()  # starts drawn in 0..19 never reach the later times
    assert columns[:, :20].any(dim=0).all()


def test_masking_leaves_its_input_alone_and_none_changes_nothing():
    spectrogram = torch.randn(1, 30, 40)
    before = spectrogram.clone()
    for masks in ("mean", "official", "none"):
        mask_spectrogram(spectrogram, masks)
    assert torch.equal(spectrogram, before)
    assert torch.equal(mask_spectrogram(spectrogram, "none"), before)
    with pytest.raises(ValueError, match="got 'loud'"):
        mask_spectrogram(spectrogram, "loud")


def test_a_nearest_mean_tells_the_generated_classes_apart():
    """The timbres differ beyond pitch, tempo, level and noise: mean and deviation over time of each band suffice."""
    transform = LogSpectrogram(16_000)

    def features(name: str, seed: int) -> torch.Tensor:
        sound = draw_sound(np.random.default_rng(seed), name, 16_000)
        spectrogram = transform(torch.from_numpy(sound / np.float32(32768)))
        bands = spectrogram[1:].unfold(0, 8, 8).mean(dim=-1)
        return torch.cat([bands.mean(dim=1) - bands.mean(), 3 * bands.std(dim=1)])

    names = list(TIMBRES)
    centres = torch.stack([torch.stack([features(n, s) for s in range(12)]).mean(dim=0) for n in names])
    found = [(centres - features(n, s)).norm(dim=1).argmin() == i for i, n in enumerate(names) for s in range(100, 110)]
    assert torch.stack(found).float().mean() > 0.7
