"""Ids, positions, targets and weights of packed documents travel together, and all ranks' parts make the whole."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from longtake.model.batch import LAYOUTS, ShardedBatch, packed_lengths, shard_documents

from tests.model.documents import IMAGE_TOKEN, TOKENS_PER_FRAME, Document, make_document

GRIDS = [(1, 1), (2, 2), (1, 4), (3, 1)]


def shards(documents: list[Document], layout: str, ring: int, ulysses: int) -> list[ShardedBatch]:
    """Every rank's part. Sharding is pure, so that a rank is no more than its place."""
    parts = []
    for rank in range(ring * ulysses):
        ring_rank, ulysses_rank = divmod(rank, ulysses)
        place = SimpleNamespace(
            ring=ring,
            ulysses=ulysses,
            sp_size=ring * ulysses,
            sp_rank=rank,
            ring_rank=ring_rank,
            ulysses_rank=ulysses_rank,
            device=torch.device("cpu"),
        )
        parts.append(
            shard_documents(documents, mesh=place, tokens_per_frame=TOKENS_PER_FRAME, layout=layout)  # type: ignore[arg-type]
        )
    return parts


def named(document: Document, number: int) -> Document:
    """With ids and weights that say which token of which document they are."""
    token = 1000 * number + torch.arange(len(document.input_ids))
    return replace(document, input_ids=token, loss_weight=token + 0.5)


DOCUMENTS = [named(make_document(videos, seed=i), i) for i, videos in enumerate([(3,), (), (1, 2), (), (9,)])]


@pytest.mark.parametrize(("ring", "ulysses"), GRIDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_belongs_to_a_token_travels_with_it(layout: str, ring: int, ulysses: int) -> None:
    parts = shards(DOCUMENTS, layout, ring, ulysses)
    whole = torch.cat([document.input_ids for document in DOCUMENTS])
    assert torch.equal(torch.cat([part.input_ids for part in parts]).sort().values, whole)
    for part in parts:
        assert torch.equal(part.positions, part.input_ids % 1000)  # restart in each document
        last = torch.isin(part.input_ids, torch.stack([document.input_ids[-1] for document in DOCUMENTS]))
        assert torch.equal(part.targets[~last], part.input_ids[~last] + 1)
        assert torch.equal(part.weights[~last], part.input_ids[~last] + 1.5)  # the weight of what is predicted
        assert not part.weights[last].any()  # nothing is predicted across the edge of a document
        assert part.loss_rows.tolist() == [i for i, weight in enumerate(part.weights) if weight]


@pytest.mark.parametrize(("ring", "ulysses"), GRIDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_knows_the_counts_of_the_whole(layout: str, ring: int, ulysses: int) -> None:
    parts = shards(DOCUMENTS, layout, ring, ulysses)
    total = sum(float(part.weights.double().sum()) for part in parts)
    for part in parts:
        assert part.num_tokens == sum(len(other.input_ids) for other in parts) == int(packed_lengths(DOCUMENTS)[-1])
        assert part.num_frames == 15
        assert part.total_weight == pytest.approx(total, rel=1e-6)  # a float32 sum
    assert sum(part.frames.last - part.frames.first for part in parts) == 15
    assert sum(len(part.frames.slots) for part in parts) == 15 * TOKENS_PER_FRAME


def test_frames_are_found_behind_the_documents_before_theirs() -> None:
    videos = [make_document(v, seed=i) for i, v in enumerate([(), (2,), (1, 1)])]
    [whole] = shards(videos, "balanced", 1, 1)
    assert torch.equal(whole.frames.slots, (whole.input_ids == IMAGE_TOKEN).nonzero()[:, 0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_may_hold_no_document_or_fewer_tokens_than_ranks(layout: str) -> None:
    for part in shards([], layout, 2, 2):
        assert (part.num_tokens, part.num_frames, part.total_weight) == (0, 0, 0.0)
        assert part.input_ids.dtype == part.positions.dtype == part.targets.dtype == torch.int64
        assert part.input_ids.shape == part.weights.shape == part.frames.slots.shape == (0,)
    one = named(make_document((), seed=0), 0)
    one = replace(one, input_ids=one.input_ids[:1], loss_weight=one.loss_weight[:1])
    parts = shards([one], layout, 2, 2)
    assert sorted(len(part.input_ids) for part in parts) == [0, 0, 0, 1]
    assert parts[0].total_weight == 0  # nothing comes before the only token to predict it


def test_an_unknown_layout_is_named() -> None:
    with pytest.raises(ValueError, match="layout must be one of contiguous, zigzag, balanced, got 'striped'"):
        shards(DOCUMENTS, "striped", 1, 1)
