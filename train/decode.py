"""Decoding of a rank's frames, in worker processes or where it is asked for."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from ..comm.launch import end_with_parent
from ..model.media import MediaError, read_frames, read_image
from .sample import MediaItem, Sample, SampleError

LEAST_SPAN = 256  # frames of a file: decoding a piece begins at a keyframe, in x264's files up to 250 earlier


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
        context.set_forkserver_preload([__name__])  # imported once: workers start in milliseconds and share its pages
        self.pool = ProcessPoolExecutor(workers, context, initializer=end_with_parent) if workers else None

    def begin(self, samples: Sequence[Sample], first: int, last: int) -> Callable[[], Tensor]:
        """Hand frames [first, last) of all the samples' frames end to end to the workers, who do first what came first.

        The call of what returns waits for them, uint8 [last - first, 3, size, size]; without workers it decodes them.
        It raises SampleError for a medium that cannot be decoded, and as this does, RuntimeError where a worker died.
        """
        with self._naming_deaths():
            parts = self._decoded(list(_tasks(samples, first, last)))

        def join() -> Tensor:
            pixels, begin = torch.empty(last - first, 3, self.size, self.size, dtype=torch.uint8), 0
            with self._naming_deaths():
                for part in parts:
                    pixels[begin : begin + len(part)] = torch.from_numpy(part)
                    begin += len(part)
            return pixels

        return join

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    @contextmanager
    def _naming_deaths(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"one of {self.workers} workers that decode frames died, for want of memory perhaps: take fewer"
            ) from error

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
    """Even pieces of at_most frames each, or of more where they would lie closer than LEAST_SPAN."""
    count, span = len(task.indices), task.indices[-1] - task.indices[0]
    num_pieces = max(1, min(-(-count // at_most), span // LEAST_SPAN))
    cuts = [count * piece // num_pieces for piece in range(num_pieces + 1)]
    return [Task(task.item, task.indices[start:end], task.source) for start, end in pairwise(cuts)]
