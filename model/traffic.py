"""Bytes that 2D attention sends in one layer: counted from a plan, and in closed form for one causal sequence.

Degrees R (ring) and U (Ulysses), T tokens a rank, Hq query and Hk key (value) heads of D elements of e bytes. Here U
divides Hq, and one of U and Hk divides the other: then each rank works with Hq/U query and K/U key heads,
K = max(Hk, U). `planned_traffic` counts any heads, lengths, masks and layouts.

Ulysses axis, any mask, each rank. Forward: q, k, v to the U - 1 others by heads, out to them by tokens. Backward: dout
by heads, dq, dk, dv by tokens, all in the dtype of q. Both ways the same:

    forward = backward = 2 T (Hq + K) (U - 1)/U D e

Ring axis. A key row is k and v of K/U heads, w = 2 K/U D elements; a ring rank's shard has n = U T rows. Forward lends
rows to others; backward lends them again and returns gradients of what it borrowed, in g = max(e, 4) bytes:

    forward = lent w e        backward = lent w e + returned w g

                        rank i lends      rank i returns       all ranks lend    all return
    relay               (R-1) n           R n                  R(R-1) n          R^2 n
    direct, contiguous  (R-1-i) n         i n                  R(R-1) n / 2      as they lend
    direct, zigzag      (R-1+i) n/2       (2R-2-i) n/2         R(R-1) n 3/4      as they lend

- relay: a shard goes to R - 1 others, its gradients once around, R hops. Any mask, every rank the same.
- contiguous: the shard of j is seen whole by each i > j, by no i < j. Half of the rotation.
- zigzag: j holds the chunks j and 2R-1-j of n/2 rows. The late chunk of i sees the early one of every j, and the late
  one of j > i alone: i borrows n rows of j > i, n/2 of j < i. A quarter less than the rotation.
- The busiest rank lends (R-1) n on each route: in contiguous the first, in zigzag the last. Returning, direct's busiest
  has (R-1) n: the last, the first. So the two peaks fall on opposite ranks, and where e = g all send the same.

Grouped routing: a key head goes only to the ranks whose query heads use it. Replicating to Hq heads first is K = Hq,
so routing sends (Hq + K)/(2 Hq) of that along the Ulysses axis and K/Hq along the ring. Where Hk divides U,
replicating to U, the least that U ranks can share, is K = U: the same bytes, routing saves the copies alone. Where
neither divides the other, replicas number lcm(Hk, U), while all ranks together are sent U + Hk - gcd(Hk, U) heads.

Packed documents have no closed form: `planned_traffic` counts the plan. Where layers are recomputed in backward, the
forward's bytes are sent once more.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from ..comm.layout import block_size
from .attention_plan import AttentionPlan, Route
from .ulysses import HeadSplit


@dataclass(frozen=True)
class AttentionShape:
    """What travels: head counts (times the batch, if there is one) and the bytes of an element of q, k, v."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    element_size: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def gradient_size(self) -> int:
        """Bytes of an element of the dk, dv that ring ranks return: float32, or float64 for float64 input."""
        return max(self.element_size, 4)


@dataclass(frozen=True)
class Traffic:
    """Bytes that leave one rank in one layer, by axis ("ring", "ulysses"), as `Transport.bytes_sent` counts them."""

    forward: dict[str, int]
    backward: dict[str, int]


def planned_traffic(plan: AttentionPlan, shape: AttentionShape) -> Traffic:
    """What the plan's rank sends. Raises ValueError where num_kv_heads does not divide num_heads."""
    split = HeadSplit(shape.num_heads, shape.num_kv_heads, plan.mesh.ulysses)
    me = plan.mesh.ulysses_rank
    expanded = split.kv_of_q(me)  # where groups are cut unevenly the ring carries a key head for each query head
    num_kv_heads = _size(split.kv[me]) if expanded is None else len(expanded)
    lent = sum(step.num_send_rows for step in plan.steps)
    returned = sum(step.num_rows for step in (plan.steps if plan.route == "relay" else plan.steps[1:]))
    ring_forward, ring_backward = _ring_bytes(lent, returned, num_kv_heads, shape)

    my_tokens, their_tokens = plan.counts[me], sum(plan.counts) - plan.counts[me]
    my_q, my_kv = _size(split.q[me]), 2 * _size(split.kv[me])
    their_q, their_kv = sum(map(_size, split.q)) - my_q, 2 * sum(map(_size, split.kv)) - my_kv
    head = shape.head_dim * shape.element_size
    return Traffic(
        {"ring": ring_forward, "ulysses": (my_tokens * (their_q + their_kv) + their_tokens * my_q) * head},
        {"ring": ring_backward, "ulysses": (my_tokens * their_q + their_tokens * (my_q + my_kv)) * head},
    )


def causal_traffic(
    shape: AttentionShape,
    *,
    ring: int,
    ulysses: int,
    tokens_per_rank: int,
    layout: Literal["contiguous", "zigzag"],
    route: Route,
) -> tuple[Traffic, ...]:
    """The closed form for one causal sequence without a window: of a rank of each ring rank, all Ulysses ranks alike.

    Raises ValueError where heads, or the blocks in which the layout deals tokens, do not divide as it needs, and for
    an unknown layout or route.
    """
    _check_divides(shape, ring, ulysses, tokens_per_rank, layout)
    num_kv_heads = max(shape.num_kv_heads, ulysses)
    leaving = 2 * tokens_per_rank * (shape.num_heads + num_kv_heads) * (ulysses - 1) // ulysses
    ulysses_bytes = leaving * shape.head_dim * shape.element_size
    ranks = []
    for ring_rank in range(ring):
        lent, returned = (num * tokens_per_rank * ulysses // 2 for num in _half_shards(ring_rank, ring, layout, route))
        forward, backward = _ring_bytes(lent, returned, num_kv_heads // ulysses, shape)
        ranks.append(Traffic({"ring": forward, "ulysses": ulysses_bytes}, {"ring": backward, "ulysses": ulysses_bytes}))
    return tuple(ranks)


def _half_shards(ring_rank: int, ring: int, layout: str, route: str) -> tuple[int, int]:
    """How many halves of a shard a ring rank lends and returns: the table above."""
    match route if ring > 1 else "direct", layout:
        case "relay", "contiguous" | "zigzag":
            return 2 * (ring - 1), 2 * ring
        case "direct", "contiguous":
            return 2 * (ring - 1 - ring_rank), 2 * ring_rank
        case "direct", "zigzag":
            return ring - 1 + ring_rank, 2 * ring - 2 - ring_rank
    raise ValueError(
        f"layout must be 'contiguous' or 'zigzag', got {layout!r}; route 'direct' or 'relay', got {route!r}"
    )


def _ring_bytes(lent: int, returned: int, num_kv_heads: int, shape: AttentionShape) -> tuple[int, int]:
    """Forward and backward of that many key rows; backward lends k, v again."""
    row = 2 * num_kv_heads * shape.head_dim
    forward = lent * row * shape.element_size
    return forward, forward + returned * row * shape.gradient_size


def _size(heads: slice) -> int:
    return heads.stop - heads.start


def _check_divides(shape: AttentionShape, ring: int, ulysses: int, tokens_per_rank: int, layout: str) -> None:
    if min(ring, ulysses, tokens_per_rank) < 1:
        raise ValueError(f"no traffic of {tokens_per_rank} tokens a rank on ring {ring} x ulysses {ulysses}")
    larger, smaller = max(shape.num_kv_heads, ulysses), min(shape.num_kv_heads, ulysses)
    if shape.num_heads % shape.num_kv_heads or shape.num_heads % ulysses or larger % smaller:
        raise ValueError(
            f"the closed form needs q heads that {ulysses} Ulysses ranks divide, and k, v heads that divide or are "
            f"divided by them, got {shape.num_heads} and {shape.num_kv_heads}: count a plan with planned_traffic"
        )
    part = tokens_per_rank * ulysses
    unit = block_size(part * ring, ring) * (2 if layout == "zigzag" else 1)
    if ring > 1 and part % unit:
        raise ValueError(
            f"the closed form needs ring parts of a multiple of {unit} tokens, got {part} "
            f"({tokens_per_rank} a rank on ulysses {ulysses}): count a plan with planned_traffic"
        )
