"""The plain backward kernels, interpreted, against the float64 reference. All memory that hosts take is NaN at first.

Limit, relative to the largest value of each gradient: 1e-5.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from longtake.kernels import flash_backward, flash_prepare, reference
from longtake.kernels.candidates import Config
from longtake.kernels.visibility import Visibility
from torch import Tensor

from tests.kernels.closeness import error, normal
from tests.kernels.far import spread
from tests.kernels.masks import cases, shard_visibility

CASES = {name: visibility for name, visibility in cases().items() if len(visibility.end) and len(visibility.kend)}
DKDV, DQ = Config("flash_dkdv", 32, 32, 4, 2), Config("flash_dq", 32, 32, 4, 2)
Block = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))


def block(visibility: Visibility, heads: int = 2, key_heads: int = 1, head_dim: int = 64) -> Block:
    """q, k, v, dout, dlse."""
    rows, keys = len(visibility.end), len(visibility.kend)
    kv = (keys, key_heads, head_dim)
    return tuple(normal((rows, heads, head_dim), kv, kv, (rows, heads, head_dim), (heads, rows)))


def expected(tensors: Block, visibility: Visibility, scale: float = 0.125) -> Block:
    """out, lse, dq, dk, dv in float64."""
    q, k, v, dout, dlse = (x.double() for x in tensors)
    out, lse = reference.forward(q, k, v, visibility, scale=scale)
    return out, lse, *reference.backward(q, k, v, out, lse, dout, visibility, scale=scale, dlse=dlse)


def backward(
    tensors: Block,
    out: Tensor,
    lse: Tensor,
    visibility: Visibility,
    *,
    grads: Block | None = None,
    dtype: torch.dtype = torch.float32,
    dkdv: Config = DKDV,
    dq: Config = DQ,
) -> Block:
    """dq, dk, dv: written in dtype, or added to grads."""
    q, k, v, dout, dlse = tensors
    add = grads is not None
    into_q, into_k, into_v = grads or (torch.empty(x.shape, dtype=dtype) for x in (q, k, v))
    prepared = flash_prepare.prepare(out, lse, dout, dlse)
    call: Any = (q, k, v, dout, *prepared, visibility)
    flash_backward.dkdv(*call, scale=0.125, config=dkdv, dk=into_k, dv=into_v, add=add)
    flash_backward.dq(*call, scale=0.125, config=dq, dq=into_q, add=add)
    return into_q, into_k, into_v


def errors(tensors: Block, visibility: Visibility, **options: Any) -> list[float]:
    out, lse, *want = expected(tensors, visibility)
    got = backward(tensors, out.float(), lse.float(), visibility, **options)
    return [error(x, y) for x, y in zip(got, want, strict=True)]


SLOW = ("wide window", "window both ways")  # hundreds of tokens


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_every_mask(name: str) -> None:
    assert max(errors(block(CASES[name]), CASES[name])) <= 1e-5


@pytest.mark.parametrize("head_dim", [40, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 2), (7, 1)])
def test_head_dims_and_groups(head_dim: int, heads: int, key_heads: int) -> None:
    visibility = shard_visibility(50, lengths=[9, 41], window=30)
    assert max(errors(block(visibility, heads, key_heads, head_dim), visibility)) <= 1e-5


@pytest.mark.parametrize(("rows", "keys"), [(16, 64), (64, 16)])
def test_tiles_of_other_shapes(rows: int, keys: int) -> None:
    visibility = CASES["zigzag, packed"]
    tiles = {"dkdv": Config("flash_dkdv", rows, keys, 4, 2), "dq": Config("flash_dq", rows, keys, 4, 2)}
    assert max(errors(block(visibility), visibility, **tiles)) <= 1e-5


@pytest.mark.parametrize("name", ["packed", "zigzag on another", "random 2"])
def test_gradients_are_added(name: str) -> None:
    visibility = CASES[name]
    tensors = block(visibility)
    out, lse, *want = expected(tensors, visibility)
    before = normal(*(x.shape for x in tensors[:3]), seed=5)
    got = backward(tensors, out.float(), lse.float(), visibility, grads=tuple(x.clone() for x in before))
    for x, old, new in zip(got, before, want, strict=True):
        assert error(x, old.double() + new) <= 1e-5


def test_tiles_that_see_nothing_are_left_alone() -> None:
    hidden = shard_visibility(64, torch.arange(32), torch.arange(32, 64))  # queries before all keys
    tensors = block(hidden)
    grads = tuple(torch.full_like(x, -0.0) for x in tensors[:3])  # adding 0.0 would make it 0.0
    backward(tensors, torch.zeros_like(tensors[0]), torch.full((2, 32), -torch.inf), hidden, grads=grads)
    assert all(x.signbit().all() for x in grads)


@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("tma", [False, True])
def test_half_precision_loses_no_more_than_pytorch(head_dim: int, tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not tma:
        monkeypatch.setattr(flash_backward, "use_tma", lambda *tensors: False)
    visibility = shard_visibility(70)
    tensors = tuple(x.half() for x in block(visibility, 2, 2, head_dim)[:4])
    out, lse, *want = expected((*tensors, torch.zeros(2, 70)), visibility)
    got = backward((*tensors, torch.zeros(2, 70)), out.half(), lse.float(), visibility, dtype=torch.float16)
    leaves = [x.transpose(0, 1).detach().requires_grad_() for x in tensors[:3]]
    peer = F.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.125)
    theirs = torch.autograd.grad(peer, leaves, tensors[3].transpose(0, 1))
    for mine, other, exact in zip(got, theirs, want, strict=True):
        assert mine.dtype == torch.float16
        epsilon = torch.finfo(torch.float16).eps / 2 * exact.abs().max()
        assert (mine - exact).abs().max() <= (other.transpose(0, 1) - exact).abs().max() + epsilon


def test_strided_operands_and_the_memory_behind_them() -> None:
    visibility = shard_visibility(70)
    tensors = block(visibility)
    out, lse, *_ = expected(tensors, visibility)
    got = [F.pad(x, (0, 6, 0, 1, 0, 60), value=torch.nan)[:70, : x.shape[1], :64] for x in (*tensors[:4], out.float())]
    far = F.pad(lse.float(), (0, 9), value=torch.nan)[:, :70]
    strided = backward((*got[:4], tensors[4]), got[4], far, visibility)
    plain = backward(tensors, out.float(), lse.float(), visibility)
    for x, y in zip(strided, plain, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("far", [False, True])
def test_strided_gradients_and_addresses_past_2_to_the_31(add: bool, far: bool) -> None:
    visibility = shard_visibility(50)
    tensors = block(visibility)
    out, lse, *_ = expected(tensors, visibility)
    before = normal(*(x.shape for x in tensors[:3]), seed=5)
    into = tuple(x.clone() for x in before) if add else None
    want = backward(tensors, out.float(), lse.float(), visibility, grads=into)
    row, head = (1 << 26, 64) if far else (3 * 64, 64)
    strided = tuple(spread(x, row * i, head * i) for i, x in enumerate(before, start=1))
    q, dout = (spread(x, row, head) for x in (tensors[0], tensors[3]))
    prepared = flash_prepare.prepare(spread(out.float(), row, head), lse.float(), dout, tensors[4])
    call: Any = (q, *tensors[1:3], dout, *prepared, visibility)
    flash_backward.dkdv(*call, scale=0.125, config=DKDV, dk=strided[1], dv=strided[2], add=add)
    flash_backward.dq(*call, scale=0.125, config=DQ, dq=strided[0], add=add)
    assert all(torch.equal(x, y) for x, y in zip(strided, want, strict=True))


def test_scores_of_ten_thousand() -> None:
    visibility = CASES["packed"]
    tensors = block(visibility)
    # Whole numbers keep the scores exact, so that a difference is the softmax's own.
    q, k = (tensors[0] * 4).round() * 40, (tensors[1] * 4).round() * 8
    out, lse, *want = expected((q, k, *tensors[2:]), visibility)
    assert lse.abs().max() > 1e4
    got = backward((q, k, *tensors[2:]), out.float(), lse.float(), visibility)
    # float32 holds an lse of 1e4 to 5e-4: weights are found again to about that.
    assert max(error(x, y) for x, y in zip(got, want, strict=True)) <= 2e-3


def test_the_same_bits_every_time() -> None:
    visibility = CASES["zigzag, packed"]
    tensors = block(visibility, 3, 1)
    out, lse, *_ = expected(tensors, visibility)
    first, second = (backward(tensors, out.float(), lse.float(), visibility) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("with_dlse", [False, True])
def test_prepare_pads_with_rows_that_see_nothing(with_dlse: bool) -> None:
    out, dout, lse, dlse = normal((70, 2, 40), (70, 2, 40), (70, 2), (70, 2))
    lse, dlse = lse.T, dlse.T  # of any strides
    lse[1, 3] = -torch.inf
    lse2, delta = flash_prepare.prepare(out, lse, dout, dlse if with_dlse else None)
    assert lse2.shape == delta.shape and lse2.shape[1] >= 70 + 128
    want = (out.double() * dout).sum(-1).T - (dlse if with_dlse else 0)
    want[1, 3] = 0
    torch.testing.assert_close(delta[:, :70].double(), want, rtol=1e-5, atol=1e-5)
    assert not delta[:, 70:].any()
    assert (lse2[:, 70:] == torch.inf).all() and lse2[1, 3] == torch.inf
    seen = lse.isfinite()
    torch.testing.assert_close(lse2[:, :70][seen], lse[seen] / torch.tensor(2.0).log())
