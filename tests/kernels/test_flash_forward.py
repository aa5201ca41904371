"""The plain forward kernel, interpreted, against the float64 reference. All memory that the host takes is NaN at first.

Limits, relative to the largest value: 1e-6 for out, or twice what PyTorch's float32 attention loses on the same tensors
(over hundreds of keys that is more, by an amount that depends on the processor's matrix products); 1e-5 for lse.
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from longtake.kernels import blocks, flash_forward, reference
from longtake.kernels.candidates import Config
from longtake.kernels.visibility import Visibility
from torch import Tensor

from tests.kernels.closeness import error, lost, normal
from tests.kernels.far import spread
from tests.kernels.masks import cases, random_visibility, shard_visibility

CASES = {name: visibility for name, visibility in cases().items() if len(visibility.end) and len(visibility.kend)}
CONFIG = Config("flash_forward", 32, 32, 4, 2)
Block = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))


def block(visibility: Visibility, heads: int = 2, key_heads: int = 1, head_dim: int = 64) -> Block:
    rows, keys = len(visibility.end), len(visibility.kend)
    q, k, v = normal((rows, heads, head_dim), (keys, key_heads, head_dim), (keys, key_heads, head_dim))
    return q, k, v


def errors(tensors: Block, visibility: Visibility, config: Config = CONFIG) -> tuple[float, float]:
    """Of out and lse of one launch."""
    scale = tensors[0].shape[-1] ** -0.5
    out, lse = flash_forward.forward(*tensors, visibility, scale=scale, config=config)
    q, k, v = (x.double() for x in tensors)
    want_out, want_lse = reference.forward(q, k, v, visibility, scale=scale)
    return error(out, want_out), error(lse, want_lse)


def assert_close(found: tuple[float, float], *, lost: float = 0.0) -> None:
    assert found[0] <= max(1e-6, 2 * lost)
    assert found[1] <= 1e-5


SLOW = ("wide window", "window both ways")  # hundreds of tokens


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_every_mask(name: str) -> None:
    tensors = block(CASES[name])
    q, k, v = (x.double() for x in tensors)
    want, _ = reference.forward(q, k, v, CASES[name], scale=q.shape[-1] ** -0.5)
    assert_close(errors(tensors, CASES[name]), lost=lost(*tensors, CASES[name], want))


@pytest.mark.parametrize("head_dim", [40, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 2), (7, 1)])
def test_head_dims_and_groups(head_dim: int, heads: int, key_heads: int) -> None:
    visibility = shard_visibility(50, lengths=[9, 41], window=30)
    assert_close(errors(block(visibility, heads, key_heads, head_dim), visibility))


@pytest.mark.parametrize("head_dim", [8, 24, 160])
def test_other_head_dims(head_dim: int) -> None:
    visibility = shard_visibility(40)
    assert_close(errors(block(visibility, head_dim=head_dim), visibility))


@pytest.mark.parametrize(("rows", "keys"), [(16, 64), (64, 16), (128, 32)])
def test_tiles_of_other_shapes(rows: int, keys: int) -> None:
    visibility = CASES["zigzag, packed"]
    assert_close(errors(block(visibility), visibility, Config("flash_forward", rows, keys, 4, 2)))


@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("tma", [False, True])
def test_half_precision_loses_no_more_than_pytorch(head_dim: int, tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    visibility = shard_visibility(70)
    if not tma:
        monkeypatch.setattr(flash_forward, "use_tma", lambda *tensors: False)
    q, k, v = (x.half() for x in block(visibility, head_dim=head_dim))
    assert blocks.use_tma(q, k, v)
    out, _ = flash_forward.forward(q, k, v, visibility, scale=0.125, config=CONFIG, final=True)
    want, _ = reference.forward(q.double(), k.double(), v.double(), visibility, scale=0.125)
    heads_first = (x.transpose(0, 1).repeat_interleave(2 // x.shape[1], 0) for x in (q, k, v))
    peer = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=0.125).transpose(0, 1)
    assert out.dtype == torch.float16
    epsilon = torch.finfo(torch.float16).eps / 2 * want.abs().max()
    assert (out - want).abs().max() <= (peer - want).abs().max() + epsilon


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_slices_of_one_projection_are_read_in_place(dtype: torch.dtype) -> None:
    visibility = shard_visibility(70)
    (projection,) = normal((70, 4, 2 * 64))
    projection = projection.to(dtype)
    q, k, v = projection[:, :2, :64], projection[:, 2:3, 64:], projection[:, 3:, :64]
    got = flash_forward.forward(q, k, v, visibility, scale=0.125, config=CONFIG)
    q, k, v = (x.contiguous() for x in (q, k, v))
    want = flash_forward.forward(q, k, v, visibility, scale=0.125, config=CONFIG)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(("row", "head"), [(1 << 25, 64), (64, (1 << 30) + 64)])
def test_addresses_past_2_to_the_31(which: int, row: int, head: int) -> None:
    visibility = shard_visibility(70)
    tensors = [x.half() for x in block(visibility, heads=3, key_heads=3)]
    q, k, v = tensors
    want = flash_forward.forward(q, k, v, visibility, scale=0.125, config=CONFIG)
    for unfit in (0, 1):  # for TMA, so that pointers serve
        tensors[which] = spread(tensors[which], row + unfit, head + unfit)
        q, k, v = tensors
        assert blocks.tma_fits(q, k, v) == (not unfit)
        got = flash_forward.forward(q, k, v, visibility, scale=0.125, config=CONFIG)
        assert torch.equal(got[0], want[0])


def test_a_state_past_2_to_the_31() -> None:
    visibility = shard_visibility(70)
    q, k, v = block(visibility)
    state = flash_forward.forward(q, k, v, visibility, scale=0.125, config=CONFIG)
    far = spread(state[0], 1 << 25, 64), state[1].clone()
    for _ in range(2):
        state = flash_forward.forward(q, k, v, visibility, scale=0.125, config=CONFIG, state=state)
        far = flash_forward.forward(q, k, v, visibility, scale=0.125, config=CONFIG, state=far)
    assert torch.equal(far[0], state[0])
    assert torch.equal(far[1], state[1])


def test_extreme_scores() -> None:
    visibility = shard_visibility(70)
    q, k, v = block(visibility)
    out, lse = flash_forward.forward(1e3 * q, 1e2 * k, v, visibility, scale=0.125, config=CONFIG)
    want_out, want_lse = reference.forward(1e3 * q.double(), 1e2 * k.double(), v.double(), visibility, scale=0.125)
    assert want_lse.abs().max() > 1e4
    assert error(lse, want_lse) <= 1e-5
    assert error(out, want_out) <= 1e-2  # a float32 score of 1e5 is good to 1e-2


def test_memory_behind_the_tensors_is_not_read() -> None:
    visibility = shard_visibility(70)
    tensors = block(visibility)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, 60), value=torch.nan)[:70] for x in tensors)
    got = flash_forward.forward(q, k, v, visibility, scale=0.125, config=CONFIG)
    want = flash_forward.forward(*tensors, visibility, scale=0.125, config=CONFIG)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_a_tile_that_sees_nothing_leaves_the_state_alone() -> None:
    visibility = shard_visibility(64, keys=torch.arange(40, 64))  # the first tile of rows sees none of these keys
    q, k, v = block(visibility)
    state = torch.full_like(q, -0.0), *normal((2, 64), seed=3)
    before = state[1].clone()
    flash_forward.forward(q, k, v, visibility, scale=0.125, config=CONFIG, state=state)
    assert state[0][:32].signbit().all()  # folding 0.0 in would make it 0.0
    assert torch.equal(state[1][:, :32], before[:, :32])


def test_a_state_that_has_seen_nothing_adds_nothing() -> None:
    visibility = CASES["zigzag, later keys hidden"]
    q, k, v = block(visibility)
    fresh = flash_forward.forward(q, k, v, visibility, scale=0.125, config=CONFIG)
    nothing = torch.zeros_like(q), torch.full_like(fresh[1], -torch.inf)
    folded = flash_forward.forward(q, k, v, visibility, scale=0.125, config=CONFIG, state=nothing)
    assert error(folded[0], fresh[0].double()) <= 1e-6
    assert error(folded[1], fresh[1].double()) <= 1e-6


@pytest.mark.parametrize("final", [False, True])
def test_the_last_of_several_blocks(final: bool) -> None:
    whole = shard_visibility(70, lengths=[9, 61])
    q, k, v = (x.half() for x in block(whole))
    state = None
    for a, b in ((48, 70), (0, 30), (30, 48)):
        last = final and (a, b) == (30, 48)
        part = shard_visibility(70, keys=torch.arange(a, b), lengths=[9, 61])
        kept = state
        state = flash_forward.forward(q, k[a:b], v[a:b], part, scale=0.125, config=CONFIG, state=state, final=last)
        assert kept is None or (state[0] is kept[0]) == (not last)
    assert state is not None
    want_out, want_lse = reference.forward(q.double(), k.double(), v.double(), whole, scale=0.125)
    assert state[0].dtype == (torch.float16 if final else torch.float32)
    assert error(state[0], want_out) <= 1e-3  # float16 rounds p
    assert error(state[1], want_lse) <= 1e-5


@settings(deadline=None, max_examples=12, database=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 60), max_size=3), st.randoms(use_true_random=False))
def test_blocks_of_keys_fold_in_any_order(seed: int, cuts: list[int], random: object) -> None:
    whole = random_visibility(seed)
    rows, keys = len(whole.end), len(whole.kend)
    if not rows or not keys:
        return
    q, k, v = block(whole, heads=1)
    edges = sorted({0, keys, *(cut for cut in cuts if cut < keys)})
    parts = list(pairwise(edges))
    random.shuffle(parts)  # pyright: ignore[reportAttributeAccessIssue]
    state = None
    for a, b in parts:
        start, end = (x.clamp(a, b) - a for x in (whole.start, whole.end))
        part = Visibility.from_bounds(start.long(), end.long() - 1, torch.arange(b - a))
        state = flash_forward.forward(q, k[a:b], v[a:b], part, scale=0.125, config=CONFIG, state=state)
    assert state is not None
    want_out, want_lse = reference.forward(q.double(), k.double(), v.double(), whole, scale=0.125)
    assert_close((error(state[0], want_out), error(state[1], want_lse)))
