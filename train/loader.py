"""The batches of each step, read some steps ahead; all ranks agree on bad samples before they enter the step.

Two threads take the steps in their order: one reads rows and hands their frames to the workers, the other waits for the
frames. So the workers go from step to step without a pause, and the earlier step comes first.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Set
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
    max_tokens, max_frames: of its longest document. num_skipped: bad samples left out. waited: seconds that the
    slowest rank waited for its frames.
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
    """Samples of one step as this rank read them, its frames of them, and what was bad about the others."""

    def __init__(self) -> None:
        self.sequences: list[dict[int, Sample]] = []  # by place in the step
        self.frames: list[Callable[[], Tensor]] = []  # of each sequence, on their way
        self.pixels: list[Tensor] = []
        self.errors: dict[int, str] = {}  # place in the step: message


class StepLoader:
    """Deals the data out in order; a step is a pure function of how many samples were consumed before it."""

    def __init__(
        self,
        dataset: Mixture[Sample],
        config: TrainConfig,
        mesh: Mesh,
        *,
        tokens_per_frame: int,
        image_size: int,
        end: int | None = None,
    ) -> None:
        """end: samples consumed when the run is over; config.steps of them if not given."""
        self.dataset, self.config, self.mesh = dataset, config, mesh
        self.tokens_per_frame = tokens_per_frame
        self.reader = FrameReader(image_size, workers=config.workers)
        self.samples_per_step = config.samples_per_step(mesh.data)
        self.end = config.steps * self.samples_per_step if end is None else end
        self.row_thread = ThreadPoolExecutor(1, thread_name_prefix="read-rows")
        self.frame_thread = ThreadPoolExecutor(1, thread_name_prefix="read-frames")
        self.ahead: deque[tuple[int, Future[_Draft]]] = deque()  # consecutive steps, each with what it begins after

    def load(self, consumed: int) -> StepData:
        """The step that begins after `consumed` samples. Collective.

        Raises SampleError on every rank where a sample is bad and the config says stop.
        """
        coming, waited = self._take(consumed), 0.0
        left_out: set[int] = set()
        while True:
            draft, errors, seconds = self._agree(coming)
            waited += seconds
            if not errors:
                break
            if self.config.on_bad_sample == "stop":
                raise SampleError(next(iter(errors.values())))
            for message in errors.values():
                if self.mesh.rank == 0:
                    log.warning("skipped: %s", message)
            left_out |= errors.keys()
            coming = self._begin(consumed, frozenset(left_out))
        self._read_ahead(consumed)
        return replace(self._shard(draft, len(left_out)), waited=waited)

    def close(self) -> None:
        """Stop reading ahead. Waits for what each worker is at; without workers, for the step whose frames are read."""
        self.row_thread.shutdown(cancel_futures=True)
        self.reader.close()  # with which all that the other thread may wait for is cancelled
        self.frame_thread.shutdown(cancel_futures=True)

    def _take(self, consumed: int) -> Future[_Draft]:
        """The step's draft, on its way or begun now; where the run goes on elsewhere, what was ahead is dropped."""
        while self.ahead:
            place, coming = self.ahead.popleft()
            if place == consumed:
                return coming
            coming.cancel()
        return self._begin(consumed)

    def _read_ahead(self, consumed: int) -> None:
        """Have `prefetch` steps behind this one on their way, as far as the run goes."""
        for step in range(len(self.ahead) + 1, self.config.prefetch + 1):
            following = consumed + step * self.samples_per_step
            if following < self.end:
                self.ahead.append((following, self._begin(following)))

    def _begin(self, consumed: int, leave_out: Set[int] = frozenset()) -> Future[_Draft]:
        return self.frame_thread.submit(self._with_pixels, self.row_thread.submit(self._read, consumed, leave_out))

    def _read(self, consumed: int, leave_out: Set[int]) -> _Draft:
        """Read this group's samples and hand on this rank's frames; nothing in here talks to other ranks.

        leave_out: places in the step. (An index stands at two of them where a step reaches into the next epoch.)
        """
        draft = _Draft()
        indices = self.dataset.order(self.config.seed, consumed, self.samples_per_step)
        size = self.config.batch_size
        for i in range(self.config.accumulation):
            first = (i * self.mesh.data + self.mesh.data_rank) * size
            mine = [place for place in range(first, first + size) if place not in leave_out]
            samples = {place: s for place in mine if (s := self._sample(indices[place], place, draft)) is not None}
            share = frame_share(sum(len(s.frame_starts) for s in samples.values()), self.mesh)
            draft.sequences.append(samples)
            draft.frames.append(self.reader.begin(list(samples.values()), *share))
        return draft

    def _sample(self, index: int, place: int, draft: _Draft) -> Sample | None:
        try:
            return self.dataset[index]
        except SampleError as error:
            draft.errors[place] = str(error)
            return None

    def _with_pixels(self, reading: Future[_Draft]) -> _Draft:
        draft = reading.result()
        draft.pixels = [self._pixels(*each, draft) for each in zip(draft.frames, draft.sequences, strict=True)]
        return draft

    def _pixels(self, frames: Callable[[], Tensor], samples: dict[int, Sample], draft: _Draft) -> Tensor:
        try:
            pixels = frames()
            return pixels.pin_memory() if self.mesh.device.type == "cuda" else pixels  # a big copy: here, ahead
        except SampleError as error:
            bad = next(place for place, sample in samples.items() if sample.source == error.source)
            draft.errors[bad] = str(error)
            return torch.empty(0)

    def _agree(self, coming: Future[_Draft]) -> tuple[_Draft, dict[int, str], float]:
        """The draft; all ranks' errors and the longest wait for a draft, both the same on all ranks.

        A wait of hosts for hosts: no GPU takes part in it.
        """
        began = time.perf_counter()
        draft = coming.result()
        gathered = self.mesh.gather_objects((draft.errors, time.perf_counter() - began))
        errors = {place: e[place] for e, _ in gathered for place in sorted(e)}
        return draft, errors, max(seconds for _, seconds in gathered)

    def _shard(self, draft: _Draft, num_skipped: int) -> StepData:
        batches = []
        sequences = [[d for s in samples.values() for d in s.documents()] for samples in draft.sequences]
        for documents, pixels in zip(sequences, draft.pixels, strict=True):
            batch = shard_documents(
                documents,
                mesh=self.mesh,
                tokens_per_frame=self.tokens_per_frame,
                layout=self.config.layout,
                route=self.config.route,
            )
            batches.append((batch, pixels))
        # each group's numbers stand on all of its ranks: count every group once
        documents = [d for sequence in sequences for d in sequence]
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
