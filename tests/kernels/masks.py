"""Masks that the kernel tests share: every kind that the system makes, and random intervals that no layout makes."""

import torch
from longtake.kernels.visibility import Visibility, mask_bounds
from torch import Tensor


def dense(visibility: Visibility) -> Tensor:
    """bool [num_queries, num_keys], straight from the row intervals."""
    key = torch.arange(len(visibility.kstart))
    return (visibility.start[:, None] <= key) & (key < visibility.end[:, None])


def random_visibility(seed: int, *, most: int = 60) -> Visibility:
    """Up to `most` rows and keys, often with empty rows, jumps and hidden keys."""
    generator = torch.Generator().manual_seed(seed)
    num_queries, num_keys = torch.randint(0, most, (2,), generator=generator).tolist()
    lo, hi = torch.randint(-3, num_keys + 3, (2, num_queries), generator=generator).sort().values
    return Visibility.from_bounds(lo, torch.maximum(hi, lo - 1), torch.arange(num_keys))


def shard_visibility(
    num_tokens: int,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    lengths: list[int] | None = None,
) -> Visibility:
    """Of the queries and keys at these global positions, all by default; `lengths`: of packed documents."""
    everything = torch.arange(num_tokens)
    queries, keys = everything if queries is None else queries, everything if keys is None else keys
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    lo, hi = mask_bounds(queries, num_tokens=num_tokens, causal=causal, window=window, cu_seqlens=cu_seqlens)
    return Visibility.from_bounds(lo, hi, keys)


def cases() -> dict[str, Visibility]:
    """One of each kind, small enough for a dense float64 reference."""
    early_and_late = torch.cat([torch.arange(0, 64), torch.arange(192, 251)])  # a zigzag shard of 251 tokens
    middle = torch.arange(64, 192)
    return {
        "full": shard_visibility(37, causal=False),
        "causal": shard_visibility(131),
        "one token": shard_visibility(1),
        "one-token documents": shard_visibility(9, lengths=[1] * 9),
        "packed": shard_visibility(200, lengths=[1, 30, 0, 2, 100, 1, 1, 65]),
        "packed, not causal": shard_visibility(200, causal=False, lengths=[50, 50, 50, 49, 1]),
        "equal documents": shard_visibility(160, lengths=[16] * 10),
        "narrow window": shard_visibility(300, window=7),
        "wide window": shard_visibility(700, window=300),
        "window both ways": shard_visibility(500, causal=False, window=140),
        "zigzag on itself": shard_visibility(251, early_and_late, early_and_late),
        "zigzag on another": shard_visibility(251, early_and_late, middle),
        "zigzag, later keys hidden": shard_visibility(251, middle, early_and_late),
        "zigzag, packed": shard_visibility(251, middle, early_and_late, lengths=[20, 100, 90, 41]),
        "decode": Visibility.from_bounds(torch.tensor([0, 90, 91]), torch.tensor([89, 90, 249]), torch.arange(250)),
        "nothing": shard_visibility(100, torch.arange(50), torch.arange(50, 100)),
        "no keys": shard_visibility(10, keys=torch.arange(0)),
        "no queries": shard_visibility(10, torch.arange(0)),
    } | {f"random {seed}": random_visibility(seed) for seed in range(8)}
