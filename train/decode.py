"""Decoding of a rank's frames, in worker processes or where it is asked for."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from ..comm.launch import end_with_parent
from ..model.media import MediaError, read_frames, read_image
from .sample import MediaItem, Sample, SampleError


@dataclass(frozen=True)
class Task:
    """Frames of one medium. source: file and row of the sample that it belongs to."""

    item: MediaItem
    indices: tuple[int, ...]
    source: str


class FrameReader:
    """Reads frames as uint8 squares of `size` pixels. What is read does not depend on the number of workers."""

    def __init__(self, size: int, *, workers: int = 0) -> None:
        self.size, self.workers = size, workers
        context = get_context("forkserver")  # a fork would hang where torch's threads have run
        self.pool = ProcessPoolExecutor(workers, context, initializer=end_with_parent) if workers else None

    def read(self, samples: Sequence[Sample], first: int, last: int) -> Tensor:
        """Frames [first, last) of all the samples' frames end to end, uint8 [last - first, 3, size, size].

        Raises SampleError for a medium that cannot be decoded, RuntimeError where a worker died.
        """
        pixels = torch.empty(last - first, 3, self.size, self.size, dtype=torch.uint8)
        tasks, begin = list(_tasks(samples, first, last)), 0
        try:
            for part in self._decoded(tasks):
                pixels[begin : begin + len(part)] = torch.from_numpy(part)
                begin += len(part)
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"one of {self.workers} workers that decode frames died, for want of memory perhaps: take fewer"
            ) from error
        return pixels

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def _decoded(self, tasks: Sequence[Task]) -> Iterator[np.ndarray]:
        if self.pool is None:
            return map(partial(decode, size=self.size), tasks)
        at_most = -(-sum(len(task.indices) for task in tasks) // self.workers)  # a long video keeps them all at work
        pieces = [piece for task in tasks for piece in _split(task, at_most)]
        return self.pool.map(partial(decode, size=self.size, threads=1), pieces)


def decode(task: Task, *, size: int, threads: int = 0) -> np.ndarray:
    """uint8 [n, 3, size, size]. Raises SampleError."""
    try:
        if task.item.kind == "image":
            return read_image(task.item.path, size=size).numpy()
        return read_frames(task.item.path, task.indices, size=size, threads=threads).numpy()
    except MediaError as error:
        raise SampleError(f"{task.source}: {error}", source=task.source) from error


def _tasks(samples: Sequence[Sample], first: int, last: int) -> Iterator[Task]:
    offset = 0
    for sample in samples:
        for item in sample.media:
            indices = item.indices[max(first - offset, 0) : max(last - offset, 0)]
            offset += len(item.indices)
            if indices:
                yield Task(item, indices, sample.source)


def _split(task: Task, at_most: int) -> list[Task]:
    cuts = range(0, len(task.indices), at_most)
    return [Task(task.item, task.indices[cut : cut + at_most], task.source) for cut in cuts]
