"""Sharded checkpoints with torch.distributed.checkpoint, that load at any world size.

A checkpoint folder holds config.json, the tokenizer, and step-N/ folders of shards. A folder under its final name
is complete: it is written as step-N.part and renamed. What starts from a checkpoint reads official ones as well.
"""

import shutil
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from transformers import PreTrainedTokenizerBase

from ..comm.mesh import Mesh
from .chat import load_tokenizer
from .config import ModelConfig
from .official import fill_from_official, official_tokenizer
from .official_config import is_official, official_config
from .vlm import VisionLanguageModel


@dataclass(frozen=True)
class Progress:
    """step: optimizer steps done; consumed: samples taken from the data; skipped: bad ones among them.

    What makes the samples' order (train/mixture.py): seed; sizes, samples in each source of the data; counts, those
    that an epoch takes of each.
    """

    step: int = 0
    consumed: int = 0
    skipped: int = 0
    seed: int = 0
    sizes: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()


ORDER = {"seed": "seed", "sizes": "numbers of samples in data", "counts": "numbers of samples in an epoch"}


def complete_steps(folder: Path) -> list[Path]:
    """The complete step-N folders, oldest first; none where the folder is not there."""
    return sorted(p for p in folder.glob("step-*") if p.suffix != ".part")


def latest(folder: Path) -> Path:
    """The newest complete step-N of a checkpoint folder. Raises ValueError where there is none."""
    steps = complete_steps(folder)
    if not (folder / "config.json").is_file() or not steps:
        raise ValueError(f"{folder} is not a checkpoint: expected config.json and a step-N folder in it")
    return steps[-1]


def open_checkpoint(folder: Path) -> tuple[ModelConfig, PreTrainedTokenizerBase]:
    """Config and tokenizer of a checkpoint folder, ours or an official one. Raises ValueError for what is neither."""
    if is_official(folder):
        tokenizer = official_tokenizer(folder)
        return official_config(folder, tokenizer), tokenizer
    latest(folder)  # before anything looks for its own files in a folder that is no checkpoint
    return ModelConfig.load(folder), load_tokenizer(folder)


def save(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    progress: Progress,
    mesh: Mesh,
) -> Path:
    """Write step-N of `folder`; every rank calls it. Without an optimizer it cannot be resumed, only loaded."""
    final = folder / f"step-{progress.step:06d}"
    part = final.with_name(final.name + ".part")
    if mesh.rank == 0:
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed while it saved
    mesh.barrier()
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        state["optimizer"] = {"state": get_optimizer_state_dict(model, optimizer)["state"]}
        state["progress"] = {k: torch.tensor(v) for k, v in vars(progress).items()}
        state["rng"] = {str(mesh.rank): torch.get_rng_state()}
    _dcp_call(dcp_save, state, part, mesh)
    mesh.barrier()
    if mesh.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    mesh.barrier()
    return final


def load_model(
    folder: Path, model: VisionLanguageModel, mesh: Mesh | None = None, *, new: Collection[str] = ()
) -> None:
    """Fill the model's parameters from a checkpoint folder: an official one, or the newest step of ours.

    What a rank holds of FSDP2's shards (DTensor) is filled in place; beside it there are two stored tensors at most,
    whole ones where one rank wrote them.
    new: names of parameters that the checkpoint does not have, which stay as they are.
    Raises ValueError where the checkpoint is of a model with other parameters, as in the middle of low-rank training.
    """
    if is_official(folder):
        fill_from_official(folder, model, new=new)
        return
    path, parameters = latest(folder), get_model_state_dict(model)
    state = {"model": {name: parameter for name, parameter in parameters.items() if name not in new}}
    written = {key for key in FileSystemReader(path).read_metadata().state_dict_metadata if key.startswith("model.")}
    if others := sorted(written ^ {f"model.{name}" for name in state["model"]}):
        raise ValueError(f"{path} is of another model, or of an unfinished low-rank stage: {others[0]} does not match")
    _dcp_call(load, state, path, mesh)
    set_model_state_dict(model, parameters | state["model"])


def read_progress(folder: Path, begin: Progress, mesh: Mesh) -> Progress:
    """Where the newest checkpoint in `folder` stands. begin: where the run that continues from it would begin.

    Raises ValueError for one that was saved for loading only, or whose samples come in another order.
    """
    path = latest(folder)
    keys: dict[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
    if "progress.step" not in keys:
        raise ValueError(f"{path} has no optimizer state (it is a finished stage): start a new run from it")
    if "progress.seed" not in keys:
        raise ValueError(f"{path} does not say in what order its samples come, it is too old: start a new run from it")
    tensors = {k: torch.empty(keys[f"progress.{k}"].size, dtype=torch.int64) for k in vars(begin)}
    _dcp_call(load, {"progress": tensors}, path, mesh)
    values: dict[str, Any] = {k: tuple(v.tolist()) if v.dim() else int(v) for k, v in tensors.items()}
    found = Progress(**values)
    for name, meaning in ORDER.items():
        if (was := getattr(found, name)) != (now := getattr(begin, name)):
            raise ValueError(
                f"{path} was written with {meaning} {was}, this run has {now}: its samples would come in another "
                "order; set it back, or start a new run in another folder"
            )
    return found


def resume(folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
    """Put the newest checkpoint in `folder` back: parameters, the optimizer's moments, the random state.

    Learning rates, weight decay and betas stay those of `optimizer`.
    """
    path = latest(folder)
    whole = get_optimizer_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": get_model_state_dict(model), "optimizer": {"state": whole["state"]}}
    if f"rng.{mesh.rank}" in FileSystemReader(path).read_metadata().state_dict_metadata:  # else other ranks wrote it
        state["rng"] = {str(mesh.rank): torch.get_rng_state()}
    _dcp_call(load, state, path, mesh)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, whole | state["optimizer"])
    if "rng" in state:
        torch.set_rng_state(state["rng"][str(mesh.rank)])


def _dcp_call(call: Any, state: dict[str, Any], path: Path, mesh: Mesh | None) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # by us, where one rank is enough
        try:
            call(state, checkpoint_id=path, no_dist=mesh is None or mesh.world_size == 1)
        except CheckpointException as error:  # a BaseException, which nobody expects
            rank, (reason, _) = next(iter(error.failures.items()))
            raise ValueError(f"{path}: {call.__name__} failed on rank {rank}: {reason}") from error
