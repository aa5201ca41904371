"""Steps are dealt out in order, read ahead or not, and all ranks agree on what is left out of them."""

import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from threading import Event, Semaphore, Thread
from typing import Any

import numpy as np
import pytest
import torch
from longtake.comm.mesh import Mesh
from longtake.model.batch import shard_documents
from longtake.model.chat import load_tokenizer
from longtake.model.features import frame_share
from longtake.train.conversations import ConversationDataset
from longtake.train.decode import FrameReader, Task
from longtake.train.loader import StepData, StepLoader
from longtake.train.mixture import Dataset, Mixture
from longtake.train.packed import PackedDataset
from longtake.train.rows import JsonRows, Rows
from longtake.train.sample import Sample, SampleError
from longtake.train.shards import ShardRows

from tests.ranks import run_ranks
from tests.training_files import IMAGE_SIZE, TOKENS_PER_FRAME, conversation, run_config, write_rows

SEED = 5
PATIENCE = 60  # seconds


def open_dataset(start: Path, rows: Rows) -> ConversationDataset:
    return ConversationDataset(
        rows, tokenizer=load_tokenizer(start), tokens_per_frame=TOKENS_PER_FRAME, num_frames=16, context=100
    )


class Watched:
    """A dataset that notes what is read of it, and whose row `lost` refers to a video that is gone by then."""

    def __init__(self, start: Path, rows: Path, lost: int | None = None) -> None:
        self.rows = open_dataset(start, JsonRows(rows))
        self.lost, self.read = lost, []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        sample = self.rows[index]
        if index != self.lost:
            return sample
        *media, last = sample.media
        return replace(sample, media=(*media, replace(last, path=Path("gone.mp4"))))


def make_loader(dataset: Dataset[Sample], mesh: Mesh, **fields: Any) -> StepLoader:
    config = run_config(Path(), Path(), Path(), seed=SEED, ring=mesh.ring, ulysses=mesh.ulysses, **fields)
    mixture = dataset if isinstance(dataset, Mixture) else Mixture([dataset])
    return StepLoader(mixture, config, mesh, tokens_per_frame=TOKENS_PER_FRAME, image_size=IMAGE_SIZE)


def rest(loader: StepLoader) -> None:
    """Wait until all is there that is read ahead."""
    assert not wait([coming for _, coming in loader.ahead], timeout=PATIENCE).not_done


def is_step(data: StepData, dataset: Dataset[Sample], mesh: Mesh, sequences: Sequence[Sequence[Sequence[int]]]) -> bool:
    """Whether the step is, for each accumulation and group, a sequence of the samples with those indices."""
    samples = [[[dataset[index] for index in group] for group in groups] for groups in sequences]
    every = [sample for groups in samples for group in groups for sample in group]
    right = len(data.batches) == len(sequences)
    for (batch, pixels), groups in zip(data.batches, samples, strict=True):
        mine = groups[mesh.data_rank]
        expected = shard_documents(mine, mesh=mesh, tokens_per_frame=TOKENS_PER_FRAME)
        share = frame_share(sum(len(sample.frame_starts) for sample in mine), mesh)
        right &= torch.equal(batch.input_ids, expected.input_ids)
        right &= torch.equal(batch.weights, expected.weights)
        right &= torch.equal(pixels, FrameReader(IMAGE_SIZE).begin(mine, *share)())
    totals = (data.total_weight, data.num_tokens, data.num_frames, data.max_tokens, data.max_frames)
    lengths, frames = [len(s.input_ids) for s in every], [len(s.frame_starts) for s in every]
    weight = sum(float(sample.loss_weight.sum()) for sample in every)
    return right and totals == (weight, sum(lengths), sum(frames), max(lengths, default=0), max(frames, default=0))


def deal(rank: int, start: Path, rows: Path) -> dict[str, bool]:
    right = {}
    meshes = {"2 x 2": Mesh(ring=2, ulysses=2), "data 2": Mesh(data=2, ulysses=2), "data 4": Mesh(data=4)}
    for name, mesh in meshes.items():
        for size, accumulation in ((2, 1), (1, 3), (8, 1)):  # 8 of 6 rows: a row comes twice
            dataset = Watched(start, rows)
            count = size * accumulation * mesh.data
            indices = Mixture([dataset]).order(SEED, 0, 3 * count)
            loader = make_loader(dataset, mesh, steps=3, batch_size=size, accumulation=accumulation)
            steps = [loader.load(step * count) for step in range(3)]  # the later two were read ahead
            loader.close()
            read = len(dataset.read)
            waits = mesh.gather_objects([data.waited for data in steps])
            case = f"{name}, {size} x {accumulation}"
            right[f"{case}: each sample is read once"] = read == 3 * size * accumulation
            right[f"{case}: the wait is the slowest rank's"] = all(each == waits[0] for each in waits)
            again = make_loader(dataset, mesh, steps=3, batch_size=size, accumulation=accumulation)
            steps.append(again.load(2 * count))
            again.close()
            for step, data in zip((0, 1, 2, 2), steps, strict=True):
                shape = (accumulation, mesh.data, size)
                sequences = torch.tensor(indices[step * count : (step + 1) * count]).view(shape).tolist()
                right[f"{case}: step {step}"] = is_step(data, dataset, mesh, sequences) and not data.num_skipped
    return right


def test_accumulation_then_group_then_sample_and_read_ahead_is_the_same(start: Path, conversations: Path) -> None:
    for right in run_ranks(deal, 4, start, conversations):
        assert not [case for case, ok in right.items() if not ok]
        assert len(right) == 9 * 5


def test_packed_documents_stay_apart(packed: Path) -> None:
    mesh = Mesh(alone=True)
    dataset = PackedDataset(packed, context=50)
    loader = make_loader(dataset, mesh, steps=1, batch_size=3)
    data = loader.load(0)
    loader.close()
    [(batch, pixels)] = data.batches
    assert data.num_tokens == 120 and data.max_tokens == 40 and data.num_frames == len(pixels) == 0
    assert int((batch.positions == 0).sum()) == 8  # six documents, two of them cut in two
    assert data.total_weight == 120 - 8


def test_a_step_says_how_long_it_waited_for_its_data(
    start: Path, conversations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by a second with each sample read, the first of them after a look at it."""
    looked_at = Event()

    class Patient(Watched):
        def __getitem__(self, index: int) -> Sample:
            assert looked_at.wait(PATIENCE)
            return super().__getitem__(index)

    def clock() -> float:
        seconds = float(len(dataset.read))
        looked_at.set()
        return seconds

    dataset = Patient(start, conversations)
    monkeypatch.setattr("time.perf_counter", clock)
    loader = make_loader(dataset, Mesh(alone=True), steps=3, batch_size=2)
    assert loader.load(0).waited == 2
    rest(loader)
    assert loader.load(2).waited == 0  # read ahead
    loader.close()


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_so_many_steps_are_read_ahead_in_their_order_and_no_more(
    start: Path, conversations: Path, prefetch: int
) -> None:
    dataset = Watched(start, conversations)
    loader = make_loader(dataset, Mesh(alone=True), steps=6, batch_size=2, prefetch=prefetch)
    for step in range(6):
        loader.load(2 * step)
        rest(loader)
        assert dataset.read == Mixture([dataset]).order(SEED, 0, 2 * min(step + 1 + prefetch, 6))
    loader.close()


class HeldPool:
    """In the place of the worker processes: notes what it is handed, and decodes each piece when it may."""

    def __init__(self) -> None:
        self.handed: list[str] = []
        self.allowed = Semaphore(0)

    def map(self, function: Callable[[Task], np.ndarray], pieces: list[Task]) -> Iterator[np.ndarray]:
        self.handed += [piece.source for piece in pieces]

        def results() -> Iterator[np.ndarray]:
            for piece in pieces:
                assert self.allowed.acquire(timeout=PATIENCE)
                yield function(piece)

        return results()

    def shutdown(self, *, cancel_futures: bool) -> None:
        """Has no process to end."""


def test_workers_are_handed_the_steps_ahead_in_order_before_the_first_of_them_is_decoded(
    start: Path, conversations: Path
) -> None:
    dataset = Watched(start, conversations)
    loader = make_loader(dataset, Mesh(alone=True), steps=6, batch_size=2, prefetch=3, workers=1)
    loader.reader.pool = pool = HeldPool()  # type: ignore[assignment]
    samples = [dataset.rows[index] for index in Mixture([dataset]).order(SEED, 0, 8)]
    for _ in range(sum(len(sample.media) for sample in samples[:2])):
        pool.allowed.release()
    loader.load(0)
    loader.row_thread.submit(int).result(PATIENCE)  # behind the reads
    assert pool.handed == [sample.source for sample in samples for _ in sample.media]
    assert not loader.ahead[0][1].done() and len(loader.ahead) == 3
    pool.allowed.release(len(pool.handed))
    assert is_step(loader.load(2), dataset, loader.mesh, [[Mixture([dataset]).order(SEED, 2, 2)]])
    pool.allowed.release(100)
    loader.close()


def test_what_fails_ahead_is_raised_at_its_step_and_at_no_other(start: Path, conversations: Path) -> None:
    """No bad sample, but an error: of a disk, or of ours."""

    class Failing(Watched):
        def __getitem__(self, index: int) -> Sample:
            if len(self.read) == 5:  # in the third step
                self.read.append(index)
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    dataset = Failing(start, conversations)
    loader = make_loader(dataset, Mesh(alone=True), steps=4, batch_size=2, prefetch=3)
    for consumed in (0, 2):
        loader.load(consumed)
        rest(loader)
    with pytest.raises(OSError, match="the disk is gone"):
        loader.load(4)
    assert not loader.load(6).num_skipped
    loader.close()


def write_shard(conversations: Path, path: Path) -> Path:
    """The rows and their videos as a tar."""
    with tarfile.open(path, "w") as archive:
        for number, line in enumerate(conversations.read_text().splitlines()):
            row = path.with_name(f"{number}.json")
            row.write_text(line)
            archive.add(row, row.name)
            for place, video in enumerate(json.loads(line)["video"]):
                archive.add(conversations.with_name(video), f"{number}.{place}.mp4")
    return path


def closes(loader: StepLoader) -> bool:
    """Whether it does, and leaves nothing undone."""
    closing = Thread(target=loader.close, daemon=True)
    closing.start()
    closing.join(PATIENCE)
    return not closing.is_alive() and all(coming.done() for _, coming in loader.ahead)


def same(data: StepData, other: StepData) -> bool:
    """Tokens, weights and pixels, bit for bit."""
    [(batch, pixels)], [(other_batch, other_pixels)] = data.batches, other.batches
    tensors = [(batch.input_ids, other_batch.input_ids), (batch.weights, other_batch.weights), (pixels, other_pixels)]
    return all(torch.equal(one, two) for one, two in tensors)


def test_a_run_that_is_stopped_with_steps_in_flight_goes_on_with_the_same_batches(
    start: Path, conversations: Path, tmp_path: Path
) -> None:
    """In the second epoch of a mixture of JSONL and a shard, whose files worker processes read."""
    sources = [JsonRows(conversations), ShardRows(write_shard(conversations, tmp_path / "a.tar"))]
    mixture, mesh = Mixture([open_dataset(start, rows) for rows in sources], [6, 5]), Mesh(alone=True)
    alone = make_loader(mixture, mesh, steps=6, batch_size=5, prefetch=0)
    through = [alone.load(5 * step) for step in range(6)]
    alone.close()
    assert all(data.num_frames for data in through)
    loaders = [make_loader(mixture, mesh, steps=6, batch_size=5, prefetch=3, workers=2) for _ in range(2)]
    for loader, steps in zip(loaders, [(0, 1, 2), (3, 4, 5, 1, 2, 5)], strict=True):  # and once more, elsewhere
        assert all(same(loader.load(5 * step), through[step]) for step in steps)
    assert loaders[0].ahead and closes(loaders[0])
    assert loaders[1].reader.pool is not None
    for process in loaders[1].reader.pool._processes.values():
        process.kill()
        process.join()
    with pytest.raises(RuntimeError, match="one of 2 workers that decode frames died"):
        loaders[1].load(0)
    assert closes(loaders[1])


def load_bad(rank: int, start: Path, rows: Path, mesh: Mesh, lost: int, **fields: Any) -> list[Any]:
    """How 3 steps end: the error's text, or how many samples were left out, should be, and if the others are there."""
    dataset, ends = Watched(start, rows, lost), []
    size, bad = fields["batch_size"], {2, lost}
    count = size * mesh.data
    loader = make_loader(dataset, mesh, steps=3, **fields)
    for step in range(3):
        indices = Mixture([dataset]).order(SEED, step * count, count)
        groups = [[i for i in indices[d * size : (d + 1) * size] if i not in bad] for d in range(mesh.data)]
        try:
            data = loader.load(step * count)
        except SampleError as error:
            ends.append(str(error))
        else:
            ends.append((data.num_skipped, sum(i in bad for i in indices), is_step(data, dataset, mesh, [groups])))
    loader.close()
    return ends


def meet_bad_samples(rank: int, start: Path, rows: Path) -> dict[str, Any]:
    one, two = Mesh(ring=2, ulysses=2), Mesh(data=2, ulysses=2)
    try:
        FrameReader(IMAGE_SIZE).begin([Watched(start, rows, lost=3)[3]], *frame_share(5, one))()
        meets_it = False
    except SampleError:
        meets_it = True
    return {
        "meets it": meets_it,
        "stop": load_bad(rank, start, rows, one, 3, batch_size=2),
        "stop, data 2": load_bad(rank, start, rows, two, 3, batch_size=1),
        "skip": load_bad(rank, start, rows, one, 3, batch_size=3, on_bad_sample="skip"),
        "skip, data 2": load_bad(rank, start, rows, two, 3, batch_size=2, on_bad_sample="skip"),
        "skip, epochs": load_bad(rank, start, rows, one, 3, batch_size=7, on_bad_sample="skip"),
        "skip, all bad": load_bad(rank, start, rows, one, 3, batch_size=1, on_bad_sample="skip"),
    }


@pytest.fixture(scope="module")
def ends(start: Path, conversations: Path) -> list[dict[str, Any]]:
    """Four rows: one is no JSON (found by every rank that reads it), one cannot be decoded (by one rank alone)."""
    good = [conversation(i, videos) for i, videos in enumerate([(3,), (), (9,), (4, 1)])]
    rows = write_rows(conversations.with_name("bad.jsonl"), [good[0], good[1], '{"conversations": ', good[3]])
    return run_ranks(meet_bad_samples, 4, start, rows)


def test_stop_raises_the_same_error_on_every_rank(ends: list[dict[str, Any]]) -> None:
    assert [end["meets it"] for end in ends] == [False, False, False, True]
    for case in ("stop", "stop, data 2"):
        assert all(end[case] == ends[0][case] for end in ends)
        texts = [end for end in ends[0][case] if isinstance(end, str)]
        assert {text.partition(": row ")[2][:1] for text in texts} == {"3", "4"}
        assert any("bad.jsonl: row 3: not JSON" in text for text in texts)
        assert any("bad.jsonl: row 4: gone.mp4: no such file" in text for text in texts)


def test_skip_leaves_bad_samples_out_and_counts_them_on_every_rank(ends: list[dict[str, Any]]) -> None:
    for case in ("skip", "skip, data 2", "skip, epochs", "skip, all bad"):
        assert all(end[case] == ends[0][case] for end in ends)
        for num_skipped, expected, is_right in ends[0][case]:
            assert num_skipped == expected and is_right
    assert sum(skipped for skipped, _, _ in ends[0]["skip, epochs"]) >= 10  # twice in an epoch, 21 samples of 4
    assert 1 in [skipped for skipped, _, _ in ends[0]["skip, all bad"]]
