"""Checkpoints in the layout of LongVILA's official code: read straight into FSDP2 shards, and written back.

A folder holds config.json (`model_type: llava_llama`), `llm/` (Qwen2 in Hugging Face form, with the tokenizer),
`vision_tower/` (a SiglipVisionModel and its preprocessor) and `mm_projector/`. What changes results there and is in no
tensor becomes part of our config: the projector's kind, the selected layer, the newline after a frame, RoPE. Not read
are `num_video_frames` and `fps`, arguments of our commands, and `image_aspect_ratio`: images are resized, never tiled.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..comm.mesh import Mesh
from .chat import MEDIA_TOKENS
from .config import ModelConfig, VisionConfig
from .official_config import QWEN2_TEMPLATE, official_config, official_json
from .official_tensors import TensorFolder, write_tensors
from .vlm import VisionLanguageModel

PARTS = ("llm", "vision_tower", "mm_projector")  # folders, and the model's children
SENTINEL = "<vila/sentinel>"  # of the official code; added in its order, so that ids agree


def load_official(
    folder: Path,
    *,
    shard: Callable[[VisionLanguageModel], Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    newline: bool = True,
    projector: str | None = None,
) -> tuple[VisionLanguageModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of an official folder.

    shard: applies `fully_shard` before there is any memory, so that a rank never holds or reads more than its shards.
    dtype: of the parameters; None keeps each as stored. newline, projector: see `official_config`.
    Raises ValueError that names file and key for what is missing, left over, of another shape, or not supported.
    """
    tokenizer = official_tokenizer(folder)
    config = official_config(folder, tokenizer, newline=newline, projector=projector)
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    stored = _find_parameters(folder, model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype or stored[name].dtype)
    if shard is not None:
        shard(model)
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        stored[name].read_into(parameter)
    return model, tokenizer


def fill_from_official(folder: Path, model: VisionLanguageModel, *, new: Collection[str] = ()) -> None:
    """Fill the parameters of a model, whole or sharded, but for those called `new`.

    Raises ValueError as `load_official`.
    """
    stored = _find_parameters(folder, model, new=new)
    for name, parameter in model.named_parameters():
        if name not in new:
            stored[name].read_into(parameter)


def official_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `llm/`, with the media tokens and the `qwen2` chat template that the official code adds.

    A template of its own stays if it marks the answers, as training needs it and ours do.
    """
    if not (folder / "llm" / "tokenizer_config.json").is_file():
        raise ValueError(f"{folder / 'llm'}: has no tokenizer_config.json")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm", local_files_only=True)
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([t for t in (SENTINEL, *MEDIA_TOKENS.values()) if t not in known], special_tokens=True)
    if "endgeneration" not in str(tokenizer.chat_template):
        tokenizer.chat_template = QWEN2_TEMPLATE
    return tokenizer


def save_official(
    folder: Path,
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    mesh: Mesh | None = None,
    *,
    max_file_bytes: int = 4 * 2**30,
) -> None:
    """Write a model, whole or sharded over the mesh, in the official layout; every rank calls it.

    One tensor at a time is gathered, and the first rank holds those of one file. Layers of the tower behind the
    selected one, which are never computed and not kept, are written as zeros, so that no reader misses them.
    """
    first = mesh is None or mesh.rank == 0
    for part in PARTS:
        tensors: dict[str, Tensor] = dict(model.get_submodule(part).named_parameters())
        if part == "vision_tower":
            tensors |= _unused_layers(model.config.vision, tensors)
        write_tensors(folder / part, tensors, max_file_bytes=max_file_bytes, write=first)
    if first:
        tokenizer.save_pretrained(folder / "llm")
        dtype = str(model.llm.model.norm.weight.dtype).removeprefix("torch.")
        for name, values in official_json(model.config, tokenizer, dtype).items():
            (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    if mesh is not None:
        mesh.barrier()


@dataclass(frozen=True)
class _Stored:
    """A tensor in its folder."""

    files: TensorFolder
    key: str

    @property
    def dtype(self) -> torch.dtype:
        return self.files.dtype(self.key)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.files.shape(self.key)

    def read_into(self, parameter: Tensor) -> None:
        self.files.read_into(self.key, parameter)

    def __str__(self) -> str:
        return f"{self.files.file_of[self.key]}: {self.key}"


def _find_parameters(folder: Path, model: VisionLanguageModel, *, new: Collection[str] = ()) -> dict[str, _Stored]:
    """Where each parameter is. Raises ValueError for a tensor that is missing, left over or of another shape."""
    stored = {name: tensor for part in PARTS for name, tensor in _tensors_of(folder / part)}
    wanted = {name: parameter for name, parameter in model.named_parameters() if name not in new}
    for name, parameter in wanted.items():
        if name not in stored:
            part, _, key = name.partition(".")
            raise ValueError(f"{folder / part}: {key} is missing")
        if (found := stored[name].shape) != tuple(parameter.shape):
            raise ValueError(f"{stored[name]} is {list(found)}, the config makes it {list(parameter.shape)}")
    for name in sorted(stored.keys() - wanted.keys()):
        if not _is_unused(name, model.config):
            raise ValueError(f"{stored[name]} is no part of the model")
    return stored


def _tensors_of(folder: Path) -> Iterator[tuple[str, _Stored]]:
    """The model's name of each tensor, and the tensor; those of a tower have the prefix `vision_model.` or not."""
    files = TensorFolder(folder)
    for key in files.file_of:
        without = folder.name == "vision_tower" and not key.startswith("vision_model.")
        yield f"{folder.name}.{'vision_model.' if without else ''}{key}", _Stored(files, key)


def _is_unused(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is one of those in official folders that no feature and no logit depends on."""
    tower = "vision_tower.vision_model."
    if layer := re.match(rf"{tower}encoder\.layers\.(\d+)\.", name):
        return config.vision.num_selected_layers <= int(layer[1]) < config.vision.num_hidden_layers
    if name == "llm.lm_head.weight":
        return config.language.tie_word_embeddings
    buffers = (".rotary_emb.inv_freq", ".position_ids")  # old versions of transformers wrote them
    return name.startswith((f"{tower}post_layernorm.", f"{tower}head.")) or name.endswith(buffers)


def _unused_layers(config: VisionConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for the layers and the norm that a SiglipVisionModel has behind the selected layer."""
    dtype = next(iter(tensors.values())).dtype
    zeros = {
        f"vision_model.post_layernorm.{name}": torch.zeros(config.hidden_size, dtype=dtype)
        for name in ("weight", "bias")
    }
    first = "vision_model.encoder.layers.0."
    for name in [name for name in tensors if name.startswith(first)]:
        for layer in range(config.num_selected_layers, config.num_hidden_layers):
            zeros[name.replace(".0.", f".{layer}.", 1)] = torch.zeros(tensors[name].shape, dtype=dtype)
    return zeros
