"""The CPU backend against the float64 reference.

Tolerances: float32 keeps 1e-7 of a score of size 4 and sums up to a few hundred terms of size 1: 2e-6 was the worst
seen for out and lse, 1e-5 for gradients, which sum over rows as well.
"""

from itertools import pairwise

import pytest
import torch
from longtake.kernels.backend import block_backward, block_forward
from longtake.kernels.visibility import Visibility
from torch import Tensor

from tests.kernels.masks import cases, shard_visibility

CASES = cases()
SCALE = 0.3


def block(
    visibility: Visibility, *, heads: int = 6, key_heads: int = 2, head_dim: int = 24, seed: int = 0
) -> list[Tensor]:
    """Random float32 q, k, v, dout, dlse."""
    generator = torch.Generator().manual_seed(seed)
    tq, tk = len(visibility.start), len(visibility.kstart)
    shapes = [(tq, heads, head_dim), (tk, key_heads, head_dim), (tk, key_heads, head_dim), (tq, heads, head_dim)]
    return [torch.randn(shape, generator=generator) for shape in [*shapes, (heads, tq)]]


def expected(tensors: list[Tensor], visibility: Visibility, *, scale: float = SCALE) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv in float64."""
    q, k, v, dout, dlse = (x.double() for x in tensors)
    out, lse = block_forward(q, k, v, visibility, scale=scale, backend="reference")
    grads = block_backward(q, k, v, out, lse, dout, visibility, scale=scale, dlse=dlse, backend="reference")
    return out, lse, *grads


def assert_near(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float = 1e-5) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (6, 2)])
def test_forward_and_every_gradient(name: str, heads: int, key_heads: int) -> None:
    visibility = CASES[name]
    tensors = block(visibility, heads=heads, key_heads=key_heads)
    q, k, v, dout, dlse = tensors
    out, lse = block_forward(q, k, v, visibility, scale=SCALE)
    grads = block_backward(q, k, v, out, lse, dout, visibility, scale=SCALE, dlse=dlse)
    assert {x.dtype for x in (out, lse, *grads)} == {torch.float32}
    assert_near((out, lse, *grads), expected(tensors, visibility))


@pytest.mark.parametrize("name", ["causal", "packed", "zigzag, packed", "random 3"])
def test_without_dlse(name: str) -> None:
    visibility = CASES[name]
    tensors = block(visibility)
    tensors[-1].zero_()
    q, k, v, dout, _ = tensors
    out, lse = block_forward(q, k, v, visibility, scale=SCALE)
    grads = block_backward(q, k, v, out, lse, dout, visibility, scale=SCALE)
    assert_near((out, lse, *grads), expected(tensors, visibility))


@pytest.mark.parametrize("name", ["causal", "packed", "wide window", "random 1"])
def test_float64_is_worked_on_in_float64(name: str) -> None:
    visibility = CASES[name]
    tensors = [x.double() for x in block(visibility)]
    q, k, v, dout, dlse = tensors
    out, lse = block_forward(q, k, v, visibility, scale=SCALE)
    grads = block_backward(q, k, v, out, lse, dout, visibility, scale=SCALE, dlse=dlse)
    assert_near((out, lse, *grads), expected(tensors, visibility), tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_only_its_inputs_rounding(dtype: torch.dtype) -> None:
    visibility = CASES["packed"]
    tensors = [x.to(dtype) for x in block(visibility)]
    q, k, v, dout, dlse = tensors
    out, lse = block_forward(q, k, v, visibility, scale=SCALE)
    grads = block_backward(q, k, v, out, lse, dout, visibility, scale=SCALE, dlse=dlse)
    assert {x.dtype for x in (out, lse, *grads)} == {torch.float32}
    assert_near((out, lse, *grads), expected(tensors, visibility))


def test_a_band_of_several_blocks() -> None:
    visibility = shard_visibility(2500, window=1100)
    assert max(tile.count for tile in visibility.tiles) > 2
    tensors = block(visibility, heads=1, key_heads=1, head_dim=4)
    q, k, v, dout, dlse = tensors
    out, lse = block_forward(q, k, v, visibility, scale=SCALE)
    grads = block_backward(q, k, v, out, lse, dout, visibility, scale=SCALE, dlse=dlse)
    # dk, dv of a key sum 1,100 rows.
    assert_near((out, lse, *grads), expected(tensors, visibility), tolerance=1e-4)


@pytest.mark.parametrize("name", ["causal", "packed", "wide window", "decode", "random 2", "nothing"])
def test_scores_of_ten_thousand(name: str) -> None:
    visibility = CASES[name]
    tensors = block(visibility)
    q, k, v, dout, dlse = tensors
    # Whole numbers keep the scores exact, so that a difference is the softmax's own.
    q.copy_((q * 4).round() * 50)
    k.copy_((k * 4).round())
    out, lse = block_forward(q, k, v, visibility, scale=1.0)
    grads = block_backward(q, k, v, out, lse, dout, visibility, scale=1.0, dlse=dlse)
    want = expected(tensors, visibility, scale=1.0)
    assert not lse.numel() or name == "nothing" or want[1][want[1].isfinite()].abs().max() > 1e4
    # float32 holds an lse of 1e4 to 5e-4, so tiles merge, and weights are found again, to about that.
    assert_near((out, lse), want[:2], tolerance=1e-3)
    for got, exact in zip(grads, want[2:], strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=2e-3, atol=2e-3 * float(exact.abs().max() + 1))


@pytest.mark.parametrize("lowest", [-1e4, 1e4])
def test_all_scores_far_from_zero(lowest: float) -> None:
    visibility = CASES["packed"]
    q, k, v, dout, _ = block(visibility)
    q[..., -1], k[..., -1] = lowest, 1.0
    out, lse = block_forward(q, k, v, visibility, scale=1.0)
    want = expected([q, k, v, dout, torch.zeros_like(lse)], visibility, scale=1.0)
    # A score near 1e4 is good to 1e-3 in float32.
    assert_near((out, lse), want[:2], tolerance=5e-3)
    for grad in block_backward(q, k, v, out, lse, dout, visibility, scale=1.0):
        assert grad.isfinite().all()


@pytest.mark.parametrize("cuts", [[0, 40, 131], [0, 1, 64, 64, 100, 131], [0, 131]])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_carried_state_over_key_blocks_is_one_call(cuts: list[int], backend: str) -> None:
    whole = shard_visibility(131, lengths=[1, 60, 70])
    tensors = block(whole)
    q, k, v, dout, dlse = tensors
    parts = [(a, b, shard_visibility(131, keys=torch.arange(a, b), lengths=[1, 60, 70])) for a, b in pairwise(cuts)]
    # Last block first: the early rows see nothing until the end.
    state = None
    for a, b, visibility in reversed(parts):
        state = block_forward(q, k[a:b], v[a:b], visibility, scale=SCALE, state=state, backend=backend)
    assert state is not None
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for a, b, visibility in parts:
        into = {"grads": (dq, dk[a:b], dv[a:b])}
        block_backward(q, k[a:b], v[a:b], *state, dout, visibility, scale=SCALE, dlse=dlse, backend=backend, **into)
    assert_near((*state, dq, dk, dv), expected(tensors, whole))


@pytest.mark.parametrize("name", CASES)
def test_a_state_that_has_seen_nothing_adds_nothing(name: str) -> None:
    visibility = CASES[name]
    q, k, v, *_ = block(visibility)
    state = torch.zeros_like(q), torch.full((q.shape[1], q.shape[0]), -torch.inf)
    fresh = block_forward(q, k, v, visibility, scale=SCALE)
    torch.testing.assert_close(block_forward(q, k, v, visibility, scale=SCALE, state=state), fresh)


def test_state_is_updated_in_place_and_gradients_are_added() -> None:
    visibility = CASES["causal"]
    q, k, v, dout, _ = block(visibility)
    state = block_forward(q, k, v, visibility, scale=SCALE)
    once = state[1].clone()
    again = block_forward(q, k, v, visibility, scale=SCALE, state=state)
    assert again[0] is state[0] and again[1] is state[1]
    torch.testing.assert_close(state[1], once + torch.tensor(2.0).log())
    dq = torch.ones_like(q)
    plain, *_ = block_backward(q, k, v, *state, dout, visibility, scale=SCALE)
    added, *_ = block_backward(q, k, v, *state, dout, visibility, scale=SCALE, grads=(dq, None, None))
    assert added is dq
    torch.testing.assert_close(dq, plain + 1)


@pytest.mark.parametrize("name", ["causal", "packed", "zigzag on itself"])
def test_any_strides(name: str) -> None:
    visibility = CASES[name]
    tensors = block(visibility)
    want = expected(tensors, visibility)
    dlse = tensors.pop()
    for layout in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: torch.cat([x, x])[len(x) :].mT.contiguous().mT,
    ):
        q, k, v, dout = (layout(x) for x in tensors)
        out, lse = block_forward(q, k, v, visibility, scale=SCALE)
        grads = block_backward(q, k, v, layout(out), lse.T.contiguous().T, dout, visibility, scale=SCALE, dlse=dlse)
        assert_near((out, lse, *grads), want)


@pytest.mark.parametrize(("tq", "tk", "heads"), [(0, 5, 2), (5, 0, 2), (0, 0, 2), (5, 5, 0)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_in_nothing_out(tq: int, tk: int, heads: int, backend: str) -> None:
    visibility = Visibility.from_bounds(torch.zeros(tq).long(), torch.full((tq,), tk - 1), torch.arange(tk))
    q, k, v, dout, dlse = block(visibility, heads=heads, key_heads=heads)
    out, lse = block_forward(q, k, v, visibility, scale=SCALE, backend=backend)
    grads = block_backward(q, k, v, out, lse, dout, visibility, scale=SCALE, dlse=dlse, backend=backend)
    assert torch.equal(out, torch.zeros(tq, heads, 24))
    assert torch.equal(lse, torch.full((heads, tq), -torch.inf))
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
    assert not any(grad.any() for grad in grads)
