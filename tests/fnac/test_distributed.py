"""Two processes on the CPU: shards, seeds, scores and resuming as with one."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections import Counter

import pytest
import torch
from lightning.pytorch import Trainer

from fnac.data.layout import ClipFolder

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
)

SCRIPT = """
    import json, os, signal, sys
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from fnac.callbacks import BestAndLast
    from fnac.data.datamodule import ClipData
    from fnac.data.layout import ClipFolder
    from fnac.training import Localization

    PREPARED = {"batch_size": 4, "image_size": 48, "clip_seconds": 0.25}

    class Notes(Callback):
        def __init__(self):
            self.steps = []

        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            loss, draw = outputs["loss"].item(), torch.rand(()).item()
            self.steps.append({"epoch": trainer.current_epoch, "names": batch["name"], "loss": loss, "draw": draw})

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4 and trainer.global_rank == 1:
                signal.raise_signal(signal.SIGTERM)

    if __name__ == "__main__":
        root, folder, ckpt_path, negatives, *stop = sys.argv[1:]
        model = Localization(dim=16, image_stages=1, audio_stages=1, warmup_epochs=1, negatives=negatives)
        notes = Notes()
        data = ClipData(root, **PREPARED)
        saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [Stop(), BestAndLast(dirpath=folder)] if stop else [notes, saving]
        trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, callbacks=callbacks,
                          max_epochs=2, enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(model, data, ckpt_path=ckpt_path or None, weights_only=True)
        scores = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        trainer.test(model, ClipData(test=ClipFolder(root + "/test", annotations=root + "/test/annotations.json",
                                                     negatives="mismatched"), **PREPARED), verbose=False)
        tested = {"results": model.results, "confidence": model.clip_scores["model"]["confidence"].tolist()}
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()
        with open(f"{folder}/rank{trainer.global_rank}.json", "w") as file:
            json.dump({"steps": notes.steps, "scores": scores, "weights": weights, "tested": tested}, file)
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory, generated):
    """Trains two epochs of three steps in two processes; returns the folder and what each rank noted."""
    script = tmp_path_factory.mktemp("script") / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def run(ckpt_path="", negatives="process", *stop):
        folder = tmp_path_factory.mktemp("run")
        command = [sys.executable, str(script), str(generated), str(folder), str(ckpt_path), negatives, *stop]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        if stop:
            return folder, []
        return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]

    return run


@pytest.fixture(scope="module")
def trained(launch):
    return launch()


def test_each_process_trains_on_its_own_clips_with_its_own_random_numbers(trained):
    _, ranks = trained
    for epoch in range(2):
        seen = Counter(n for rank in ranks for step in rank["steps"] if step["epoch"] == epoch for n in step["names"])
        assert len(seen) == 24
        assert set(seen.values()) == {1}
    draws = [step["draw"] for rank in ranks for step in rank["steps"]]
    assert len(set(draws)) == len(draws) == 12


def test_processes_end_with_the_same_weights_and_scores(trained):
    _, ranks = trained
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["scores"] == ranks[1]["scores"]


def test_sharded_scores_are_those_of_one_process(trained, tmp_path, make_model, make_clips):
    """9 validation clips on two ranks: a score over padded shards would count one twice."""
    folder, ranks = trained
    single = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    (scores,) = single.validate(
        make_model(), make_clips(), ckpt_path=folder / "step=6.ckpt", weights_only=True, verbose=False
    )
    assert ranks[0]["scores"] == pytest.approx({name: scores[name] for name in ranks[0]["scores"]}, abs=1e-5)


def test_every_process_has_the_tests_of_all_clips(trained, tmp_path, generated, make_model, make_clips):
    folder, ranks = trained
    test = ClipFolder(f"{generated}/test", annotations=f"{generated}/test/annotations.json", negatives="mismatched")
    model, single = make_model(), Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    single.test(model, make_clips(test=test), ckpt_path=folder / "step=6.ckpt", weights_only=True, verbose=False)
    assert len(model.clip_scores["model"]["confidence"]) == 14
    for rank in ranks:
        assert rank["tested"]["confidence"] == pytest.approx(
            model.clip_scores["model"]["confidence"].tolist(), abs=1e-5
        )
        for row, scores in model.results.items():
            assert rank["tested"]["results"][row] == pytest.approx(scores, abs=1e-4), row


def test_a_resumed_epoch_goes_on_on_every_rank(trained, launch):
    folder, ranks = trained
    _, resumed = launch(folder / "step=4.ckpt")
    for rank, whole in zip(resumed, ranks, strict=True):
        assert rank["steps"] == whole["steps"][4:]
        assert torch.equal(torch.tensor(rank["weights"]), torch.tensor(whole["weights"]))


def test_one_process_does_not_go_on_with_the_shares_of_two(trained, make_model, make_clips, tmp_path):
    folder, _ = trained
    alone = Trainer(accelerator="cpu", max_epochs=9, logger=False, default_root_dir=tmp_path, enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"trainer\.num_nodes is 1, but the checkpoint was trained in 2 process"):
        alone.fit(
            make_model(warmup_epochs=1), make_clips(batch_size=4), ckpt_path=folder / "step=4.ckpt", weights_only=True
        )


def test_sigterm_to_one_process_stops_all_after_the_same_step(trained, launch):
    _, ranks = trained
    folder, _ = launch("", "process", "stop")
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 4
    _, resumed = launch(folder / "last.ckpt")
    for rank, whole in zip(resumed, ranks, strict=True):
        assert rank["steps"] == whole["steps"][4:]
        assert rank["weights"] == whole["weights"]


def test_processes_may_share_one_loss(trained, launch):
    """Each step's loss is that of the clips of both, so both have the same; on its own each has another."""
    _, ranks = launch(negatives="all")
    losses = [[step["loss"] for step in rank["steps"]] for rank in ranks]
    assert losses[0] == losses[1]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    _, apart = trained
    assert apart[0]["steps"][0]["loss"] != apart[1]["steps"][0]["loss"]


EVALUATE = """
    import signal, sys
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Callback
    from fnac.callbacks import BestAndLast
    from fnac.data.datamodule import ClipData
    from fnac.training import Localization

    how, root = sys.argv[1:]

    class Stop(Callback):
        def stop(self, trainer, *_):
            if trainer.global_rank == 1:
                signal.raise_signal(signal.SIGTERM)

        on_test_batch_end = on_predict_batch_end = stop

        def on_validation_batch_end(self, trainer, *_):
            assert trainer.sanity_checking == (how == "fit")
            self.stop(trainer)

    if __name__ == "__main__":
        model = Localization(dim=16, image_stages=1, audio_stages=1)
        trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, callbacks=[Stop(), BestAndLast()],
                          max_epochs=1, enable_progress_bar=False, enable_model_summary=False)
        getattr(trainer, how)(model, datamodule=ClipData(root, batch_size=1, image_size=48, clip_seconds=0.25))
        print("done")
"""


@pytest.mark.parametrize("how", ["fit", "validate", "test", "predict"])
def test_sigterm_to_one_process_ends_all_where_nothing_is_trained_yet(tmp_path, generated, how):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(EVALUATE))
    command = [sys.executable, str(script), how, str(generated)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert "done" not in done.stdout
