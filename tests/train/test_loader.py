"""Steps are dealt out in order, read ahead or not, and all ranks agree on what is left out of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.comm.mesh import Mesh
from longtake.model.batch import shard_documents
from longtake.model.chat import load_tokenizer
from longtake.model.features import frame_share
from longtake.train.conversations import ConversationDataset
from longtake.train.decode import FrameReader
from longtake.train.loader import StepData, StepLoader
from longtake.train.mixture import Dataset, Mixture
from longtake.train.packed import PackedDataset
from longtake.train.rows import JsonRows
from longtake.train.sample import Sample, SampleError

from tests.ranks import run_ranks
from tests.training_files import IMAGE_SIZE, TOKENS_PER_FRAME, conversation, run_config, write_rows

SEED = 5


class Watched:
    """A dataset that notes what is read of it, and whose row `lost` refers to a video that is gone by then."""

    def __init__(self, start: Path, rows: Path, lost: int | None = None) -> None:
        tokenizer = load_tokenizer(start)
        self.rows = ConversationDataset(
            JsonRows(rows), tokenizer=tokenizer, tokens_per_frame=TOKENS_PER_FRAME, num_frames=16, context=100
        )
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
    return StepLoader(Mixture([dataset]), config, mesh, tokens_per_frame=TOKENS_PER_FRAME, image_size=IMAGE_SIZE)


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
        right &= torch.equal(pixels, FrameReader(IMAGE_SIZE).read(mine, *share))
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
            case = f"{name}, {size} x {accumulation}"
            right[f"{case}: each sample is read once"] = read == 3 * size * accumulation
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
        assert len(right) == 9 * 4


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
    """By a clock that goes on by a second with each sample read."""
    dataset = Watched(start, conversations)
    monkeypatch.setattr("time.perf_counter", lambda: float(len(dataset.read)))
    loader = make_loader(dataset, Mesh(alone=True), steps=3, batch_size=2)
    assert loader.load(0).waited == 2
    assert loader.ahead is not None
    loader.ahead[1].result()
    assert loader.load(2).waited == 0  # read ahead
    loader.close()


def test_workers_change_nothing_wherever_a_run_goes_on(start: Path, conversations: Path) -> None:
    mesh, steps = Mesh(alone=True), {}
    for workers in (0, 2):
        loader = make_loader(Watched(start, conversations), mesh, steps=4, batch_size=2, workers=workers)
        steps[workers] = [loader.load(consumed) for consumed in (0, 2, 6, 4)]  # 6 is read anew, as after a restart
        loader.close()
    for plain, decoded in zip(steps[0], steps[2], strict=True):
        [(batch, pixels)], [(same_batch, same_pixels)] = plain.batches, decoded.batches
        assert torch.equal(batch.input_ids, same_batch.input_ids) and torch.equal(pixels, same_pixels)
    assert sum(data.num_frames for data in steps[0]) >= 19  # each of six rows


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
        FrameReader(IMAGE_SIZE).read([Watched(start, rows, lost=3)[3]], *frame_share(5, one))
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
