"""Packed text: documents that lie end to end in a safetensors file, written as a stream and read by stretches.

The file has tokens int32 [N], cu_seqlens int64 [num_documents + 1] and, where they are not all 1, the tokens' weights
in the loss, loss_weight float32 [N].
"""

import json
import math
import os
import shutil
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .sample import Sample, SampleError


class PackedDataset:
    """Stretches of `context` tokens of a packed file (the last may be shorter). Tokens stay on disk until read.

    A document that the edge of a stretch cuts goes on as another document.
    """

    def __init__(self, path: str | Path, *, context: int) -> None:
        self.path, self.context = Path(path), context
        if not self.path.is_file():
            raise SampleError(f"{self.path}: no such file")
        try:
            with safe_open(self.path, "pt") as file:
                self._names = set(file.keys())
                if not {"tokens", "cu_seqlens"} <= self._names:
                    raise SampleError(f"{self.path}: has {sorted(self._names)}, not tokens and cu_seqlens")
                [self.num_tokens] = file.get_slice("tokens").get_shape()
                self._cu_seqlens: Tensor = file.get_tensor("cu_seqlens")
        except SafetensorError as error:
            raise SampleError(
                f"{self.path}: not a safetensors file, or truncated ({error}); longtake pack writes one"
            ) from error
        first, last = self._cu_seqlens[[0, -1]].tolist()
        if (first, last) != (0, self.num_tokens):
            raise SampleError(f"{self.path}: cu_seqlens from {first} to {last} for {self.num_tokens} tokens")

    def __len__(self) -> int:
        return math.ceil(self.num_tokens / self.context)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"stretch {index} of {len(self)}")
        start = index * self.context
        end = min(start + self.context, self.num_tokens)
        with safe_open(self.path, "pt") as file:
            tokens = file.get_slice("tokens")[start:end].long()
            weighted = "loss_weight" in self._names
            weight = file.get_slice("loss_weight")[start:end] if weighted else torch.ones(end - start)
        first = torch.searchsorted(self._cu_seqlens, start, right=True)
        inside = self._cu_seqlens[first : torch.searchsorted(self._cu_seqlens, end)].unique()
        return Sample(
            tokens,
            weight,
            frame_starts=torch.empty(0, dtype=torch.int64),
            cu_seqlens=torch.tensor([start, *inside.tolist(), end]) - start,
            source=f"{self.path}: stretch {index}",
        )


class PackedWriter:
    """Writes a packed file piece by piece; it is there, whole, when the `with` ends without an error.

    Pieces wait on disk beside it: the header, which comes first, says how many there were. In memory are the places
    of the documents alone.
    """

    def __init__(self, path: str | Path, *, weighted: bool = False) -> None:
        self.path, self.num_tokens = Path(path), 0
        self._cu_seqlens = array("q", [0])
        with ExitStack() as parts:
            self._tokens = parts.enter_context(TemporaryFile(dir=self.path.parent))
            self._weights = parts.enter_context(TemporaryFile(dir=self.path.parent)) if weighted else None
            self._parts = parts.pop_all()

    @property
    def num_documents(self) -> int:
        """Documents that have ended."""
        return len(self._cu_seqlens) - 1

    def write(self, tokens: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Tokens int [n] of the present document, and their weights float [n] where the file has them."""
        if self._weights is not None:
            given = 0 if weights is None else len(weights)
            if weights is None or given != len(tokens):
                raise ValueError(f"{given} weights for {len(tokens)} tokens")
            self._weights.write(weights.astype("<f4").tobytes())
        self._tokens.write(tokens.astype("<i4").tobytes())
        self.num_tokens += len(tokens)

    def end_document(self) -> None:
        self._cu_seqlens.append(self.num_tokens)

    def __enter__(self) -> "PackedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._parts:
            if kind is None:
                self._assemble()

    def _assemble(self) -> None:
        assert self._cu_seqlens[-1] == self.num_tokens, "the last document has not ended"
        edges = np.frombuffer(self._cu_seqlens, np.int64).astype("<i8").tobytes()
        sizes = {"cu_seqlens": ("I64", 8, len(self._cu_seqlens)), "tokens": ("I32", 4, self.num_tokens)}
        if self._weights is not None:
            sizes["loss_weight"] = ("F32", 4, self.num_tokens)
        header, begin = {}, 0
        for name, (dtype, width, length) in sizes.items():
            header[name] = {"dtype": dtype, "shape": [length], "data_offsets": [begin, begin + width * length]}
            begin += width * length
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # what follows is aligned
        unfinished = self.path.with_name(f"{self.path.name}.part")
        with unfinished.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text + edges)
            for part in (self._tokens, self._weights):
                if part is not None:
                    part.seek(0)
                    shutil.copyfileobj(part, file, 1 << 20)
        os.replace(unfinished, self.path)


def write_packed(path: str | Path, documents: Iterable[Tensor], weights: Iterable[Tensor] | None = None) -> None:
    """Write documents (int [T] each) and the weights of their tokens in the loss (float [T] each, else 1).

    Raises ValueError for weights that are not as many as the tokens.
    """
    with PackedWriter(path, weighted=weights is not None) as writer:
        pairs = zip(documents, repeat(None)) if weights is None else zip(documents, weights, strict=True)
        for document, weight in pairs:
            writer.write(document.numpy(), None if weight is None else weight.numpy())
            writer.end_document()
