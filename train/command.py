"""`longtake train --config FILE.toml [--field value ...] [--resume]`."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from ..comm.launch import launch
from .config import TrainConfig
from .trainer import train


def main(argv: Sequence[str]) -> None:
    """Parse, then train on the ranks that torchrun started, or on ring x ulysses of them started here."""
    parser = ArgumentParser(prog="longtake train", parser_mode="toml", description=__doc__)
    parser.add_argument("--config", action="config", help="TOML file with any of the fields below.")
    parser.add_argument("--resume", action="store_true", help="Continue from the newest checkpoint in `out`.")
    parser.add_class_arguments(TrainConfig)
    flags = [arg.replace("-", "_").replace("__", "--", 1) if arg.startswith("--") else arg for arg in argv]
    if "--config" in flags and not (path := Path([*flags, ""][flags.index("--config") + 1])).is_file():
        raise ValueError(f"{path}: no such config file")
    fields = vars(parser.parse_args(flags))
    resume = fields.pop("resume")
    del fields["config"]
    config = TrainConfig(**fields)
    world_size = int(os.environ.get("WORLD_SIZE", config.ring * config.ulysses))
    launch(run, config, resume, world_size=world_size)


def run(config: TrainConfig, resume: bool) -> None:
    """One rank's part."""
    if not config.data.exists():
        raise ValueError(f"{config.data}: no such data file")
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    train(config, continue_run=resume)
