"""`longtake train --config FILE.toml [--field value ...] [--resume | --dry-run [--gpus N] [--shape NAME]]`."""

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentError, ArgumentParser

from ..comm.launch import launch
from ..model.checkpoint import open_checkpoint
from ..model.shapes import ShapeName, published_shape
from .config import TrainConfig
from .data import count_samples
from .dry_run import report
from .trainer import train


@dataclass(frozen=True)
class Flags:
    """What is asked of the command, beside the run's settings.

    gpus, shape and image_size belong to dry_run: None and 448 stand for the grid's ranks, the model's own shape and
    448 pixels.
    """

    resume: bool
    dry_run: bool
    gpus: int | None
    shape: ShapeName | None
    image_size: int


RESUME = (
    "Continue from the newest checkpoint in `out`, on any number of ranks. Learning rates, weight_decay, betas and all "
    "other settings are those given now; another seed, or data of another size, is refused."
)
PLACEHOLDERS = {"model": Path("IN"), "data": Path("DATA"), "out": Path("OUT")}  # in a dry run that names none


def main(argv: Sequence[str]) -> None:
    """Parse, then train on the ranks that torchrun started, or on ring x ulysses of them started here.

    Raises ValueError for a config file or a flag that cannot be used.
    """
    config, flags = parse(argv)
    world_size = int(os.environ.get("WORLD_SIZE", config.ring * config.ulysses))
    if flags.dry_run:
        print(dry_run(config, flags, world_size))
    else:
        timeout = timedelta(seconds=config.deadline)
        launch(run, config, flags.resume, world_size=world_size, timeout=timeout)


def parse(argv: Sequence[str]) -> tuple[TrainConfig, Flags]:
    """The run that the arguments ask for, and what to do with it. A flag overrides the file's field."""
    parser = ArgumentParser(prog="longtake train", parser_mode="toml", description=__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="TOML file with any of the fields below.")
    parser.add_argument("--resume", action="store_true", help=RESUME)
    parser.add_argument("--dry_run", action="store_true", help="Check the run and print what a rank holds of it.")
    parser.add_argument("--gpus", type=int, help="Ranks of the dry run; the grid's, or torchrun's.")
    parser.add_argument("--shape", choices=get_args(ShapeName), help="Model of the dry run, in place of --model's.")
    parser.add_argument("--image_size", type=int, default=448, help="Pixels of its frames: 448 or 384.")
    parser.add_class_arguments(TrainConfig)
    flags = [_with_underscores(arg) for arg in argv]
    if "--dry_run" in flags:
        parser.set_defaults(PLACEHOLDERS)
    try:
        _check_config_exists(flags)
        settings: dict[str, Any] = vars(parser.parse_args(flags))
    except ArgumentError as error:
        raise ValueError(f"{' '.join(argv)}: {' '.join(str(error).split())}") from error
    del settings["config"]
    asked = Flags(**{f.name: settings.pop(f.name) for f in fields(Flags)})
    if not asked.dry_run and (asked.gpus is not None or asked.shape is not None):
        raise ValueError("--gpus and --shape are for --dry-run: the ranks and the model of a run are what they are")
    return TrainConfig(**settings), asked


def _with_underscores(arg: str) -> str:
    """--batch-size is --batch_size; what follows the = stays."""
    name, equals, value = arg.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else arg


def _check_config_exists(flags: Sequence[str]) -> None:
    """jsonargparse takes the name of a file that is not there for TOML."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(flags)[0].config
    if path is not None and not path.is_file():
        raise ValueError(f"{path}: no such config file")


def dry_run(config: TrainConfig, flags: Flags, world_size: int) -> str:
    """The page of `longtake train --dry-run`. Where there are data, samples are counted, and none is read.

    Raises ValueError for what cannot run, or a model that is neither in its folder nor named by its shape.
    """
    world_size = world_size if flags.gpus is None else flags.gpus
    config.resolve(data=config.num_groups(world_size), num_samples=None)  # what cannot run is said first
    if flags.shape is not None:
        name, model = f"{flags.shape}, {flags.image_size} pixels", published_shape(flags.shape, flags.image_size)
    elif (config.model / "config.json").is_file():
        name, (model, _) = str(config.model), open_checkpoint(config.model)
    else:
        raise ValueError(
            f"{config.model} has no config.json: name a checkpoint with --model, or one of the published shapes with "
            f"--shape: {', '.join(get_args(ShapeName))}"
        )
    num_samples = count_samples(config) if config.data.exists() else None
    return report(config, model, name=name, world_size=world_size, num_samples=num_samples)


def run(config: TrainConfig, resume: bool) -> None:
    """One rank's part."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    train(config, continue_run=resume)
