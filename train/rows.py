"""Rows of a JSON list or of JSONL, read one by one: only their places in the file are held in memory."""

import json
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..model.media import Medium
from .sample import SampleError


@dataclass(frozen=True)
class Row:
    """One row's fields. locate: a file's name in them -> the file; raises ValueError where there is none."""

    fields: dict[str, Any]
    locate: Callable[[str], Medium]


class Rows(Protocol):
    """Rows by index, whatever they lie in."""

    def __len__(self) -> int: ...

    def source(self, index: int) -> str:
        """File and row, for messages."""
        ...

    def __getitem__(self, index: int) -> Row:
        """Raises ValueError, which does not name the source, for a row that is not as it should be."""
        ...


class JsonRows:
    """path: a JSON list of rows, or JSONL. media: folder that their files' names start from; the path's own."""

    def __init__(self, path: Path, *, media: Path | None = None) -> None:
        self.path, self.media = path, path.parent if media is None else media
        self._places = _index_rows(path)

    def __len__(self) -> int:
        return len(self._places)

    def source(self, index: int) -> str:
        return f"{self.path}: row {self._places[index, 2]}"

    def __getitem__(self, index: int) -> Row:
        start, length, _ = self._places[index].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            return Row(parse(file.read(length)), lambda name: self.media / name)


def parse(row: bytes) -> dict[str, Any]:
    """The fields of a row. Raises ValueError for what is no JSON object."""
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
