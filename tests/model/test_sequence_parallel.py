"""2D attention on N ranks equals one rank, forward and backward, for every grid, layout, route and head count."""

import pytest
import torch
from longtake.comm.layout import Layout, balanced, contiguous, zigzag
from longtake.comm.mesh import Mesh
from longtake.kernels.attention import attention
from longtake.model.sequence_parallel import parallel_attention
from longtake.model.ulysses import HeadSplit
from torch import Tensor

from tests.ranks import run_ranks

GRIDS = [(1, 2), (2, 1), (2, 2), (4, 1), (1, 4), (3, 1)]
HEADS = {(1, 2): (7, 1), (1, 4): (4, 1), (2, 2): (6, 2)}  # 7 heads on ulysses 2, 1 k/v head on ulysses 4
LENGTHS = [1, 37, 0, 130, 23, 64, 2]  # packed documents, one of them empty
TOLERANCE = 1e-5  # float32 sums in another order; errors seen are about 1e-6 of the largest value


def layouts(cu_seqlens: Tensor, ring: int, ulysses: int) -> dict[str, Layout]:
    num_tokens = int(cu_seqlens[-1])
    return {
        "contiguous": contiguous(num_tokens, ring=ring, ulysses=ulysses),
        "zigzag": zigzag(num_tokens, ring=ring, ulysses=ulysses),
        "balanced": balanced(cu_seqlens, ring=ring, ulysses=ulysses),
    }


def masks() -> dict[str, dict]:
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    return {
        "full": {},
        "causal": {"causal": True},
        "window": {"causal": True, "window": 40},
        "packed": {"causal": True, "cu_seqlens": cu_seqlens},
        "packed full": {"cu_seqlens": cu_seqlens},
    }


def inputs(num_tokens: int, num_heads: int, num_kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    sizes = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return [torch.randn(num_tokens, h, 16, generator=generator) for h in sizes]


def gradients(call, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = call(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def compare_with_one_rank(
    rank: int,
    ring: int,
    ulysses: int,
    num_heads: int,
    num_kv_heads: int,
    backend: str | None = None,
    only: tuple[str, ...] = ("",),
) -> dict[str, float]:
    mesh, errors = Mesh(ring=ring, ulysses=ulysses), {}
    num_tokens = sum(LENGTHS)
    whole = inputs(num_tokens, num_heads, num_kv_heads)
    for mask_name, mask in masks().items():
        expected = gradients(lambda q, k, v, mask=mask: attention(q, k, v, **mask), *whole)
        for name, layout in layouts(torch.tensor([0, *LENGTHS]).cumsum(0), ring, ulysses).items():
            mine = [layout.shard(x, mesh.sp_rank) for x in whole]
            for route in ("direct", "relay"):
                case = f"{mask_name}, {name}, {route}"
                if not case.startswith(only):
                    continue
                found = gradients(
                    lambda q, k, v, mask=mask, layout=layout, route=route: parallel_attention(
                        q, k, v, mesh=mesh, layout=layout, route=route, backend=backend, **mask
                    ),
                    *mine,
                )
                worst = max(
                    float((f - layout.shard(e, mesh.sp_rank)).abs().max() / e.abs().max()) if f.numel() else 0.0
                    for f, e in zip(found, expected, strict=True)
                )
                errors[case] = worst
    return errors


@pytest.mark.parametrize(("ring", "ulysses"), GRIDS)
def test_equals_one_rank(ring: int, ulysses: int) -> None:
    num_heads, num_kv_heads = HEADS.get((ring, ulysses), (4, 2))
    for errors in run_ranks(compare_with_one_rank, ring * ulysses, ring, ulysses, num_heads, num_kv_heads):
        assert not {case: error for case, error in errors.items() if error > TOLERANCE}
        assert len(errors) == 30


def test_the_triton_kernels_equal_one_rank_too() -> None:
    """A whole 2D step, forward and backward, with interpreted kernels against the CPU backend on one rank."""
    only = ("packed, zigzag", "packed, balanced, direct")
    for errors in run_ranks(compare_with_one_rank, 4, 2, 2, 4, 2, "triton", only, timeout=300):
        assert not {case: error for case, error in errors.items() if error > TOLERANCE}
        assert len(errors) == 3


def batched_and_tiny(rank: int) -> list[float]:
    mesh, errors = Mesh(ring=2, ulysses=2), []
    for num_tokens in (0, 1, 3, 5):  # fewer tokens than ranks
        layout = zigzag(num_tokens, ring=2, ulysses=2)
        generator = torch.Generator().manual_seed(num_tokens)
        whole = [torch.randn(2, num_tokens, h, 16, generator=generator) for h in (4, 2, 2, 4)]
        expected = gradients(lambda q, k, v: attention(q, k, v, causal=True), *whole)
        for route in ("direct", "relay"):
            found = gradients(
                lambda q, k, v, layout=layout, route=route: parallel_attention(
                    q, k, v, mesh=mesh, layout=layout, causal=True, route=route
                ),
                *(layout.shard(x, mesh.sp_rank, dim=1) for x in whole),
            )
            pairs = zip(found, expected, strict=True)
            errors += [float((f - layout.shard(e, mesh.sp_rank, dim=1)).abs().sum()) for f, e in pairs]
    return errors


def test_batches_and_sequences_shorter_than_the_group() -> None:
    for errors in run_ranks(batched_and_tiny, 4):
        assert max(errors) < 1e-4 and len(errors) == 32


def two_meshes(rank: int) -> float:
    """A 7-head model on ulysses 2 beside a 1-kv-head model on ring 2, interleaved."""
    shapes = [(Mesh(ulysses=2), 7, 7), (Mesh(ring=2), 4, 1)]
    worst = 0.0
    for _ in range(2):
        for mesh, num_heads, num_kv_heads in shapes:
            whole = inputs(sum(LENGTHS), num_heads, num_kv_heads)
            layout = zigzag(sum(LENGTHS), ring=mesh.ring, ulysses=mesh.ulysses)
            expected = gradients(lambda q, k, v: attention(q, k, v, causal=True), *whole)
            found = gradients(
                lambda q, k, v, mesh=mesh, layout=layout: parallel_attention(
                    q, k, v, mesh=mesh, layout=layout, causal=True
                ),
                *(layout.shard(x, mesh.sp_rank) for x in whole),
            )
            pairs = zip(found, expected, strict=True)
            worst = max(worst, *(float((f - layout.shard(e, rank)).abs().max()) for f, e in pairs))
    return worst


def test_two_meshes_in_one_process() -> None:
    assert max(run_ranks(two_meshes, 2)) < 1e-4


def bytes_sent(rank: int, route: str, length: int) -> dict[str, int]:
    mesh = Mesh(ring=4)
    cu_seqlens = torch.arange(0, 4096 + length, length)
    layout = balanced(cu_seqlens, ring=4)
    q, k, v, _ = (layout.shard(x, rank) for x in inputs(4096, 2, 1))
    parallel_attention(q, k, v, mesh=mesh, layout=layout, causal=True, cu_seqlens=cu_seqlens, route=route)  # type: ignore[arg-type]
    return mesh.transport.bytes_sent


def test_only_visible_rows_travel() -> None:
    key_row = 2 * 16 * 4  # k and v, one head of 16 float32
    rotation = 3 * 4096 * key_row
    sent = {
        (route, length): sum(b["ring"] for b in run_ranks(bytes_sent, 4, route, length))
        for route, length in (("relay", 4096), ("direct", 4096), ("direct", 256))
    }
    assert sent["relay", 4096] == rotation
    assert 0.7 * rotation < sent["direct", 4096] < 0.8 * rotation  # a quarter less for a causal zigzag
    assert sent["direct", 256] == 0  # documents that sit whole on one rank


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "degree"), [(28, 4, 8), (7, 1, 2), (12, 2, 5), (4, 4, 8)])
def test_every_head_has_one_owner_and_its_kv_head(num_heads: int, num_kv_heads: int, degree: int) -> None:
    split = HeadSplit(num_heads, num_kv_heads, degree)
    owned = [h for s in split.q for h in range(s.start, s.stop)]
    sizes = [s.stop - s.start for s in split.q]
    assert owned == list(range(num_heads)) and max(sizes) - min(sizes) <= 1
    group = num_heads // num_kv_heads
    for rank, (q, kv) in enumerate(zip(split.q, split.kv, strict=True)):
        index = split.kv_of_q(rank)
        local = range(q.stop - q.start)
        per_kv = len(local) // max(1, kv.stop - kv.start)
        kv_heads = [kv.start + (i // per_kv if index is None else index[i]) for i in local]
        assert kv_heads == [h // group for h in range(q.start, q.stop)]


def test_wrong_tokens_are_named() -> None:
    layout = zigzag(8)
    q, k, v, _ = inputs(7, 2, 2)
    with pytest.raises(ValueError, match=r"holds 8 tokens by the layout, got q with 7"):
        parallel_attention(q, k, v, mesh=Mesh(), layout=layout)
    with pytest.raises(ValueError, match=r"3 q heads are not a multiple of 2"):
        parallel_attention(*(torch.zeros(8, h, 4) for h in (3, 2, 2)), mesh=Mesh(), layout=layout)
    with pytest.raises(ValueError, match=r"make the layout with the mesh's degrees"):
        parallel_attention(q, k, v, mesh=Mesh(), layout=zigzag(7, ring=2))
    with pytest.raises(ValueError, match=r"route must be 'direct' or 'relay', got 'rotate'"):
        parallel_attention(q, k, v, mesh=Mesh(), layout=zigzag(7), route="rotate")  # type: ignore[arg-type]
