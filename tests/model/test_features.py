"""Features of frames, wherever they were encoded, arrive at the owners of their tokens, and gradients come back."""

from types import SimpleNamespace

import pytest
import torch
from longtake.comm.layout import Layout, balanced, contiguous, zigzag
from longtake.comm.mesh import Mesh
from longtake.model.features import frame_share, route_frames, to_owners
from torch import Tensor

from tests.ranks import run_ranks

TOKENS_PER_FRAME = 4
GRIDS = [(2, 2), (4, 1)]
COUNTS = (0, 1, 3, 9)  # frames; 4 ranks


def frame_starts(num_frames: int) -> Tensor:
    """Frames in twos, side by side, with text before, between and after."""
    i = torch.arange(num_frames)
    return 2 + i * TOKENS_PER_FRAME + 5 * (i // 2)


def layouts(num_tokens: int, ring: int, ulysses: int) -> dict[str, Layout]:
    degrees = {"ring": ring, "ulysses": ulysses}
    held = torch.rand(num_tokens, generator=torch.Generator().manual_seed(1)) < 0.1
    few, most = held.nonzero().flatten(), (~held).nonzero().flatten()
    others = (torch.empty(0, dtype=torch.int64),) * (ring - 2)
    return {
        "contiguous": contiguous(num_tokens, **degrees),
        "zigzag": zigzag(num_tokens, **degrees),
        "balanced": balanced(torch.tensor([0, num_tokens // 3, num_tokens]), **degrees),
        "uneven": Layout(num_tokens, ring, ulysses, (*others, few, most)),
    }


def send_positions(rank: int) -> dict[str, bool]:
    """Each feature row is the position of its token. Says for each case whether all is where it belongs."""
    right = {}
    for ring, ulysses in GRIDS:
        mesh = Mesh(ring=ring, ulysses=ulysses)
        for num_frames in COUNTS:
            starts = frame_starts(num_frames)
            positions = (starts[:, None] + torch.arange(TOKENS_PER_FRAME)).float()[..., None].expand(-1, -1, 3)
            for name, layout in layouts(20 + 7 * num_frames, ring, ulysses).items():
                route = route_frames(starts, TOKENS_PER_FRAME, layout, mesh)
                mine = positions[route.first : route.last].clone().requires_grad_()
                arrived = to_owners(mine, route)
                (arrived**2).sum().backward()
                owned = layout.positions(mesh.sp_rank)
                visual = owned[torch.isin(owned, positions[..., 0].long())]
                right[f"{ring} x {ulysses}, {num_frames} frames, {name}"] = (
                    torch.equal(arrived[:, 0].long(), visual)
                    and torch.equal(owned[route.slots], visual)
                    and arrived.shape[1] == 3
                    and mine.grad is not None
                    and torch.equal(mine.grad, 2 * mine.detach())
                )
    return right


def test_features_arrive_in_order_and_gradients_return() -> None:
    for right in run_ranks(send_positions, 4):
        assert not [case for case, ok in right.items() if not ok]
        assert len(right) == 32


@pytest.mark.parametrize("num_frames", [0, 1, 3, 4, 9, 2048])
@pytest.mark.parametrize("ranks", [1, 4, 7])
def test_frames_are_shared_out_evenly_and_in_order(num_frames: int, ranks: int) -> None:
    shares = [frame_share(num_frames, SimpleNamespace(sp_rank=rank, sp_size=ranks)) for rank in range(ranks)]
    sizes = [last - first for first, last in shares]
    assert [frame for first, last in shares for frame in range(first, last)] == list(range(num_frames))
    assert max(sizes) - min(sizes) <= 1
