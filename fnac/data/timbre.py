"""Generated sounds: one timbre family per class, with pitch, tempo, level and noise drawn per clip.

All families share the range of pitches and levels, so only the timbre tells the class. Integer arithmetic from a
rounded sine table: the same samples everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SAMPLE_RATE = 16_000

TURN = 1 << 32  # one period of a phase
PEAK = 32_767
SINE = np.rint(PEAK * np.sin(2 * np.pi * np.arange(4096) / 4096)).astype(np.int64)

Array = np.ndarray


def _phase(frequency: Array | int, length: int) -> Array:
    """Running phase, int64 (length,), of a frequency in millihertz, constant or one per sample."""
    step = np.broadcast_to(np.asarray(frequency, dtype=np.int64) * TURN // (1000 * SAMPLE_RATE), (length,))
    return np.cumsum(step)


def _sine(phase: Array) -> Array:
    return SINE[(phase >> 20) & 4095]


def _harmonics(phase: Array, weights: dict[int, int]) -> Array:
    """Sum of sines at multiples (in thousandths) of the phase's pitch."""
    return sum((weight * _sine(phase * multiple // 1000) for multiple, weight in weights.items()), np.zeros_like(phase))


def _beat(rng: np.random.Generator, length: int, slowest: int, fastest: int) -> Array:
    """Position 0..1023 within each of the beats that come ``slowest..fastest`` times in 1000 seconds."""
    start = int(rng.integers(TURN))
    return ((_phase(int(rng.integers(slowest, fastest)), length) + start) >> 22) & 1023


def _noise(rng: np.random.Generator, length: int) -> Array:
    return rng.integers(-PEAK, PEAK + 1, length)


def _flute(rng: np.random.Generator, pitch: int, length: int) -> Array:
    vibrato = _sine(_phase(int(rng.integers(4500, 6500)), length))
    return _harmonics(_phase(pitch + pitch * vibrato // (60 * PEAK), length), {1000: 8, 2000: 2})


def _organ(rng: np.random.Generator, pitch: int, length: int) -> Array:
    return _harmonics(_phase(pitch, length), {1000: 30, 3000: 15, 5000: 12, 7000: 10, 9000: 8})


def _bell(rng: np.random.Generator, pitch: int, length: int) -> Array:
    strike = 1023 - _beat(rng, length, 2000, 3500)
    return _harmonics(_phase(pitch, length), {1000: 6, 2756: 5, 5404: 4, 8933: 3}) * strike**2


def _siren(rng: np.random.Generator, pitch: int, length: int) -> Array:
    rise = abs(2 * _beat(rng, length, 1500, 2500) - 1023)
    return _harmonics(_phase(pitch + 2 * pitch * rise // 1023, length), {1000: 6, 2000: 3, 3000: 2})


def _buzzer(rng: np.random.Generator, pitch: int, length: int) -> Array:
    saw = ((_phase(pitch, length) >> 16) & 0xFFFF) - 0x8000
    return saw * (_beat(rng, length, 5000, 9000) < 600)


def _drum(rng: np.random.Generator, pitch: int, length: int) -> Array:
    window = SAMPLE_RATE * 100 // pitch + 16  # a moving sum passes what is below SAMPLE_RATE / window
    rumble = np.cumsum(_noise(rng, length + window))
    return (rumble[window:] - rumble[:-window]) * (1023 - _beat(rng, length, 4000, 7000)) ** 2


def _shaker(rng: np.random.Generator, pitch: int, length: int) -> Array:
    hiss = np.diff(_noise(rng, length + 1))
    return hiss * (1023 - _beat(rng, length, 7000, 12000))


def _cricket(rng: np.random.Generator, pitch: int, length: int) -> Array:
    return _sine(_phase(10 * pitch, length)) * abs(2 * _beat(rng, length, 18_000, 30_000) - 1023)


# (random generator, pitch in millihertz, number of samples) -> int64 samples at any scale
TIMBRES: dict[str, Callable[[np.random.Generator, int, int], Array]] = {
    "flute": _flute,
    "organ": _organ,
    "bell": _bell,
    "siren": _siren,
    "buzzer": _buzzer,
    "drum": _drum,
    "shaker": _shaker,
    "cricket": _cricket,
}


def draw_sound(rng: np.random.Generator, name: str, length: int) -> Array:
    """``length`` samples, int16 at ``SAMPLE_RATE``, of the class's timbre over a noise floor 18 to 36 dB below it."""
    sound = TIMBRES[name](rng, int(rng.integers(180_000, 420_000)), length)
    level = int(rng.integers(4_000, 28_000))
    sound = sound * level // max(int(abs(sound).max()), 1)
    floor = level * int(rng.integers(1, 9)) // 64
    return (sound + _noise(rng, length) * floor // PEAK).astype(np.int16)
