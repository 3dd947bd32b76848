"""The ``fnac`` command as a user calls it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from fnac.cli import COMMANDS, main
from fnac.training import Localization

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
)

MODEL = ["--model.dim=16", "--model.image_stages=1", "--model.audio_stages=1"]
DATA = ["--data.batch_size=8", "--data.image_size=48", "--data.clip_seconds=0.25"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture
def run(tmp_path, monkeypatch, generated):
    monkeypatch.chdir(tmp_path)

    def command(name, *options):
        main([name, f"--data.root={generated}", *MODEL, *DATA, *QUIET, *options])

    return command


def test_fit_validate_test_predict(run, tmp_path, generated, capsys):
    run("fit", "--trainer.max_epochs=2", "--trainer.precision=32-true")
    (folder,) = (tmp_path / "runs").glob("*/version_0")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (folder / "config.yaml").is_file()

    best = f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}"
    run("validate", best)
    capsys.readouterr()
    run("test", best, "--results=scores.json", "--model.object_alpha=0.4")
    printed = capsys.readouterr().out
    for word in ("bicubic", "7 clips", "centre", "whole frame", "object only", "oracle", "model + objects"):
        assert word in printed
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["upsampling"] == "bicubic"
    assert scores["clips"] == 7
    assert 0 <= scores["scores"]["model"]["auc"] <= 1

    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[0] == "row,clip,positive,ciou,pointing,adaptive_ciou,confidence"
    rows = [line.split(",") for line in lines[1:]]
    assert len(rows) == 7 * len(scores["scores"])
    of_model = [row for row in rows if row[0] == "model"]
    assert [row[1] for row in of_model] == [f"test_{i:06d}" for i in range(7)]
    assert np.mean([float(row[3]) for row in of_model]) == pytest.approx(scores["scores"]["model"]["ciou"])
    assert scores["input"] == {"image_size": 48, "sample_rate": 16_000, "clip_seconds": 0.25}

    # The checkpoint says what its weights mean and how clips were prepared, so evaluation need not repeat it.
    main(["test", f"--data.root={generated}", *QUIET, best, "--results=again.json"])
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["scores"]["model"] == scores["scores"]["model"]
    assert again["input"] == scores["input"]
    with pytest.raises(
        SystemExit, match=r"--data\.image_size is 64, but .* trained with 48: give --data.image_size 48"
    ):
        run("test", best, "--data.image_size=64")
    with pytest.raises(
        SystemExit, match=r"--model\.dim is 8, but .*best\.ckpt was trained with 16: leave the flag out"
    ):
        run("test", best, "--model.dim=8")

    run("test", best, "--results=few.json", "--trainer.limit_test_batches=2", "--data.batch_size=2")
    assert json.loads((tmp_path / "few.json").read_text())["clips"] == 4

    run("predict", best, "--predictions.output_dir=maps")
    written = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert len(written) == 14
    assert np.load(tmp_path / "maps" / written[0]).shape == (224, 224)
    assert Image.open(tmp_path / "maps" / written[1]).size == (224, 224)


def test_negatives_are_scored_apart_and_counted(run, tmp_path, generated, capsys):
    test = [f"--data.test.root={generated}/test", f"--data.test.annotations={generated}/test/annotations.json"]
    run("test", *test, "--data.test.negatives=silent,mismatched", "--results=scores.json")
    printed = capsys.readouterr().out
    assert "7 clips and 14 negatives" in printed
    assert "max F1" in printed
    assert "mIoU" not in printed
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["clips"], scores["negatives"]) == (7, 14)
    assert scores["scores"]["oracle"]["ap"] == pytest.approx(scores["scores"]["oracle"]["ap50"])
    assert (tmp_path / "scores.csv").read_text().count("+silence,0.0,0.0,") == 7 * len(scores["scores"])
    with pytest.raises(SystemExit, match=r"negatives is 'quiet'; it should be silent, mismatched, both, or a csv file"):
        run("test", *test, "--data.test.negatives=quiet")
    with pytest.raises(SystemExit, match=r"--results should be a \.json file, got 'scores\.csv'"):
        run("test", "--results=scores.csv")


def test_another_score_may_choose_the_best_epoch(run, tmp_path):
    run("fit", "--trainer.max_epochs=2", "--best_by=pointing")
    (best,) = tmp_path.glob("runs/*/*/checkpoints/best.ckpt")
    kept = torch.load(best, weights_only=True)["callbacks"]
    assert kept["BestAndLast"]["monitor"] == "val/pointing"
    with pytest.raises(
        SystemExit, match=r"score \(--best_by\) is 'miou'; validation clips of this kind have ap50, ciou"
    ):
        run("fit", "--best_by=miou")
    with pytest.warns(
        UserWarning, match=r"best epoch so far was chosen by val/pointing; by val/ap50 the choice begins"
    ):
        run("fit", "--trainer.max_epochs=3", f"--ckpt_path={best.with_name('last.ckpt')}")
    assert len(list(tmp_path.glob("runs/*/*/checkpoints/best.ckpt"))) == 2


def test_validation_says_how_maps_became_pixels(run, capsys):
    run("validate", "--model.upsampling=bilinear_align_corners")
    assert "maps brought to pixels by bilinear_align_corners interpolation" in capsys.readouterr().out


def test_a_finished_run_is_continued_with_more_epochs(run, tmp_path):
    run("fit", "--trainer.max_epochs=1", "--seed_everything=5")
    (last,) = tmp_path.glob("runs/*/version_0/checkpoints/last.ckpt")
    for flag, before in (("--seed_everything", 5), ("--data.batch_size", 8)):
        with pytest.raises(SystemExit, match=f"{flag} is 6, but the checkpoint was trained with {before}"):
            run("fit", "--trainer.max_epochs=2", f"--ckpt_path={last}", f"{flag}=6")
    run("fit", "--trainer.max_epochs=2", f"--ckpt_path={last}")
    assert len(list(tmp_path.glob("runs/*/*/checkpoints/last.ckpt"))) == 2


def test_unreadable_media_are_named(run, tmp_path, generated):
    broken = tmp_path / "broken"
    shutil.copytree(generated, broken)
    (broken / "test" / "audio" / "test_000003.wav").write_bytes(b"no sound")
    with pytest.raises(SystemExit, match=r"cannot read sound .*test_000003\.wav"):
        run("test", f"--data.root={broken}")
    (broken / "test" / "frames" / "test_000002.png").unlink()
    with pytest.raises(SystemExit, match=r"test_000002 \(frame\)"):
        run("test", f"--data.root={broken}")


def test_training_and_predicting_on_a_folder_as_users_have_it(tmp_path, monkeypatch):
    """Frames of several formats and sizes, sounds of several rates and lengths, a file that is broken, one missing."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder in ("frames", "audio"):
        (tmp_path / "clips" / folder).mkdir(parents=True)
    names = [f"clip_{i:06d}" for i in range(12)]
    forms = [("RGB", "jpg", (90, 50)), ("L", "png", (31, 64)), ("RGBA", "png", (48, 48)), ("CMYK", "jpeg", (33, 57))]
    for i, name in enumerate(names):
        mode, suffix, size = forms[i % len(forms)]
        Image.new(mode, size, int(rng.integers(256))).save(tmp_path / "clips" / "frames" / f"{name}.{suffix}")
        rate, channels, seconds = [(44_100, 2, 0.5), (8_000, 1, 0.05), (16_000, 1, 3.0)][i % 3]
        sound = rng.uniform(-1, 1, (round(rate * seconds), channels))
        soundfile.write(tmp_path / "clips" / "audio" / f"{name}.wav", sound, rate)
    (tmp_path / "clips" / "audio" / f"{names[3]}.wav").write_bytes(b"RIFF")
    (tmp_path / "train.csv").write_text("".join(f"{name},7\n" for name in [*names[:9], "clip_lost"]))
    (tmp_path / "test.txt").write_text("".join(f"{name}\n" for name in names[9:]))

    clips = ["--data.train.root=clips", "--data.train.ids=train.csv", "--data.batch_size=3", *DATA[1:]]
    with pytest.raises(SystemExit, match=r"clips lack files: clip_lost \(frame and sound\)"):
        main(["fit", *clips, *MODEL, *QUIET])
    with pytest.warns(UserWarning, match="1 unreadable training clips were skipped"):
        main(["fit", *clips, *MODEL, *QUIET, "--data.on_bad_clip=skip", "--trainer.max_epochs=1"])
    (last,) = tmp_path.glob("runs/*/version_*/checkpoints/last.ckpt")
    tested = ["--data.test.root=clips", "--data.test.ids=test.txt", *DATA, *QUIET, f"--ckpt_path={last}"]
    main(["predict", *tested, "--predictions.output_dir=maps"])
    assert sorted(path.stem for path in (tmp_path / "maps").glob("*.npy")) == names[9:]


@pytest.mark.parametrize("content", ["hello, this is no checkpoint", "", None, {"model": {"weight": torch.zeros(1)}}])
def test_a_file_that_is_no_checkpoint_is_named(run, tmp_path, content):
    path = tmp_path / "best.pth"
    if isinstance(content, dict):
        torch.save(content, path)
        reason = "is no checkpoint of `fnac fit`; weights alone are given as --model.init_from"
    elif content is None:
        reason = "No such file or directory"
    else:
        path.write_text(content)
        reason = "cannot be read as a checkpoint"
    with pytest.raises(SystemExit, match=rf"^fnac: .*{reason}") as exit_:
        run("test", f"--ckpt_path={path}")
    assert str(path) in str(exit_.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "there is no command 'fitt'; there are fit, validate, test, predict, make-data"),
        (["fit"], "train: there are no train clips"),
        (["fit", "--data.root=nowhere"], "root: nowhere holds no generated data set"),
        (["fit", "--model.tau=0"], "tau is 0.0; it should be positive"),
        (["fit", "--seed_everything=-1"], r"--seed_everything must be at least 0 and less than 2\*\*32, got -1"),
        (["fit", "--seed_everything=4294967296"], r"--seed_everything must be .* less than 2\*\*32, got 4294967296"),
        (["fit", "--trainer.max_epochs=-5"], "`max_epochs` must be"),
        (["fit", "--data.train.audio=null"], r"train\.root is missing"),
        (["test", "--results=scores.txt"], r"--results should be a \.json file, got 'scores\.txt'"),
        (["test", "--results=folder/scores.json"], r"folder/scores\.csv is a folder; it should be a file"),
        (["test", "--results=file/scores.json"], "File exists: 'file'"),
        (["check-leakage", "a.txt", "b.txt"], r"No such file or directory: 'a\.txt'"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "scores.csv").mkdir(parents=True)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=f"^fnac: .*{message}"):
        main(arguments)


def test_a_box_that_cannot_be_is_told_with_its_file_and_entry(run, tmp_path, generated):
    (tmp_path / "boxes.json").write_text('[{"file": "test_000000", "class": "bell", "bbox": [[0, 0, 112, 112]]}]')
    test = [f"--data.test.root={generated}/test", "--data.test.annotations=boxes.json"]
    with pytest.raises(SystemExit, match=r"^fnac: boxes\.json, entry 0: ValueError: box \[0, 0, 112, 112\] should be"):
        run("test", *test)


@pytest.mark.parametrize(
    ("command", "next_time"), [("demo", "goes on"), ("extract", "goes on"), ("make-data", "begins anew")]
)
def test_interrupted_by_the_keyboard_it_says_so_and_no_more(monkeypatch, capsys, command, next_time):
    def interrupted():
        raise KeyboardInterrupt  # not by a signal, which a process in the background may ignore

    monkeypatch.setitem(COMMANDS, command, interrupted)
    with pytest.raises(SystemExit) as exit_:
        main([command])
    assert exit_.value.code == 130
    assert capsys.readouterr().err == f"fnac: stopped by SIGINT; the same command {next_time}\n"


def test_a_scheduler_needs_an_optimizer(run):
    with pytest.raises(SystemExit, match=r"^fnac: --lr_scheduler is given without --optimizer"):
        run("fit", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1")


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_what_another_optimizer_would_ignore_is_an_error(run, name):
    with pytest.raises(SystemExit, match=rf"^fnac: --model\.{name} is 0\.5, but --optimizer is .* --optimizer\.{name}"):
        run("fit", "--optimizer=Adam", f"--model.{name}=0.5")


def test_a_run_that_is_told_to_stop_does_not_end_as_one_that_is_done(run, tmp_path, monkeypatch, capsys):
    told = [os.kill]

    def tell(self, *_):
        if told:
            told.pop()(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Localization, "on_train_batch_end", tell)
    with pytest.raises(SystemExit) as exit_:
        run("fit", "--trainer.max_epochs=2")
    assert exit_.value.code == 143
    assert "stopped by SIGTERM; give the run's last.ckpt as --ckpt_path to go on" in capsys.readouterr().err
    (last,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 1


def test_processes_that_torchrun_started_are_all_asked_for(run, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        SystemExit, match=r"^fnac: --trainer.devices x --trainer.num_nodes is 1, but torchrun started 2"
    ):
        run("fit")


def test_scores_must_not_end_with_processes(run):
    with pytest.raises(SystemExit, match=r"^fnac: --trainer\.strategy .* should be ddp"):
        run("test", "--trainer.devices=2", "--trainer.strategy=ddp_spawn")


@pytest.mark.parametrize("command", ["test", "predict"])
def test_an_evaluation_that_is_told_to_stop_does(run, tmp_path, monkeypatch, capsys, command):
    def tell(self, outputs, batch, batch_idx, *_):
        assert batch_idx == 0
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Localization, f"on_{command}_batch_end", tell, raising=False)
    with pytest.raises(SystemExit) as exit_:
        run(command, "--data.batch_size=2", *(["--predictions.output_dir=maps"] if command == "predict" else []))
    assert exit_.value.code == 143
    assert "stopped by SIGTERM; the same command begins anew" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))
    assert len(list(tmp_path.rglob("*.npy"))) == (2 if command == "predict" else 0)


def test_weights_without_an_optimizer_are_no_run_to_go_on_with(run, tmp_path):
    run("fit", "--trainer.max_steps=1")
    (last,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["optimizer_states"]  # as ModelCheckpoint(save_weights_only=True) does
    torch.save(checkpoint, "weights.ckpt")
    with pytest.raises(
        SystemExit, match=r"^fnac: weights\.ckpt holds weights and no optimizer; give it as --model\.init"
    ):
        run("fit", "--ckpt_path=weights.ckpt")


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        ([], ["--optimizer=SGD", "--optimizer.lr=1e-4"], r"betas None \(was \(0\.9, 0\.999\)\).*momentum"),
        (["--optimizer=SGD", "--optimizer.lr=0.5"], [], r"lr 0\.0001 \(was 0\.5\)"),
        ([], ["--optimizer=AdamW"], r"decoupled_weight_decay True \(was False\)"),
        ([], ["--optimizer=Adam", "--lr_scheduler=CosineAnnealingLR", "--lr_scheduler.T_max=9"], "initial_lr"),
    ],
)
def test_a_run_goes_on_with_its_own_optimizer(run, tmp_path, first, then, told):
    run("fit", "--trainer.max_steps=1", *first)
    (last,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    with pytest.raises(SystemExit, match=rf"^fnac: --optimizer or --lr_scheduler is not the checkpoint's, by .*{told}"):
        run("fit", f"--ckpt_path={last}", "--trainer.max_steps=2", *then)


def test_a_run_goes_on_with_its_schedule(run, tmp_path):
    scheduled = ["--optimizer=SGD", "--optimizer.lr=0.01", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"]
    run("fit", "--trainer.max_epochs=1", *scheduled)
    (last,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    run("fit", f"--ckpt_path={last}", "--trainer.max_epochs=2", *scheduled)


def test_a_damaged_checkpoint_is_not_scored(run, tmp_path):
    run("fit", "--trainer.max_steps=1")
    (last,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 128
    (tmp_path / "flipped.ckpt").write_bytes(content)
    with pytest.raises(SystemExit, match=r"^fnac: flipped\.ckpt is damaged: the check sum of .* is wrong"):
        run("test", "--ckpt_path=flipped.ckpt")


def test_a_generated_split_is_changed_by_single_fields(run, tmp_path):
    run("test", "--data.test.negatives=silent", "--results=scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["clips"], scores["negatives"]) == (7, 7)


def test_home_is_the_users_behind_a_flag_too(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run("test", "--results=~/scores.json")
    assert (tmp_path / "home" / "scores.json").is_file()
    assert not (tmp_path / "~").exists()


def test_no_checkpoints_where_none_are_wanted(run, tmp_path):
    run("fit", "--trainer.max_steps=1", "--trainer.enable_checkpointing=false")
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.usefixtures("run")
def test_an_unreadable_file_in_a_loaders_process_is_told_in_one_line(generated, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(generated, broken)
    for sound in (broken / "test" / "audio").iterdir():
        sound.write_bytes(b"no sound")
    with pytest.raises(SystemExit, match=r"^fnac: cannot read sound .*\.wav: .*") as exit_:
        main(["test", f"--data.root={broken}", *MODEL, *DATA, *QUIET, "--data.num_workers=1"])
    assert "\n" not in str(exit_.value)


def test_without_its_libraries_the_command_says_what_to_install():
    script = "import sys; sys.modules['jsonargparse'] = None; from fnac.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "jsonargparse" in done.stderr
    assert "pip install -e '.[train]'" in done.stderr


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    def faulty(*_, **__):
        return [][1]

    monkeypatch.setitem(COMMANDS, "make-data", faulty)
    with pytest.raises(IndexError):
        main(["make-data"])


def test_make_data_and_check_leakage(tmp_path, capsys):
    main(["make-data", str(tmp_path / "set"), "--train=2", "--val=1", "--test=1", "--single=0", "--progress=false"])
    assert (tmp_path / "set" / "train" / "annotations.json").is_file()
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "test.txt").write_text("b\nc\n")
    with pytest.raises(SystemExit, match=r"1 of the 2 .* also training clips: b"):
        main(["check-leakage", str(tmp_path / "train.txt"), str(tmp_path / "test.txt")])
    (tmp_path / "test.txt").write_text("c\n")
    main(["check-leakage", str(tmp_path / "train.txt"), str(tmp_path / "test.txt")])
    assert "no clip is in both" in capsys.readouterr().out


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "demo", "make-data", "extract", "check-leakage"):
        assert command in printed


def test_the_published_config_is_valid(tmp_path, capsys):
    main_args = ["fit", "--config", "fnac/configs/vggss.yaml", "--data.train.root", str(tmp_path), "--print_config"]
    with pytest.raises(SystemExit) as exit_:
        main(main_args)
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "image_weights: imagenet" in printed
    assert "batch_size: 256" in printed
