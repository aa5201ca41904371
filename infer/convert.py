"""`longtake convert`: an official LongVILA checkpoint becomes one of ours, one of ours an official one."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..comm.mesh import Mesh
from ..model.chat import load_tokenizer
from ..model.checkpoint import Progress, latest, load_model, save
from ..model.config import PROJECTOR_SIDES, ModelConfig
from ..model.official import load_official, save_official
from ..model.official_config import is_official
from ..model.precision import DTYPES
from ..model.vlm import VisionLanguageModel


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="longtake convert", description=__doc__)
    parser.add_argument("source", type=Path, metavar="IN", help="folder of a checkpoint; what it is says the direction")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to write, empty or not there yet")
    parser.add_argument("--dtype", choices=DTYPES, help="of all parameters (as stored)")
    official = parser.add_argument_group("of official checkpoints")
    official.add_argument(
        "--no-newline",
        action="store_false",
        dest="newline",
        help="no newline token after a frame, as the official code has it with sequence parallelism (with)",
    )
    official.add_argument(
        "--projector",
        choices=PROJECTOR_SIDES,
        help="kind of the projector; mlp_downsample_columns is the mlp_downsample of VILA 1.5 (as config.json says)",
    )
    args = parser.parse_args(argv)
    if args.target.exists() and (not args.target.is_dir() or any(args.target.iterdir())):
        raise ValueError(f"{args.target} is there already: take another folder")
    dtype = DTYPES.get(args.dtype)
    if is_official(args.source):
        from_official(args.source, args.target, dtype=dtype, newline=args.newline, projector=args.projector)
    else:
        to_official(args.source, args.target, dtype=dtype)
    print(f"wrote {args.target}")


def from_official(
    source: Path, target: Path, *, dtype: torch.dtype | None, newline: bool = True, projector: str | None = None
) -> None:
    """Write config.json, the tokenizer and step-000000. Raises ValueError as `load_official`."""
    model, tokenizer = load_official(source, dtype=dtype, newline=newline, projector=projector)
    model.config.save(target)
    tokenizer.save_pretrained(target)
    save(target, model=model, optimizer=None, progress=Progress(), mesh=Mesh(alone=True))


def to_official(source: Path, target: Path, *, dtype: torch.dtype | None) -> None:
    """Write the newest step of a checkpoint in the official layout. Raises ValueError as `load_model`."""
    stored = FileSystemReader(latest(source)).read_metadata().state_dict_metadata
    with torch.device("meta"):
        model = VisionLanguageModel(ModelConfig.load(source))
    for name, parameter in model.named_parameters():
        entry = stored.get(f"model.{name}")
        kept = entry.properties.dtype if isinstance(entry, TensorStorageMetadata) else None  # none: load_model refuses
        parameter.data = parameter.data.to(dtype or kept or parameter.dtype)
    load_model(source, model.to_empty(device="cpu"))
    save_official(target, model, load_tokenizer(source))
