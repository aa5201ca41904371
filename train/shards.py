"""Rows in WebDataset shards: a .tar, or a folder of them, read at random without unpacking.

The files of a sample follow each other and share their name up to its first dot: `000.json` with the row, and its
images or videos, `000.jpg`, `000.1.mp4`. An index of where each sample begins and ends is made once and kept beside the
shard (`NAME.tar.index.npy`), or in memory where that folder cannot be written to; `longtake train --dry-run` makes it
ahead of a run of many ranks.
"""

import os
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np

from ..model.chat import Kind
from ..model.media import Inside
from .rows import Row, parse
from .sample import SampleError
from .styles import KINDS

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"),
    "video": (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".ts"),
}
COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_sharded(path: Path) -> bool:
    """Whether a path is one for ShardRows, be it to refuse it."""
    return path.is_dir() or path.name.endswith((".tar", *COMPRESSED))


class ShardRows:
    """path: a .tar, or a folder whose .tar files are taken in the order of their names.

    A row's fields `image` and `video` may be left out, and then are all such files of the sample; names in them are
    the files', without folders, or stand for the files in their order where there are as many.
    """

    def __init__(self, path: Path) -> None:
        self.shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if not self.shards:
            raise SampleError(f"{path}: no .tar in this folder; rows in a file are named by the file")
        self._indices = [_index(shard) for shard in self.shards]
        self._starts = [0, *accumulate(len(index) for index in self._indices)]

    def __len__(self) -> int:
        return self._starts[-1]

    def source(self, index: int) -> str:
        shard, sample = self._place(index)
        return f"{self.shards[shard]}: row {sample + 1}"

    def __getitem__(self, index: int) -> Row:
        shard, sample = self._place(index)
        start, end = self._indices[shard][sample].tolist()
        files = {file.name: file for file in _files(self.shards[shard], start, end)}
        return Row(_named_by_files(_row(files), list(files)), files.__getitem__)

    def _place(self, index: int) -> tuple[int, int]:
        """Shard, and sample in it."""
        shard = bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]


def _row(files: dict[str, Inside]) -> dict[str, Any]:
    rows = [file for name, file in files.items() if name.lower().endswith(".json")]
    if len(rows) != 1:
        raise ValueError(f"one .json is expected in a sample, found {len(rows)} among {', '.join(files)}")
    with rows[0].archive.open("rb") as archive:
        archive.seek(rows[0].start)
        return parse(archive.read(rows[0].size))


def _named_by_files(fields: dict[str, Any], files: Sequence[str]) -> dict[str, Any]:
    """The row with the names of its own files in `image` and `video`."""
    named = dict(fields)
    for kind in KINDS:
        own = [name for name in files if name.lower().endswith(SUFFIXES[kind])]
        value = fields.get(kind)
        names = [value] if isinstance(value, str) else value
        if names is None:
            named[kind] = own
        elif isinstance(names, list) and all(isinstance(name, str) for name in names):
            named[kind] = _matched(kind, names, own)
    return named


def _matched(kind: Kind, names: Sequence[str], own: Sequence[str]) -> list[str]:
    by_name = {PurePosixPath(name).name: name for name in own}
    wanted = [PurePosixPath(name).name for name in names]
    if all(name in by_name for name in wanted):
        return [by_name[name] for name in wanted]
    if len(names) == len(own):
        return list(own)
    raise ValueError(
        f"field {kind!r} has {', '.join(names)}: files of the sample are expected, which has "
        f"{', '.join(own) or f'no {kind}'}"
    )


def _index(shard: Path) -> np.ndarray:
    """Where each sample begins and ends in the shard: int64 [n, 2]. Its first row on disk says of which file it is."""
    if not shard.is_file():
        raise SampleError(f"{shard}: no such file")
    state = shard.stat()
    stamp = [state.st_size, state.st_mtime_ns]
    kept = shard.with_name(f"{shard.name}.index.npy")
    try:
        stamped = np.load(kept)
        if stamped[0].tolist() == stamp:
            return stamped[1:]
    except (OSError, EOFError, ValueError, IndexError):  # none, or one of another time
        pass
    places = _scan(shard)
    _keep(kept, np.concatenate([np.array([stamp]), places]))
    return places


def _keep(path: Path, index: np.ndarray) -> None:
    """All ranks may do so at once: each writes a file of its own, and the last one stays."""
    try:
        with NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            np.save(file, index)
        os.replace(file.name, path)
    except OSError:  # a folder that cannot be written to
        pass


def _scan(shard: Path) -> np.ndarray:
    places, key = array("q"), None
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if end > shard.stat().st_size:
                    raise SampleError(f"{shard}: truncated in {member.name}")
                if _key(member.name) == key:
                    places[-1] = end
                else:
                    key = _key(member.name)
                    places.extend((member.offset, end))
    except tarfile.TarError as error:
        raise SampleError(f"{shard}: not a tar, compressed, or damaged ({error}): shards are plain .tar") from error
    if not places:
        raise SampleError(f"{shard}: has no files")
    return np.frombuffer(places, np.int64).reshape(-1, 2)


def _key(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0] or path.name))


def _files(shard: Path, start: int, end: int) -> Iterator[Inside]:
    """The files of one sample, from the headers in its stretch of the shard."""
    with shard.open("rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:  # which begins where the file stands
            for member in archive:
                if member.offset >= end:
                    return
                if member.isfile():
                    yield Inside(shard, member.name, member.offset_data, member.size)
