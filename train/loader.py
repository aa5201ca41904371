"""The batches of each step, read ahead in a thread; all ranks agree on bad samples before they enter the step."""

import logging
import time
from collections.abc import Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..comm.mesh import Mesh
from ..model.batch import ShardedBatch, shard_documents
from ..model.features import frame_share
from .config import TrainConfig
from .decode import FrameReader
from .mixture import Mixture
from .sample import Sample, SampleError

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StepData:
    """This rank's share of one optimizer step: a batch and its pixels, uint8 and on the host, for each sequence.

    total_weight: of all tokens of the global batch, the loss's denominator; num_tokens, num_frames: in it.
    max_tokens, max_frames: of its longest document. num_skipped: bad samples left out. waited: seconds that it took
    until this rank's frames were there.
    """

    batches: list[tuple[ShardedBatch, Tensor]]
    total_weight: float
    num_tokens: int
    num_frames: int
    max_tokens: int
    max_frames: int
    num_skipped: int
    waited: float = 0.0


class _Draft:
    """Samples of one step as this rank read them, and what was bad about the others."""

    def __init__(self) -> None:
        self.sequences: list[list[Sample]] = []
        self.pixels: list[Tensor] = []
        self.errors: dict[int, str] = {}  # place in the step: message


class StepLoader:
    """Deals the data out in order; a step is a pure function of how many samples were consumed before it."""

    def __init__(
        self, dataset: Mixture[Sample], config: TrainConfig, mesh: Mesh, *, tokens_per_frame: int, image_size: int
    ) -> None:
        self.dataset, self.config, self.mesh = dataset, config, mesh
        self.tokens_per_frame = tokens_per_frame
        self.reader = FrameReader(image_size, workers=config.workers)
        self.samples_per_step = config.batch_size * mesh.data * config.accumulation
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self.ahead: tuple[int, Future[_Draft]] | None = None

    def load(self, consumed: int) -> StepData:
        """The step that begins after `consumed` samples. Collective.

        Raises SampleError on every rank where a sample is bad and the config says stop.
        """
        began = time.perf_counter()
        draft = self._wait_for(consumed)
        waited = time.perf_counter() - began
        left_out: set[int] = set()
        while errors := self._agree(draft.errors):
            if self.config.on_bad_sample == "stop":
                raise SampleError(next(iter(errors.values())))
            for message in errors.values():
                if self.mesh.rank == 0:
                    log.warning("skipped: %s", message)
            left_out |= errors.keys()
            draft = self._read(consumed, left_out)
        following = consumed + self.samples_per_step
        if following < self.config.steps * self.samples_per_step:
            self.ahead = following, self.thread.submit(self._read, following)
        return replace(self._shard(draft, len(left_out)), waited=waited)

    def close(self) -> None:
        """Stop reading ahead."""
        self.thread.shutdown(cancel_futures=True)
        self.reader.close()

    def _wait_for(self, consumed: int) -> _Draft:
        if self.ahead is not None and self.ahead[0] == consumed:
            return self.ahead[1].result()
        return self._read(consumed)

    def _read(self, consumed: int, leave_out: Set[int] = frozenset()) -> _Draft:
        """Read this group's samples and decode this rank's frames; nothing in here talks to other ranks.

        leave_out: places in the step. (An index stands at two of them where a step reaches into the next epoch.)
        """
        draft = _Draft()
        indices = self.dataset.order(self.config.seed, consumed, self.samples_per_step)
        size = self.config.batch_size
        for i in range(self.config.accumulation):
            first = (i * self.mesh.data + self.mesh.data_rank) * size
            mine = [place for place in range(first, first + size) if place not in leave_out]
            samples = {place: s for place in mine if (s := self._sample(indices[place], place, draft)) is not None}
            draft.sequences.append([d for s in samples.values() for d in s.documents()])
            draft.pixels.append(self._pixels(samples, draft))
        return draft

    def _sample(self, index: int, place: int, draft: _Draft) -> Sample | None:
        try:
            return self.dataset[index]
        except SampleError as error:
            draft.errors[place] = str(error)
            return None

    def _pixels(self, samples: dict[int, Sample], draft: _Draft) -> Tensor:
        first, last = frame_share(sum(len(s.frame_starts) for s in samples.values()), self.mesh)
        try:
            pixels = self.reader.read(list(samples.values()), first, last)
            return pixels.pin_memory() if self.mesh.device.type == "cuda" else pixels  # a big copy: here, ahead
        except SampleError as error:
            bad = next(place for place, sample in samples.items() if sample.source == error.source)
            draft.errors[bad] = str(error)
            return torch.empty(0)

    def _agree(self, errors: dict[int, str]) -> dict[int, str]:
        """Every rank's errors, the same on all ranks. A wait of hosts for hosts: no GPU takes part in it."""
        gathered = self.mesh.gather_objects(errors)
        return {place: e[place] for e in gathered for place in sorted(e)}

    def _shard(self, draft: _Draft, num_skipped: int) -> StepData:
        batches = []
        for samples, pixels in zip(draft.sequences, draft.pixels, strict=True):
            batch = shard_documents(
                samples,
                mesh=self.mesh,
                tokens_per_frame=self.tokens_per_frame,
                layout=self.config.layout,
                route=self.config.route,
            )
            batches.append((batch, pixels))
        # each group's numbers stand on all of its ranks: count every group once
        documents = [d for samples in draft.sequences for d in samples]
        mine = [(b.total_weight, b.num_tokens, b.num_frames) for b, _ in batches]
        sums = [sum(column) for column in zip(*mine, strict=True)]
        longest = [
            max((len(x) for x in xs), default=0)
            for xs in ([d.input_ids for d in documents], [d.frame_starts for d in documents])
        ]
        everyone = self.mesh.gather_objects((sums, longest), "data")
        weight, tokens, frames = (sum(column) for column in zip(*(s for s, _ in everyone), strict=True))
        max_tokens, max_frames = (max(column) for column in zip(*(m for _, m in everyone), strict=True))
        return StepData(batches, float(weight), int(tokens), int(frames), max_tokens, max_frames, num_skipped)
