"""Training data: conversations about images and videos in the LLaVA format, and packed text.

Samples are metadata. What is in a row is checked when the sample is read, before any frame is decoded; pixels are
read later, by each rank for its own frames only.
"""

import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..model.chat import Kind, encode
from ..model.media import MediaError, probe, probe_image, read_frames, read_image, sample_frames


class SampleError(ValueError):
    """A sample that cannot be trained on; the message names file, row and what is wrong. source: file and row."""

    def __init__(self, message: str, *, source: str = "") -> None:
        super().__init__(message)
        self.source = source


@dataclass(frozen=True)
class MediaItem:
    """An image, or the frames to take of a video. indices: of the frames in the file; (0,) for an image."""

    path: Path
    kind: Kind
    indices: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens of one row, without pixels.

    input_ids: int64 [T]. loss_weight: float32 [T], weight of predicting each token. source: file and row.
    frame_starts: int64 [num_frames], index of each frame's first visual token, in the order of `media`.
    cu_seqlens: int64 [num_documents + 1]; tokens of different documents do not see each other.
    """

    input_ids: Tensor
    loss_weight: Tensor
    frame_starts: Tensor
    cu_seqlens: Tensor
    source: str
    media: tuple[MediaItem, ...] = ()

    def documents(self) -> list["Sample"]:
        """The documents of a pack, each a sample of its own; a conversation is one."""
        if len(self.cu_seqlens) == 2:
            return [self]
        assert not self.media, "packs are of text"
        return [
            Sample(
                self.input_ids[start:end],
                self.loss_weight[start:end],
                self.frame_starts,
                cu_seqlens=torch.tensor([0, end - start]),
                source=self.source,
            )
            for start, end in pairwise(self.cu_seqlens.tolist())
        ]


class ConversationDataset:
    """Rows {"conversations": [{"from": "human" | "gpt", "value": text}, ...], "image" | "video": path or paths}.

    path: a JSON list of rows, or JSONL. Paths of media are relative to its folder. Only the places of the rows in
    the file are held in memory. num_frames: most frames taken of a video. max_fps: most of a second of it.
    context: most tokens.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_frame: int,
        num_frames: int,
        context: int,
        max_fps: float | None = None,
        newline_token_id: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.tokenizer, self.tokens_per_frame = tokenizer, tokens_per_frame
        self.newline_token_id = newline_token_id
        self.num_frames, self.context, self.max_fps = num_frames, context, max_fps
        self._rows = _index_rows(self.path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Raises SampleError for a row that is not as it should be, or whose media are not."""
        start, length, number = self._rows[index].tolist()
        source = f"{self.path}: row {number}"
        with self.path.open("rb") as file:
            file.seek(start)
            row = file.read(length)
        try:
            return self._sample(_parse(row), source)
        except ValueError as error:
            raise SampleError(f"{source}: {error}", source=source) from error

    def _sample(self, row: dict[str, Any], source: str) -> Sample:
        if not isinstance(row.get("conversations"), list):
            raise ValueError("no list in field 'conversations'")
        turns = row["conversations"]
        media = tuple(self._media_item(kind, path) for kind, path in _media_in_order(row, turns))
        encoded = encode(
            self.tokenizer,
            turns,
            [(item.kind, len(item.indices)) for item in media],
            tokens_per_frame=self.tokens_per_frame,
            newline_token_id=self.newline_token_id,
        )
        num_tokens = len(encoded.input_ids)
        if num_tokens > self.context:
            raise ValueError(f"{num_tokens} tokens are more than the context of {self.context}")
        return Sample(
            encoded.input_ids,
            encoded.loss_weight,
            encoded.frame_starts,
            cu_seqlens=torch.tensor([0, num_tokens]),
            source=source,
            media=media,
        )

    def _media_item(self, kind: Kind, name: str) -> MediaItem:
        path = self.path.parent / name
        if kind == "image":
            probe_image(path)
            return MediaItem(path, kind, (0,))
        video = probe(path)
        indices = sample_frames(video.num_frames, self.num_frames, fps=video.fps, max_fps=self.max_fps)
        return MediaItem(path, kind, tuple(indices))


class PackedDataset:
    """Pre-tokenised documents that lie end to end, in stretches of `context` tokens (the last may be shorter).

    path: of a safetensors file with tokens int32 [N], cu_seqlens int64 [num_documents + 1] and optionally
    loss_weight float32 [N], as `write_packed` writes it. Tokens stay on disk until read. A document that the edge
    of a stretch cuts goes on as another document.
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
            raise SampleError(f"{self.path}: not a safetensors file, or truncated ({error})") from error
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


def count_rows(path: Path) -> int:
    """Conversations in a file, which are not parsed where it is JSONL. Raises SampleError where there is none."""
    return len(_index_rows(path))


def write_packed(path: str | Path, documents: Iterable[Tensor], weights: Iterable[Tensor] | None = None) -> None:
    """Write documents (int [T] each) and the weights of their tokens in the loss (float [T] each, else 1)."""
    documents = list(documents)
    lengths = torch.tensor([0, *(len(document) for document in documents)])
    tensors = {"tokens": torch.cat(documents).int(), "cu_seqlens": lengths.cumsum(0)}
    if weights is not None:
        tensors["loss_weight"] = torch.cat(list(weights)).float()
        if len(tensors["loss_weight"]) != len(tensors["tokens"]):
            raise ValueError(f"{len(tensors['loss_weight'])} weights for {len(tensors['tokens'])} tokens")
    save_file(tensors, path)


def order(num_samples: int, seed: int, consumed: int, count: int) -> list[int]:
    """Which samples come after the first `consumed`: each epoch has every sample once, in an order of its own."""
    places = [divmod(place, num_samples) for place in range(consumed, consumed + count)]
    return [int(_epoch(num_samples, seed, epoch)[place]) for epoch, place in places]


def read_pixels(samples: Sequence[Sample], first: int, last: int, size: int) -> Tensor:
    """Frames [first, last) of all the samples' frames end to end, as float32 [last - first, 3, size, size].

    Raises SampleError for a medium that cannot be decoded.
    """
    parts, offset = [], 0
    for sample in samples:
        for item in sample.media:
            indices = item.indices[max(first - offset, 0) : max(last - offset, 0)]
            offset += len(item.indices)
            if indices:
                parts.append(_read_item(item, indices, size, sample.source))
    if len(parts) == 1:  # often one long video: no second copy of it
        return parts[0]
    return torch.cat([torch.empty(0, 3, size, size), *parts])


def _read_item(item: MediaItem, indices: Sequence[int], size: int, source: str) -> Tensor:
    try:
        if item.kind == "image":
            return read_image(item.path, size=size)
        return read_frames(item.path, indices, size=size)
    except MediaError as error:
        raise SampleError(f"{source}: {error}", source=source) from error


@lru_cache(maxsize=2)
def _epoch(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def _index_rows(path: Path) -> np.ndarray:
    """Where the rows of a JSONL file or a JSON list stand: int64 [n, 3] of first byte, length, number from 1.

    A row's number is its line in JSONL, its place in a list.
    """
    if not path.is_file():
        raise SampleError(f"{path}: no such file")
    with path.open("rb") as file:
        is_list = file.read(1024).lstrip().startswith(b"[")
    places = array("q")
    for place in _list_items(path) if is_list else _lines(path):
        places.extend(place)
    if not places:
        raise SampleError(f"{path}: has no rows")
    return np.frombuffer(places, np.int64).reshape(-1, 3)


def _lines(path: Path) -> Iterator[tuple[int, int, int]]:
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield start, len(line), number
            start += len(line)


def _list_items(path: Path) -> Iterator[tuple[int, int, int]]:
    """Parses the whole list once, item by item, and keeps none."""
    text, decoder, item_or_end = path.read_text("utf-8"), json.JSONDecoder(), re.compile(r"[^\s,]")
    position, number = text.index("[") + 1, 0
    num_bytes = len(text[:position].encode())  # of the text before position
    while found := item_or_end.search(text, position):
        num_bytes += found.start() - position
        position, number = found.start(), number + 1
        if text[position] == "]":
            return
        try:
            _, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise SampleError(f"{path}: row {number}: not JSON: {error}") from error
        length = len(text[position:end].encode())
        yield num_bytes, length, number
        position, num_bytes = end, num_bytes + length
    raise SampleError(f"{path}: the list does not end after row {number}")


def _parse(row: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(row)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}, in {_shortened(row)}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"not an object: {_shortened(row)}")
    return parsed


def _shortened(row: bytes, length: int = 60) -> str:
    text = row.decode(errors="replace").strip()
    return text if len(text) <= length else f"{text[:length]}..."


def _media_in_order(row: dict[str, Any], turns: list[Any]) -> list[tuple[Kind, str]]:
    """Kind and path of each of a row's media, in the order of the placeholders. Raises ValueError."""
    text = " ".join(str(turn.get("value")) for turn in turns if isinstance(turn, dict))
    placeholders: list[Kind] = re.findall("<(image|video)>", text)
    kinds: tuple[Kind, ...] = ("image", "video")
    paths = {kind: _paths(row, kind) for kind in kinds}
    for kind in kinds:
        if placeholders.count(kind) != len(paths[kind]):
            raise ValueError(
                f"{placeholders.count(kind)} placeholders <{kind}> for {len(paths[kind])} in field {kind!r}"
            )
    remaining = {kind: iter(paths[kind]) for kind in kinds}
    return [(kind, next(remaining[kind])) for kind in placeholders]


def _paths(row: dict[str, Any], kind: Kind) -> list[str]:
    value = row.get(kind)
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"field {kind!r} has {value!r}, neither a path nor a list of paths")
    return paths
