"""Plans of the ring: which key rows each step works on, and what is sent and received for it. Pure functions.

Both ends of a transfer derive its size from the same tables, so that nothing has to be asked; what a rank sends
in its step s is what its peer receives in its own step s.
- direct: rows go from their owner to each rank that sees them, only those, and their gradients straight back.
- relay: whole shards rotate to the right; their gradients travel along and arrive home after the last step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Rows = Tensor | slice | None


@dataclass(frozen=True, eq=False)
class Step:
    """One step of one rank. A side on which nothing travels has no peer (None).

    Empty steps stay in the list, so that all ranks start their transfers at the same places of the loop: messages of
    two ranks are told apart by their order alone.
    """

    source: int  # ring rank whose key rows are worked on
    rows: Rows  # which rows of the source's shard: a slice, int64 increasing, or None for all
    num_rows: int
    recv_from: int | None
    send_to: int | None
    send_rows: Rows  # which of this rank's rows (direct), or None: all that the step before worked on (relay)
    num_send_rows: int


def compact(rows: Tensor) -> Tensor | slice:
    """A slice for increasing int64 rows that follow each other, else the rows."""
    if rows.numel() == 0:
        return slice(0, 0)
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == rows.numel() else rows


def direct(needed: Sequence[Sequence[Tensor]], rank: int) -> list[Step]:
    """Steps of `rank`, the local one first; needed[i][j]: increasing int64 rows of j's shard that i's queries see.

    In step s rank i sends to i + s and receives from i - s. A side without rows has no peer: nothing travels.
    """
    ring = len(needed)
    steps = []
    for shift in range(ring):
        source, target = (rank - shift) % ring, (rank + shift) % ring
        num_rows = needed[rank][source].numel()
        num_send_rows = needed[target][rank].numel() if shift else 0
        step = Step(
            source=source,
            rows=compact(needed[rank][source]) if shift else None,  # of one's own shard all, seen or not
            num_rows=num_rows,
            recv_from=source if shift and num_rows else None,
            send_to=target if num_send_rows else None,
            send_rows=compact(needed[target][rank]) if num_send_rows else None,
            num_send_rows=num_send_rows,
        )
        steps.append(step)
    return steps


def relay(sizes: Sequence[int], rank: int) -> list[Step]:
    """Steps of `rank` in the rotation of whole shards of `sizes` rows, the local one first.

    In step s rank i works on the shard of i - s, received from i - 1, and passes on that of i - s + 1 to i + 1.
    """
    ring = len(sizes)
    steps = []
    for shift in range(ring):
        source = (rank - shift) % ring
        num_send_rows = sizes[(source + 1) % ring] if shift else 0
        step = Step(
            source=source,
            rows=None,
            num_rows=sizes[source],
            recv_from=(rank - 1) % ring if shift and sizes[source] else None,
            send_to=(rank + 1) % ring if num_send_rows else None,
            send_rows=None,
            num_send_rows=num_send_rows,
        )
        steps.append(step)
    return steps
