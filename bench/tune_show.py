"""What `longtake tune --show` prints: for each kind of call the kernels that would run, and why."""

from collections.abc import Iterator, Sequence

import torch

from ..kernels.candidates import DIRECTIONS
from ..kernels.table import LENGTHS, Choice, Entry, ranking
from .attention_check import KERNELS
from .races import mask

Kind = tuple[int, str, str]  # head_dim, dtype, direction
CPU = torch.device("cpu")


def kind(entry: Entry) -> Kind:
    """What it is a candidate for."""
    return entry.head_dim, entry.dtype, entry.direction


def kind_text(kind: Kind) -> str:
    """In columns."""
    head_dim, dtype, direction = kind
    return f"head_dim {head_dim:<4}{dtype:<9} {direction:<9}"


def named(entry: Entry) -> str:
    """The candidate in words."""
    config = entry.config
    return f"{config.kernel} {config.rows}x{config.keys}, {config.warps} warps, {config.stages} stages"


def show(entries: Sequence[Entry]) -> Iterator[str]:
    """Lines, from all the entries that attention would choose from, under the masks that `longtake tune` times."""
    for which in sorted({kind(entry) for entry in entries}, key=lambda kind: (*kind[:2], DIRECTIONS.index(kind[2]))):
        reasons = [reason(entries, which, length) for length in LENGTHS]
        lengths = [f"{length} keys" for length in LENGTHS] if len(set(reasons)) > 1 else ["any length"]
        for length, why in zip(lengths, reasons, strict=False):
            yield f"{kind_text(which)} {length:>10}  {why}"
    refusals = dict.fromkeys((kind(entry), named(entry), entry.why) for entry in entries if entry.cost is None)
    yield from (f"{kind_text(which)} {name} {why}" for which, name, why in refusals)


def reason(entries: Sequence[Entry], which: Kind, length: int) -> str:
    """What runs, why, and what stands behind it."""
    head_dim, dtype, direction = which

    def ranked(direction: str, *, unmeasured: bool = False) -> list[Choice]:
        visibility = mask(direction, length, CPU)
        return ranking(
            entries, direction, visibility, head_dim=head_dim, dtype=dtype, kernels=KERNELS, unmeasured=unmeasured
        )

    serving = ranked(direction)
    idle = [named(choice.entry) for choice in ranked(direction, unmeasured=True) if choice not in serving]
    notes = [f"not measured, so not used: {name}" for name in idle]
    if direction == "backward":  # the fused one serves if it is ahead of the two kernels
        two = [ranked(other)[:1] for other in ("dkdv", "dq")]
        cost = sum(choice.cost for choices in two for choice in choices)
        behind = [choice for choice in serving[:1] if choice.cost >= cost]
        if behind or not serving:
            notes += [f"{described(choice)} takes {choice.cost / cost:.2f} x as much" for choice in behind if cost]
            return "; ".join(["dkdv and dq", *notes])
        notes.append(f"dkdv and dq: {cost / serving[0].cost:.2f} x as much")
    if not serving:
        return "; ".join(["nothing: no candidate is right", *notes])
    first, *others = serving
    notes = [f"next: {named(choice.entry)}, {choice.cost / first.cost:.2f} x as much" for choice in others[:1]] + notes
    return "; ".join([described(first), *notes])


def described(choice: Choice) -> str:
    """The candidate, and where its cost is from."""
    return f"{named(choice.entry)} ({choice.entry.why})"
