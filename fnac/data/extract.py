"""Videos to clips on disk: one frame and the sound of each, as training and evaluation read them.

::

    root/extract.json       what the clips were extracted with
    root/frames/<id>.jpg    the frame on screen at the wanted moment, upright
    root/audio/<id>.wav     the sound from the first frame on, mono, 16 bits
    root/missing.txt        ids without a clip, and why; only if there are any

Files appear whole or not at all, and clips that have both are not made again, so an interrupted command goes on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fnac.audio import RATES, MediaError, check_rate, check_size, resampler
from fnac.data.ids import VIDEO_SUFFIXES, comparable
from fnac.data.layout import read_ids, some
from fnac.data.processes import available_cores, in_processes
from fnac.files import once_whole, write_wav
from fnac.results import write_text
from fnac.threads import one_thread

Moment = float | Literal["middle"]

JPEG_QUALITY = 95
CLIPS_PER_PROCESS = 32  # at least, for starting one takes about as long


@dataclass(frozen=True)
class Settings:
    """What clips are extracted with."""

    moment: Moment
    sample_rate: int | None
    frame_size: int | None

    def __post_init__(self) -> None:
        if self.moment != "middle" and not (isinstance(self.moment, float) and 0 <= self.moment < math.inf):
            raise ValueError(f'moment must be "middle" or seconds from 0 on, got {self.moment!r}')
        if self.sample_rate is not None and self.sample_rate not in RATES:
            raise ValueError(f"sample_rate must be None or {RATES[0]} to {RATES[-1]} Hz, got {self.sample_rate!r}")
        if self.frame_size is not None and self.frame_size < 1:
            raise ValueError(f"frame_size must be None or at least 1, got {self.frame_size!r}")


def extract(
    videos: str | Path,
    root: str | Path,
    *,
    ids: str | Path | None = None,
    moment: Moment = "middle",
    sample_rate: int | None = 16_000,
    frame_size: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Write a frame and the sound of each video of a folder, as `fnac fit` and `fnac test` read them.

    They are ROOT/frames/<id>.jpg and ROOT/audio/<id>.wav (mono, 16 bits); the id is the video's file name without its
    suffix. The sound begins with the picture: what is before is left out, silence fills up what is not there. Clips
    that have both files are left as they are, so the same command goes on where one was interrupted.

    Args:
        videos: folder with mp4, mkv, webm, avi or mov files, also in subfolders.
        root: folder to write to. ROOT/missing.txt names the ids that have no clip in the end, and says why.
        ids: file that lists the clips to extract, such as vggss.json or VGG-Sound's csv; by default all. The second in
            VGG-Sound's ids may have leading zeros in one and none in the other; clips are named as the list does.
        moment: of the frame, in seconds after the first one, or "middle" of the video.
        sample_rate: of the sounds in Hz, null for the videos' own.
        frame_size: shorter side in pixels of larger frames; null leaves them as they are.
        workers: processes; by default one for each available core, fewer for few videos. 0 works in this process. A
            script that asks for more needs the usual ``if __name__ == "__main__":``, for they are spawned.
        progress: show a progress bar.

    Raises:
        MediaError: some videos cannot be read or have no picture, no sound or no frame at the moment; the others are
            extracted.
        ValueError: an argument is out of range, there is no video, or two are of the same clip.
        FileExistsError: ``root`` holds clips that were extracted with other settings.
    """
    settings = Settings(moment if isinstance(moment, str) else float(moment), sample_rate, frame_size)
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be None or at least 0, got {workers}")
    root, found = Path(root), _find(Path(videos))
    names = sorted(path.stem for path in found.values()) if ids is None else read_ids(ids)
    present = _stems(root / "frames", ".jpg") & _stems(root / "audio", ".wav")
    wanted = [name for name in names if name not in present]
    jobs = [(name, found[comparable(name)]) for name in wanted if comparable(name) in found]
    absent = [name for name in wanted if comparable(name) not in found]
    if len(absent) == len(names):
        raise ValueError(f"ids: none of the {len(names)} clips of {ids} ({some(names)}) has a video in {videos}")
    _keep_apart(root, settings, present)
    reasons = _run(partial(_extract_one, root, settings), jobs, workers, progress)
    unreadable = {name: reason for (name, _), reason in zip(jobs, reasons, strict=True) if reason is not None}
    told = root / "missing.txt"
    _write_missing(told, dict.fromkeys(absent, f"no video in {videos}") | unreadable)
    print(f"{root}: {len(jobs) - len(unreadable)} clips extracted, {len(names) - len(wanted)} were there already")
    if absent:
        print(f"{len(absent)} of the {len(names)} clips of {ids} have no video, see {told}: {some(absent)}")
    if unreadable:
        raise MediaError(
            f"{len(unreadable)} of {len(jobs)} videos could not be extracted, see {told}; the first: "
            f"{next(iter(unreadable.values()))}"
        )


def _find(folder: Path) -> dict[str, Path]:
    """Videos by the comparable form of their ids."""
    if not folder.is_dir():
        raise ValueError(f"videos must be a folder, got {str(folder)!r}, which is none")
    found: dict[str, Path] = {}
    for place, _, files in os.walk(folder):
        for path in (Path(place, file) for file in files):
            if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith("."):
                other = found.setdefault(comparable(path.stem), path)
                if other is not path:
                    raise ValueError(f"videos: two are of clip {path.stem}, {other} and {path}; there should be one")
    if not found:
        raise ValueError(f"videos: {folder} holds none; there should be files {', '.join(sorted(VIDEO_SUFFIXES))}")
    return found


def _stems(folder: Path, suffix: str) -> set[str]:
    return {path.stem for path in folder.glob(f"*{suffix}")}


def _keep_apart(root: Path, settings: Settings, present: set[str]) -> None:
    """Write down the settings; raise if there are clips extracted with others."""
    path, wanted = root / "extract.json", asdict(settings)
    if present and path.is_file() and (found := json.loads(path.read_text())) != wanted:
        differ = [f"{k}={found.get(k)!r} (asked for {v!r})" for k, v in wanted.items() if found.get(k) != v]
        raise FileExistsError(
            f"root: {root} holds clips extracted with {', '.join(differ)}; choose another folder or empty this one"
        )
    write_text(path, json.dumps(wanted, indent=2))


def _write_missing(path: Path, missing: dict[str, str]) -> None:
    """A line for each id, with the reason behind a tab, so that the file can be read as a list; none, no file."""
    if not missing:
        path.unlink(missing_ok=True)
        return
    write_text(path, "".join(f"{name}\t{reason}\n" for name, reason in missing.items()))


def _run(
    extract_one: Callable[[str, Path], str | None], jobs: list[tuple[str, Path]], workers: int | None, progress: bool
) -> list[str | None]:
    """For each job None, or why its video cannot be read."""
    workers = min(available_cores() if workers is None else workers, len(jobs) // CLIPS_PER_PROCESS)
    with in_processes(extract_one, jobs, workers, chunksize=4) as reasons:
        return list(tqdm(reasons, total=len(jobs), desc="extracting", unit="clip", disable=not (progress and jobs)))


def _extract_one(root: Path, settings: Settings, name: str, video: Path) -> str | None:
    try:
        image, sound, rate = _read(video, settings)
    except MediaError as error:
        return str(error)
    with once_whole(root / "audio" / f"{name}.wav") as path:
        write_wav(path, sound, rate)
    with once_whole(root / "frames" / f"{name}.jpg") as path:
        image.save(path, "JPEG", quality=JPEG_QUALITY)
    return None


def _read(path: Path, settings: Settings) -> tuple[Image.Image, np.ndarray, int]:
    """A video's frame and its sound, float32 ``(samples,)``, with the rate in Hz."""
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            picture, sound = _stream(container, "video"), _stream(container, "audio")
            picture.codec_context.thread_count = 1  # the other cores have videos of their own
            begin, end, waveform, rate = _scan(path, container, picture, sound, settings.sample_rate)
            frame = _frame(container, picture, begin, end, settings.moment)
            image = frame.to_image().rotate(frame.rotation, expand=True)
    except MediaError:
        raise
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(f"cannot read video {path}: {getattr(error, 'strerror', error)}") from error
    if settings.frame_size is not None and (scale := settings.frame_size / min(image.size)) < 1:
        image = image.resize([round(scale * side) for side in image.size], Image.Resampling.BICUBIC)
    if settings.sample_rate is not None and settings.sample_rate != rate:
        resample, rate = resampler(rate, settings.sample_rate), settings.sample_rate
        with one_thread():
            waveform = resample(torch.from_numpy(waveform)).numpy()
    return image, waveform, rate


def _stream(container: Any, kind: Literal["video", "audio"]) -> Any:
    """The one that players choose."""
    stream = container.streams.best(kind)
    if stream is None or stream.codec_context is None:
        raise ValueError(f"it has no {kind} stream" + (" that can be decoded" if stream else ""))
    return stream


def _scan(path: Path, container: Any, picture: Any, sound: Any, target: int | None) -> tuple[int, int, np.ndarray, int]:
    """From when to when there is a picture, in ticks of its clock, the sound from then on, and its rate.

    Packets tell this, not what the file says of its length: some say nothing, or say that of what they were cut from.
    """
    begin, end = math.inf, -math.inf
    chunks: list[np.ndarray] = []
    rate = samples = 0
    sound_begin = None
    to_float = av.AudioResampler("fltp")  # of the same rate and channels
    for packet in container.demux(picture, sound):
        if packet.is_corrupt:
            raise ValueError("it is damaged or cut off")
        if packet.stream is picture:
            # Discarded is what comes before a cut, kept for decoding alone.
            if packet.pts is not None and not packet.is_discard:
                begin, end = min(begin, packet.pts), max(end, packet.pts + (packet.duration or 0))
            continue
        for frame in packet.decode():
            if not chunks:
                rate, sound_begin = frame.sample_rate, frame.time
                check_rate(path, rate, target)
            elif frame.sample_rate != rate:
                raise ValueError(f"the rate of its sound changes from {rate} to {frame.sample_rate} Hz")
            for part in to_float.resample(frame):
                channels = part.to_ndarray()
                if not np.isfinite(channels).all():
                    raise ValueError("its sound holds NaN or infinite samples")
                chunks.append(channels.clip(-1, 1).mean(axis=0))  # as load_audio does
            samples += frame.samples
            check_size(path, samples, 1, rate, target)
    if end < begin or not chunks:
        raise ValueError(f"its {'video' if end < begin else 'audio'} stream is empty")
    late = 0 if sound_begin is None else round((sound_begin - float(begin * picture.time_base)) * rate)
    check_size(path, samples + late, 1, rate, target)
    waveform = np.concatenate([np.zeros(max(late, 0), np.float32), *chunks])[max(-late, 0) :]
    if len(waveform) == 0:
        raise ValueError("its sound ends before its picture begins")
    return int(begin), int(end), waveform, rate


def _frame(container: Any, picture: Any, begin: int, end: int, moment: Moment) -> Any:
    """The frame on screen at the moment."""
    length = float((end - begin) * picture.time_base)
    if moment == "middle":
        wanted = begin + (end - begin) // 2
    elif moment < length:
        wanted = begin + int(moment / float(picture.time_base) + 1e-3)  # a frame's own time, rounded, is its own
    else:
        raise ValueError(f"there is no frame at {moment} s, for it lasts {length:g} s")
    # From the last frame before it that can be decoded alone; from the first, where the file leads to a later one.
    for start in (wanted, begin):
        container.seek(start, stream=picture)
        shown = None
        for frame in container.decode(picture):
            if frame.pts is not None and frame.pts > wanted:
                break
            shown = frame
        if shown is not None:
            break
    if shown is None or shown.is_corrupt:
        raise ValueError("its frame at the moment cannot be decoded")
    return shown
