"""Properties of plans over random layouts and masks: pure index work, no processes."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longtake.comm.layout import Layout, balanced, contiguous, zigzag
from longtake.comm.mesh import Mesh
from longtake.kernels.attention import attention
from longtake.kernels.backend import block_forward
from longtake.kernels.visibility import mask_bounds
from longtake.model.attention_plan import AttentionPlan, holdings, plan_attention, take
from torch import Tensor

from tests.kernels.masks import dense

LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(sum)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Layout, dict[str, Any]]:
    """A layout of a packed sequence over up to 4 x 3 ranks, and a mask."""
    cu_seqlens = torch.tensor([0, *draw(LENGTHS)]).cumsum(0)
    degrees = {"ring": draw(st.integers(1, 4)), "ulysses": draw(st.integers(1, 3))}
    num_tokens = int(cu_seqlens[-1])
    make = draw(st.sampled_from(["contiguous", "zigzag", "balanced"]))
    layout = {
        "contiguous": lambda: contiguous(num_tokens, **degrees),
        "zigzag": lambda: zigzag(num_tokens, **degrees),
        "balanced": lambda: balanced(cu_seqlens, **degrees),
    }[make]()
    mask = {
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.integers(1, 40)),
        "cu_seqlens": draw(st.sampled_from([None, cu_seqlens])),
    }
    return layout, mask


def plan_of(layout: Layout, ring_rank: int, route: str, mask: dict[str, Any]) -> AttentionPlan:
    degrees = {"ring": layout.ring, "ulysses": layout.ulysses, "sp_size": layout.ring * layout.ulysses}
    mesh = SimpleNamespace(**degrees, ring_rank=ring_rank, ulysses_rank=0, device=torch.device("cpu"))
    return plan_attention(
        cast(Mesh, mesh), *holdings(layout), num_tokens=layout.num_tokens, route=cast(Any, route), **mask
    )


@settings(deadline=None, max_examples=60)
@given(problems(), st.sampled_from(["direct", "relay"]))
def test_each_visible_pair_is_visited_once_over_the_ring(problem: tuple[Layout, dict[str, Any]], route: str) -> None:
    layout, mask = problem
    lo, hi = mask_bounds(torch.arange(layout.num_tokens), num_tokens=layout.num_tokens, **mask)
    assert torch.equal(visits(layout, route, mask), seen(lo, hi))


@settings(deadline=None, max_examples=40)
@given(problems(), st.sampled_from(["direct", "relay"]), st.integers(0, 2**32 - 1))
def test_bounds_are_a_mask(problem: tuple[Layout, dict[str, Any]], route: str, seed: int) -> None:
    """A window of what is before, and all of the query's own block of random length, as Gemma 3 has it."""
    layout, position = problem[0], torch.arange(problem[0].num_tokens)
    starts = torch.rand(len(position), generator=torch.Generator().manual_seed(seed)) < 0.2
    block = starts.cumsum(0)
    last = torch.searchsorted(block, block, right=True) - 1
    lo, hi = (position - 10).clamp(min=0), last
    ranks = range(layout.ring * layout.ulysses)
    bounds = [(lo[layout.positions(rank)], hi[layout.positions(rank)]) for rank in ranks]
    assert torch.equal(visits(layout, route, {"bounds": bounds}), seen(lo, hi))


def test_wrong_bounds_are_named() -> None:
    layout, up, down = contiguous(6, ring=1, ulysses=2), torch.tensor([0, 1, 2]), torch.tensor([3, 5, 4])
    with pytest.raises(ValueError, match="bounds are those of 1 ranks, queries of 2"):
        plan_of(layout, 0, "direct", {"bounds": [(up, up)]})
    with pytest.raises(ValueError, match="must not fall from query to query, got hi 4 after 5"):
        plan_of(layout, 0, "direct", {"bounds": [(up, up), (up + 3, down)]})
    with pytest.raises(ValueError, match="must not fall from query to query, got lo 0 after 2"):
        plan_of(layout, 0, "direct", {"bounds": [(up, up), (up, up + 3)]})


def seen(lo: Tensor, hi: Tensor) -> Tensor:
    key = torch.arange(len(lo))
    return ((lo[:, None] <= key) & (key <= hi[:, None])).long()


def visits(layout: Layout, route: str, mask: dict[str, Any]) -> Tensor:
    """How often each key is visited by each query, over all ranks and steps: int64 [T, T]."""
    visits = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.int64)
    for rank in range(layout.ring):
        plan = plan_of(layout, rank, route, mask)
        for step, visibility in zip(plan.steps, plan.visibility, strict=True):
            keys = take(layout.ring_part(step.source), step.rows)
            visits[layout.ring_part(rank)[:, None], keys] += dense(visibility).long()
    return visits


@settings(deadline=None, max_examples=40)
@given(problems(), st.sampled_from(["direct", "relay"]), st.integers(0, 2**32 - 1))
def test_random_splits_merge_to_one_answer(problem: tuple[Layout, dict[str, Any]], route: str, seed: int) -> None:
    layout, mask = problem
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(layout.num_tokens, heads, 8, generator=generator) for heads in (2, 1, 1))
    want_out, want_lse = attention(q, k, v, return_lse=True, backend="reference", **mask)
    for rank in range(layout.ring):
        plan, state = plan_of(layout, rank, route, mask), None
        rows = layout.ring_part(rank)
        for step, visibility in zip(plan.steps, plan.visibility, strict=True):
            keys = take(layout.ring_part(step.source), step.rows)
            state = block_forward(q[rows], k[keys], v[keys], visibility, scale=8**-0.5, state=state)
        assert state is not None
        torch.testing.assert_close(state[0], want_out[rows], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state[1], want_lse[:, rows], rtol=1e-5, atol=1e-5)
