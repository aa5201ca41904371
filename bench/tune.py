"""`longtake tune`: finds out which attention kernels, with which tiles, are right and fastest on this GPU.

    longtake tune [--head-dim 64,128] [--dtype bfloat16] [--direction forward,decode,backward]
    longtake tune --show [--arch hopper]

Every candidate for this kind of GPU is checked against float64; those that are right are timed in turns, on causal
masks of three lengths (decode: one row against as many keys), 16 query heads that share 4 key heads. The table goes to
the cache folder, where attention looks for it, after each race anew; rows that are not tuned now stay as they were.
All of it may take ten minutes on 16 cores: flags pick a part. Nothing is ever tuned while a model runs. --show prints
what would run, and why.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton

from ..kernels.candidates import LISTED_HEAD_DIMS
from ..kernels.device import architecture
from ..kernels.table import LENGTHS, Entry, cache_file, checked_in, entries_for, read_entries, write_entries
from .attempts import Attempt, Outcome, Refused, in_processes, short_of_memory, sparing, with_second_try
from .attention_check import check_candidate
from .attention_verdicts import CHECK_SECONDS, num_processes
from .races import FAMILIES, ClockMaker, Race, clock_of, launch_once, measure, measured, races, refused
from .tune_show import kind, kind_text, named, show

OPTIONAL = ("backward",)  # what attention can do without: two kernels serve in its place
DTYPES = ("bfloat16", "float16", "float32")
TUNED_DTYPES = DTYPES[:2]  # by default: float32 is a fallback, and slow
ARCHITECTURES = ("hopper", "ampere")
RACE_SECONDS = 180.0  # what takes longer hangs


def check(entry: Entry, device: torch.device) -> float:
    """The candidate's error; raises Refused where it is wrong."""
    dtype = getattr(torch, entry.dtype)
    verdict = check_candidate(entry.direction, entry.config, entry.head_dim, dtype, device)
    if verdict.problem:
        raise Refused(verdict.problem)
    launch_once(entry, device)
    return verdict.error or 0.0


def tune(
    candidates: Sequence[Entry],
    device: torch.device,
    *,
    together: Attempt,
    alone: Attempt,
    make_clock: ClockMaker,
) -> Iterator[list[Entry]]:
    """What was found: for each candidate an entry for each of LENGTHS, without a cost where it is refused.

    Yields it after each race, so far as it stands: what still waits for its first race is left out.

    together: runs the checks, several at once. alone: the races, and what failed in company. make_clock: of the
    device, in the process that times.
    """
    began = time.monotonic()

    def progress(entry: Entry, text: str) -> None:
        print(f"{time.monotonic() - began:4.0f} s  {kind_text(kind(entry))} {named(entry)}: {text}", flush=True)

    right: list[Entry] = []
    found: list[Entry] = []
    checking = partial(check, device=device)
    first = sparing(together, lambda entry: entry.config.kernel)
    judged = with_second_try(checking, candidates, first=first, second=alone, again=short_of_memory)
    for count, (entry, error, failure) in enumerate(judged, 1):
        if failure:
            found += refused(entry, LENGTHS, failure)
        else:
            right.append(entry)
        verdict = "refused" if failure else f"right, error {error:.0e}"
        progress(entry, f"{verdict} ({count} of {len(candidates)})")
    waiting = {kind(entry) for entry in right}
    timing = partial(measure, device=device, make_clock=make_clock)
    for race, times, failure in with_second_try(timing, races(right), first=alone, second=alone, again=one_by_one):
        found += refused(race.entries[0], [race.length], failure) if failure else measured(race, times)
        for entry, ms in zip(race.entries, times or (), strict=bool(times)):
            progress(entry, f"{ms:.4g} ms with {race.length} keys")
        waiting -= {kind(entry) for entry in race.entries}
        yield [entry for entry in found if kind(entry) not in waiting]
    yield found


def one_by_one(outcome: Outcome) -> list[Race]:
    """Whose fault it was that a race failed shows where each runs alone."""
    race = outcome.item
    return [Race(race.length, (entry,)) for entry in race.entries] if len(race.entries) > 1 else []


def save(gpu: torch.device, found: Sequence[Entry]) -> None:
    """Into the table of that GPU; what was not tuned now stays."""
    file = cache_file(torch.cuda.get_device_name(gpu))
    tuned = {kind(entry) for entry in found}
    write_entries(file, [*(entry for entry in read_entries(file) if kind(entry) not in tuned), *found])


def report(candidates: Sequence[Entry], found: Sequence[Entry]) -> bool:
    """Says on stderr what was refused; True if there is something right for all that attention needs."""
    refusals = dict.fromkeys((kind(entry), named(entry), entry.why) for entry in found if entry.cost is None)
    for which, name, why in refusals:
        print(f"longtake tune: {kind_text(which)} {name} {why}", file=sys.stderr)
    served = {kind(entry) for entry in found if entry.cost is not None}
    needed = dict.fromkeys(kind(entry) for entry in candidates if entry.direction not in OPTIONAL)
    missing = [which for which in needed if which not in served]
    for which in missing:
        print(f"longtake tune: {kind_text(which)} has no right candidate", file=sys.stderr)
    return not missing


def listed(allowed: Sequence[Any]) -> Callable[[str], list[Any]]:
    """Reads a comma-separated list of some of these."""
    by_name = {str(value): value for value in allowed}

    def read(text: str) -> list[Any]:
        unknown = [name for name in text.split(",") if name not in by_name]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(by_name)}")
        return [by_name[name] for name in text.split(",")]

    return read


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="longtake tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dim", type=listed(LISTED_HEAD_DIMS), default=LISTED_HEAD_DIMS, help="default: all")
    parser.add_argument("--dtype", type=listed(DTYPES), help="default: bfloat16,float16; --show: all")
    parser.add_argument("--direction", type=listed(tuple(FAMILIES)), default=tuple(FAMILIES), help="default: all")
    parser.add_argument("--show", action="store_true", help="only print what would run, and why")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="with --show: what runs where nothing is measured")
    args = parser.parse_args(argv)
    if args.arch and not args.show:
        parser.error("--arch goes with --show: what is tuned is the GPU of this machine")
    return args


def find_gpu() -> torch.device | None:
    """The GPU that this process would use."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    gpu = find_gpu()

    def chosen(entries: Sequence[Entry]) -> list[Entry]:
        directions = [direction for family in args.direction for direction in FAMILIES[family]]
        dtypes = args.dtype or (DTYPES if args.show else TUNED_DTYPES)
        return [
            entry
            for entry in entries
            if entry.head_dim in args.head_dim and entry.dtype in dtypes and entry.direction in directions
        ]

    if args.show:
        print_table(gpu, args.arch, chosen)
        return
    arch = ARCHITECTURES[0] if gpu is None else architecture(gpu)
    candidates = chosen(checked_in(arch))
    if not candidates:
        raise ValueError(f"nothing to tune: no candidate on {arch} GPUs for what is asked")
    what = f"{len(candidates)} candidates to check, and to time on {', '.join(map(str, LENGTHS))} keys"
    if gpu is None:
        folder = cache_file("").parent
        print(f"longtake tune: no CUDA GPU here. On a {arch} one: {what}; the table goes to {folder}", file=sys.stderr)
        print("longtake tune: `longtake tune --show` prints what runs where nothing is measured", file=sys.stderr)
        sys.exit(2)
    print(f"{torch.cuda.get_device_name(gpu)}, Triton {triton.__version__}: {what}", flush=True)
    together = in_processes(num_processes(gpu), seconds=CHECK_SECONDS)
    alone = in_processes(1, seconds=RACE_SECONDS)
    found: list[Entry] = []
    for found in tune(candidates, gpu, together=together, alone=alone, make_clock=clock_of):
        save(gpu, found)  # each time: what breaks off later loses nothing
    print(f"wrote {cache_file(torch.cuda.get_device_name(gpu))}")
    if not report(candidates, found):
        sys.exit(1)


def print_table(gpu: torch.device | None, arch: str | None, chosen: Callable[[Sequence[Entry]], list[Entry]]) -> None:
    """What runs on that kind of GPU without a measurement, or, where none is named, on this machine's."""
    if gpu is None or arch:
        arch = arch or ARCHITECTURES[0]
        print(f"checked in for {arch} GPUs, which runs where nothing is measured")
        entries = checked_in(arch)
    else:
        file = cache_file(torch.cuda.get_device_name(gpu))
        print(f"{torch.cuda.get_device_name(gpu)}, Triton {triton.__version__}")
        print(f"read {file}" if file.exists() else f"not there: {file}. `longtake tune` writes it")
        entries = entries_for(gpu)
    for line in show(chosen(entries)):
        print(line)


if __name__ == "__main__":
    main()
