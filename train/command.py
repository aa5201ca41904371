"""`longtake train --config FILE.toml [--field value ...] [--resume]`."""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from ..comm.launch import launch
from .config import TrainConfig
from .trainer import train


def main(argv: Sequence[str]) -> None:
    """Parse, then train on the ranks that torchrun started, or on ring x ulysses of them started here.

    Raises ValueError for a config file or a flag that cannot be used.
    """
    config, resume = parse(argv)
    world_size = int(os.environ.get("WORLD_SIZE", config.ring * config.ulysses))
    launch(run, config, resume, world_size=world_size)


def parse(argv: Sequence[str]) -> tuple[TrainConfig, bool]:
    """The run that the arguments ask for, and whether to continue it. A flag overrides the file's field."""
    parser = ArgumentParser(prog="longtake train", parser_mode="toml", description=__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="TOML file with any of the fields below.")
    parser.add_argument("--resume", action="store_true", help="Continue from the newest checkpoint in `out`.")
    parser.add_class_arguments(TrainConfig)
    flags = [_with_underscores(arg) for arg in argv]
    try:
        _check_config_exists(flags)
        fields = vars(parser.parse_args(flags))
    except ArgumentError as error:
        raise ValueError(f"{' '.join(argv)}: {' '.join(str(error).split())}") from error
    resume = fields.pop("resume")
    del fields["config"]
    return TrainConfig(**fields), resume


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


def run(config: TrainConfig, resume: bool) -> None:
    """One rank's part."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    train(config, continue_run=resume)
