"""Training steps, the warm-up, exact resume, evaluation whatever the batch size."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint

from fnac.callbacks import BestAndLast, History
from fnac.metrics import LocalizationScores
from fnac.training import MODEL, Localization
from fnac_kernels import reference

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
)


def trainer(tmp_path, *callbacks, **options):
    checkpointing = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return Trainer(
        accelerator="cpu", logger=False, callbacks=list(callbacks), enable_checkpointing=checkpointing,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, **options,
    )  # fmt: skip


def flat(model):
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def test_two_steps_through_the_kernels_equal_two_through_the_reference(tmp_path, make_model, make_clips):
    def trained(backend, dtype):
        torch.manual_seed(0)
        model = make_model(backend=backend, warmup_epochs=0, image_dropout=0.0)
        # Plain descent: Adam's first steps turn the rounding of a tiny gradient into a whole step.
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1)
        before = flat(model)
        trainer(tmp_path, max_steps=2, limit_val_batches=0, precision=dtype).fit(model, make_clips())
        assert model.global_step == 2
        return flat(model) - before

    exact = trained("reference", "64-true")
    ours, torchs = trained("cpu", "32-true"), trained("reference", "32-true")
    errors = [float((steps - exact).norm() / exact.norm()) for steps in (ours, torchs)]
    assert exact.norm() > 1e-3
    assert errors[0] <= 2 * errors[1] + 1e-6, errors


def test_warm_up_trains_nce_alone(tmp_path, make_model, make_clips):
    model, history = make_model(warmup_epochs=1, weights=(2, 100, 50, 25)), History()
    trainer(tmp_path, history, max_epochs=2, limit_val_batches=0).fit(model, make_clips())
    warm, after = history.train[:3], history.train[3:]
    assert len(after) == 3
    for entry in warm:
        assert entry["fns_audio"] == entry["tne"] == entry["fns_visual"] == 0
        assert entry["loss"] == pytest.approx(2 * entry["nce"], rel=1e-6)
    for entry in after:
        total = 2 * entry["nce"] + 100 * entry["fns_audio"] + 50 * entry["tne"] + 25 * entry["fns_visual"]
        assert entry["fns_audio"] > 0
        assert entry["loss"] == pytest.approx(total, rel=1e-5)


def test_weights_depend_on_the_seed_alone(make_model):
    first = flat(make_model(seed=3))
    torch.rand(7)
    assert torch.equal(first, flat(make_model(seed=3)))
    assert not torch.equal(first, flat(make_model(seed=4)))


SCRIPT = """
    import os, signal, sys
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from fnac.callbacks import History
    from fnac.data.datamodule import ClipData
    from fnac.training import Localization

    class Kill(Callback):
        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            if trainer.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    root, folder = sys.argv[1:]
    model = Localization(dim=16, image_stages=1, audio_stages=1, warmup_epochs=1)
    data = ClipData(root, batch_size=8, image_size=48, clip_seconds=0.25)
    saving = ModelCheckpoint(folder, filename="step", every_n_train_steps=2, save_top_k=1, enable_version_counter=False)
    Trainer(accelerator="cpu", logger=False, callbacks=[History(), saving, Kill()], max_epochs=3,
            enable_progress_bar=False, enable_model_summary=False).fit(model, data)
"""


def test_a_killed_run_goes_on_within_its_epoch_to_the_same_weights(tmp_path, generated, make_model, make_clips):
    """Three steps an epoch, a checkpoint every two, killed in the second epoch: it resumes after its first step."""
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(generated), str(tmp_path)], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert torch.load(tmp_path / "step.ckpt", weights_only=True)["global_step"] == 4

    def run(ckpt_path=None):
        model, history = make_model(warmup_epochs=1), History()
        saving = ModelCheckpoint(tmp_path / "other", filename="step", every_n_train_steps=2)
        trainer(tmp_path, history, saving, max_epochs=3).fit(
            model, make_clips(), ckpt_path=ckpt_path, weights_only=True
        )
        return model, history

    uninterrupted, whole = run()
    torch.rand(11)  # whatever else the process drew must not matter
    resumed, continued = run(tmp_path / "step.ckpt")
    assert len(whole.train) == 9
    assert continued.train == whole.train
    assert continued.val == whole.val
    for (name, ours), theirs in zip(resumed.state_dict().items(), uninterrupted.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_float64_weights_are_not_rounded_where_a_run_goes_on(tmp_path, make_model, make_clips):
    def run(ckpt_path=None):
        model, saving = make_model(), BestAndLast(dirpath=str(tmp_path / "kept"))
        options = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0, "precision": "64-true"}
        trainer(tmp_path, saving, **options).fit(model, make_clips(), ckpt_path=ckpt_path, weights_only=True)
        return flat(model)

    trained = run()
    assert not torch.equal(trained, trained.float().double())
    assert torch.equal(run(tmp_path / "kept" / "last.ckpt"), trained)


class Fail(Callback):
    """Fails, or has Lightning stop the run, where the fifth step is to begin."""

    def __init__(self, how):
        self.how = how

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 4:
            if self.how == "sigterm":
                signal.raise_signal(signal.SIGTERM)
            else:
                raise RuntimeError("failed")


@pytest.mark.parametrize(
    ("how", "step"), [("max_steps", 4), ("max_time", 1), ("sigterm", 5), ("exception", 4), ("theirs", 4)]
)
def test_a_run_stopped_within_an_epoch_goes_on_with_the_batches_left(tmp_path, make_model, make_clips, how, step):
    def run(folder, *callbacks, ckpt_path=None, **options):
        model, history = make_model(warmup_epochs=1), History()
        saving = BestAndLast("ciou", dirpath=str(tmp_path / folder))
        trainer(tmp_path, *callbacks, history, saving, **({"max_epochs": 3} | options)).fit(
            model, make_clips(), ckpt_path=ckpt_path, weights_only=True
        )
        return model, history

    path = tmp_path / "stopped" / "last.ckpt"
    if how == "max_steps":
        run("stopped", max_steps=4, max_epochs=-1)
    elif how == "max_time":
        run("stopped", max_time={"microseconds": 1})
    elif how == "sigterm":
        with pytest.raises(SystemExit):
            run("stopped", Fail(how))
    else:
        theirs = [OnExceptionCheckpoint(tmp_path)] if how == "theirs" else []
        with pytest.raises(RuntimeError, match="failed"):
            run("stopped", Fail(how), *theirs)
        path = theirs[0].ckpt_path if theirs else path
    assert torch.load(path, weights_only=True)["global_step"] == step
    resumed, continued = run("resumed", ckpt_path=path)
    uninterrupted, whole = run("whole")
    assert [entry["step"] for entry in continued.train] == list(range(1, 10))
    assert continued.train == whole.train
    assert [entry for entry in continued.val if entry["step"] % 3 == 0] == whole.val  # where it stops it validates
    assert torch.equal(flat(resumed), flat(uninterrupted))


class Stop(Callback):
    """Stops the run in the first of the second epoch's two batches of validation."""

    def __init__(self, how):
        self.how = how

    def on_validation_batch_start(self, trainer, *_):
        if trainer.global_step == 6 and self.how == "sigterm":
            signal.raise_signal(signal.SIGTERM)
        elif trainer.global_step == 6:
            raise RuntimeError("failed")


@pytest.mark.parametrize("how", ["sigterm", "exception"])
def test_a_run_stopped_while_it_validates_goes_on_with_the_whole_validation(tmp_path, make_model, make_clips, how):
    def run(folder, *callbacks, ckpt_path=None):
        model, history = make_model(warmup_epochs=1), History()
        saving = BestAndLast("ciou", dirpath=str(tmp_path / folder))
        trainer(tmp_path, *callbacks, history, saving, max_epochs=3).fit(
            model, make_clips(), ckpt_path=ckpt_path, weights_only=True
        )
        return model, history, saving

    with pytest.raises(SystemExit if how == "sigterm" else RuntimeError):
        run("stopped", Stop(how))
    path = tmp_path / "stopped" / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 6
    resumed, continued, kept = run("resumed", ckpt_path=path)
    uninterrupted, whole, best = run("whole")
    assert continued.train == whole.train
    assert continued.val == whole.val
    assert kept.best_model_score == best.best_model_score
    assert torch.equal(flat(resumed), flat(uninterrupted))


def test_checkpoints_are_written_where_they_belong(tmp_path, make_model, make_clips, monkeypatch):
    """A file brought from the folder of temporary files is copied, where that is on another disk."""

    def copied(*_):
        raise AssertionError("a file was brought from elsewhere")

    monkeypatch.setattr(shutil, "move", copied)
    trainer(tmp_path, BestAndLast(dirpath=str(tmp_path / "kept")), max_epochs=1).fit(make_model(), make_clips())
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_trial_run_keeps_nothing(tmp_path, make_model, make_clips):
    trainer(tmp_path, BestAndLast(dirpath=str(tmp_path / "kept")), fast_dev_run=True).fit(make_model(), make_clips())
    assert not list(tmp_path.rglob("*.ckpt"))


def test_accumulated_batches_draw_random_numbers_of_their_own(tmp_path, make_model, make_clips):
    draws = []

    class Draw(Callback):
        def on_train_batch_end(self, *_):
            draws.append(torch.rand(()).item())

    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    trainer(tmp_path, Draw(), **options).fit(make_model(), make_clips())
    assert len(set(draws)) == len(draws) == 6


class Interrupt(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise RuntimeError("interrupted")


def test_best_and_last_survive_an_interruption(tmp_path, make_model, make_clips):
    def checkpoints():
        return BestAndLast("ciou", dirpath=str(tmp_path / "kept"))

    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(tmp_path, Interrupt(), History(), checkpoints(), max_epochs=3).fit(make_model(), make_clips())
    last = tmp_path / "kept" / "last.ckpt"
    saving, history = checkpoints(), History()
    trainer(tmp_path, history, saving, max_epochs=3).fit(make_model(), make_clips(), ckpt_path=last, weights_only=True)
    assert sorted(path.name for path in last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert saving.best_model_score == pytest.approx(max(entry["ciou"] for entry in history.val))
    assert [entry["step"] for entry in history.val] == [3, 6, 9]


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_that_goes_on_in_another_folder_takes_the_best_epoch_along(tmp_path, make_model, make_clips, moved):
    """Each epoch scores worse than the one before, so the first stays the best."""

    def run(folder, epochs, ckpt_path=None):
        model, saving = make_model(), BestAndLast("ciou", dirpath=str(tmp_path / folder))
        model.on_validation_epoch_end = lambda: model.log("val/ciou", 1.0 - model.current_epoch)
        trainer(tmp_path, saving, max_epochs=epochs).fit(model, make_clips(), ckpt_path=ckpt_path, weights_only=True)
        return saving

    first = run("first", 2)
    saved = {name: torch.load(tmp_path / "first" / f"{name}.ckpt", weights_only=True) for name in ("best", "last")}
    assert {name: content["global_step"] for name, content in saved.items()} == {"best": 3, "last": 6}
    source = (tmp_path / "first").rename(tmp_path / "elsewhere") if moved else tmp_path / "first"
    second = run("second", 3, source / "last.ckpt")
    assert second.best_model_path == str(tmp_path / "second" / "best.ckpt")
    assert second.best_model_score == first.best_model_score
    assert (tmp_path / "second" / "best.ckpt").read_bytes() == (source / "best.ckpt").read_bytes()
    assert torch.load(tmp_path / "second" / "last.ckpt", weights_only=True)["global_step"] == 9


def test_a_best_epoch_that_is_lost_is_named(tmp_path, make_model, make_clips):
    def run(folder, epochs, ckpt_path=None):
        saving = BestAndLast("ciou", dirpath=str(tmp_path / folder))
        trainer(tmp_path, saving, max_epochs=epochs).fit(make_model(), make_clips(), ckpt_path=ckpt_path)

    run("first", 1)
    (tmp_path / "first" / "best.ckpt").unlink()
    with pytest.warns(UserWarning, match=r"best\.ckpt is not there: the best of the epochs to come"):
        run("second", 2, tmp_path / "first" / "last.ckpt")
    assert (tmp_path / "second" / "best.ckpt").is_file()


def test_without_validation_there_is_no_best(tmp_path, make_model, make_clips):
    data = make_clips()
    data.folders["val"] = None
    with pytest.raises(
        ValueError, match=r"score \(--best_by\) is 'ciou', by which no epoch can be chosen without validation clips"
    ):
        trainer(tmp_path, BestAndLast("ciou"), max_epochs=1).fit(make_model(), data)


def test_without_validation_the_last_epoch_is_kept(tmp_path, make_model, make_clips):
    data = make_clips()
    data.folders["val"] = None
    trainer(tmp_path, BestAndLast(dirpath=str(tmp_path / "kept")), max_epochs=1).fit(make_model(), data)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_scores_do_not_depend_on_the_batch_size(tmp_path, make_model, make_clips, batch_size):
    model, whole = make_model(), make_clips(batch_size=7)
    trainer(tmp_path).test(model, make_clips(batch_size=batch_size), verbose=False)
    model.eval()
    batch = next(iter(whole.test_dataloader()))
    img, aud = model.model(batch["image"], batch["audio"])
    cells = reference.paired_maps(img, aud, 1.0)
    maps = torch.nn.functional.interpolate(cells[:, None], (224, 224), mode="bicubic")[:, 0]
    scores = LocalizationScores()
    scores.update(maps.detach(), batch["gt"], batch["index"])
    summary, clips = scores.compute()
    for name, value in summary.items():
        assert model.results[MODEL][name] == pytest.approx(float(value), abs=1e-4), name
    for name, values in clips.items():
        assert torch.allclose(model.clip_scores[MODEL][name], values, atol=1e-4), name
    assert model.results["oracle"]["pointing"] == 1
    assert model.results["whole frame"]["ap50"] == 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true", "bf16-mixed"])
def test_an_object_encoder_of_its_own_has_the_precision_of_the_trainer(tmp_path, make_model, make_clips, precision):
    torch.save(make_model().model.imgnet.state_dict(), tmp_path / "encoder.pt")
    model = make_model(object_weights=str(tmp_path / "encoder.pt"))
    trainer(tmp_path, precision=precision).test(model, make_clips(), verbose=False)
    assert 0 <= model.results["object only"]["ciou"] <= 1


def test_a_checkpoint_is_loaded_without_a_trainer(tmp_path, make_model, make_clips):
    model, fitting = make_model(), trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    fitting.fit(model, make_clips())
    fitting.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Localization.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(flat(loaded), flat(model))
    image, audio = torch.zeros(2, 3, 48, 48), torch.zeros(2, 1, 257, 20)
    assert torch.equal(loaded.eval().maps(image, audio), model.eval().maps(image, audio))


def test_object_guided_map_mixes_both(tmp_path, make_model, make_clips):
    tables = {}
    for alpha in (0.0, 0.4, 1.0):
        model = make_model(object_alpha=alpha)
        trainer(tmp_path).test(model, make_clips(), verbose=False)
        tables[alpha] = model.results
    assert tables[1.0]["model + objects"] == pytest.approx(tables[1.0][MODEL])
    assert tables[0.0]["model + objects"] == pytest.approx(tables[0.0]["object only"])
    assert tables[0.4]["model + objects"] != tables[0.4][MODEL]


def test_up_sampling_is_a_choice(tmp_path, make_model, make_clips):
    tables = []
    for mode in ("bicubic", "bilinear_align_corners"):
        model = make_model(upsampling=mode)
        trainer(tmp_path).test(model, make_clips(), verbose=False)
        tables.append(model.results[MODEL])
    assert tables[0] != tables[1]


def test_both_memory_formats_give_the_same_model(make_model):
    image, audio = torch.randn(2, 3, 48, 48), torch.randn(2, 1, 257, 20)
    first, second = (make_model(channels_last=choice).eval() for choice in (True, False))
    img, aud = first(image, audio)
    assert img.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close((img, aud), second(image, audio), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_epochs": -1}, "warmup_epochs must be at least 0, got -1"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0, got nan"),
        ({"audio_dropout": 1.5}, "audio_dropout must be between 0 and 1, got 1.5"),
        ({"object_alpha": 1.5}, "object_alpha must be between 0 and 1, got 1.5"),
        ({"tau": 0.0}, "tau"),
        ({"weights": (1, 2)}, "weights"),
    ],
)
def test_settings_are_checked(make_model, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_model(**options)


def test_global_seed_is_no_concern_of_the_model(make_model):
    seed_everything(1, verbose=False)
    first = flat(make_model())
    seed_everything(2, verbose=False)
    assert torch.equal(first, flat(make_model()))
