"""The plan of 2D attention for one batch: pure index work, done once and used by every layer.

It is made on the CPU, where every count is known without a wait; what kernels and indexing read is then moved to the
mesh's device, once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..comm.layout import Layout
from ..comm.mesh import Mesh
from ..comm.plan import Rows, Step, direct, relay
from ..kernels.device import to_device
from ..kernels.visibility import Visibility, mask_bounds

Route = Literal["direct", "relay"]
Bounds = tuple[Tensor, Tensor]  # lo, hi: int64 [n] each, non-decreasing: see kernels.visibility


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Who sends which key rows to whom, and what each step's queries see of them. Made once a batch.

    counts: tokens that each Ulysses rank of this ring rank brings in; visibility: one a step. On the mesh's device
    are the visibility and the steps' send_rows; their rows, which no step indexes with, stay on the CPU.
    """

    mesh: Mesh
    route: Route
    counts: tuple[int, ...]
    steps: tuple[Step, ...]
    visibility: tuple[Visibility, ...]
    backend: str | None = None
    deterministic: bool = True


def plan_attention(
    mesh: Mesh,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    num_tokens: int,
    causal: bool = False,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    bounds: Sequence[Bounds] | None = None,
    route: Route = "direct",
    backend: str | None = None,
    deterministic: bool = True,
) -> AttentionPlan:
    """Plan attention over a sequence of num_tokens, from who holds what.

    queries: global positions (int64, increasing) of each rank of the group, sp_size of them; keys: those that each
    ring rank holds, ring of them. bounds: the first and the last position that each query sees, for each rank as in
    queries; in place of causal, window and cu_seqlens. Raises ValueError where there are not as many, bounds fall from
    one query of a ring rank to the next, or the route is unknown.
    """
    if (len(queries), len(keys)) != (mesh.sp_size, mesh.ring):
        raise ValueError(
            f"the layout is for {len(queries)} ranks and a ring of {len(keys)}, the mesh has ring {mesh.ring} x "
            f"ulysses {mesh.ulysses}: make the layout with the mesh's degrees"
        )
    if route not in ("direct", "relay"):
        raise ValueError(f"route must be 'direct' or 'relay', got {route!r}")
    if mesh.ring == 1:
        route = "direct"  # nobody to relay to
    ring, me, group = range(mesh.ring), mesh.ring_rank, mesh.ulysses
    if bounds is None:
        bounds = [
            mask_bounds(part, num_tokens=num_tokens, causal=causal, window=window, cu_seqlens=cu_seqlens)
            for part in queries
        ]
    if len(bounds) != mesh.sp_size:
        raise ValueError(f"bounds are those of {len(bounds)} ranks, queries of {len(queries)}: give them for each rank")
    seen = [_join(bounds[r * group : (r + 1) * group]) for r in ring]
    if route == "direct":
        needed = [[_seen_rows(seen[i], keys[j]) if me in (i, j) else _NOTHING for j in ring] for i in ring]
        steps = direct(needed, me)
    else:
        steps = relay([len(part) for part in keys], me)
    masks = [Visibility.from_bounds(*seen[me], take(keys[step.source], step.rows)) for step in steps]
    return AttentionPlan(
        mesh,
        route,
        counts=tuple(len(q) for q in queries[me * group : (me + 1) * group]),
        steps=tuple(_on_device(step, mesh.device) for step in steps),
        visibility=tuple(mask.to(mesh.device) for mask in masks),
        backend=backend,
        deterministic=deterministic,
    )


def holdings(layout: Layout) -> tuple[list[Tensor], list[Tensor]]:
    """The layout as plan_attention takes it: positions of each rank of the group, and of each ring rank."""
    ranks = range(layout.ring * layout.ulysses)
    return [layout.positions(rank) for rank in ranks], [layout.ring_part(r) for r in range(layout.ring)]


_NOTHING = torch.empty(0, dtype=torch.int64)


def _join(bounds: Sequence[Bounds]) -> Bounds:
    """The bounds of all queries of one ring rank."""
    lo, hi = (torch.cat(list(edges)) for edges in zip(*bounds, strict=True))
    for name, edge in (("lo", lo), ("hi", hi)):
        falls = (edge.diff() < 0).nonzero()
        if len(falls):
            before, after = edge[int(falls[0]) :][:2].tolist()
            raise ValueError(f"bounds must not fall from query to query, got {name} {after} after {before}")
    return lo, hi


def _seen_rows(bounds: Bounds, keys: Tensor) -> Tensor:
    visibility = Visibility.from_bounds(*bounds, keys)
    return (visibility.kend > visibility.kstart).nonzero().flatten()


def _on_device(step: Step, device: torch.device) -> Step:
    rows = step.send_rows
    return replace(step, send_rows=to_device(rows, device)) if isinstance(rows, Tensor) else step


def take(x: Tensor, rows: Rows) -> Tensor:
    """The given rows of x; None: all."""
    return x if rows is None else x[rows]
