"""The tensors of a folder of safetensors files: read slice by slice, written file by file.

Hugging Face's layout: `model.safetensors`, or several files and `model.safetensors.index.json`. Tensors can be FSDP2
shards (DTensor): each rank reads its own slices alone, and writing gathers one tensor at a time.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorFolder:
    """The tensors of a folder, by their names in it; files are mapped into memory, not read.

    Raises ValueError for a folder without safetensors, and wherever a file is not what the index or its own header
    says. A pickle is never read: it can run code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[Path, Any] = {}
        self.file_of = self._find()

    def _find(self) -> dict[str, Path]:
        index, whole = self.folder / INDEX, self.folder / WHOLE
        if index.is_file():
            try:
                places = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index}: not JSON with a weight_map in it ({error})") from error
            return {name: self.folder / file for name, file in places.items()}
        if whole.is_file():
            return dict.fromkeys(self._open(whole).keys(), whole)
        for pattern in ("*.bin", "*.pt", "*.pth"):
            if any(self.folder.glob(pattern)):
                raise ValueError(_about_pickles(self.folder, pattern))
        raise ValueError(f"{self.folder}: has neither {WHOLE} nor {INDEX}")

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a safetensors file, or truncated or missing ({error})") from error
        return self._handles[path]

    def _slice(self, name: str) -> Any:
        path = self.file_of[name]
        try:
            return self._open(path).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: has no {name}, which {INDEX} places there") from error

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises ValueError for a dtype that is not a float of 16 to 64 bits."""
        stored = self._slice(name).get_dtype()
        if stored not in DTYPES:
            raise ValueError(f"{self.file_of[name]}: {name} is of dtype {stored}, expected one of {', '.join(DTYPES)}")
        return DTYPES[stored]

    @torch.no_grad()
    def read_into(self, name: str, target: Tensor) -> None:
        """Fill a tensor of the stored shape, or what this rank holds of one; the dtype is the target's."""
        if isinstance(target, DTensor):
            for chunk in target.__create_chunk_list__():
                self._copy(name, target.to_local(), chunk.offsets)
        else:
            self._copy(name, target, [0] * target.dim())

    def _copy(self, name: str, target: Tensor, offsets: list[int] | torch.Size) -> None:
        if target.numel():
            place = tuple(slice(start, start + size) for start, size in zip(offsets, target.shape, strict=True))
            target.copy_(self._slice(name)[place])


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], *, max_file_bytes: int, write: bool) -> None:
    """Write whole tensors, and DTensors that all their ranks pass here. Only one rank may have `write` set.

    Larger sets than max_file_bytes become several files with an index. Memory is that of one file.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_file_bytes,
    )
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("*.safetensors"), *folder.glob(INDEX)):
            old.unlink()
    for file, names in split.filename_to_tensors.items():
        content = {}
        for name in names:
            tensor = tensors[name].detach()
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if write:
                content[name] = tensor.cpu().contiguous()
        if write:
            save_file(content, folder / file, {"format": "pt"})
    if write and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _about_pickles(folder: Path, pattern: str) -> str:
    code = (
        f"import glob, torch; from safetensors.torch import save_file; f = {str(folder)!r}; "
        f"t = {{k: v.clone() for p in sorted(glob.glob(f + '/{pattern}')) "
        f"for k, v in torch.load(p, map_location='cpu', weights_only=True).items()}}; "
        f"save_file(t, f + '/{WHOLE}', {{'format': 'pt'}})"
    )
    return f'{folder}: has only {pattern} files, pickles, which can run code. Convert them: python -c "{code}"'
