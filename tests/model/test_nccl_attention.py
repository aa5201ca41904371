"""2D attention over the NCCL transport on its double: what a stream's order must hold together gives wrong numbers here
where it does not. Against one rank, forward and backward."""

import pytest
import torch
from longtake.comm.layout import Layout, balanced, contiguous, zigzag
from longtake.model.attention_plan import Route
from longtake.model.sequence_parallel import parallel_attention
from torch import Tensor

from tests.comm.fake_nccl import World, run_threads
from tests.comm.thread_mesh import ThreadMesh

CU_SEQLENS = torch.tensor([0, 40, 45, 131, 203])
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
LAYOUTS = {
    "contiguous": lambda ring, ulysses: contiguous(203, ring=ring, ulysses=ulysses),
    "zigzag": lambda ring, ulysses: zigzag(203, ring=ring, ulysses=ulysses),
    "balanced": lambda ring, ulysses: balanced(CU_SEQLENS, ring=ring, ulysses=ulysses),
}


def whole() -> list[Tensor]:
    """q, k, v, dout of the whole sequence, float64."""
    generator = torch.Generator().manual_seed(7)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(203, h, HEAD_DIM, generator=generator, dtype=torch.float64) for h in heads]


def attend(mesh: ThreadMesh, layout: Layout, route: Route, packed: bool) -> list[Tensor]:
    """out, dq, dk, dv of this rank's tokens; backend "reference": the kernels are not what is tested."""
    *qkv, dout = (layout.shard(x, mesh.sp_rank) for x in whole())
    qkv = [x.requires_grad_() for x in qkv]
    out = parallel_attention(
        *qkv,
        mesh=mesh,  # pyright: ignore[reportArgumentType]
        layout=layout,
        causal=True,
        cu_seqlens=CU_SEQLENS if packed else None,
        route=route,
        backend="reference",
    )
    return [out.detach(), *torch.autograd.grad(out, qkv, dout)]


def body(rank: int, world: World, ring: int, ulysses: int, layout: str, route: Route) -> list[Tensor]:
    mesh = ThreadMesh(rank, world, ring=ring, ulysses=ulysses)
    return attend(mesh, LAYOUTS[layout](ring, ulysses), route, packed=layout == "balanced")


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("route", ["direct", "relay"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("ring", "ulysses"), [(4, 1), (2, 2), (1, 4)])
def test_four_ranks_equal_one(ring: int, ulysses: int, layout: str, route: Route, lazy: bool) -> None:
    (expected,) = run_threads(body, 1, 1, 1, layout, route, lazy=lazy)
    parts = run_threads(body, ring * ulysses, ring, ulysses, layout, route, lazy=lazy)
    dealt = LAYOUTS[layout](ring, ulysses)
    for found, want in zip(zip(*parts, strict=True), expected, strict=True):
        torch.testing.assert_close(dealt.unshard(found), LAYOUTS[layout](1, 1).unshard([want]), rtol=1e-9, atol=1e-9)
