"""Attention kernels against one another, on one problem: which candidates, on which shapes, by whose clock."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cache, partial

import torch

from ..kernels.operator import visibility_of
from ..kernels.table import LENGTHS, Entry, pairs
from ..kernels.visibility import Visibility
from .attention_check import KERNELS
from .clock import Call, Clock, cuda_clock

# Directions that are timed in turns: the fused backward competes with the two kernels together.
FAMILIES = {"forward": ("forward",), "decode": ("decode",), "backward": ("dkdv", "dq", "backward")}
HEADS, KEY_HEADS = 16, 4
TOKENS = 16384  # at least so many in all sequences together
CLOCK_SECONDS = 0.25  # of rounds

ClockMaker = Callable[[torch.device], Clock]


@dataclass(frozen=True)
class Race:
    """Entries of one family, head_dim and dtype, on sequences of `length` keys."""

    length: int
    entries: tuple[Entry, ...]


def races(entries: Sequence[Entry]) -> Iterator[Race]:
    """All that these take part in."""
    groups: dict[tuple[str, int, str], list[Entry]] = {}
    for entry in entries:
        family = next(name for name, directions in FAMILIES.items() if entry.direction in directions)
        groups.setdefault((family, entry.head_dim, entry.dtype), []).append(entry)
    return (Race(length, tuple(group)) for group in groups.values() for length in LENGTHS)


def mask(direction: str, length: int, device: torch.device) -> Visibility:
    """What is timed: causal sequences of that length; decode: one row that sees as many keys."""
    batch, rows = (1, 1) if direction == "decode" else (max(1, TOKENS // length), length)
    q, k = (torch.empty(batch, seq, 0, 0, device=device) for seq in (rows, length))
    return visibility_of(q, k, None, True, None)


@cache
def clock_of(device: torch.device) -> Clock:
    """One for all races of a process: it keeps the GPU warm between them."""
    return cuda_clock(device, seconds=CLOCK_SECONDS)


def measure(race: Race, device: torch.device, make_clock: ClockMaker) -> list[float]:
    """Median milliseconds of each entry of the race."""
    return make_clock(device)(launches(race, device))


def launch_once(entry: Entry, device: torch.device) -> None:
    """What a race of this entry launches: it is compiled then, for all lengths, and a fault or a hang has shown."""
    (call,) = launches(Race(LENGTHS[0], (entry,)), device)
    call()
    torch.get_device_module(device).synchronize()


def launches(race: Race, device: torch.device) -> list[Call]:
    """A call for each entry, all on the same random inputs."""
    direction, head_dim = race.entries[0].direction, race.entries[0].head_dim
    dtype, scale = getattr(torch, race.entries[0].dtype), head_dim**-0.5
    visibility = mask(direction, race.length, device)
    num_rows, num_keys = len(visibility.start), len(visibility.kstart)

    def normal(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, head_dim, dtype=dtype, device=device)

    q, k, v = normal(num_rows, HEADS), normal(num_keys, KEY_HEADS), normal(num_keys, KEY_HEADS)
    if direction not in FAMILIES["backward"]:
        return [
            partial(KERNELS[entry.config.kernel], q, k, v, visibility, scale=scale, config=entry.config, final=True)
            for entry in race.entries
        ]
    out, dout = normal(num_rows, HEADS), normal(num_rows, HEADS)
    # The lse of n scores that are normal is near log n + 1/2: so the weights are about what they would be.
    lse = ((visibility.end - visibility.start).log() + 0.5).repeat(HEADS, 1)
    operands = q, k, v, dout, *KERNELS["prepare"](out, lse, dout, None), visibility
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def launch(entry: Entry) -> object:
        kernel = partial(KERNELS[entry.config.kernel], *operands, scale=scale, config=entry.config, add=False)
        if entry.direction == "dkdv":
            return kernel(dk=dk, dv=dv)
        if entry.direction == "dq":
            return kernel(dq=dq)
        total = torch.zeros_like(q, dtype=torch.float32)  # it adds to dq: what that takes besides is part of its time
        kernel(dq=total, dk=dk, dv=dv)
        return total.to(dtype)

    return [partial(launch, entry) for entry in race.entries]


def measured(race: Race, times: Sequence[float]) -> list[Entry]:
    """The entries with their costs: nanoseconds for a million visited pairs of a row and a key, in one head."""
    found = []
    for entry, ms in zip(race.entries, times, strict=True):
        visited = pairs(entry.direction, mask(entry.direction, race.length, torch.device("cpu")), entry.config)
        why = f"measured on {date.today().isoformat()}: {ms:.4g} ms"
        found.append(replace(entry, length=race.length, cost=1e12 * ms / (visited * HEADS), why=why))
    return found


def refused(entry: Entry, lengths: Sequence[int], why: str) -> list[Entry]:
    """Entries without a cost: such a candidate never serves."""
    return [replace(entry, length=length, cost=None, why=f"refused: {why}") for length in lengths]
