"""Sound files to log spectrograms, as the official implementation computes them, with torchaudio's transforms."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import torch
from torch import Tensor, nn
from torchaudio import transforms

SEGMENT, HOP = 512, 512 - 274
LOG_FLOOR, LOG_SCALE = 1e-7, 12.0

# What a corrupt header says must not decide how much memory is asked for.
RATES = range(1000, 768_001)  # in Hz
MAX_SAMPLES = 2**28  # read from one file, all channels, or resampled: 1 GiB
MAX_FRAMES = 2**62  # more is what libsndfile says of a length that is not known
MAX_KERNEL = 2**22  # of the resampling filters: all usual rates to all usual rates, not 44101 Hz to 16000

Masks = Literal["mean", "official", "none"]


class MediaError(ValueError):
    """A file that cannot be read as the sound or image it should be; the message names it."""


def load_audio(
    path: str | Path, *, seconds: float | None = None, moment: float | None = None, sample_rate: int | None = None
) -> tuple[Tensor, int]:
    """Read a sound file, channels averaged; samples beyond -1..1, which files of floats may have, are cut off.

    Args:
        path: any format that libsndfile reads (wav, flac, ogg, mp3, ...).
        seconds: take this much from the middle of the file, repeating the sound if it is shorter.
        moment: the middle of what is taken, in seconds, as near as the file's ends allow; by default the file's.
        sample_rate: resample to this rate in Hz; by default the file's own is kept, as in the official code.

    Returns:
        The waveform, float32 ``(samples,)`` in -1..1, and its sample rate in Hz.

    Raises:
        MediaError: the file is missing, cannot be decoded, holds no samples or some that are not finite, is too long
            to be read whole, or has a sample rate that cannot be or cannot be resampled.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            check_rate(path, rate, sample_rate)
            if file.frames > MAX_FRAMES:
                raise MediaError(f"cannot read sound {path}: its header does not say how long it is; convert the file")
            frames = file.frames if seconds is None else min(round(seconds * rate), file.frames)
            check_size(path, frames, file.channels, rate, sample_rate)
            start = (file.frames - frames) // 2 if moment is None else round(moment * rate) - frames // 2
            file.seek(min(max(start, 0), file.frames - frames))
            channels = file.read(frames, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        reason = error if Path(path).exists() else "there is no such file"
        raise MediaError(f"cannot read sound {path}: {reason}") from error
    if len(channels) == 0:
        raise MediaError(f"cannot read sound {path}: it holds no samples")
    if not np.isfinite(channels).all():
        raise MediaError(f"cannot read sound {path}: it holds NaN or infinite samples")
    waveform = torch.from_numpy(channels.clip(-1, 1).mean(axis=1))
    if sample_rate is not None and sample_rate != rate:
        waveform, rate = resampler(rate, sample_rate)(waveform), sample_rate
    if seconds is not None:
        length = round(seconds * rate)
        waveform = waveform.repeat(-(-length // len(waveform)))[:length]
    return waveform, rate


def check_rate(path: str | Path, rate: int, target: int | None) -> None:
    """Raise :class:`MediaError` if a file's sample rate cannot be, or cannot be resampled to the target."""
    if rate not in RATES:
        raise MediaError(
            f"cannot read sound {path}: its sample rate is {rate} Hz; it should be {RATES[0]} to {RATES[-1]} Hz"
        )
    if target is not None and _kernel_size(rate, target) > MAX_KERNEL:
        raise MediaError(
            f"cannot read sound {path}: its sample rate of {rate} Hz has too small a common divisor with {target} Hz "
            f"to be resampled; convert the file to {target} Hz first"
        )


def check_size(path: str | Path, frames: int, channels: int, rate: int, target: int | None) -> None:
    """Raise :class:`MediaError` if so many samples should not be in memory at once, before or after resampling."""
    if max(frames * channels, frames * (target or rate) // rate) > MAX_SAMPLES:
        raise MediaError(
            f"cannot read sound {path}: {frames} samples of {channels} channel(s) at {rate} Hz are too many; at most "
            f"{MAX_SAMPLES} should be read at once"
        )


def _kernel_size(source: int, target: int) -> int:
    """Entries of torchaudio's resampling filters, one for each phase; 0 where nothing is resampled."""
    if source == target:
        return 0
    divisor = math.gcd(source, target)
    source, target = source // divisor, target // divisor
    return target * (source + 2 * math.ceil(6 * source / (0.99 * min(source, target))))


@lru_cache(maxsize=16)
def resampler(source: int, target: int) -> transforms.Resample:
    """From one rate in Hz to another; its filters are kept."""
    return transforms.Resample(source, target)


def _tukey(length: int, taper: float = 0.25) -> Tensor:
    """Periodic Tukey window, the default of ``scipy.signal.spectrogram``."""
    position = torch.arange(length, dtype=torch.float64)
    from_end = torch.minimum(position, length - position) / (taper * length / 2)
    return (0.5 - 0.5 * torch.cos(torch.pi * from_end.clamp(max=1))).float()


class LogSpectrogram(nn.Module):
    """``log(S + 1e-7) / 12`` of the power spectral density S, as the official implementation computes it.

    S equals ``scipy.signal.spectrogram(waveform, sample_rate, nperseg=512, noverlap=274)`` with its defaults: Tukey
    window, constant detrending of each segment, density scaling, one-sided.

    Args:
        sample_rate: of the waveforms, in Hz; it scales the density.

    Shape:
        waveform ``(..., samples)`` float, at least 512 samples -> ``(..., 257, 1 + (samples - 512) // 238)``.
    """

    density: Tensor
    window_spectrum: Tensor

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.spectrum = transforms.Spectrogram(SEGMENT, hop_length=HOP, window_fn=_tukey, power=None, center=False)
        window = self.spectrum.window.double()
        density = torch.full((SEGMENT // 2 + 1, 1), 2 / (sample_rate * window.square().sum().item()))
        density[[0, -1]] /= 2  # the mean and the Nyquist frequency have no mirror image
        self.register_buffer("density", density, persistent=False)
        self.register_buffer("window_spectrum", torch.fft.rfft(window).to(torch.complex64)[:, None], persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        if waveform.shape[-1] < SEGMENT:
            raise ValueError(f"waveform must have at least {SEGMENT} samples, got {waveform.shape[-1]}")
        # torchaudio does not detrend. The transform is linear, so a segment's mean takes the window's spectrum times
        # itself out of it. Without the whole waveform's mean there is little to take out, hence little rounding.
        waveform = waveform - waveform.mean(dim=-1, keepdim=True)
        means = waveform.unfold(-1, SEGMENT, HOP).mean(dim=-1)
        spectrum = self.spectrum(waveform) - means[..., None, :] * self.window_spectrum
        power = torch.view_as_real(spectrum).square().sum(dim=-1) * self.density
        return (power + LOG_FLOOR).log() / LOG_SCALE


def mask_spectrogram(spectrogram: Tensor, masks: Masks = "mean", width: int = 10) -> Tensor:
    """Hide one random band of frequencies and one span of time, each less than ``width`` wide (training only).

    Args:
        spectrogram: ``(..., F, T)``.
        masks: ``"mean"`` fills with the spectrogram's mean and draws places over the masks' own axes.
            ``"official"`` does what the official code does: it fills with 0, which is loud in log power, and draws the
            place of each mask over the other's axis, so that on spectrograms longer than high the frequency mask often
            falls outside, and later times are never masked if they are longer. ``"none"`` changes nothing.
        width: bound of the widths, in cells.

    The random numbers are torch's global ones.
    """
    if masks == "none":
        return spectrogram
    if masks == "mean":
        fill = float(spectrogram.mean())
        hidden = transforms.FrequencyMasking(width)(spectrogram, fill)
        return transforms.TimeMasking(width)(hidden, fill)
    if masks != "official":
        raise ValueError(f'masks must be "mean", "official" or "none", got {masks!r}')
    masked = spectrogram.clone()
    for axis, other in ((-2, -1), (-1, -2)):
        start, span = int(torch.randint(spectrogram.shape[other], ())), int(torch.randint(width, ()))
        visible = max(min(span, spectrogram.shape[axis] - start), 0)
        if visible:
            masked.narrow(axis, start, visible).zero_()
    return masked
