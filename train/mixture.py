"""Data of several sources in one order, which is a pure function of the seed and of how many samples were consumed.

A mixture file says what an epoch is made of:

    [[source]]
    data = "captions.jsonl"    # as the run's `data`; paths start from the folder of this file
    repeat = 2                 # passes over it in an epoch (1); 0.5 takes half, and the other half in the next
    media = "videos"           # folder that the rows' files start from (the data's own)

    [[source]]
    data = "shards"

or gives every source a `weight` in place of `repeat`: an epoch has as many samples as all sources have together, dealt
out by weight.
"""

import tomllib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

T_co = TypeVar("T_co", covariant=True)


class Dataset(Protocol[T_co]):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> T_co: ...


@dataclass(frozen=True)
class Source:
    """A row of a mixture file, paths resolved. One of repeat and weight is None, the same one in all sources."""

    data: Path
    media: Path | None = None
    repeat: float | None = 1.0
    weight: float | None = None


class Mixture(Generic[T_co]):
    """Datasets end to end under one index, and the order in which they are drawn from.

    counts: samples of each in an epoch; all of them, once, if not given.
    """

    def __init__(self, datasets: Sequence[Dataset[T_co]], counts: Sequence[int] | None = None) -> None:
        self.datasets = datasets
        self.sizes = tuple(len(dataset) for dataset in datasets)
        self.counts = self.sizes if counts is None else tuple(counts)
        self.starts = [0, *accumulate(self.sizes)]

    def __len__(self) -> int:
        """Samples in an epoch."""
        return sum(self.counts)

    def __getitem__(self, index: int) -> T_co:
        which = bisect_right(self.starts, index) - 1
        return self.datasets[which][index - self.starts[which]]

    def order(self, seed: int, consumed: int, count: int) -> list[int]:
        """Indices of the `count` samples that come after the first `consumed`.

        Each epoch has its counts of every dataset, spread in an order of its own; a dataset is gone through in full,
        in an order of its own each time, before a sample of it comes again.
        """
        indices = []
        for place in range(consumed, consumed + count):
            epoch, at = divmod(place, len(self))
            turns, nth = _turns(self.counts, seed, epoch)
            which = int(turns[at])
            passes, drawn = divmod(epoch * self.counts[which] + int(nth[at]), self.sizes[which])
            indices.append(self.starts[which] + int(_pass(self.sizes[which], seed, which, passes)[drawn]))
        return indices


def read_sources(path: Path) -> list[Source]:
    """The sources of a mixture file. Raises ValueError that names file, source and key."""
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a mixture file: {error}") from error
    sources = tables.get("source")
    if set(tables) != {"source"} or not sources or not _are_tables(sources):
        found = ", ".join(tables) or "nothing"
        raise ValueError(f"{path}: a mixture file is a list of [[source]] tables, this has {found}")
    read = [_source(f"{path}: source {number}", table, path.parent) for number, table in enumerate(sources, 1)]
    for number, source in enumerate(read, 1):
        if (source.weight is None) != (read[0].weight is None):
            raise ValueError(f"{path}: sources 1 and {number}: give all of them a weight, or none")
    return read


def open_mixture(path: Path, open_source: Callable[[Path, Path | None], Dataset[T_co]]) -> Mixture[T_co]:
    """What a path names: a mixture file's sources where it is TOML, else one source. open_source: (data, media)."""
    if path.suffix != ".toml":
        return Mixture([open_source(path, None)])
    sources = read_sources(path)
    datasets = [open_source(source.data, source.media) for source in sources]
    counts = _counts(sources, [len(dataset) for dataset in datasets])
    for source, dataset, count in zip(sources, datasets, counts, strict=True):
        if not count:
            raise ValueError(
                f"{path}: {source.data} has {len(dataset)} samples, of which an epoch would take none: "
                "raise its weight or repeat, or leave it out"
            )
    return Mixture(datasets, counts)


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(table, dict) for table in value)


def _source(name: str, table: dict[str, Any], folder: Path) -> Source:
    unknown = sorted(set(table) - {"data", "media", "repeat", "weight"})
    if unknown or not isinstance(table.get("data"), str):
        what = f"unknown key {unknown[0]!r}" if unknown else "no path in 'data'"
        raise ValueError(f"{name}: {what}; a source has data, and may have media, repeat or weight")
    if not isinstance(table.get("media", ""), str):
        raise ValueError(f"{name}: media must be a folder, got {table['media']!r}")
    if {"repeat", "weight"} <= set(table):
        raise ValueError(f"{name}: give repeat or weight, not both")
    for key in ("repeat", "weight"):
        value = table.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{name}: {key} must be a number above 0, got {value!r}")
    return Source(
        data=folder / table["data"],
        media=folder / table["media"] if "media" in table else None,
        repeat=None if "weight" in table else float(table.get("repeat", 1)),
        weight=float(table["weight"]) if "weight" in table else None,
    )


def _counts(sources: Sequence[Source], sizes: Sequence[int]) -> list[int]:
    """Samples of each source in an epoch."""
    if sources[0].weight is None:
        return [round((source.repeat or 0) * size) for source, size in zip(sources, sizes, strict=True)]
    weights = np.array([source.weight for source in sources])
    exact = weights / weights.sum() * sum(sizes)
    counts = np.floor(exact).astype(int)
    largest_rest = np.argsort(counts - exact, kind="stable")[: sum(sizes) - counts.sum()]
    counts[largest_rest] += 1
    return counts.tolist()


@lru_cache(maxsize=2)
def _turns(counts: tuple[int, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Which dataset each place of an epoch draws from, and how many places before it do so too; int [n] both."""
    turns = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    np.random.default_rng([seed, epoch, 0, 1]).shuffle(turns)  # numpy takes _pass's seeds as ending with 0
    nth = np.empty(len(turns), np.int64)
    nth[turns.argsort(kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    return turns, nth


@lru_cache(maxsize=64)
def _pass(num_samples: int, seed: int, which: int, passes: int) -> np.ndarray:
    return np.random.default_rng([seed, passes, which]).permutation(num_samples)
