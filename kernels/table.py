"""Which kernel, with which tiles, serves a call.

Candidates have costs, from one of two tables. The one of `candidates.py` serves where nothing was measured: plain
Triton kernels alone, each cost being the instructions that a visited pair of a row and a key takes. The other is
what `longtake tune` measured on this GPU with these versions, and is read from the user's cache folder. The choice is
the least cost times the pairs that the mask makes a kernel of such tiles visit: short documents get small tiles.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
import triton

from .candidates import LISTED_HEAD_DIMS, ONLY_MEASURED, Config, candidates
from .device import architecture, is_capturing
from .visibility import Visibility

LENGTHS = (1024, 8192, 65536)  # keys that a row sees, on average: a measurement serves those nearest to it
BY_KEYS = ("dkdv", "backward")  # directions whose programs own key tiles and walk query tiles


@dataclass(frozen=True)
class Entry:
    """A candidate for `direction` at a listed head_dim, and its cost; `why` says where that is from.

    dtype: as in "bfloat16". length: one of LENGTHS, 0 for any. cost: any unit, one for all of a table; None: refused.
    """

    direction: str
    head_dim: int
    dtype: str
    length: int
    config: Config
    cost: float | None
    why: str = ""


@dataclass(frozen=True)
class Choice:
    """What serves, its cost for the whole call, and the entry that it comes from."""

    config: Config
    cost: float
    entry: Entry


def listed_head_dim(head_dim: int) -> int:
    """The head dim whose measurements serve this one."""
    return next(listed for listed in LISTED_HEAD_DIMS if listed >= head_dim)


def nearest_length(mean_keys: float, lengths: Collection[int] = LENGTHS) -> int | None:
    """The one of `lengths` that is nearest, as a ratio."""
    return min(lengths, key=lambda length: max(length / max(mean_keys, 1), mean_keys / length), default=None)


def cache_file(gpu: str) -> Path:
    """Where the measurements of that GPU lie: a name for each set of GPU, Triton and kernel sources."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    name = re.sub(r"[^\w.-]+", "-", f"tuned-{gpu}-triton{triton.__version__}-{sources.hexdigest()[:12]}")
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "longtake" / f"{name}.json"


def write_entries(file: Path, entries: Sequence[Entry]) -> None:
    """Replaces the file whole: a reader sees the old table or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps([asdict(entry) for entry in entries], indent=1) + "\n")
    partial.replace(file)
    read_entries.cache_clear()
    entries_for.cache_clear()


@lru_cache(maxsize=8)
def read_entries(file: Path) -> tuple[Entry, ...]:
    """The table of that file; empty, with a warning, where it cannot be read, and empty where it is not there."""
    try:
        rows = json.loads(file.read_text())
        return tuple(Entry(**(row | {"config": Config(**row["config"])})) for row in rows)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"{file} cannot be read ({error}): run `longtake tune` again", stacklevel=2)
        return ()


@lru_cache(maxsize=8)
def checked_in(arch: str) -> tuple[Entry, ...]:
    """The table that serves without measurements."""
    return tuple(
        Entry(direction, head_dim, dtype, 0, config, cost, "checked in: instructions per pair, nothing measured")
        for direction, head_dim, dtype, config, cost in candidates(arch)
    )


@lru_cache(maxsize=8)
def entries_for(device: torch.device) -> tuple[Entry, ...]:
    """Measurements of this GPU, and behind them the checked-in table."""
    measured = read_entries(cache_file(torch.cuda.get_device_name(device))) if device.type == "cuda" else ()
    return (*measured, *checked_in(architecture(device)))


def choose(
    direction: str,
    visibility: Visibility,
    *,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Collection[str],
    unmeasured: bool = False,
) -> Choice | None:
    """The first of `ranking`, None where it is empty.

    Asked once for each mask: what a kernel visits is counted on the CPU, or waited for where the mask was made on
    the device. While a CUDA graph is recorded nothing is counted, but a choice that was made before stands: what it
    launches is compiled.
    """

    def find() -> Choice | None:
        ranked = ranking(
            entries_for(device),
            direction,
            visibility,
            head_dim=head_dim,
            dtype=str(dtype).removeprefix("torch."),
            kernels=kernels,
            unmeasured=unmeasured,
            counted=not is_capturing(device),
        )
        return ranked[0] if ranked else None

    return visibility.memo(("choose", direction, head_dim, dtype, frozenset(kernels), unmeasured), find)


def ranking(
    entries: Sequence[Entry],
    direction: str,
    visibility: Visibility,
    *,
    head_dim: int,
    dtype: str,
    kernels: Collection[str],
    unmeasured: bool = False,
    counted: bool = True,
) -> list[Choice]:
    """What may serve under that mask, cheapest first: of the candidates whose kernel is in `kernels`.

    unmeasured: also those that must not serve before a measurement has shown them right and ahead.
    counted: False: nothing is read from the device, and candidates compare as if the mask were long and full.
    """
    wanted = direction, listed_head_dim(head_dim), dtype
    fits = [
        entry
        for entry in entries
        if (entry.direction, entry.head_dim, entry.dtype) == wanted and entry.config.kernel in kernels
    ]
    if any(entry.length for entry in fits):  # measured: what is checked in stands back
        lengths = {entry.length for entry in fits if entry.length and entry.cost is not None}
        mean_keys = visibility.area / max(len(visibility.start), 1) if counted else LENGTHS[-1]
        fits = [entry for entry in fits if entry.length == nearest_length(mean_keys, lengths)]
    choices = [
        Choice(entry.config, entry.cost * (pairs(direction, visibility, entry.config) if counted else 1), entry)
        for entry in fits
        if entry.cost is not None and (entry.length or unmeasured or entry.config.kernel not in ONLY_MEASURED)
    ]
    return sorted(choices, key=lambda choice: choice.cost)


def pairs(direction: str, visibility: Visibility, config: Config) -> int:
    """Pairs of a row and a key in the tiles that the mask makes such a kernel visit."""
    by_keys = direction in BY_KEYS
    visited = (
        visibility.transposed.visited(config.keys, config.rows)
        if by_keys
        else visibility.visited(config.rows, config.keys)
    )
    return visited * config.rows * config.keys
