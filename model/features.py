"""Stage one of the two-stage sharding: frames are encoded evenly, features go straight to their tokens' owners.

LongVILA (arXiv 2408.10188, section 3.2). No rank ever holds all features or the whole embedded sequence.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..comm.layout import Layout
from ..comm.mesh import Mesh
from ..kernels.device import to_device
from .once import OnceDifferentiable


@dataclass(frozen=True, eq=False)
class FrameRoute:
    """Which frames this rank encodes, and where their feature rows go.

    This rank encodes frames [first, last) of all frames of the group. order: its feature rows, sorted by owner;
    send_counts, recv_counts: rows to and from each rank of the group; slots: the local token index (int64) of each
    received row. Both are on the mesh's device.
    """

    mesh: Mesh
    first: int
    last: int
    order: Tensor
    send_counts: list[int]
    recv_counts: list[int]
    slots: Tensor


def frame_share(num_frames: int, mesh: Mesh) -> tuple[int, int]:
    """This rank encodes frames [first, last) of the num_frames of its group."""
    return share(num_frames, mesh.sp_rank, mesh.sp_size)


def share(num_frames: int, rank: int, ranks: int) -> tuple[int, int]:
    """The frames [first, last) that one of `ranks` ranks encodes."""
    return rank * num_frames // ranks, (rank + 1) * num_frames // ranks


def route_frames(frame_starts: Tensor, tokens_per_frame: int, layout: Layout, mesh: Mesh) -> FrameRoute:
    """frame_starts: int64 [num_frames], increasing: the global position of each frame's first visual token."""
    me, ranks = mesh.sp_rank, mesh.sp_size
    shares = [share(len(frame_starts), rank, ranks) for rank in range(ranks)]
    first, last = shares[me]
    positions = (frame_starts[:, None] + torch.arange(tokens_per_frame)).flatten()
    owner = layout.owner[positions]
    mine = owner[first * tokens_per_frame : last * tokens_per_frame]
    parts = owner.split([(b - a) * tokens_per_frame for a, b in shares])
    return FrameRoute(
        mesh,
        first,
        last,
        order=to_device(mine.argsort(stable=True), mesh.device),
        send_counts=mine.bincount(minlength=ranks).tolist(),
        recv_counts=[int((part == me).sum()) for part in parts],
        slots=to_device(torch.searchsorted(layout.positions(me), positions[owner == me]), mesh.device),
    )


def to_owners(features: Tensor, route: FrameRoute) -> Tensor:
    """Send features [last - first, tokens_per_frame, C] of one's frames to the owners of their tokens.

    Returns [len(slots), C]: the rows for this rank's own tokens. The gradient travels the same way back.
    """
    return _ToOwners.apply(features.flatten(0, 1), route)


class _ToOwners(OnceDifferentiable):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: FrameRoute) -> Tensor:
        ctx.route = route
        return _travel(rows[route.order], route, route.send_counts, route.recv_counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        route = ctx.route
        back = _travel(grads[0].contiguous(), route, route.recv_counts, route.send_counts)
        return torch.empty_like(back).index_copy_(0, route.order, back), None


def _travel(rows: Tensor, route: FrameRoute, send_counts: list[int], recv_counts: list[int]) -> Tensor:
    arrived = rows.new_empty(sum(recv_counts), rows.shape[1])
    send, recv = rows.split(send_counts), arrived.split(recv_counts)
    route.mesh.transport.all_to_all("sp", [[x] for x in send], [[x] for x in recv])
    return arrived
