"""Ulysses (arXiv 2309.14509): an all-to-all trades a rank's tokens for its heads, and another one trades back."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..comm.mesh import Mesh
from .attention_plan import AttentionPlan
from .once import OnceDifferentiable


class HeadSplit:
    """Which heads each Ulysses rank takes: any head counts, as evenly as they go.

    A k, v head goes to each rank that has a query head of its group, and to no other.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, degree: int) -> None:
        if num_kv_heads == 0 or num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} q heads are not a multiple of {num_kv_heads} k, v heads")
        self.group = num_heads // num_kv_heads
        edges = [rank * num_heads // degree for rank in range(degree + 1)]
        self.q = [slice(a, b) for a, b in pairwise(edges)]
        self.kv = [slice(s.start // self.group, -(-s.stop // self.group)) for s in self.q]
        self.kv = [kv if q.start < q.stop else slice(0, 0) for q, kv in zip(self.q, self.kv, strict=True)]

    def kv_of_q(self, rank: int) -> list[int] | None:
        """For each local query head its local k, v head; None where plain grouping says the same."""
        q, kv = self.q[rank], self.kv[rank]
        index = [h // self.group - kv.start for h in range(q.start, q.stop)]
        num_kv = kv.stop - kv.start
        plain = num_kv == 0 or (
            len(index) % num_kv == 0 and index == [i // (len(index) // num_kv) for i in range(len(index))]
        )
        return None if plain else index


def to_heads(
    q: Tensor, k: Tensor, v: Tensor, *, heads: HeadSplit, plan: AttentionPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """All-to-all: (my tokens, all heads) to (my ring part's tokens, my heads); q, k and v in one message a peer."""
    if plan.mesh.ulysses == 1:
        return q, k, v
    q, k, v = _ToHeads.apply(plan.mesh, (heads.q, heads.kv, heads.kv), plan.counts, q, k, v)
    index = heads.kv_of_q(plan.mesh.ulysses_rank)
    return q, pick_heads(k, index), pick_heads(v, index)


def pick_heads(x: Tensor, index: list[int] | None) -> Tensor:
    """The heads [T, len(index), D] of x [T, H, D], any of them several times; None: all as they are.

    By views: a list as an index would be copied to the device, and waited for, in every layer.
    """
    if index is None:
        return x
    heads = x.unbind(1)
    return torch.stack([heads[i] for i in index], dim=1)


def to_tokens(out: Tensor, *, heads: HeadSplit, plan: AttentionPlan) -> Tensor:
    """All-to-all back: (my ring part's tokens, my heads) to (my tokens, all heads)."""
    if plan.mesh.ulysses == 1:
        return out
    return _ToTokens.apply(plan.mesh, heads.q, plan.counts, out)


Slices = Sequence[slice]


def _scatter_heads(
    mesh: Mesh, heads: Sequence[Slices], counts: Sequence[int], tensors: Sequence[Tensor]
) -> list[Tensor]:
    mine = mesh.ulysses_rank
    send = [[x[:, h[u]] for x, h in zip(tensors, heads, strict=True)] for u in range(mesh.ulysses)]
    whole = [
        x.new_empty(sum(counts), h[mine].stop - h[mine].start, x.shape[2]) for x, h in zip(tensors, heads, strict=True)
    ]
    mesh.transport.all_to_all("ulysses", send, _by_peer(whole, counts))
    return whole


def _gather_heads(
    mesh: Mesh, heads: Sequence[Slices], counts: Sequence[int], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """The adjoint of _scatter_heads: a head that several ranks worked on is summed, in the order of ranks."""
    num_tokens = counts[mesh.ulysses_rank]
    recv = [
        [x.new_empty(num_tokens, h[u].stop - h[u].start, x.shape[2]) for x, h in zip(tensors, heads, strict=True)]
        for u in range(mesh.ulysses)
    ]
    mesh.transport.all_to_all("ulysses", _by_peer(tensors, counts), recv)
    whole = [x.new_zeros(num_tokens, max(s.stop for s in h), x.shape[2]) for x, h in zip(tensors, heads, strict=True)]
    for u in range(mesh.ulysses):
        for x, h, part in zip(whole, heads, recv[u], strict=True):
            x[:, h[u]] += part
    return whole


def _by_peer(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    parts = [x.split(list(counts)) for x in tensors]
    return [list(peer) for peer in zip(*parts, strict=True)]


class _ToHeads(OnceDifferentiable):
    @staticmethod
    def forward(
        ctx: Any, mesh: Mesh, heads: Sequence[Slices], counts: Sequence[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.mesh, ctx.heads, ctx.counts = mesh, heads, counts
        return tuple(_scatter_heads(mesh, heads, counts, tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_gather_heads(ctx.mesh, ctx.heads, ctx.counts, grads)


class _ToTokens(OnceDifferentiable):
    @staticmethod
    def forward(ctx: Any, mesh: Mesh, heads: Slices, counts: Sequence[int], x: Tensor) -> Tensor:
        ctx.mesh, ctx.heads, ctx.counts = mesh, heads, counts
        return _gather_heads(mesh, [heads], counts, [x])[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, _scatter_heads(ctx.mesh, [ctx.heads], ctx.counts, grads)[0]
