"""Videos to frames and sounds: which frame, which samples, under which name, and what is said where that fails.

The videos show grey that gets lighter by ``STEP`` with each frame, and hold a tone in their left channel that begins
after a second of silence.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from fnac.audio import MediaError, load_audio
from fnac.cli import main
from fnac.data import extract as module
from fnac.data.extract import extract
from fnac.data.layout import ClipFolder, list_clips, read_ids

FPS, FRAMES, STEP = 25, 50, 5
SIZE = (64, 48)
TONE, RATE = 440, 44_100
VGG = "zpWuikVorYg_000032"


def make_video(
    path: Path,
    codec: str | None = "mpeg4",
    sound: str | None = "aac",
    *,
    picture_delay: float = 0,
    sound_delay: float = 0,
    b_frames: int = 0,
    amplitude: float = 0.5,
) -> None:
    """Two seconds in the format of the suffix."""
    with av.open(str(path), "w") as container:
        # Both streams must be there before the first packet.
        encoders = [] if codec is None else [add_picture(container, codec, picture_delay, b_frames)]
        if sound is not None:
            encoders.append(add_sound(container, sound, sound_delay, amplitude))
        for encode in encoders:
            container.mux(encode())


def add_picture(container, codec: str, delay: float, b_frames: int):
    # The encoders would take a lighter frame for another scene, which can be decoded alone.
    threshold = {"mpeg4": "1000000000", "libx264": "0"}.get(codec)
    stream = container.add_stream(codec, rate=FPS, options={"sc_threshold": threshold} if threshold else {})
    stream.width, stream.height = SIZE
    stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
    stream.codec_context.gop_size, stream.codec_context.max_b_frames = 6, b_frames

    def encode() -> list:
        packets = []
        for index in range(FRAMES):
            grey = np.full((SIZE[1], SIZE[0], 3), STEP * index, np.uint8)
            grey[:, : SIZE[0] // 4] = 0  # the left is black, so that a turned picture shows
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = index + round(delay * FPS), Fraction(1, FPS)
            packets += stream.encode(frame)
        return packets + stream.encode()

    return encode


def add_sound(container, codec: str, delay: float, amplitude: float):
    rate = 48_000 if codec == "libopus" else RATE
    stream = container.add_stream(codec, rate=rate, layout="stereo")

    def encode() -> list:
        time = np.arange(2 * rate) / rate
        samples = np.zeros((2 * rate, 2), np.float32)
        samples[:, 0] = amplitude * np.sin(2 * np.pi * TONE * time) * (time >= 1)
        packets = []
        for begin in range(0, 2 * rate, 960):
            part = samples[begin : begin + 960].reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(part, format="flt", layout="stereo")
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), begin + round(delay * rate)
            packets += stream.encode(frame)
        return packets + stream.encode()

    return encode


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "made.mp4"
    make_video(path)
    return path


@pytest.fixture
def videos(tmp_path, video):
    """Put copies of a video under names into a folder."""

    def put(*names: str) -> Path:
        for name in names:
            (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(video, tmp_path / "videos" / name)
        return tmp_path / "videos"

    return put


def run(folder: Path, name: str = "clips", **options) -> Path:
    """Extract in this process; the folder of clips."""
    root = folder.parent / name
    extract(folder, root, **{"workers": 0, "progress": False} | options)
    return root


def index_of(image: Image.Image) -> int:
    return round(float(np.asarray(image.convert("L"))[8:-8, -12:-4].mean()) / STEP)


def frame_index(root: Path, name: str) -> int:
    with Image.open(root / "frames" / f"{name}.jpg") as image:
        return index_of(image)


def onset(root: Path, name: str) -> float:
    """When the tone begins, in seconds."""
    sound, rate = soundfile.read(root / "audio" / f"{name}.wav")
    return int(np.argmax(abs(sound) > 0.1)) / rate


def contents(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.suffix in {".jpg", ".wav"}}


@pytest.mark.parametrize(
    ("suffix", "codec", "sound"),
    [
        ("mp4", "mpeg4", "aac"),
        ("mp4", "libx264", "aac"),
        ("MKV", "mpeg4", "aac"),
        ("webm", "libvpx", "libopus"),
        ("avi", "mpeg4", "pcm_s16le"),
        ("mov", "mpeg4", "pcm_s16le"),
    ],
)
def test_the_middle_frame_and_the_sound_of_a_video(tmp_path, suffix, codec, sound):
    if not {codec, sound} <= av.codecs_available:
        pytest.skip(f"PyAV has no {codec} or {sound} here")
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos" / f"{VGG}.{suffix}", codec, sound)
    root = run(tmp_path / "videos")
    assert frame_index(root, VGG) == FRAMES // 2
    with Image.open(root / "frames" / f"{VGG}.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", SIZE)
    info = soundfile.info(root / "audio" / f"{VGG}.wav")
    assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
    assert 2 <= info.duration < 2.06  # codecs fill their last block up
    assert onset(root, VGG) == pytest.approx(1, abs=0.03)
    waveform, rate = load_audio(root / "audio" / f"{VGG}.wav")
    second = waveform[int(1.25 * rate) : int(1.75 * rate)].numpy()
    assert np.argmax(abs(np.fft.rfft(second))) * 2 == TONE
    assert abs(second).max() == pytest.approx(0.25, rel=0.1)  # the mean of a tone and silence
    (clip,) = list_clips(ClipFolder(str(root))).clips
    assert clip.name == VGG


@pytest.mark.parametrize(("moment", "index"), [(0, 0), (0.12, 3), (0.139, 3), (1.0, 25), (1.99, 49)])
def test_the_frame_on_screen_at_a_moment(videos, moment, index):
    assert frame_index(run(videos("a.mp4"), moment=moment), "a") == index


def test_every_frame_is_found_where_some_depend_on_later_ones(tmp_path):
    """Such a file leads to the next frame that can be decoded alone, after the ones before it."""
    make_video(tmp_path / "a.mp4", b_frames=2)
    for index in range(FRAMES):
        image, *_ = module._read(tmp_path / "a.mp4", module.Settings(index / FPS, None, None))
        assert index_of(image) == index


def test_a_moment_after_the_end_is_an_error_that_says_how_long_the_video_is(videos):
    with pytest.raises(MediaError, match=r"a\.mp4: there is no frame at 2\.0 s, for it lasts 2 s"):
        run(videos("a.mp4"), moment=2)


def test_own_sample_rate_and_frame_size(videos):
    own, small = run(videos("a.mp4"), "own", sample_rate=None), run(videos("a.mp4"), "small", frame_size=24)
    large = run(videos("a.mp4"), "large", frame_size=480)
    sizes = [Image.open(root / "frames" / "a.jpg").size for root in (own, small, large)]
    assert sizes == [SIZE, (32, 24), SIZE]
    assert soundfile.info(own / "audio" / "a.wav").samplerate == RATE
    # Resampling before writing is the same as resampling when reading.
    before, _ = load_audio(small / "audio" / "a.wav")
    after, _ = load_audio(own / "audio" / "a.wav", sample_rate=16_000)
    assert len(before) == len(after)
    assert abs(before - after).max() < 1e-4


@pytest.mark.parametrize(("sound_delay", "picture_delay", "begin"), [(0.4, 0, 1.4), (0, 0.4, 0.6)])
def test_the_sound_begins_with_the_picture(tmp_path, sound_delay, picture_delay, begin):
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos" / "a.mkv", sound_delay=sound_delay, picture_delay=picture_delay)
    root = run(tmp_path / "videos")
    assert onset(root, "a") == pytest.approx(begin, abs=0.03)
    assert frame_index(root, "a") == FRAMES // 2


def test_channels_are_cut_off_at_one_before_they_are_averaged(tmp_path):
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos" / "loud.mkv", sound="pcm_f32le", amplitude=4)
    sound, _ = soundfile.read(run(tmp_path / "videos", sample_rate=None) / "audio" / "loud.wav")
    assert np.abs(sound).max() == pytest.approx(0.5, abs=1e-4)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
def test_a_sound_that_is_not_finite_is_named(tmp_path):
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos" / "odd.mkv", sound="pcm_f32le", amplitude=np.inf)
    with pytest.raises(MediaError, match=r"odd\.mkv: its sound holds NaN or infinite samples"):
        run(tmp_path / "videos")


def test_frames_before_a_cut_do_not_count(tmp_path, video):
    """Cutting without encoding keeps the frames since the last that can be decoded alone, and says not to show them."""
    (tmp_path / "videos").mkdir()
    with (
        av.open(str(video)) as source,
        av.open(str(tmp_path / "videos" / "a.mp4"), "w", options={"avoid_negative_ts": "disabled"}) as target,
    ):
        streams = {stream: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            cut = round(0.8 / packet.time_base)
            if packet.dts is not None and (packet.stream.type == "video" or packet.pts >= cut):
                packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, streams[packet.stream]
                target.mux(packet)
    root = run(tmp_path / "videos")
    assert frame_index(root, "a") == 20 + 15
    assert onset(root, "a") == pytest.approx(0.2, abs=0.03)


def test_pictures_of_turned_phones_are_upright(tmp_path, video):
    content = bytearray(video.read_bytes())
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, SIZE[1] << 16, 0, 1 << 30)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(content)
    with Image.open(run(tmp_path / "videos") / "frames" / "a.jpg") as image:
        assert image.size == SIZE[::-1]
        rows = np.asarray(image.convert("L")).mean(axis=1)
    assert rows[:10].max() < 20  # the left side, to the right of the top after a quarter turn clockwise
    assert rows[-10:].min() > 100


def test_a_list_chooses_videos_and_names_clips_and_what_it_has_no_video_for_is_told(tmp_path, videos, capsys):
    folder = videos("zpWuikVorYg_32.mp4", "sub/-x_uikVorY9_000007.MP4", "other.mp4", "._other.mp4", "other.txt")
    (tmp_path / "list.csv").write_text("zpWuikVorYg,32,elk bugling,test\n-x_uikVorY9,7,a,test\naaaaaaaaaaa,1,b,test\n")
    root = run(folder, ids=tmp_path / "list.csv")
    names = ["-x_uikVorY9_000007", VGG]
    assert sorted(path.stem for path in contents(root)) == sorted(2 * names)
    assert f"1 of the 3 clips of {tmp_path / 'list.csv'} have no video" in capsys.readouterr().out
    assert read_ids(root / "missing.txt") == ["aaaaaaaaaaa_000001"]
    videos("aaaaaaaaaaa_1.mp4")
    run(folder, ids=tmp_path / "list.csv")
    assert not (root / "missing.txt").exists()
    assert "1 clips extracted, 2 were there already" in capsys.readouterr().out


def test_a_list_without_any_video_is_an_error(tmp_path, videos):
    (tmp_path / "list.txt").write_text("b\nc\n")
    with pytest.raises(ValueError, match=r"ids: none of the 2 clips of .*list\.txt \(b, c\) has a video in .*videos"):
        run(videos("a.mp4"), ids=tmp_path / "list.txt")
    assert not (tmp_path / "clips").exists()


def test_only_what_is_not_there_is_extracted(videos):
    root = run(videos("a.mp4", "b.mp4"))
    before = contents(root)
    run(videos("c.mp4"))
    assert {path: time for path, time in contents(root).items() if path.stem != "c"} == before
    (root / "audio" / "b.wav").unlink()
    run(videos())
    after = contents(root)
    assert len(after) == 6
    assert {path.stem for path in before if after[path] != before[path]} == {"b"}


def test_clips_extracted_otherwise_are_not_mixed(videos):
    root = run(videos("a.mp4"))
    before = contents(root)
    with pytest.raises(FileExistsError, match=r"clips extracted with moment='middle' \(asked for 1\.0\)"):
        run(videos("b.mp4"), moment=1)
    assert contents(root) == before
    assert json.loads((root / "extract.json").read_text()) == {
        "moment": "middle", "sample_rate": 16_000, "frame_size": None,
    }  # fmt: skip


@pytest.mark.parametrize("writer", ["fnac.data.extract.write_wav", "PIL.Image.Image.save"])
def test_an_interruption_leaves_no_half_files(videos, monkeypatch, writer):
    def interrupt(*arguments, **_) -> None:
        next(path for path in arguments if isinstance(path, Path)).write_bytes(b"half")
        raise KeyboardInterrupt

    folder = videos("a.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(writer, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    left = [path for path in (folder.parent / "clips").rglob("*") if path.is_file()]
    assert {path.suffix for path in left} <= {".json", ".wav"}
    assert not [path for path in left if path.read_bytes() == b"half"]
    assert len(contents(run(folder))) == 2


def test_videos_that_cannot_be_read_are_named_and_the_others_extracted(videos, capsys):
    folder = videos("a.mp4", "d.mp4")
    for name in ("broken.mp4", "._a.mp4"):
        (folder / name).write_bytes(b"no video")
    make_video(folder / "cut.avi")
    os.truncate(folder / "cut.avi", (folder / "cut.avi").stat().st_size // 2)
    make_video(folder / "mute.mp4", sound=None)
    make_video(folder / "blind.mov", codec=None)
    make_video(folder / "unknown.avi")
    (folder / "unknown.avi").write_bytes((folder / "unknown.avi").read_bytes().replace(b"FMP4", b"ZZZZ"))
    root = folder.parent / "clips"
    with pytest.raises(MediaError, match=r"^5 of 7 videos .*missing\.txt; the first: cannot read video .*blind\.mov: "):
        run(folder)
    assert {path.stem for path in contents(root)} == {"a", "d"}
    assert "2 clips extracted" in capsys.readouterr().out
    reasons = dict(line.split("\t") for line in (root / "missing.txt").read_text().splitlines())
    assert list(reasons) == read_ids(root / "missing.txt") == ["blind", "broken", "cut", "mute", "unknown"]
    assert "broken.mp4: Invalid data found" in reasons["broken"]
    assert "cut.avi: it is damaged or cut off" in reasons["cut"]
    assert "mute.mp4: it has no audio stream" in reasons["mute"]
    assert "blind.mov: it has no video stream" in reasons["blind"]
    assert "unknown.avi: it has no video stream that can be decoded" in reasons["unknown"]


def test_a_sound_of_any_length_does_not_fill_the_memory(videos, monkeypatch):
    monkeypatch.setattr("fnac.audio.MAX_SAMPLES", 2000)
    with pytest.raises(MediaError, match=r"the first: cannot read sound .*a\.mp4: 2048 samples .* are too many"):
        run(videos("a.mp4"))


def test_processes_extract_the_same_as_one(videos, monkeypatch):
    folder = videos("a.mp4", "b.mp4", "c.mp4")
    (folder / "broken.mp4").write_bytes(b"no video")
    roots = []
    monkeypatch.setattr(module, "CLIPS_PER_PROCESS", 2)
    for workers in (0, 2):
        roots.append(folder.parent / f"clips_{workers}")
        with pytest.raises(MediaError, match=r"1 of 4 videos .*broken\.mp4"):
            extract(folder, roots[-1], workers=workers, progress=False)
    one, several = ({p.relative_to(root): p.read_bytes() for p in contents(root)} for root in roots)
    assert len(one) == 6
    assert several == one


def test_sigterm_ends_the_processes_too(videos, monkeypatch):
    folder = videos(*(f"{number}.mp4" for number in range(40)))
    monkeypatch.setattr(module, "CLIPS_PER_PROCESS", 20)

    def told(reasons, **_):
        for reason in reasons:
            signal.raise_signal(signal.SIGTERM)
            yield reason

    monkeypatch.setattr(module, "tqdm", told)
    with pytest.raises(SystemExit) as exit_:
        run(folder, workers=2)
    assert exit_.value.code == 143
    assert multiprocessing.active_children() == []


def test_two_videos_of_a_clip_are_an_error_that_names_both(videos):
    folder = videos("zpWuikVorYg_32.mp4", "sub/zpWuikVorYg_000032.webm")
    with pytest.raises(ValueError, match=r"videos: two are of clip zpWuikVorYg_0*32, .*there should be one") as error:
        run(folder)
    assert "Yg_32.mp4" in str(error.value)
    assert "Yg_000032.webm" in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moment": -1}, r'moment must be "middle" or seconds from 0 on, got -1\.0'),
        ({"moment": float("nan")}, "moment must be .* got nan"),
        ({"moment": "first"}, "moment must be .* got 'first'"),
        ({"sample_rate": 0}, "sample_rate must be None or 1000 to 768000 Hz, got 0"),
        ({"frame_size": 0}, "frame_size must be None or at least 1, got 0"),
        ({"workers": -1}, "workers must be None or at least 0, got -1"),
    ],
)
def test_a_bad_parameter_is_named_with_its_value(videos, options, message):
    folder = videos("a.mp4")
    with pytest.raises(ValueError, match=message):
        run(folder, **options)
    assert not (folder.parent / "clips").exists()


def test_the_command(videos, tmp_path, monkeypatch, capsys):
    videos(f"{VGG}.mp4")
    monkeypatch.chdir(tmp_path)
    command = ["extract", "videos", "clips", "--progress=false"]
    main([*command, "--moment=1.2", "--sample_rate=null", "--frame_size=24"])
    assert "clips: 1 clips extracted" in capsys.readouterr().out
    assert frame_index(Path("clips"), VGG) == 30
    assert soundfile.info(f"clips/audio/{VGG}.wav").samplerate == RATE
    with pytest.raises(SystemExit, match=r"^fnac: root: clips holds clips extracted with moment=1\.2"):
        main(command)
    for folder, message in (("nowhere", "must be a folder, got 'nowhere'"), ("clips", r"clips holds none; .*\.mp4")):
        with pytest.raises(SystemExit, match=f"^fnac: videos.*{message}"):
            main(["extract", folder, "other"])
    Path("videos/broken.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit, match=r"^fnac: 1 of 2 videos could not be extracted, see .*broken\.mp4"):
        main(["extract", "videos", "other", "--progress=false"])
    assert (Path("other") / "frames" / f"{VGG}.jpg").is_file()
