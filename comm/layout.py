"""Layouts: which positions of the packed sequence each rank holds. Pure functions of lengths and degrees.

Tokens are dealt to ring ranks first, in blocks; each ring part, in increasing position, is then cut into
consecutive runs for its ulysses ranks, so that what they put together is sorted again. Nothing is padded: the last
block is ragged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .balanced import deal

BLOCK = 128  # the kernels' largest tile: cut at its multiples, no tile straddles two far chunks


@dataclass(frozen=True, eq=False)
class Layout:
    """Who holds what. parts[ring_rank]: int64 [n], increasing; together they are 0..num_tokens-1."""

    num_tokens: int
    ring: int
    ulysses: int
    parts: tuple[Tensor, ...]

    def ring_part(self, ring_rank: int) -> Tensor:
        """int64 [n]: the positions that the ulysses ranks of this ring rank hold together, increasing."""
        return self.parts[ring_rank]

    def positions(self, sp_rank: int) -> Tensor:
        """int64 [n]: the positions of sp_rank = ring_rank * ulysses + ulysses_rank, increasing."""
        ring_rank, ulysses_rank = divmod(sp_rank, self.ulysses)
        part = self.parts[ring_rank]
        start, end = (part.numel() * run // self.ulysses for run in (ulysses_rank, ulysses_rank + 1))
        return part[start:end]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of tokens of each sp_rank."""
        return tuple(self.positions(sp_rank).numel() for sp_rank in range(self.ring * self.ulysses))

    @cached_property
    def owner(self) -> Tensor:
        """int64 [num_tokens]: the sp_rank that holds each token."""
        owner = torch.empty(self.num_tokens, dtype=torch.int64)
        for sp_rank in range(self.ring * self.ulysses):
            owner[self.positions(sp_rank)] = sp_rank
        return owner

    def shard(self, x: Tensor, sp_rank: int, dim: int = 0) -> Tensor:
        """The part of a whole tensor that a rank holds. ValueError where `dim` does not hold num_tokens."""
        if x.shape[dim] != self.num_tokens:
            raise ValueError(f"dim {dim} holds {x.shape[dim]} tokens, the layout {self.num_tokens}")
        return x.index_select(dim, self.positions(sp_rank).to(x.device))

    def unshard(self, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        """The whole tensor from all parts, in sp_rank order. ValueError where a part has another length."""
        lengths = tuple(part.shape[dim] for part in parts)
        if lengths != self.counts:
            raise ValueError(f"parts of {lengths} tokens in dim {dim}, the layout has {self.counts}")
        order = torch.cat([self.positions(sp_rank) for sp_rank in range(len(parts))])
        return torch.cat(list(parts), dim).index_select(dim, order.argsort().to(parts[0].device))


def block_size(num_tokens: int, ring: int) -> int:
    """Tokens in a block: BLOCK, or a power of two below it that leaves each ring rank eight blocks."""
    block = BLOCK
    while block > 1 and num_tokens < 8 * ring * block:
        block //= 2
    return block


def contiguous(num_tokens: int, *, ring: int = 1, ulysses: int = 1) -> Layout:
    """Each ring rank holds one run of tokens."""
    num_blocks = _num_blocks(num_tokens, ring, ulysses)
    sizes = np.diff(np.arange(ring + 1) * num_blocks // ring)
    return _from_blocks(np.repeat(np.arange(ring), sizes), num_tokens, ring, ulysses)


def zigzag(num_tokens: int, *, ring: int = 1, ulysses: int = 1) -> Layout:
    """Each ring rank holds a run from the front and its mirror image from the back: equal causal area."""
    num_blocks = _num_blocks(num_tokens, ring, ulysses)
    ranks = np.arange(ring)
    sizes = (num_blocks + ring - 1 - ranks) // ring  # rank 0 holds the ragged last block, and the first spare one
    front = (sizes + ranks % 2) // 2  # odd sizes: the longer half alternates, or the area would lean to one side
    owner = np.repeat(np.append(ranks, ranks[::-1]), np.append(front, (sizes - front)[::-1]))
    return _from_blocks(owner, num_tokens, ring, ulysses)


def balanced(cu_seqlens: Tensor, *, ring: int = 1, ulysses: int = 1) -> Layout:
    """Packed documents: equal causal area, and each document on as few ring ranks as that allows.

    cu_seqlens: int64 [num_documents + 1], from 0, increasing (a document may be empty). One document: zigzag.
    Raises ValueError where it is not that.
    """
    edges = cu_seqlens.cpu().numpy().astype(np.int64)
    if edges.ndim != 1 or edges.size == 0 or edges[0] != 0 or (np.diff(edges) < 0).any():
        raise ValueError(f"cu_seqlens must start at 0 and not decrease: {edges.tolist()}")
    num_tokens = int(edges[-1])
    if np.count_nonzero(np.diff(edges)) < 2 or ring == 1:
        return zigzag(num_tokens, ring=ring, ulysses=ulysses)
    _num_blocks(num_tokens, ring, ulysses)
    return _from_blocks(deal(edges, block_size(num_tokens, ring), ring), num_tokens, ring, ulysses)


def _from_blocks(owner: np.ndarray, num_tokens: int, ring: int, ulysses: int) -> Layout:
    """The layout that gives block i (block_size tokens, the last one ragged) to ring rank owner[i]."""
    token_owner = np.repeat(owner, block_size(num_tokens, ring))[:num_tokens]
    parts = tuple(torch.from_numpy(np.flatnonzero(token_owner == rank)) for rank in range(ring))
    return Layout(num_tokens, ring, ulysses, parts)


def _num_blocks(num_tokens: int, ring: int, ulysses: int) -> int:
    if num_tokens < 0 or ring < 1 or ulysses < 1:
        raise ValueError(f"no layout of {num_tokens} tokens on ring {ring} x ulysses {ulysses}")
    return -(-num_tokens // block_size(num_tokens, ring))
