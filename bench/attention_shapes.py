"""What `longtake bench attention` measures: shapes as data, the pairs that they show, and their operations.

A shape is named for head dim, what is special about it, mask and length: "d128-gqa64x8-causal-8k".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np
import torch

from ..comm.layout import zigzag
from ..kernels.visibility import Visibility, mask_bounds

TOKENS = 16384  # of short sequences together: so many of them make a batch
HEADS = {64: 32, 72: 16, 80: 16, 96: 16, 128: 16, 256: 8}  # 72, 80: of vision towers; else 2,048 channels
RING = 8  # ranks that share 8 x 128k tokens, in zigzag
PACKED_TOKENS = 32768
DIRECTIONS = ("forward", "backward")
OPERATIONS = {"forward": 4, "backward": 10}  # of a visible pair and channel: 2 products forward, 5 backward


@dataclass(frozen=True)
class Shape:
    """One call of attention.

    batch, queries, keys: sequences, and the rows of each. mask: "full", "causal", "packed" (causal inside each
    document), "packed-full", "zigzag" (a step of a ring). documents: lengths, of packed masks. ranks: of zigzag, who
    holds the queries, and who the keys. carried: the step adds to what steps before have left. flex: FlexAttention
    takes part, whose compiling takes seconds.
    """

    name: str
    head_dim: int
    heads: int
    kv_heads: int
    batch: int
    queries: int
    keys: int
    mask: str
    documents: tuple[int, ...] = ()
    ranks: tuple[int, int] = (0, 0)
    carried: bool = False
    flex: bool = False

    @property
    def causal(self) -> bool:
        """Whether no query sees a later key."""
        return self.mask not in ("full", "packed-full")

    @property
    def offsets(self) -> list[int]:
        """Where each document starts, and where the last one ends."""
        return [0, *np.cumsum(self.documents).tolist()]


def size(length: int) -> str:
    """As in names: 8192 is 8k."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def plain(head_dim: int, mask: str, length: int, *, heads: int | None = None, flex: bool = False) -> Shape:
    """As many query heads as key heads."""
    count = heads or HEADS[head_dim]
    name = f"d{head_dim}-{mask}-{size(length)}"
    return Shape(name, head_dim, count, count, max(1, TOKENS // length), length, length, mask, flex=flex)


def grouped(heads: int, kv_heads: int, mask: str, length: int, *, flex: bool = False) -> Shape:
    """head_dim 128, as in language models."""
    name = f"d128-gqa{heads}x{kv_heads}-{mask}-{size(length)}"
    return Shape(name, 128, heads, kv_heads, max(1, TOKENS // length), length, length, mask, flex=flex)


def packed(name: str, documents: Sequence[int], head_dim: int, heads: int, kv_heads: int, mask: str) -> Shape:
    total = sum(documents)
    return Shape(name, head_dim, heads, kv_heads, 1, total, total, mask, documents=tuple(documents), flex=True)


def ring_step(name: str, ranks: tuple[int, int], *, length: int = 131072, carried: bool = False) -> Shape:
    """`length` queries of one rank meet as many keys of another, or its own; 8 heads."""
    return Shape(name, 128, 8, 8, 1, length, length, "zigzag", ranks=ranks, carried=carried)


def documents(mean: int, total: int = PACKED_TOKENS) -> list[int]:
    """Lengths that sum to `total`: log-normal, of that mean, the last one cut."""
    rng, lengths = np.random.default_rng(0), []
    while sum(lengths) < total:
        lengths.append(min(1 + int(rng.lognormal(np.log(mean) - 0.5)), total - sum(lengths)))
    return lengths


def mixed_documents(total: int = PACKED_TOKENS) -> list[int]:
    """One of half of all tokens, and short ones of mean 500 around it."""
    short = documents(500, total // 2)
    middle = len(short) // 2
    return [*short[:middle], total - sum(short), *short[middle:]]


def all_shapes() -> list[Shape]:
    """What matters most comes first: what the time does not suffice for is left out."""
    masks = ("full", "causal")
    return [
        *(plain(128, mask, length, flex=length == 8192) for length in (8192, 16384) for mask in masks),
        plain(80, "full", 16384, flex=True),
        *(plain(head_dim, "full", 4096) for head_dim in (72, 80)),
        grouped(64, 8, "causal", 8192, flex=True),
        ring_step("ring-late-queries", (2, 5)),
        *(plain(64, mask, 16384) for mask in masks),
        packed("packed-2000", documents(2000), 128, 28, 4, "packed"),
        packed("packed-300", documents(300), 128, 28, 4, "packed"),
        packed("packed-mix", mixed_documents(), 128, 28, 4, "packed"),
        packed("packed-frames", [729] * 44, 72, 16, 16, "packed-full"),
        ring_step("ring-early-keys", (5, 2)),
        ring_step("ring-itself", (3, 3)),
        ring_step("ring-late-queries-carried", (2, 5), carried=True),
        *(plain(128, mask, 32768) for mask in masks),
        *(plain(128, mask, 131072, heads=4) for mask in masks),
        *(grouped(28, 4, "causal", length) for length in (8192, 32768)),
        *(grouped(12, 2, "causal", length) for length in (8192, 32768)),
        grouped(64, 8, "full", 8192),
        grouped(64, 8, "causal", 32768),
        *(plain(head_dim, "causal", 16384) for head_dim in (72, 80)),
        *(plain(head_dim, mask, length) for head_dim in (256, 96) for length in (16384, 4096) for mask in masks),
        *(plain(128, mask, length) for length in (4096, 2048, 1024) for mask in masks),
        *(plain(64, mask, length) for length in (4096, 1024, 32768) for mask in masks),
        *(plain(head_dim, "full", 1024) for head_dim in (72, 80)),
        plain(72, "full", 16384),
    ]


QUICK = (
    "d128-full-8k",
    "d128-causal-8k",
    "d128-causal-16k",
    "d80-full-4k",
    "d64-causal-16k",
    "d128-gqa64x8-causal-8k",
    "ring-late-queries",
    "packed-300",
)


def quick_shapes() -> list[Shape]:
    """One of each kind; FlexAttention takes no part."""
    return [replace(shape, flex=False) for shape in all_shapes() if shape.name in QUICK]


def tiny(shape: Shape) -> Shape:
    """Of the same kind and name, but with few tokens and heads: for rehearsals."""
    group = shape.heads // shape.kv_heads
    few = {"heads": group, "kv_heads": 1, "batch": 1 if group > 1 else min(shape.batch, 2)}
    if shape.documents:
        lengths = tuple(1 + length % 23 for length in shape.documents[:4])
        return replace(shape, **few, documents=lengths, queries=sum(lengths), keys=sum(lengths))
    return replace(shape, **few, queries=48, keys=48)


def twin(shape: Shape) -> Shape:
    """The plain call whose visible area is that of a zigzag step, for its length a multiple of 2 blocks."""
    query_rank, key_rank = shape.ranks
    if query_rank == key_rank:
        return replace(shape, mask="causal")
    if query_rank < key_rank:  # of the queries the later half alone sees keys, and all of them
        return replace(shape, mask="full", queries=shape.queries // 2)
    return replace(shape, mask="full", keys=shape.keys // 2)  # all queries see the earlier half of the keys


@cache
def visibility(shape: Shape, device: torch.device) -> Visibility:
    """The mask of one sequence of the batch."""
    if shape.mask == "zigzag":
        layout = zigzag(RING * shape.queries, ring=RING)
        rows, keys = (layout.ring_part(rank) for rank in shape.ranks)
        num_tokens = layout.num_tokens
    else:
        num_tokens = max(shape.queries, shape.keys)
        rows, keys = torch.arange(num_tokens - shape.queries, num_tokens), torch.arange(shape.keys)
    cu_seqlens = torch.tensor(shape.offsets) if shape.documents else None
    rows, keys = rows.to(device), keys.to(device)
    if shape.mask == "full":
        lo, hi = torch.zeros_like(rows), torch.full_like(rows, shape.keys - 1)
    else:
        lo, hi = mask_bounds(rows, num_tokens=num_tokens, causal=shape.causal, cu_seqlens=cu_seqlens)
    return Visibility.from_bounds(lo, hi, keys)


@cache
def visible_pairs(shape: Shape) -> int:
    """Pairs of a query and a key that it sees, of all sequences and one head."""
    if shape.mask == "zigzag":
        return visibility(shape, torch.device("cpu")).area
    if shape.documents:
        lengths = [end - start for start, end in pairwise(shape.offsets)]
        return sum(n * (n + 1) // 2 if shape.causal else n * n for n in lengths)
    hidden = shape.queries * (shape.queries - 1) // 2 if shape.causal else 0  # bottom-right aligned
    return shape.batch * (shape.queries * shape.keys - hidden)


def operations(shape: Shape, direction: str) -> int:
    """Floating-point ones, of the real head dim and of visible pairs alone; what is computed anew is not counted."""
    return OPERATIONS[direction] * shape.heads * shape.head_dim * visible_pairs(shape)
