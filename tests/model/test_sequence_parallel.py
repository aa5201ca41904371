"""2D attention on N ranks equals one rank, forward and backward, for every grid, layout, route and head count."""

from collections.abc import Callable

import pytest
import torch
from longtake.comm.layout import Layout, balanced, contiguous, zigzag
from longtake.comm.mesh import Mesh
from longtake.kernels.attention import attention
from longtake.model.attention_plan import holdings, plan_attention
from longtake.model.features import route_frames, to_owners
from longtake.model.huggingface_loss import sum_over_ranks
from longtake.model.ring import ring_attention
from longtake.model.sequence_parallel import parallel_attention
from longtake.model.ulysses import HeadSplit, to_heads, to_tokens
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
        HeadSplit(3, 2, 1)
    with pytest.raises(ValueError, match=r"make the layout with the mesh's degrees"):
        parallel_attention(q, k, v, mesh=Mesh(), layout=zigzag(7, ring=2))
    with pytest.raises(ValueError, match=r"route must be 'direct' or 'relay', got 'rotate'"):
        parallel_attention(q, k, v, mesh=Mesh(), layout=zigzag(7), route="rotate")  # type: ignore[arg-type]


ROW = torch.zeros(1, 8, 2, 4)


@pytest.mark.parametrize(
    ("q", "k", "options", "message"),
    [
        (
            ROW.expand(2, -1, -1, -1),
            ROW,
            {},
            r"match q in batch and head_dim, got q \[2, 8, 2, 4\] and k \[1, 8, 2, 4\]",
        ),
        (
            ROW,
            ROW.expand(2, -1, -1, -1),
            {},
            r"match q in batch and head_dim, got q \[1, 8, 2, 4\] and k \[2, 8, 2, 4\]",
        ),
        (ROW, ROW[0], {}, r"match q in batch and head_dim, got q \[1, 8, 2, 4\] and k \[8, 2, 4\]"),
        (ROW, ROW[:, :, :1].expand(-1, -1, 3, -1), {}, "q's heads must be a multiple of k's, got 2 and 3"),
        (ROW.int(), ROW.int(), {}, "one floating dtype, got torch.int32"),
        (ROW.bfloat16(), ROW, {}, "one floating dtype, got torch.bfloat16, torch.float32"),
        (ROW[:, :7], ROW[:, :7], {}, "holds 8 tokens by the layout, got q with 7"),
        (ROW, ROW, {"scale": 0.0}, "scale must be finite and above 0, got 0.0"),
        (ROW, ROW, {"backend": "x"}, "unknown backend 'x'"),
        (ROW.to("meta"), ROW.to("meta"), {}, "on the mesh's device, cpu, got meta"),
    ],
)
def test_what_does_not_fit_is_refused(q: Tensor, k: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parallel_attention(q, k, k, mesh=Mesh(device="cpu"), layout=zigzag(8), **options)


def wrong_then_right(rank: int) -> list[float]:
    """Errors of right calls, each of which comes after one that all ranks were refused."""
    mesh, layout, errors = Mesh(ring=2), zigzag(300, ring=2), []
    whole = inputs(300, 4, 2)
    expected = gradients(lambda q, k, v: attention(q, k, v, causal=True), *whole)
    q, k, v, dout = (layout.shard(x, mesh.sp_rank) for x in whole)
    refused = [
        ((q, k, v), {"backend": "x"}, "unknown backend 'x'"),
        ((q.double(), k.double(), v.double()), {"backend": "triton"}, "got torch.float64: cast"),
        ((q, k, v), {"scale": float("nan")}, "scale must be finite"),
        ((q.int(), k.int(), v.int()), {}, "one floating dtype"),
    ]
    for tensors, options, message in refused:
        with pytest.raises(ValueError, match=message):
            parallel_attention(*tensors, mesh=mesh, layout=layout, causal=True, **options)
        found = gradients(lambda *x: parallel_attention(*x, mesh=mesh, layout=layout, causal=True), q, k, v, dout)
        errors += [float((f - layout.shard(e, rank)).abs().max()) for f, e in zip(found, expected, strict=True)]
    return errors


def test_ranks_are_in_step_after_a_call_that_was_refused() -> None:
    for errors in run_ranks(wrong_then_right, 2, timeout=30):
        assert max(errors) < 1e-4 and len(errors) == 4 * 4


def gradients_of_gradients(rank: int) -> dict[str, str]:
    """What autograd says to a penalty on a gradient, by what it would have to go through twice."""
    mesh, layout = Mesh(ulysses=2), zigzag(8, ulysses=2)
    plan = plan_attention(mesh, *holdings(layout), num_tokens=8)
    ring_plan = plan_attention(Mesh(ring=2), *holdings(zigzag(8, ring=2)), num_tokens=8)
    heads, features = HeadSplit(2, 2, 2), route_frames(torch.tensor([0, 4]), 4, layout, mesh)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "ring_attention": lambda x: ring_attention(x, x, x, ring_plan, scale=1.0),
        "to_heads": lambda x: to_heads(x, x, x, heads=heads, plan=plan)[0],
        "to_tokens": lambda x: to_tokens(x.repeat(2, 1, 1)[:, :1], heads=heads, plan=plan),
        "to_owners": lambda x: to_owners(x.flatten(1)[None], features),
        "sum_over_ranks": lambda x: sum_over_ranks(x.sum(), mesh),
    }
    said = {}
    for name, call in calls.items():
        x = torch.ones(4, 2, 4, requires_grad=True)
        out = call(x).square().sum()
        try:
            [grad] = torch.autograd.grad(out, x, create_graph=True)
            (out + grad.square().sum()).backward()
            said[name] = "nothing"
        except RuntimeError as error:
            said[name] = str(error)
    return said


def test_gradients_of_gradients_are_refused() -> None:
    for said in run_ranks(gradients_of_gradients, 2, timeout=30):
        assert len(said) == 5
        assert not {name: words for name, words in said.items() if "once_differentiable" not in words}
