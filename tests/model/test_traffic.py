"""What 2D attention sends: the transport's counters, the count from the plan and the closed form are one number."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import gcd
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from longtake.comm.layout import Layout, balanced, contiguous, zigzag
from longtake.comm.mesh import Mesh
from longtake.model.attention_plan import AttentionPlan, Route, holdings, plan_attention
from longtake.model.sequence_parallel import planned_attention
from longtake.model.traffic import AttentionShape, Traffic, causal_traffic, planned_traffic
from longtake.model.ulysses import HeadSplit
from torch import Tensor

from tests.ranks import run_ranks

AXES = ("ring", "ulysses")
LENGTHS = [1, 37, 0, 130, 23, 64, 2]  # packed documents, one of them empty
LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag}
ROUTES: tuple[Route, ...] = ("direct", "relay")
GRIDS = [(1, 1), (2, 1), (3, 2), (5, 4), (8, 1), (1, 8), (8, 8)]  # ring, ulysses


class CountingTransport:
    """Counts what rank (ring_rank, ulysses_rank) sends to others, and delivers zeros."""

    def __init__(self, ring_rank: int, ulysses_rank: int) -> None:
        self.me = dict(zip(AXES, (ring_rank, ulysses_rank), strict=True))
        self.bytes_sent = dict.fromkeys(AXES, 0)

    def all_to_all(self, axis: str, send: Sequence[Sequence[Tensor]], recv: Sequence[Sequence[Tensor]]) -> None:
        for peer, (leaving, arriving) in enumerate(zip(send, recv, strict=True)):
            self.exchange(axis, send_to=peer, send=leaving, recv_from=peer, recv=arriving)

    def exchange(
        self,
        axis: str,
        *,
        send_to: int | None,
        send: Sequence[Tensor],
        recv_from: int | None,
        recv: Sequence[Tensor],
    ) -> SimpleNamespace:
        if send_to not in (None, self.me[axis]):
            self.bytes_sent[axis] += sum(x.nbytes for x in send)
        for x in recv:
            x.zero_()
        return SimpleNamespace(wait=lambda: None)


def lone_mesh(ring: int, ulysses: int, ring_rank: int, ulysses_rank: int) -> Mesh:
    """One rank of a grid without the others."""
    return cast(
        Mesh,
        SimpleNamespace(
            ring=ring,
            ulysses=ulysses,
            sp_size=ring * ulysses,
            ring_rank=ring_rank,
            ulysses_rank=ulysses_rank,
            sp_rank=ring_rank * ulysses + ulysses_rank,
            device=torch.device("cpu"),
            transport=CountingTransport(ring_rank, ulysses_rank),
        ),
    )


def make_plan(mesh: Mesh, layout: Layout, route: Route, cu_seqlens: Tensor | None = None) -> AttentionPlan:
    return plan_attention(
        mesh, *holdings(layout), num_tokens=layout.num_tokens, causal=True, cu_seqlens=cu_seqlens, route=route
    )


def counted(plan: AttentionPlan, shape: AttentionShape, dtype: torch.dtype) -> Traffic:
    """What the transport counts in one forward and in one backward."""
    mesh = plan.mesh
    num_tokens = plan.counts[mesh.ulysses_rank]
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    q, k, v = (torch.randn(num_tokens, h, shape.head_dim, dtype=dtype, requires_grad=True) for h in heads)

    def count(call: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
        before = dict(mesh.transport.bytes_sent)
        result = call()
        return result, {axis: mesh.transport.bytes_sent[axis] - before[axis] for axis in AXES}

    out, forward = count(lambda: planned_attention(q, k, v, plan))
    _, backward = count(lambda: torch.autograd.grad(out, (q, k, v), torch.randn_like(out)))
    return Traffic(forward, backward)


def cases(ring: int, ulysses: int) -> Iterator[tuple[str, Layout, Tensor | None]]:
    """One sequence that does not divide, in two layouts, and packed documents."""
    degrees = {"ring": ring, "ulysses": ulysses}
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    for name, layout in LAYOUTS.items():
        yield name, layout(sum(LENGTHS), **degrees), None
    yield "packed", balanced(cu_seqlens, **degrees), cu_seqlens


def count_on_gloo(rank: int) -> dict[tuple, tuple[Traffic, Traffic]]:
    """The transport's count and the plan's, of every case."""
    found = {}
    for ring, ulysses in ((4, 1), (2, 2), (1, 4)):
        mesh = Mesh(ring=ring, ulysses=ulysses)
        for (name, layout, cu_seqlens), route in product(cases(ring, ulysses), ROUTES):
            plan = make_plan(mesh, layout, route, cu_seqlens)
            for dtype in (torch.bfloat16, torch.float64):
                shape = AttentionShape(6, 3, 8, dtype.itemsize)  # 3 key heads on ulysses 2 and 4: shared, unevenly
                found[ring, name, route, dtype] = counted(plan, shape, dtype), planned_traffic(plan, shape)
    return found


def test_the_plan_counts_what_gloo_ranks_send() -> None:
    for found in run_ranks(count_on_gloo, 4):
        assert len(found) == 36
        assert {case: pair for case, pair in found.items() if pair[0] != pair[1]} == {}


@pytest.mark.parametrize(("ring", "ulysses"), [(8, 1), (1, 8), (5, 3), (8, 8)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(12, 2), (8, 8), (7, 1)])
def test_the_plan_counts_what_the_code_hands_over_on_larger_grids(
    ring: int, ulysses: int, num_heads: int, num_kv_heads: int
) -> None:
    shape = AttentionShape(num_heads, num_kv_heads, 4, 2)
    sp_ranks = {0, ulysses * ring // 2, ulysses * ring - 1}
    for (_, layout, cu_seqlens), route, sp_rank in product(cases(ring, ulysses), ROUTES, sp_ranks):
        plan = make_plan(lone_mesh(ring, ulysses, *divmod(sp_rank, ulysses)), layout, route, cu_seqlens)
        assert counted(plan, shape, torch.bfloat16) == planned_traffic(plan, shape)


@pytest.mark.parametrize(("ring", "ulysses"), GRIDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("route", ROUTES)
def test_the_closed_form_is_the_plan(ring: int, ulysses: int, layout: Any, route: Route) -> None:
    tokens_per_rank = 1280  # 10 blocks: five for each half of a zigzag's shard
    whole = LAYOUTS[layout](ring * ulysses * tokens_per_rank, ring=ring, ulysses=ulysses)
    plans = [make_plan(lone_mesh(ring, ulysses, r, ulysses // 2), whole, route) for r in range(ring)]
    for (num_heads, num_kv_heads), element_size in product([(16, 16), (16, 2), (24, 1), (8, 4)], (2, 4, 8)):
        shape = AttentionShape(num_heads, num_kv_heads, 64, element_size)
        closed = causal_traffic(
            shape, ring=ring, ulysses=ulysses, tokens_per_rank=tokens_per_rank, layout=layout, route=route
        )
        assert closed == tuple(planned_traffic(plan, shape) for plan in plans)


def ring_bytes(shape: AttentionShape, layout: Any, route: Route) -> list[tuple[float, float]]:
    """Forward and backward of each rank of a ring of 8, in units of the bytes of a shard's keys and values."""
    ranks = causal_traffic(shape, ring=8, ulysses=2, tokens_per_rank=1024, layout=layout, route=route)
    shard = 2 * 1024 * 2 * max(1, shape.num_kv_heads // 2) * shape.head_dim * shape.element_size
    return [(rank.forward["ring"] / shard, rank.backward["ring"] / shard) for rank in ranks]


def test_direct_saves_a_quarter_of_a_zigzag_rotation_and_half_of_a_contiguous_one() -> None:
    shape = AttentionShape(28, 4, 128, 2)
    rotation = ring_bytes(shape, "zigzag", "relay")
    assert rotation == ring_bytes(shape, "contiguous", "relay") == [(7, 7 + 2 * 8)] * 8  # float32 is 2 of bfloat16
    for layout, share, lends_most, returns_most in (("zigzag", 3 / 4, 7, 0), ("contiguous", 1 / 2, 0, 7)):
        ranks = ring_bytes(shape, layout, "direct")
        forward, backward = zip(*ranks, strict=True)
        assert sum(forward) == share * 8 * 7 and sum(backward) == share * 8 * 7 * (1 + 2)
        returned = [b - f for f, b in ranks]
        assert max(forward) == forward[lends_most] == 7 and max(returned) == returned[returns_most] == 2 * 7
    even = ring_bytes(replace(shape, element_size=4), "zigzag", "direct")
    assert [forward for forward, _ in even] == [(7 + i) / 2 for i in range(8)]
    assert [backward for _, backward in even] == [3 / 2 * 7] * 8  # where rows and gradients weigh the same


@pytest.mark.parametrize(("num_kv_heads", "ulysses"), [(4, 2), (4, 4), (2, 8), (1, 4)])
def test_grouped_routing_against_replicated_key_heads(num_kv_heads: int, ulysses: int) -> None:
    shape = AttentionShape(24, num_kv_heads, 64, 2)
    plan = make_plan(lone_mesh(4, ulysses, 1, 0), zigzag(4096 * ulysses, ring=4, ulysses=ulysses), "direct")
    ours = planned_traffic(plan, shape)
    theirs = planned_traffic(plan, replace(shape, num_kv_heads=24))
    least = planned_traffic(plan, replace(shape, num_kv_heads=max(num_kv_heads, ulysses)))
    num_moving = max(num_kv_heads, ulysses)
    for mine, replicated in ((ours.forward, theirs.forward), (ours.backward, theirs.backward)):
        assert mine["ulysses"] * 2 * 24 == replicated["ulysses"] * (24 + num_moving)
        assert mine["ring"] * 24 == replicated["ring"] * num_moving
    assert ours == least


def test_key_heads_that_all_ranks_together_need() -> None:
    for degree, num_kv_heads in product(range(1, 9), range(1, 9)):
        heads = HeadSplit(840, num_kv_heads, degree).kv  # 840: all of them divide it
        assert sum(s.stop - s.start for s in heads) == degree + num_kv_heads - gcd(degree, num_kv_heads)


def lent_rows(layout: Layout, cu_seqlens: Tensor, i: int, j: int) -> int:
    """Rows of j's shard that a query of i sees: from i's last query of each document back to the document's start."""
    total = 0
    for first, end in zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist(), strict=False):
        queries, keys = ({p for p in layout.ring_part(r).tolist() if first <= p < end} for r in (i, j))
        total += sum(key <= max(queries) for key in keys) if queries else 0
    return total


@pytest.mark.parametrize("mean", [40, 300, 1500])
def test_packed_documents_send_the_rows_that_others_see(mean: int) -> None:
    generator = torch.Generator().manual_seed(mean)
    lengths = torch.randint(1, 2 * mean, (4500 // mean,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    layout, shape, ring = balanced(cu_seqlens, ring=4, ulysses=2), AttentionShape(4, 2, 16, 2), 4
    row = 2 * 16
    for i in range(ring):
        traffic = planned_traffic(make_plan(lone_mesh(4, 2, i, 1), layout, "direct", cu_seqlens), shape)
        lent = sum(lent_rows(layout, cu_seqlens, j, i) for j in range(ring) if j != i)
        borrowed = sum(lent_rows(layout, cu_seqlens, i, j) for j in range(ring) if j != i)
        assert traffic.forward["ring"] == lent * row * 2
        assert traffic.backward["ring"] == (lent * 2 + borrowed * 4) * row


SETTING: dict[str, Any] = {"ring": 4, "ulysses": 2, "tokens_per_rank": 1024, "layout": "zigzag", "route": "direct"}


@pytest.mark.parametrize(
    ("heads", "tokens_per_rank", "message"),
    [
        ((9, 3), 1024, r"that 2 Ulysses ranks divide.*got 9 and 3"),
        ((12, 3), 1024, r"divide or are divided by them, got 12 and 3"),
        ((8, 2), 1088, r"ring parts of a multiple of 256 tokens, got 2176 \(1088 a rank on ulysses 2\)"),
    ],
)
def test_what_does_not_divide_is_named(heads: tuple[int, int], tokens_per_rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_traffic(AttentionShape(*heads, 64, 2), **SETTING | {"tokens_per_rank": tokens_per_rank})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layout": "balanced"}, "layout must be 'contiguous' or 'zigzag', got 'balanced'"),
        ({"route": "rotate"}, "route 'direct' or 'relay', got 'rotate'"),
        ({"ulysses": 0}, "no traffic of 1024 tokens a rank on ring 4 x ulysses 0"),
    ],
)
def test_an_unknown_setting_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_traffic(AttentionShape(8, 2, 64, 2), **SETTING | wrong)


def test_a_shape_of_nothing_is_named() -> None:
    with pytest.raises(ValueError, match="num_kv_heads must be at least 1, got 0"):
        AttentionShape(8, 0, 64, 2)
