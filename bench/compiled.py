"""`longtake bench compiled`: what the compiler makes of every attention kernel that ships, without a GPU.

    longtake bench compiled [--target sm_90a|sm_80] [--kernel NAME ...] [--head-dim D ...] [--dtype bf16 ...] [--check]

The table holds static facts, see `recorder.Facts`, of each launch of each candidate, see `shipped`. `--check` holds
them against limits, and against the table that is checked in for this target and Triton version. A change that is
meant is checked in by `--write`.
"""

import argparse
import json
import multiprocessing
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from .recorder import Facts, facts
from .shipped import DTYPES, HOST, TARGETS, Case, cases, compiled

SHARED = {"sm_90a": 232448, "sm_80": 101376}  # bytes of shared memory a program may have; sm_80: as in sm_86, 89, 120
PROCESSES = 2
DRIFT = 0.05  # by how much the length of a full loop may differ from what is checked in
# Five products at head_dim 128: may spill, but hardly in the loop. Triton 3.9's does, by its --regAllocOptLevel=2.
MAY_SPILL = "hopper_backward", 128
LOCAL_ACCESSES = 8  # to spilled bytes in that loop
RECORDED = ("spilled", "local", "shared", "programs", "groups", "order")  # facts that must be as they are checked in


@dataclass(frozen=True)
class Row:
    """A line of the table: a kernel compiled for one launch of one case, and its facts."""

    kernel: str
    function: str
    head_dim: int
    dtype: str
    tile: str
    variant: str
    facts: Facts

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.function} D{self.head_dim} {self.dtype} {self.tile} {self.variant}"

    @property
    def cells(self) -> list[str]:
        values: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "facts"}
        return [str(value) for value in (values | asdict(self.facts)).values()]


KEYS = tuple(field.name for field in fields(Row) if field.name != "facts")
COLUMNS = (*KEYS, *(field.name for field in fields(Facts)))
WIDTHS = (15, 14, 8, 5, 12, 19, *(max(len(field.name), 6) for field in fields(Facts)))
NUMBERS = {"head_dim"} | {field.name for field in fields(Facts) if field.type is int}


def table_file(target: str) -> Path:
    """Where the table of that target is checked in, for the Triton that is installed."""
    return Path(__file__).parent / "results" / f"compiled-{target}-triton{version('triton')}.txt"


def compile_variants(target: str, variants: Sequence[Case]) -> tuple[list[Row], list[str]]:
    """The lines of a candidate's cases, and what is wrong with how they are launched. Code that cases share has one."""
    rows, problems, seen = [], [], set()
    for case in variants:
        try:
            launches, others = compiled(target, case)
        except Exception as error:  # whatever a compiler throws is what it makes of this case
            problems.append(f"{case}: must compile, got {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            continue
        for launch in launches:
            if launch.kernel.hash in seen:
                continue
            seen.add(launch.kernel.hash)
            key = (case.config.kernel, launch.kernel.name, case.head_dim, case.dtype, case.tile, str(case.variant))
            rows.append(Row(*key, facts(launch)))
            if "enable_fp_fusion" not in launch.keywords:
                problems.append(f"{rows[-1].name}: enable_fp_fusion must be passed, as Triton 3.10 will leave it out")
        if {launch.kernel.hash for launch in launches} != {launch.kernel.hash for launch in others}:
            problems.append(f"{case}: must be compiled once, is compiled again for another length")
    return rows, problems


def limits(row: Row, target: str) -> Iterator[str]:
    """What breaks a rule for all kernels: one line each, with the limit and the value."""
    it = row.facts
    may_spill = (row.kernel, row.head_dim) == MAY_SPILL
    specialised = row.kernel.startswith("hopper")
    multiplies = row.dtype != "fp32" and row.function not in ("prepare_kernel", "merge_kernel")
    by_wgmma = multiplies and target == "sm_90a" and row.kernel != "decode"  # whose tiles have too few rows
    rules = [
        ("spilled bytes", it.spilled, "0", it.spilled == 0 or may_spill),
        ("local accesses in a loop", it.local, f"at most {LOCAL_ACCESSES}", it.local <= LOCAL_ACCESSES),
        ("ptxas' notes", it.notes, "none of C75xx, which serialise wgmma", it.notes == "-"),
        ("shared bytes", it.shared, f"at most {SHARED[target]}", it.shared <= SHARED[target]),
        ("programs on an SM", it.programs, "at least 1", it.programs >= 1),
        ("TMA boxes", it.boxes, "as their buffers", it.boxes == "ok"),
        ("HGMMA", it.hgmma, "at least 1", it.hgmma > 0 or not by_wgmma),
        ("HMMA", it.hmma, "0", it.hmma == 0 or not by_wgmma),
        ("HMMA", it.hmma, "at least 1", it.hmma > 0 or by_wgmma or not multiplies),
        ("UTMALDG", it.tma_loads, "at least 1", it.tma_loads > 0 or not by_wgmma),
        ("UTMAREDG", it.tma_adds, "at least 1", it.tma_adds > 0 or row.kernel != "hopper_backward"),
        ("register groups", it.groups, "present", it.groups != "-" or not specialised),
        ("order", it.order, "without B, a barrier of all partitions", not specialised or "B" not in it.order.split()),
    ]
    yield from (f"{row.name}: {fact} must be {limit}, got {got}" for fact, got, limit, holds in rules if not holds)


def changes(row: Row, recorded: Row | None) -> Iterator[str]:
    """What is not as it is checked in."""
    if recorded is None:
        yield f"{row.name}: is not in the table that is checked in: --write"
        return
    for name in RECORDED:
        got, limit = getattr(row.facts, name), getattr(recorded.facts, name)
        if got != limit:
            yield f"{row.name}: {name} must be {limit!r}, got {got!r}"
    got, limit = row.facts.loop, recorded.facts.loop
    if abs(got - limit) > DRIFT * limit:
        yield f"{row.name}: loop must be within {DRIFT:.0%} of {limit} instructions, got {got}"


def line(cells: Sequence[str]) -> str:
    """Of the table: columns are two spaces apart or more."""
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip() + "\n"


def read(text: str) -> list[Row]:
    """The rows of a table; lines that begin with # are passed over."""
    header, *lines = [re.split(r" {2,}", line) for line in text.splitlines() if line and not line.startswith("#")]
    if header != list(COLUMNS):
        raise ValueError(f"columns must be {' '.join(COLUMNS)}, got {' '.join(header)}: --write the table anew")
    rows = []
    for line in lines:
        cells: dict[str, Any] = {
            name: int(cell) if name in NUMBERS else cell for name, cell in zip(COLUMNS, line, strict=True)
        }
        key = {name: cells.pop(name) for name in KEYS}
        rows.append(Row(**key, facts=Facts(**cells)))
    return rows


def compile_all(target: str, chosen: Sequence[Case]) -> Iterator[tuple[list[Row], list[str]]]:
    """Of each candidate its `compile_variants`, several at a time."""
    candidates = groupby(chosen, key=lambda case: (case.config, case.head_dim, case.dtype))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(partial(compile_variants, target), [list(variants) for _, variants in candidates])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="longtake bench compiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=list(TARGETS), default="sm_90a")
    parser.add_argument("--kernel", nargs="+", choices=list(HOST), help="these alone")
    parser.add_argument("--head-dim", nargs="+", type=int, help="these alone")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="these alone")
    parser.add_argument(
        "--check", action="store_true", help="end with 1 and a line for each fact that must be otherwise"
    )
    parser.add_argument("--write", action="store_true", help="check in this table")
    parser.add_argument("--table", type=Path, help="the one that is checked in; default: in bench/results")
    parser.add_argument("--json", type=Path, help="also write the table here")
    args = parser.parse_args(argv)
    file = args.table or table_file(args.target)
    if knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    if args.write and (args.kernel or args.head_dim or args.dtype):
        raise ValueError("--write checks in the whole table: leave out --kernel, --head-dim and --dtype")
    if args.check and not file.is_file():
        raise ValueError(f"{file} is not there: check it in with --write first")

    def asked(kernel: str, head_dim: int, dtype: str) -> bool:
        chosen = ((kernel, args.kernel), (head_dim, args.head_dim), (dtype, args.dtype))
        return all(not names or value in names for value, names in chosen)

    chosen = [case for case in cases(args.target) if asked(case.config.kernel, case.head_dim, case.dtype)]
    if not chosen:
        raise ValueError(f"nothing that is asked for ships for {args.target}: loosen --kernel, --head-dim or --dtype")
    rows, problems = [], []
    print(line(COLUMNS), end="")
    for done, wrong in compile_all(args.target, chosen):
        rows += done
        problems += wrong
        print("".join(line(row.cells) for row in done), end="", flush=True)
    if args.json:
        report = {"triton": version("triton"), "target": args.target, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    problems += [line for row in rows for line in limits(row, args.target)]
    if args.check:
        recorded = {row.name: row for row in read(file.read_text()) if asked(row.kernel, row.head_dim, row.dtype)}
        problems += [line for row in rows for line in changes(row, recorded.pop(row.name, None))]
        problems += [f"{name}: is checked in, but was not compiled: --write if it ships no more" for name in recorded]
    if args.write:
        file.parent.mkdir(exist_ok=True)
        title = f"# longtake bench compiled --target {args.target} --write, Triton {version('triton')}\n"
        file.write_text(title + line(COLUMNS) + "".join(line(row.cells) for row in rows))
    print(f"\n{len(problems)} facts of {len(rows)} kernels must be otherwise", *problems, sep="\n")
    if problems and (args.check or args.write):
        sys.exit(1)


if __name__ == "__main__":
    main()
