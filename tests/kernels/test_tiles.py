import pytest
import torch
from longtake.kernels.tiles import MAX_MASK, Kind, Tile
from longtake.kernels.visibility import Visibility
from torch import Tensor

from tests.kernels.masks import cases, dense, random_visibility, shard_visibility


def rectangles(tile: Tile) -> list[tuple[slice, slice]]:
    first = tile.rectangle
    corners = [(first.row + i * tile.row_step, first.key + i * tile.key_step) for i in range(tile.count)]
    return [(slice(row, row + first.rows), slice(key, key + first.keys)) for row, key in corners]


def coverage(visibility: Visibility) -> Tensor:
    """int [num_queries, num_keys]: how many tiles hold each pair."""
    held = torch.zeros(len(visibility.start), len(visibility.kstart), dtype=torch.int32)
    for tile in visibility.tiles:
        inside = torch.ones(tile.rectangle.rows, tile.rectangle.keys, dtype=torch.int32)
        if tile.rectangle.kind is Kind.CAUSAL:
            inside = inside.tril()
        if tile.mask is not None:
            inside = (tile.mask == 0).int()
        for rows, keys in rectangles(tile):
            held[rows, keys] += inside
    return held


VISIBILITIES = cases() | {f"more random {seed}": random_visibility(seed, most=200) for seed in range(100, 140)}


@pytest.mark.parametrize("name", VISIBILITIES)
def test_each_visible_pair_is_in_exactly_one_tile(name: str) -> None:
    visibility = VISIBILITIES[name]
    assert torch.equal(coverage(visibility), dense(visibility).int())


@pytest.mark.parametrize("name", VISIBILITIES)
def test_a_call_is_first_only_where_no_row_was_touched_and_names_its_empty_rows(name: str) -> None:
    touched = torch.zeros(len(VISIBILITIES[name].start), dtype=torch.bool)
    for tile in VISIBILITIES[name].tiles:
        before = torch.stack([touched[rows] for rows, _ in rectangles(tile)])
        assert tile.first == (not before.any())
        for rows, _ in rectangles(tile):
            touched[rows] = True
        if tile.mask is not None:
            assert tile.mask.numel() <= MAX_MASK
            empty = torch.zeros(tile.rectangle.rows, dtype=torch.bool) if tile.empty is None else tile.empty
            assert torch.equal(empty, tile.mask.isinf().all(1))


@pytest.mark.parametrize("name", VISIBILITIES)
def test_rectangles_of_one_call_share_no_row_and_no_key(name: str) -> None:
    for tile in VISIBILITIES[name].tiles:
        if tile.count > 1:
            assert tile.row_step >= tile.rectangle.rows
            assert tile.key_step >= tile.rectangle.keys


def test_a_causal_sequence_is_one_causal_call_without_a_mask() -> None:
    (tile,) = shard_visibility(16384).tiles
    assert (tile.rectangle.kind, tile.mask) == (Kind.CAUSAL, None)


def test_a_later_chunk_of_a_causal_sequence_is_a_full_call_and_a_causal_one() -> None:
    tiles = shard_visibility(16384, queries=torch.arange(8192, 12288)).tiles
    assert [(tile.rectangle.kind, tile.rectangle.keys) for tile in tiles] == [(Kind.CAUSAL, 4096), (Kind.FULL, 8192)]


def test_equal_documents_are_one_call() -> None:
    (tile,) = shard_visibility(64 * 16, causal=False, lengths=[16] * 64).tiles
    assert (tile.count, tile.rectangle.rows, tile.mask) == (64, 16, None)


def test_short_documents_share_masked_calls() -> None:
    lengths = [3, 5, 4, 7, 2, 6, 5, 3] * 8
    assert len(shard_visibility(sum(lengths), lengths=lengths).tiles) < len(lengths) / 4


def test_decode_rows_with_long_intervals_of_their_own_are_not_masked() -> None:
    ends = torch.tensor([1000, 2200, 3700])
    tiles = Visibility.from_bounds(
        ends - ends.diff(prepend=torch.zeros(1, dtype=torch.long)), ends - 1, torch.arange(3700)
    ).tiles
    assert all(tile.rectangle.kind is Kind.FULL for tile in tiles)


def test_masks_stay_small_and_few_for_a_window_over_a_long_sequence() -> None:
    tiles = shard_visibility(32768, window=3000).tiles
    worked = sum(tile.count * tile.rectangle.rows * tile.rectangle.keys for tile in tiles)
    masks = [tile.mask for tile in tiles if tile.mask is not None]
    assert sum(mask.numel() for mask in masks) <= 3 * MAX_MASK
    assert len(tiles) < 20
    # The triangles at the band's right edge count twice here; the rest is exact but for small leaves.
    assert worked < 1.5 * shard_visibility(32768, window=3000).area
