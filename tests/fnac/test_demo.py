"""The demo end to end on a tiny setting, its pictures and its report."""

from __future__ import annotations

import base64
import io
import json
import re

import pytest
import soundfile
import torch
from PIL import Image

from fnac import demo as demo_module
from fnac.demo import compare, demo, margin

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TINY = {
    "train": 16, "val": 4, "test": 5, "single": 12, "encoder_epochs": 1, "epochs": 2, "warmup_epochs": 1,
    "batch_size": 8, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, demo(str(folder), **TINY)


def test_table_and_results(run):
    folder, table = run
    assert list(table) == ["FNAC", "NCE alone", "untrained", "object only", "centre", "whole frame", "oracle"]
    kept = json.loads((folder / "results.json").read_text())
    assert kept["scores"] == table
    assert kept["settings"]["train"] == 16
    assert kept["upsampling"] == "bicubic"


def test_report_needs_nothing_else(run):
    folder, _ = run
    text = (folder / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)  # four letters that encoded bytes may well spell
    sounds = [base64.b64decode(s.partition("base64,")[2]) for s in sources if s.startswith("data:audio/wav")]
    pictures = [base64.b64decode(s.partition("base64,")[2]) for s in sources if s.startswith("data:image/png")]
    assert len(sounds) == len(pictures) - 1 == 5  # each clip once, and the curves
    assert all(soundfile.info(io.BytesIO(sound)).frames == 8_000 for sound in sounds)
    for picture in pictures:
        Image.open(io.BytesIO(picture)).verify()
    for words in ("NCE alone", "supervised", "oracle", "bicubic"):
        assert words in text


def test_the_picture_shows_each_clip_once(run):
    """Five clips in two rows of three: the last place is empty."""
    picture = Image.open(run[0] / "examples.png").convert("L")
    width, height = picture.size
    assert picture.crop((2 * width // 3 + 2, height // 2 + 2, width, height)).getextrema() == (255, 255)


def test_a_second_run_uses_what_is_there(run, monkeypatch):
    folder, table = run

    def not_again(*_, **__):
        raise AssertionError("the image encoder was trained again")

    monkeypatch.setattr(demo_module, "warm_up", not_again)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("best.ckpt")}
    report = (folder / "results.json").read_text()
    assert demo(str(folder), **TINY) == table
    assert json.loads((folder / "results.json").read_text())["seconds"] == json.loads(report)["seconds"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("best.ckpt")} == before


def test_the_shared_warm_up_changes_nothing(run, tmp_path):
    """Without warm-up, NCE alone is trained in one go."""
    whole = tmp_path / "run"
    demo(str(whole), **{**TINY, "warmup_epochs": 0})
    assert not (whole / "warm-up").exists()
    wanted, got = (torch.load(f / "nce-alone" / "last.ckpt", weights_only=True) for f in (whole, run[0]))
    assert got["epoch"] == wanted["epoch"] == 1
    torch.testing.assert_close(got["state_dict"], wanted["state_dict"], rtol=0, atol=0)
    assert got["callbacks"]["History"] == wanted["callbacks"]["History"]


def test_a_warm_up_may_be_all_of_the_training(tmp_path):
    folder = tmp_path / "run"
    table = demo(str(folder), **{**TINY, "epochs": 1, "warmup_epochs": 2})
    assert table["FNAC"] == table["NCE alone"]
    assert torch.load(folder / "warm-up" / "last.ckpt", weights_only=True)["epoch"] == 0


def test_another_setting_needs_another_folder(run):
    folder, _ = run
    with pytest.raises(FileExistsError, match="other settings"):
        demo(str(folder), **{**TINY, "seed": 1})
    (folder / "settings.json").write_text('{"seed": 0')
    with pytest.raises(FileExistsError, match="other settings"):
        demo(str(folder), **TINY)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"val": 0}, "val is 0; it should be at least 1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"train": 4}, "train is 4, "),
        ({"single": 8}, "single 8; train and nine tenths of single should be at least batch_size, which is 8"),
        ({"seed": -1}, "seed must be at least 0 and less than 2[*][*]32, got -1"),
        ({"warmup_epochs": -1}, "warmup_epochs is -1; it should be at least 0"),
    ],
)
def test_what_cannot_be_trained_or_scored_is_told_first(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        demo(str(tmp_path / "run"), **{**TINY, **setting})
    assert not (tmp_path / "run").exists()


def row(ap50, pointing):
    return {"ap50": ap50, "pointing": pointing}


def test_words_follow_the_numbers():
    table = {
        "FNAC": row(0.9, 0.8), "NCE alone": row(0.5, 0.79), "untrained": row(0.3, 0.2), "object only": row(0.1, 0.5),
        "centre": row(0.0, 0.4), "whole frame": row(0.0, 0.4), "oracle": row(1.0, 1.0),
    }  # fmt: skip
    assert "AP50: +60.0 points against untrained" in margin(table)
    assert "pointing accuracy: +30.0 points against object only" in margin(table)
    assert "FNAC's terms helped" in compare(table, clips=400)
    assert "NCE alone does as well" in compare({**table, "NCE alone": row(0.9, 0.8)}, clips=400)
    assert "AP50 FNAC 90.0, NCE alone 88.0" in compare({**table, "NCE alone": row(0.88, 0.8)}, clips=400)
    assert "NCE alone does better" in compare({**table, "FNAC": row(0.2, 0.79)}, clips=400)
