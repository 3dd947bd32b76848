"""The ``fnac`` command: Lightning's ``fit``, ``validate``, ``test`` and ``predict``, and the project's own."""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from fnac.audio import MediaError
from fnac.callbacks import BestAndLast
from fnac.checkpoints import read_checkpoint
from fnac.data.datamodule import READING, SAMPLING, ClipData
from fnac.data.extract import extract
from fnac.data.generate import make_data
from fnac.data.leakage import check_leakage
from fnac.demo import demo
from fnac.evaluation import Score
from fnac.files import check_writable
from fnac.prediction import PredictionWriter
from fnac.results import render, write_clips, write_results
from fnac.seeding import check_seed
from fnac.training import MODEL, Localization, accelerator, fast_precision

DESCRIPTION = """Audio-visual sound source localization with FNAC: fit, validate, test and predict as below (each with
--help), and four commands of their own: `fnac demo` trains and evaluates on generated data from nothing,
`fnac make-data FOLDER` only makes such data, `fnac extract VIDEOS FOLDER` takes a frame and the sound of each video,
`fnac check-leakage TRAIN_LIST TEST_LIST` finds test clips in training."""


class LocalizationCLI(LightningCLI):
    """Lightning's command line over the project's Lightning module and data module."""

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """A seed is a number: Lightning's own flag may also say that there is none."""
        parser.add_argument("--seed_everything", type=int, default=self.seed_everything_default, help="seed of all")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed for all, and where predictions and results go."""
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        help_ = "json file for the scores of `test`; those of each clip go into a csv beside it"
        parser.add_argument(
            "--best_by", type=Score | None, default=None, help="validation score that chooses best.ckpt"
        )
        parser.add_argument("--results", type=str, default="runs/results.json", help=help_)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Take from a checkpoint how it was trained, where the user does not say otherwise."""
        super().parse_arguments(parser, args)
        command = self.config["subcommand"]
        config = self.config[command]
        check_seed(config["seed_everything"], "--seed_everything")
        if config.get("lr_scheduler") and not config.get("optimizer"):
            raise ValueError("--lr_scheduler is given without --optimizer; both are needed, --optimizer Adam for one")
        if config.get("optimizer"):
            _refuse_settings_of_adam(config["model"])
        results = Path(config["results"])
        if results.suffix != ".json":
            raise ValueError(
                f"--results should be a .json file, got {str(results)!r}; each clip's scores go to a .csv beside it"
            )
        if command == "test":
            for written in (results, results.with_suffix(".csv")):  # rather than after hours of evaluation
                check_writable(written)
        path = config["ckpt_path"]
        if path in ("best", "last"):  # Lightning's words for what the same process has trained
            raise ValueError(f"ckpt_path must be a file, such as runs/.../checkpoints/{path}.ckpt, got {path!r}")
        if path is None or path == "hpc":
            return
        checkpoint = read_checkpoint(path)
        saved = checkpoint.get("hyper_parameters", {})
        model = {name: value for name, value in saved.items() if name in config["model"] and name != "seed"}
        data = checkpoint.get(ClipData.__qualname__, {})
        defaults = {f"model.{name}": value for name, value in model.items()}
        defaults |= {f"data.{name}": data[name] for name in READING if name in data}
        if command == "fit":
            if "optimizer_states" not in checkpoint:
                raise ValueError(
                    f"{path} holds weights and no optimizer; give it as --model.init_from to start from them"
                )
            flags = {name: "seed_everything" if name == "seed" else f"data.{name}" for name in SAMPLING}
            defaults |= {flag: data[name] for name, flag in flags.items() if name in data}
        self._subcommand_parsers[command].set_defaults(defaults)
        super().parse_arguments(parser, args)
        _refuse_other(self.config[command]["model"], model, path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With the callback that keeps checkpoints, unless none are wanted."""
        config = self.config[self.config["subcommand"]]
        if config["trainer"]["enable_checkpointing"] is not False and not config["trainer"]["barebones"]:
            self.trainer_defaults["callbacks"] = BestAndLast(config["best_by"])
        trainer = super().instantiate_trainer(**kwargs)
        started = os.environ.get("WORLD_SIZE", "") if torch.distributed.is_torchelastic_launched() else ""
        if started and int(started) != trainer.world_size:
            raise ValueError(
                f"--trainer.devices x --trainer.num_nodes is {trainer.world_size}, but torchrun started {started} "
                "processes; each would train a model of its own"
            )
        return trainer

    def before_fit(self) -> None:
        """Checkpoints hold tensors and plain values only: nothing else is unpickled."""
        self._checkpoints_are_data()

    def before_validate(self) -> None:
        """As before fitting."""
        self._checkpoints_are_data()

    def before_test(self) -> None:
        """As before fitting; the table replaces Lightning's."""
        if isinstance(self.trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                "--trainer.strategy starts processes whose scores end with them; for test it should be ddp instead of "
                "its spawn and fork kinds"
            )
        self._checkpoints_are_data()
        self.config_init["test"]["verbose"] = False

    def before_predict(self) -> None:
        """As before fitting; maps go to files, not to memory."""
        self._checkpoints_are_data()
        self.config_init["predict"]["return_predictions"] = False

    @rank_zero_only
    def after_validate(self) -> None:
        """Say what the scores depend on beside the weights."""
        print(f"maps brought to pixels by {self.config['validate']['model']['upsampling']} interpolation")

    @rank_zero_only
    def after_test(self) -> None:
        """Print the scores beside the baselines and write them to a file."""
        config, table = self.config["test"], self.model.results
        if not self.model.clip_scores:
            raise ValueError("--trainer.limit_test_batches left no clip to evaluate")
        weights = config["ckpt_path"] or config["model"]["init_from"] or "untrained"
        upsampling, scored = config["model"]["upsampling"], self.model.clip_scores[MODEL]
        positive = scored.get("positive", scored["index"] >= 0)
        clips, negatives = int((positive > 0).sum()), int((positive == 0).sum())
        count = f"{clips} clips" + (f" and {negatives} negatives" if negatives else "")
        print(f"\n{weights}: {count}, maps brought to pixels by {upsampling} interpolation; in percent:\n")
        print(render(table))
        results, of_clips = Path(config["results"]), Path(config["results"]).with_suffix(".csv")
        write_results(
            results, table, weights=weights, clips=clips, negatives=negatives, upsampling=upsampling,
            precision=str(self.trainer.precision), object_alpha=config["model"]["object_alpha"],
            object_weights=config["model"]["object_weights"], input=self.datamodule.input,
        )  # fmt: skip
        write_clips(of_clips, self.datamodule.test_set.names, self.model.clip_scores)
        print(f"\nwritten to {results}, clip by clip to {of_clips}")

    @rank_zero_only
    def after_predict(self) -> None:
        """Say where the maps are."""
        print(f"maps and pictures: {self.config['predict']['predictions']['output_dir']}")

    def _checkpoints_are_data(self) -> None:
        self.config_init[self.subcommand]["weights_only"] = True


def _refuse_settings_of_adam(given: Mapping[str, Any]) -> None:
    """Lightning's --optimizer takes the place of the model's Adam, and of its learning rate and weight decay."""
    for name in ("lr", "weight_decay"):
        if given[name] != inspect.signature(Localization).parameters[name].default:
            raise ValueError(f"--model.{name} is {given[name]}, but --optimizer is given, which has --optimizer.{name}")


def _refuse_other(given: Mapping[str, Any], trained: Mapping[str, Any], path: str) -> None:
    """Lightning takes the checkpoint's hyperparameters, whatever flags say: do not let it do so silently."""
    for name, value in trained.items():
        wanted, got = (list(v) if isinstance(v, tuple) else v for v in (value, given[name]))
        if got != wanted:
            raise ValueError(
                f"--model.{name} is {got}, but {path} was trained with {wanted}: leave the flag out, or take the "
                "checkpoint's weights alone, with --model.init_from instead of --ckpt_path"
            )


COMMANDS: dict[str, Any] = {"make-data": make_data, "extract": extract, "check-leakage": check_leakage, "demo": demo}
LIGHTNINGS = ("fit", "validate", "test", "predict")


def main(args: list[str] | None = None) -> None:
    """Run the command line; ``args`` are the process's by default."""
    words = sys.argv[1:] if args is None else args
    # The shell does so where a word begins with it, and not behind `--results=`.
    given = [re.sub(r"^(--[\w.]+=)?~(?=/|$)", rf"\1{Path.home()}", word) for word in words]
    if args is None:
        sys.argv[1:] = given  # where Lightning wants to find it
    else:
        args = given
    if not given:
        args = given = ["--help"]
    command = given[0]
    try:
        if command in COMMANDS:
            jsonargparse.auto_cli(COMMANDS, args=args, prog="fnac")
        elif command in LIGHTNINGS or command.startswith("-"):
            run_lightning(args)
        else:
            raise ValueError(f"there is no command {command!r}; there are {', '.join([*LIGHTNINGS, *COMMANDS])}")
    except (SIGTERMException, KeyboardInterrupt) as error:  # Lightning's has the status of success
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
        if command == "fit":
            remedy = "give the run's last.ckpt as --ckpt_path to go on"
        else:
            remedy = f"the same command {'goes on' if command in ('demo', 'extract') else 'begins anew'}"
        print(f"fnac: stopped by {number.name}; {remedy}", file=sys.stderr)
        sys.exit(128 + number)
    except Exception as error:
        if not _explains_itself(error):
            raise
        message = str(error).strip()
        # Of an error in a loader's process torch makes its traceback, which ends with the error's own words.
        if message.startswith("Caught "):
            message = message.rpartition(f"{type(error).__name__}: ")[2]
        sys.exit(f"fnac: {message}")


def run_lightning(args: list[str] | None) -> None:
    """Run one of Lightning's commands."""
    # Lightning's own use of torch; a fit without validation clips.
    for hint in ("isinstance.treespec, LeafSpec", "Total length of .list. across ranks is zero"):
        warnings.filterwarnings("ignore", f".*{hint}.*")
    LocalizationCLI(
        Localization,
        ClipData,
        args=args,
        seed_everything_default=0,
        parser_kwargs={"prog": "fnac", "description": DESCRIPTION},
        trainer_defaults={
            "default_root_dir": "runs",
            "max_epochs": 30,
            "accelerator": accelerator(),
            "precision": fast_precision(),
        },
        save_config_kwargs={"overwrite": True},
    )


def _explains_itself(error: Exception) -> bool:
    """Files that are not there, and what this project's code raises on purpose, need no traceback."""
    if isinstance(error, (OSError, MediaError, MisconfigurationException)):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    raised_by = frame.f_globals["__name__"].partition(".")[0]
    return isinstance(error, (ValueError, TypeError, RuntimeError)) and raised_by in ("fnac", "fnac_kernels")
