"""Both routes: every visible pair is met once, both ends agree on every size, bytes are what the design says."""

from itertools import pairwise

import pytest
import torch
from longtake.comm.layout import Layout, balanced, contiguous, zigzag
from longtake.comm.plan import Step, compact, direct, relay
from torch import Tensor

RINGS = [1, 2, 3, 4, 7]


def random_needed(ring: int, sizes: list[int], density: float, seed: int) -> list[list[Tensor]]:
    """Random rows of every shard for every rank; some pairs need none."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.nonzero(torch.rand(size, generator=generator) < density * (i + j) % 1.5).flatten()
            for j, size in enumerate(sizes)
        ]
        for i in range(ring)
    ]


def needed_rows(layout: Layout, cu_seqlens: Tensor) -> list[list[Tensor]]:
    """Rows of each shard that each rank's causal queries see, from a dense mask."""
    position = torch.arange(layout.num_tokens)
    document = torch.searchsorted(cu_seqlens, position, right=True)
    visible = (document[:, None] == document) & (position[:, None] >= position)
    return [[visible[i][:, j].any(0).nonzero().flatten() for j in layout.parts] for i in layout.parts]


def taken(rows: Tensor | slice | None, size: int) -> list[int]:
    every = torch.arange(size)
    return (every if rows is None else every[rows]).tolist()


def deliver(plans: list[list[Step]]) -> None:
    """Run all plans as blocking sends and receives would: in each rank's order, matched by pair; fail on a mismatch."""
    queues: dict[tuple[int, int], list[int]] = {}
    for rank, plan in enumerate(plans):
        for step in plan:
            if step.send_to is not None:
                assert step.num_send_rows > 0
                queues.setdefault((rank, step.send_to), []).append(step.num_send_rows)
    for rank, plan in enumerate(plans):
        for step in plan:
            if step.recv_from is not None:
                assert queues[step.recv_from, rank].pop(0) == step.num_rows > 0
    assert not any(queues.values())


@pytest.mark.parametrize("ring", RINGS)
def test_direct_works_on_every_needed_row_once(ring: int) -> None:
    sizes = [5 + 3 * j if j != 1 else 0 for j in range(ring)]
    for seed, density in enumerate((0.0, 0.3, 1.0)):
        needed = random_needed(ring, sizes, density, seed)
        plans = [direct(needed, rank) for rank in range(ring)]
        deliver(plans)
        for rank, plan in enumerate(plans):
            assert plan[0].source == rank and plan[0].recv_from is None and plan[0].send_to is None
            assert plan[0].rows is None  # nothing is picked out of what is at hand
            met = {step.source: taken(step.rows, sizes[step.source]) for step in plan[1:]}
            assert sorted(met) == [source for source in range(ring) if source != rank]
            assert all(rows == needed[rank][source].tolist() for source, rows in met.items())
            assert all(step.num_rows == len(met[step.source]) for step in plan[1:])


@pytest.mark.parametrize("ring", RINGS)
def test_direct_sends_the_rows_that_the_receiver_works_on(ring: int) -> None:
    sizes = [9] * ring
    needed = random_needed(ring, sizes, 0.6, ring)
    plans = [direct(needed, rank) for rank in range(ring)]
    for rank, plan in enumerate(plans):
        for step in plan[1:]:
            if step.recv_from is not None:
                assert step.recv_from == step.source
                (sent,) = [peer for peer in plans[step.source] if peer.send_to == rank]
                assert taken(sent.send_rows, 9) == taken(step.rows, 9)


@pytest.mark.parametrize("ring", RINGS)
def test_relay_brings_every_shard_once_and_sends_what_it_holds(ring: int) -> None:
    for sizes in ([4] * ring, [3 * j for j in range(ring)], [0] * ring, [7] + [0] * (ring - 1)):
        plans = [relay(sizes, rank) for rank in range(ring)]
        deliver(plans)
        for rank, plan in enumerate(plans):
            assert plan[0].source == rank and plan[0].recv_from is None and plan[0].send_to is None
            worked = [step.source for step in plan if step.num_rows]
            assert sorted(worked) == [source for source in range(ring) if sizes[source]]
            for before, step in pairwise(plan):
                if step.num_send_rows:
                    assert step.send_to == (rank + 1) % ring and step.num_send_rows == before.num_rows
                assert step.rows is None and step.num_rows == sizes[step.source]


@pytest.mark.parametrize("ring", [2, 4, 8])
def test_direct_sends_a_quarter_less_than_the_rotation_for_a_causal_zigzag(ring: int) -> None:
    num_tokens = 64 * ring
    needed = needed_rows(zigzag(num_tokens, ring=ring), torch.tensor([0, num_tokens]))
    sent = sum(step.num_send_rows for rank in range(ring) for step in direct(needed, rank))
    rotation = sum(step.num_send_rows for rank in range(ring) for step in relay([64] * ring, rank))
    assert rotation == (ring - 1) * num_tokens
    assert sent == 0.75 * rotation


def test_rows_of_a_causal_zigzag_are_slices() -> None:
    needed = needed_rows(zigzag(512, ring=4), torch.tensor([0, 512]))
    assert all(isinstance(step.rows, slice) for rank in range(4) for step in direct(needed, rank)[1:])


def test_nothing_travels_for_documents_that_sit_whole_on_a_rank() -> None:
    cu_seqlens = torch.tensor([0, 256, 512])
    for layout in (contiguous(512, ring=2), balanced(cu_seqlens, ring=2)):
        needed = needed_rows(layout, cu_seqlens)
        for step in direct(needed, 0)[1:] + direct(needed, 1)[1:]:
            assert (step.recv_from, step.send_to, step.num_rows, step.num_send_rows) == (None, None, 0, 0)


def test_compact_makes_slices_of_runs_only() -> None:
    assert compact(torch.tensor([], dtype=torch.int64)) == slice(0, 0)
    assert compact(torch.tensor([3, 4, 5])) == slice(3, 6)
    rows = torch.tensor([3, 5])
    assert compact(rows) is rows
