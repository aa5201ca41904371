"""Documents packed into one sequence, and this rank's share of it: stage two of the two-stage sharding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..comm.layout import Layout, balanced, contiguous, zigzag
from ..comm.mesh import Mesh
from ..kernels.device import to_device
from .attention_plan import AttentionPlan, Route, holdings, plan_attention
from .features import FrameRoute, route_frames


class Document(Protocol):
    """A tokenised sample."""

    @property
    def input_ids(self) -> Tensor:
        """int64 [T]"""
        ...

    @property
    def loss_weight(self) -> Tensor:
        """float32 [T]: what predicting each token weighs in the loss"""
        ...

    @property
    def frame_starts(self) -> Tensor:
        """int64 [num_frames]: index in input_ids of each frame's first visual token"""
        ...


@dataclass(frozen=True, eq=False)
class ShardedBatch:
    """One rank's tokens of a packed sequence. input_ids, positions, targets int64 and weights float32: [S_local].

    positions restart at each document; targets[i] is the token that follows, weights[i] its share of the loss;
    loss_rows: int64 [n], the tokens whose weight is not 0. All tensors are on the mesh's device.
    num_tokens, num_frames, total_weight: of the whole sequence, all ranks of the group together.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    loss_rows: Tensor
    frames: FrameRoute
    attention: AttentionPlan
    num_tokens: int
    num_frames: int
    total_weight: float


LAYOUTS: dict[str, Callable[[Tensor, Mesh], Layout]] = {
    "contiguous": lambda cu, mesh: contiguous(int(cu[-1]), ring=mesh.ring, ulysses=mesh.ulysses),
    "zigzag": lambda cu, mesh: zigzag(int(cu[-1]), ring=mesh.ring, ulysses=mesh.ulysses),
    "balanced": lambda cu, mesh: balanced(cu, ring=mesh.ring, ulysses=mesh.ulysses),
}


def packed_lengths(documents: Sequence[Document]) -> Tensor:
    """cu_seqlens, int64 [num_documents + 1], of the documents laid end to end."""
    lengths = torch.tensor([0, *(len(document.input_ids) for document in documents)])
    return lengths.cumsum(0)


def packed_frame_starts(documents: Sequence[Document], cu_seqlens: Tensor) -> Tensor:
    """Position of each frame's first token when document i begins at cu_seqlens[i]; int64 [num_frames]."""
    starts = [d.frame_starts + start for d, start in zip(documents, cu_seqlens.tolist(), strict=False)]
    return torch.cat([torch.empty(0, dtype=torch.int64), *starts])


def shard_documents(
    documents: Sequence[Document],
    *,
    mesh: Mesh,
    tokens_per_frame: int,
    layout: str = "balanced",
    route: Route = "direct",
) -> ShardedBatch:
    """Pack documents into one sequence and take this rank's part. Every rank of the group passes the same ones.

    Raises ValueError for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    cu_seqlens = packed_lengths(documents)
    dealt = LAYOUTS[layout](cu_seqlens, mesh)
    nothing = torch.empty(0)
    input_ids = torch.cat([nothing.long(), *(d.input_ids for d in documents)])
    positions = torch.cat([nothing.long(), *(torch.arange(len(d.input_ids)) for d in documents)])
    weights = torch.cat([nothing, *(_next(d.loss_weight) for d in documents)])
    frame_starts = packed_frame_starts(documents, cu_seqlens)

    sharded = [dealt.shard(x, mesh.sp_rank) for x in (input_ids, positions, _next(input_ids), weights)]
    loss_rows = sharded[-1].nonzero().squeeze(1)
    return ShardedBatch(
        *(to_device(x, mesh.device) for x in (*sharded, loss_rows)),
        frames=route_frames(frame_starts, tokens_per_frame, dealt, mesh),
        attention=plan_attention(
            mesh,
            *holdings(dealt),
            num_tokens=len(input_ids),
            causal=True,
            cu_seqlens=cu_seqlens,
            route=route,
        ),
        num_tokens=len(input_ids),
        num_frames=len(frame_starts),
        total_weight=float(weights.sum()),
    )


def _next(x: Tensor) -> Tensor:
    """x moved one place to the left, 0 at the end."""
    return torch.cat([x[1:], x.new_zeros(min(1, len(x)))])
