"""The steps of `longtake bench attention` on a GPU: are the kernels right, then how fast; or the rehearsal of both."""

import os
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from ..kernels.candidates import LISTED_HEAD_DIMS, ONLY_MEASURED
from ..kernels.device import architecture
from .attempts import directly, in_processes
from .attention_gpu import Bench, Candidate, Group, group_name, measure_all, profile
from .attention_report import HEADER, LEGEND, environment, file_for, goals, group_lines, plot, write_json
from .attention_shapes import DIRECTIONS, Shape, all_shapes, quick_shapes, tiny
from .attention_verdicts import (
    SANITIZED_HEAD_DIMS,
    SANITIZER_SECONDS,
    check_all,
    find_sanitizer,
    name_of,
    sanitize,
    sanitized,
    sanitizer_prefixes,
    shipped,
    this_command,
)
from .clock import Allowance, cuda_stopwatch, fake_stopwatch, product
from .sensors import Sensors

CANARY_SIZE, TINY_CANARY_SIZE = 8192, 64
CHECK_SECONDS = 120.0  # a candidate that takes longer hangs; compiling is part of it
MOST_PROCESSES = 16
REHEARSED_HEAD_DIM = 72  # of two parts; what compute-sanitizer would run on has one
REHEARSED_DTYPE = "float32"  # the interpreter multiplies bfloat16 wrongly
RESULTS = Path("bench/results")

Wanted = list[tuple[Shape, list[str]]]


@dataclass(frozen=True)
class Options:
    """As the command's flags. only: patterns of names; file: JSON; rehearsal: on CPU tensors, with a made-up clock."""

    quick: bool = False
    only: tuple[str, ...] = ()
    minutes: float = 8.5
    file: Path | None = None
    rehearsal: bool = False


def wanted_groups(options: Options) -> Wanted:
    """Shapes with the directions that are asked for. Raises ValueError where a pattern fits none."""
    shapes = quick_shapes() if options.quick and not options.only else all_shapes()
    found: Wanted = []
    missing = set(options.only)
    for shape in shapes:
        directions = []
        for direction in DIRECTIONS:
            names = (shape.name, group_name(shape, direction))
            fitting = [pattern for pattern in options.only if any(fnmatch(name, pattern) for name in names)]
            missing -= set(fitting)
            if fitting or not options.only:
                directions.append(direction)
        if directions:
            found.append((tiny(shape) if options.rehearsal else shape, directions))
    if missing:
        names = ", ".join(shape.name for shape in shapes)
        raise ValueError(f"no shape is called {sorted(missing)[0]!r}: there are {names}; or with -forward, -backward")
    return found


def device_of(options: Options) -> torch.device:
    return torch.device("cpu") if options.rehearsal else torch.device("cuda", torch.cuda.current_device())


def run(options: Options) -> bool:
    """Correctness, compute-sanitizer, timing. True where nothing of ours was wrong."""
    began = time.perf_counter()
    wanted, device = wanted_groups(options), device_of(options)
    facts = environment(device) | {"rehearsal": options.rehearsal}
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    wrong = check(wanted, options, device)
    facts["wrong"] = {name_of(candidate): problem for candidate, problem in wrong.items()}
    facts["sanitizers"] = run_sanitizers(options)
    file = options.file or file_for(results_folder(options), facts)
    groups: list[Group] = []
    broken = time_all(
        wanted, options, device, wrong, groups, deadline=began + 60 * options.minutes, file=file, facts=facts
    )
    plot(groups, facts, file.with_suffix(".png"))
    for line in goals(groups):
        print(f"{'made up: ' if options.rehearsal else ''}{line}")
    print(f"wrote {file} and {file.with_suffix('.png').name} after {time.perf_counter() - began:.0f} s")
    problems = list(faults(facts, groups)) + ([broken] if broken else [])
    for problem in problems:
        print(f"WRONG: {problem}")
    return not problems


def results_folder(options: Options) -> Path:
    return Path(tempfile.mkdtemp(prefix="longtake-bench-")) if options.rehearsal else RESULTS


def faults(facts: Mapping[str, Any], groups: Sequence[Group]) -> Iterator[str]:
    """All that was wrong with ours."""
    for name, problem in facts["wrong"].items():
        yield f"{name}: {problem}"
    for tool, text in facts["sanitizers"].items():
        if not text.startswith(("clean", "not ")):
            yield f"{tool}: {text}"
    for group in groups:
        yield from (f"{group.name}, {row.contender}: {row.note}" for row in group.rows if row.wrong)


def check(wanted: Wanted, options: Options, device: torch.device) -> dict[Candidate, str]:
    """Candidates for the head dims of these shapes, in several processes; why those that are wrong are."""
    arch = architecture(device)
    if options.rehearsal:
        items = shipped(arch, (REHEARSED_HEAD_DIM,), (REHEARSED_DTYPE,))
        print(f"not run here: {', '.join(ONLY_MEASURED)} (Gluon kernels, which the interpreter cannot run)")
    else:
        head_dims = {shape.head_dim for shape, _ in wanted} & set(LISTED_HEAD_DIMS)
        items = shipped(arch, head_dims, ("bfloat16",) if options.quick else ("bfloat16", "float16", "float32"))
    count = 2 if options.rehearsal else min(MOST_PROCESSES, os.cpu_count() or 1)
    return check_all(
        items,
        device,
        together=in_processes(count, seconds=CHECK_SECONDS),
        alone=in_processes(1, seconds=CHECK_SECONDS),
        quick=options.quick or options.rehearsal,
    )


def run_sanitizers(options: Options) -> dict[str, str]:
    """What compute-sanitizer finds; the rehearsal runs the same without it."""
    if options.rehearsal:
        return sanitize(this_command("--sanitize", "--dry-run"), {"without compute-sanitizer": ()}, SANITIZER_SECONDS)
    tool = find_sanitizer()
    if options.quick or tool is None:
        text = "not run: --quick" if options.quick else "not found: it comes with the CUDA toolkit"
        print(f"compute-sanitizer: {text}")
        return {"compute-sanitizer": text}
    return sanitize(this_command("--sanitize"), sanitizer_prefixes(tool), SANITIZER_SECONDS)


def run_sanitized(options: Options) -> bool:
    """In this process, which compute-sanitizer watches: a candidate of each kernel on tiny shapes."""
    device = device_of(options)
    kinds = (SANITIZED_HEAD_DIMS[:1], REHEARSED_DTYPE) if options.rehearsal else (SANITIZED_HEAD_DIMS, "bfloat16")
    items = sanitized(architecture(device), *kinds)
    return not check_all(items, device, together=directly, alone=directly, quick=True)


def time_all(
    wanted: Wanted,
    options: Options,
    device: torch.device,
    wrong: Collection[Candidate],
    groups: list[Group],
    *,
    deadline: float,
    file: Path,
    facts: Mapping[str, Any],
) -> str:
    """Appends what is measured, and prints and writes it as it comes; why it broke off, if it did."""
    allowance = Allowance(1.0)
    print(f"{LEGEND}\n{HEADER}" + ("  (a rehearsal: all times are made up)" if options.rehearsal else ""), flush=True)
    write_json(file, facts, groups)
    with nullcontext() if options.rehearsal else Sensors(gpu_name(device)) as sensors:
        bench = make_bench(device, options, wrong, allowance, sensors)
        try:
            for group in measure_all(wanted, bench, deadline=deadline, allowance=allowance):
                groups.append(group)
                print("\n".join(group_lines(group)), flush=True)
                write_json(file, facts, groups)
        except RuntimeError as error:  # of CUDA: nothing more can be timed in this process
            return f"timing broke off after {groups[-1].name if groups else 'nothing'}: {error}"
    names = {group_name(shape, direction) for shape, directions in wanted for direction in directions}
    late = sorted(names - {group.name for group in groups})
    if late:
        print(f"not measured, for want of time or memory: {', '.join(late)}")
    return ""


def make_bench(
    device: torch.device,
    options: Options,
    wrong: Collection[Candidate],
    allowance: Allowance,
    sensors: Sensors | None = None,
) -> Bench:
    rehearsal = options.rehearsal
    size = TINY_CANARY_SIZE if rehearsal else CANARY_SIZE
    bench = Bench(
        device,
        torch.float32 if rehearsal else torch.bfloat16,
        fake_stopwatch if rehearsal else cuda_stopwatch(device, allowance),
        product(device, size),
        2.0 * size**3,
        wrong,
    )
    return bench if sensors is None else replace(bench, reading_since=sensors.since)


def gpu_name(device: torch.device) -> str:
    """As nvidia-smi knows it, whatever CUDA_VISIBLE_DEVICES says."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def run_profile(options: Options, contender: str) -> None:
    """One contender on the first shape that is asked for."""
    device = device_of(options)
    shape, directions = wanted_groups(options)[0]
    profile(contender, shape, directions[0], make_bench(device, options, (), Allowance(1.0)))
