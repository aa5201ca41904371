import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from longtake.kernels.attention import attention
from torch import Tensor

# float32 sums of a few hundred terms of size 1; gradients sum over rows too.
NEAR = {"rtol": 1e-5, "atol": 2e-5}


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Differentiable float64 definition on [B, S, H, D] with one position rule: the last query meets the last key."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    distance = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden |= distance < 0
    if window is not None:
        hidden |= distance.abs() >= window
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
    blind = hidden.all(-1)
    # A row that sees nothing: softmax over zeros, then out 0; keeps NaN out of autograd.
    weights = scores.masked_fill(blind[:, None], 0).softmax(-1) * ~blind[:, None]
    lse = scores.masked_fill(blind[:, None], 0).logsumexp(-1).masked_fill(blind, -torch.inf)
    return (weights @ v).transpose(1, 2), lse


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize(("sq", "sk"), [(33, 33), (1, 20), (7, 40), (40, 7), (1, 1)])
def test_batches_with_gradients_through_out_and_lse(causal: bool, window: int | None, sq: int, sk: int) -> None:
    q, k, v = random(2, sq, 6, 8), random(2, sk, 2, 8, seed=1), random(2, sk, 2, 8, seed=2)
    exact = leaves(q.double(), k.double(), v.double())
    want_out, want_lse = dense_attention(*exact, causal=causal, window=window)
    dout, dlse = random(*q.shape, seed=3), random(2, 6, sq, seed=4).masked_fill(want_lse.isinf(), 0)
    want = torch.autograd.grad([want_out, want_lse], exact, [dout.double(), dlse.double()])

    mine = leaves(q, k, v)
    out, lse = attention(*mine, causal=causal, window=window, return_lse=True)
    grads = torch.autograd.grad([out, lse], mine, [dout, dlse])
    for got, exactly in zip((out, lse, *grads), (want_out, want_lse, *want), strict=True):
        torch.testing.assert_close(got.double(), exactly, **NEAR)


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("window", [None, 6])
def test_packed_documents_are_each_on_their_own(backend: str | None, window: int | None) -> None:
    cu_seqlens = torch.tensor([0, 1, 24, 24, 60, 61])
    q, k, v, dout = random(61, 4, 8), random(61, 2, 8, seed=1), random(61, 2, 8, seed=2), random(61, 4, 8, seed=3)
    mine, alone = leaves(q, k, v), leaves(q.double(), k.double(), v.double())
    out, lse = attention(*mine, causal=True, window=window, cu_seqlens=cu_seqlens, return_lse=True, backend=backend)
    parts = [
        dense_attention(*(x[None, a:b] for x in alone), causal=True, window=window)
        for a, b in pairwise(cu_seqlens.tolist())
        if b > a
    ]
    want_out = torch.cat([part[0][0] for part in parts])
    torch.testing.assert_close(out.double(), want_out, **NEAR)
    torch.testing.assert_close(lse.double(), torch.cat([part[1][0] for part in parts], -1), **NEAR)
    grads = torch.autograd.grad(out, mine, dout)
    for got, want in zip(grads, torch.autograd.grad(want_out, alone, dout.double()), strict=True):
        torch.testing.assert_close(got.double(), want, **NEAR)


def test_packed_without_cu_seqlens_is_one_document() -> None:
    q, k, v = random(20, 4, 8), random(20, 2, 8, seed=1), random(20, 2, 8, seed=2)
    one = attention(q, k, v, causal=True, cu_seqlens=torch.tensor([0, 20], dtype=torch.int32))
    assert torch.equal(attention(q, k, v, causal=True), one)


def test_gradient_through_lse_alone() -> None:
    mine = leaves(random(1, 9, 2, 4), random(1, 9, 2, 4, seed=1), random(1, 9, 2, 4, seed=2))
    exact = leaves(*(x.double() for x in mine))
    _, lse = attention(*mine, causal=True, return_lse=True)
    got = torch.autograd.grad(lse.sum(), mine)
    want = torch.autograd.grad(dense_attention(*exact, causal=True)[1].sum(), exact[:2])
    torch.testing.assert_close(got[0].double(), want[0], **NEAR)
    torch.testing.assert_close(got[1].double(), want[1], **NEAR)
    assert not got[2].any()


def test_gradients_by_finite_differences() -> None:
    q, k, v = leaves(random(5, 4, 3).double(), random(5, 2, 3, seed=1).double(), random(5, 2, 3, seed=2).double())

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, causal=True, cu_seqlens=torch.tensor([0, 2, 5]), return_lse=True)

    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_pytorch(dtype: torch.dtype) -> None:
    q, k, v, dout = (random(2, 70, 4, 16, seed=seed).to(dtype) for seed in range(4))

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = leaves(*(x.to(dtype) for x in (q, k, v)))
        out = function(*inputs)
        assert out.dtype == dtype
        return [out, *torch.autograd.grad(out, inputs, dout.to(dtype))]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    exact = run(sdpa, torch.float64)
    ours = run(lambda q, k, v: attention(q, k, v, causal=True), dtype)
    theirs = run(sdpa, dtype)
    for got, peer, want in zip(ours, theirs, exact, strict=True):
        # Plus half a unit in the last place of the largest number, where both round to the same.
        epsilon = torch.finfo(dtype).eps / 2 * want.abs().max()
        assert (got - want).abs().max() <= (peer - want).abs().max() + epsilon


def test_scale_is_taken_as_given() -> None:
    q, k, v = random(1, 6, 2, 4), random(1, 6, 2, 4, seed=1), random(1, 6, 2, 4, seed=2)
    torch.testing.assert_close(attention(q, k, v, scale=0.25), attention(q / 2, k, v))


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4), (0, 2, 4), (2, 5, 0, 4)])
def test_zero_sizes(shape: tuple[int, ...]) -> None:
    mine = leaves(*(torch.zeros(shape) for _ in range(3)))
    out, lse = attention(*mine, causal=True, return_lse=True)
    assert out.shape == shape
    assert lse.numel() == out.numel() // 4
    assert [grad.shape for grad in torch.autograd.grad(out.sum() + lse.sum(), mine)] == [shape] * 3


def test_no_keys_at_all() -> None:
    out, lse = attention(random(2, 3, 2, 4), random(2, 0, 2, 4), random(2, 0, 2, 4), return_lse=True)
    assert torch.equal(out, torch.zeros(2, 3, 2, 4))
    assert torch.equal(lse, torch.full((2, 2, 3), -torch.inf))


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "message"),
    [
        ((4, 3), (4, 3), (4, 3), {}, r"q must be \[B, S, H, D\] or packed \[T, H, D\], got \[4, 3\]"),
        ((1, 4, 2, 8), (1, 4, 2, 8), (1, 5, 2, 8), {}, r"k and v .*got \[1, 4, 2, 8\] and \[1, 5, 2, 8\]"),
        ((1, 4, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8), {}, "k must match q in batch and head_dim"),
        ((1, 4, 2, 8), (1, 4, 2, 6), (1, 4, 2, 6), {}, "k must match q in batch and head_dim"),
        ((1, 4, 2, 8), (4, 2, 8), (4, 2, 8), {}, "k must match q in batch and head_dim"),
        ((1, 4, 7, 8), (1, 4, 2, 8), (1, 4, 2, 8), {}, "heads must be a multiple of k's, got 7 and 2"),
        ((1, 4, 7, 8), (1, 4, 0, 8), (1, 4, 0, 8), {}, "heads must be a multiple of k's, got 7 and 0"),
        ((4, 2, 0), (4, 2, 0), (4, 2, 0), {}, r"head_dim must be at least 1, got q \[4, 2, 0\]"),
        ((4, 2, 8), (4, 2, 8), (4, 2, 8), {"window": 0}, "window must be an integer from 1 .*got 0"),
        ((4, 2, 8), (4, 2, 8), (4, 2, 8), {"window": 2.5}, "window must be an integer .*got 2.5"),
        ((4, 2, 8), (4, 2, 8), (4, 2, 8), {"window": 2**63 - 1}, r"to 2\*\*62, got 9223372036854775807"),
        ((4, 2, 8), (4, 2, 8), (4, 2, 8), {"scale": 0.0}, "scale must be finite and above 0, got 0.0: negate q"),
        ((4, 2, 8), (4, 2, 8), (4, 2, 8), {"scale": math.nan}, "scale must be finite and above 0, got nan"),
        ((4, 2, 8), (4, 2, 8), (4, 2, 8), {"backend": "tritn"}, "unknown backend 'tritn'.* one of cpu, reference"),
        ((4, 2, 8), (4, 2, 8), (4, 2, 8), {"cu_seqlens": [1, 4]}, "cu_seqlens must start at 0, got 1"),
        ((4, 2, 8), (4, 2, 8), (4, 2, 8), {"cu_seqlens": [0, 3, 2, 4]}, "cu_seqlens must not decrease"),
        ((4, 2, 8), (4, 2, 8), (4, 2, 8), {"cu_seqlens": [0, 3]}, "end at the number of tokens, 4, got 3"),
        ((4, 2, 8), (5, 2, 8), (5, 2, 8), {"cu_seqlens": [0, 4]}, "as many keys as queries, got 5 and 4"),
        ((1, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8), {"cu_seqlens": [0, 4]}, "cu_seqlens needs packed"),
    ],
)
def test_mistakes_are_named(q: tuple, k: tuple, v: tuple, options: dict, message: str) -> None:
    if "cu_seqlens" in options:
        options = options | {"cu_seqlens": torch.tensor(options["cu_seqlens"])}
    with pytest.raises(ValueError, match=message):
        attention(random(*q), random(*k), random(*v), **options)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.zeros(2, device="meta"), "cu_seqlens must be on the CPU or on cpu with q, got meta"),
        (torch.tensor([0, 4], dtype=torch.uint16), r"1-D integer tensor \[num_docs \+ 1\], got torch.uint16"),
        (torch.tensor([0, 4j]), r"1-D integer tensor \[num_docs \+ 1\], got torch.complex64"),
    ],
)
def test_cu_seqlens_of_another_kind(cu_seqlens: Tensor, message: str) -> None:
    q = random(4, 2, 8)
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, cu_seqlens=cu_seqlens)


def test_mixed_dtypes_are_named() -> None:
    q = random(4, 2, 8)
    with pytest.raises(ValueError, match=r"one floating dtype, got torch.float32, torch.bfloat16, torch.float32"):
        attention(q, q.bfloat16(), q)
    with pytest.raises(ValueError, match="one floating dtype"):
        attention(q.int(), q.int(), q.int())
