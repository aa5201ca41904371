import pytest
import torch
from longtake.kernels import visibility as visibility_module
from longtake.kernels.visibility import Visibility, document_bounds, mask_bounds

from tests.kernels.masks import dense, random_visibility


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("lengths", [None, [5, 0, 1, 14], [20], [1] * 20])
def test_mask_bounds_are_the_mask_by_definition(causal: bool, window: int | None, lengths: list[int] | None) -> None:
    position = torch.arange(20)
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    lo, hi = mask_bounds(position, num_tokens=20, causal=causal, window=window, cu_seqlens=cu_seqlens)
    document = (
        torch.zeros(20) if lengths is None else torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    )
    visible = document[:, None] == document
    if causal:
        visible &= position <= position[:, None]
    if window is not None:
        visible &= (position - position[:, None]).abs() < window
    assert torch.equal((lo[:, None] <= position) & (position <= hi[:, None]), visible)
    assert lo.dtype == hi.dtype == torch.int64


def test_mask_bounds_of_a_shard_are_those_rows_of_the_whole() -> None:
    cu_seqlens = torch.tensor([0, 7, 7, 30, 40])
    shard = torch.tensor([0, 3, 8, 9, 29, 30, 39])
    whole = mask_bounds(torch.arange(40), num_tokens=40, causal=True, window=5, cu_seqlens=cu_seqlens)
    part = mask_bounds(shard, num_tokens=40, causal=True, window=5, cu_seqlens=cu_seqlens)
    for bound, bounds in zip(part, whole, strict=True):
        assert torch.equal(bound, bounds[shard])


@pytest.mark.parametrize("seed", range(40))
def test_the_four_rows_agree_and_never_fall(seed: int) -> None:
    visibility = random_visibility(seed, most=25)
    visible = dense(visibility)
    rows = torch.arange(len(visibility.start))[:, None]
    assert torch.equal((visibility.kstart <= rows) & (rows < visibility.kend), visible)
    for bound, limit in (
        (visibility.start, len(visibility.kstart)),
        (visibility.end, len(visibility.kstart)),
        (visibility.kstart, len(visibility.start)),
        (visibility.kend, len(visibility.start)),
    ):
        assert bound.dtype == torch.int32
        assert (bound.diff() >= 0).all()
        assert ((bound >= 0) & (bound <= limit)).all()
    assert (visibility.start <= visibility.end).all()
    assert (visibility.kstart <= visibility.kend).all()
    assert visibility.area == visible.sum()


def test_gaps_between_keys_are_skipped() -> None:
    keys = torch.tensor([2, 3, 10, 11, 12])
    visibility = Visibility.from_bounds(torch.tensor([0, 4, 5]), torch.tensor([3, 9, 11]), keys)
    assert visibility.start.tolist() == [0, 2, 2]
    assert visibility.end.tolist() == [2, 2, 4]


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([1, 10], "start at 0, got 1"),
        ([0, 6, 5, 10], "must not decrease, got 5 after 6 at index 2"),
        ([0, 5, 9], "end at the number of tokens, 10, got 9"),
        ([[0, 10]], "1-D integer"),
        ([0.0, 10.0], "1-D integer"),
        ([], "1-D integer"),
    ],
)
def test_bad_cu_seqlens_are_refused(cu_seqlens: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_bounds(torch.arange(10), num_tokens=10, cu_seqlens=torch.tensor(cu_seqlens))


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_that_hides_the_token_itself_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"window must be an integer from 1 .*got {window}"):
        mask_bounds(torch.arange(10), num_tokens=10, window=window)


@pytest.mark.parametrize("window", [None, 2])
def test_queries_before_their_documents_keys_see_nothing_and_keep_the_order(window: int | None) -> None:
    # Two documents of 5 queries and 3 keys that end together: the first two of each come before all keys.
    positions = torch.tensor([-2, -1, 0, 1, 2, 1, 2, 3, 4, 5])
    first, last = torch.tensor([0, 3]).repeat_interleave(5), torch.tensor([2, 5]).repeat_interleave(5)
    lo, hi = document_bounds(positions, first, last, causal=True, window=window)
    assert (hi >= lo - 1).all() and (lo.diff() >= 0).all() and (hi.diff() >= 0).all()
    visibility = Visibility.from_bounds(lo, hi, torch.arange(6))
    seen = (visibility.end - visibility.start).tolist()
    assert seen == [0, 0, 1, 2, 3 if window is None else 2] * 2


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (8, 4), (16, 32)])
def test_the_schedule_takes_every_tile_once_longest_first(seed: int, rows: int, keys: int) -> None:
    visibility = random_visibility(seed)
    starts, ends = visibility.start.split(rows), visibility.end.split(rows)
    spans = [int(end[-1] - start[0]) for start, end in zip(starts, ends, strict=True) if len(start)]
    order = visibility.longest_first(rows)
    assert sorted(order.tolist()) == list(range(len(spans)))
    assert [spans[tile] for tile in order] == sorted(spans, reverse=True)
    assert visibility.visited(rows, keys) == sum(-(-span // keys) for span in spans)
    assert order.dtype == torch.int32


def test_transposed_swaps_rows_and_keys() -> None:
    visibility = random_visibility(3)
    assert torch.equal(dense(visibility.transposed), dense(visibility).T)
    back = visibility.transposed.transposed
    for row in ("start", "end", "kstart", "kend"):
        assert torch.equal(getattr(back, row), getattr(visibility, row))


def test_what_is_made_while_a_graph_is_recorded_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = random_visibility(3)
    before = mask.longest_first(8)
    with monkeypatch.context() as patch:
        patch.setattr(visibility_module, "is_capturing", lambda device: True)
        assert mask.longest_first(8) is before
        recorded = [mask.longest_first(4), mask.kstart, mask.kend, mask.transposed]
    after = [mask.longest_first(4), mask.kstart, mask.kend, mask.transposed]
    assert not any(x is y for x, y in zip(after, recorded, strict=True))
    assert mask.transposed is after[-1]
