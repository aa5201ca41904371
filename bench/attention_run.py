"""The steps of `longtake bench attention` on a GPU: are the kernels right, then how fast; or the rehearsal of both."""

import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from ..kernels.candidates import LISTED_HEAD_DIMS, ONLY_MEASURED
from ..kernels.device import architecture
from .attempts import Attempt, directly, in_processes, short_of_memory, sparing, with_second_try
from .attention_gpu import Bench, Candidate, Group, call_once, group_name, measure, profile
from .attention_peers import contenders
from .attention_report import HEADER, LEGEND, environment, file_for, goals, group_lines, plot, write_json
from .attention_shapes import DIRECTIONS, Shape, all_shapes, quick_shapes, tiny
from .attention_verdicts import (
    CHECK_SECONDS,
    SANITIZED_HEAD_DIMS,
    SANITIZER_SECONDS,
    check_all,
    find_sanitizer,
    name_of,
    num_processes,
    sanitize,
    sanitized,
    sanitizer_prefixes,
    shipped,
    this_command,
)
from .clock import Allowance, cuda_stopwatch, fake_stopwatch, product
from .sensors import Sensors

CANARY_SIZE, TINY_CANARY_SIZE = 8192, 64
HANG_SECONDS = 90.0  # for timing one shape in one direction, compiling and all
MOST_SECONDS = 2.0  # for its rounds
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
    """Correctness, compute-sanitizer, first calls, timing. True where nothing of ours was wrong."""
    began = time.perf_counter()
    wanted, device = wanted_groups(options), device_of(options)
    facts = environment(device) | {"rehearsal": options.rehearsal}
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    wrong = check(wanted, options, device)
    facts["wrong"] = {name_of(candidate): problem for candidate, problem in wrong.items()}
    facts["sanitizers"] = run_sanitizers(options)
    left_out = call_all(wanted, options, device, wrong)
    file = options.file or file_for(results_folder(options), facts)
    groups: list[Group] = []
    facts["broken"] = time_all(wanted, options, wrong, left_out, groups, file=file, facts=facts)
    write_json(file, facts, groups)
    plot(groups, facts, file.with_suffix(".png"))
    for line in goals(groups):
        print(f"{'made up: ' if options.rehearsal else ''}{line}")
    print(f"wrote {file} and {file.with_suffix('.png').name} after {time.perf_counter() - began:.0f} s")
    problems = list(faults(facts, groups))
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
    for name, problem in facts["broken"].items():
        if "out of memory" not in problem:  # a smaller GPU is no fault of ours
            yield f"timing {name}: {problem}"
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
    together, alone = attempts(options, device)
    return check_all(items, device, together=together, alone=alone, quick=options.quick or options.rehearsal)


def attempts(options: Options, device: torch.device) -> tuple[Attempt, Attempt]:
    """For what may hang: several at once, and each alone."""
    count = 2 if options.rehearsal else num_processes(device)
    return in_processes(count, seconds=CHECK_SECONDS), in_processes(1, seconds=CHECK_SECONDS)


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


def call_all(
    wanted: Wanted, options: Options, device: torch.device, wrong: Collection[Candidate]
) -> dict[str, dict[str, str]]:
    """Calls each of ours once on each shape, several at once: all is compiled then, and what breaks is left out.

    By group: contenders that must not be called, and why.
    """
    began = time.perf_counter()
    items = [
        (shape, direction, one.name)
        for shape, directions in wanted
        for direction in directions
        for one in contenders(shape, device)
        if one.kind != "peer"
    ]
    together, alone = attempts(options, device)
    calling = partial(call_once, device=device, dtype=dtype_of(options), wrong=wrong)
    first = sparing(together, lambda item: item[2])
    left_out: dict[str, dict[str, str]] = {}
    for item, _, failure in with_second_try(calling, items, first=first, second=alone, again=short_of_memory):
        if failure:
            shape, direction, name = item
            left_out.setdefault(group_name(shape, direction), {})[name] = failure
            print(f"WRONG: {group_name(shape, direction)}, {name}: {failure}", flush=True)
    print(f"called each of ours once on each shape ({time.perf_counter() - began:.0f} s)", flush=True)
    return left_out


def time_all(
    wanted: Wanted,
    options: Options,
    wrong: Collection[Candidate],
    left_out: Mapping[str, Mapping[str, str]],
    groups: list[Group],
    *,
    file: Path,
    facts: Mapping[str, Any],
) -> dict[str, str]:
    """Appends what is measured, and prints and writes it as it comes; which groups broke their process, and how."""
    pairs = [(shape, direction) for shape, directions in wanted for direction in directions]
    deadline = time.perf_counter() + 60 * options.minutes

    def tasks() -> Iterator[tuple[Shape, str, Mapping[str, str], float]]:
        for i, (shape, direction) in enumerate(pairs):
            left = deadline - time.perf_counter()
            if left < 0:
                return
            # Half of the time goes to what the stopwatch does not count: inputs, compiling, warming up.
            seconds = min(MOST_SECONDS, 0.5 * left / (len(pairs) - i))
            yield shape, direction, left_out.get(group_name(shape, direction), {}), seconds

    print(f"{LEGEND}\n{HEADER}" + ("  (a rehearsal: all times are made up)" if options.rehearsal else ""), flush=True)
    broken: dict[str, str] = {}
    timing = partial(time_group, options=options, wrong=wrong)
    for (shape, direction, *_), group, failure in in_processes(1, seconds=HANG_SECONDS)(timing, tasks()):
        if failure:
            broken[group_name(shape, direction)] = failure
            print(f"{group_name(shape, direction)}: {failure}", flush=True)
        else:
            groups.append(group)
            print("\n".join(group_lines(group)), flush=True)
        write_json(file, dict(facts) | {"broken": broken}, groups)
    names = [group_name(*pair) for pair in pairs]
    late = set(names) - {group.name for group in groups} - broken.keys()
    if late:
        print(f"not measured, for want of time: {', '.join(name for name in names if name in late)}")
    return broken


def time_group(
    task: tuple[Shape, str, Mapping[str, str], float], *, options: Options, wrong: Collection[Candidate]
) -> Group:
    """One shape in one direction; the rounds may take so many seconds."""
    shape, direction, left_out, seconds = task
    bench, allowance = make_bench(options)
    allowance.seconds = seconds
    with nullcontext() if options.rehearsal else Sensors(gpu_name(bench.device)) as sensors:
        reading_since = bench.reading_since if sensors is None else sensors.since
        return measure(shape, direction, replace(bench, wrong=wrong, reading_since=reading_since), left_out)


@cache
def make_bench(options: Options) -> tuple[Bench, Allowance]:
    """For all that this process times, and what its stopwatch may spend: it keeps the GPU warm in between."""
    device, rehearsal, allowance = device_of(options), options.rehearsal, Allowance(1.0)
    size = TINY_CANARY_SIZE if rehearsal else CANARY_SIZE
    stopwatch = fake_stopwatch if rehearsal else cuda_stopwatch(device, allowance)
    return Bench(device, dtype_of(options), stopwatch, product(device, size), 2.0 * size**3), allowance


def dtype_of(options: Options) -> torch.dtype:
    return torch.float32 if options.rehearsal else torch.bfloat16


def gpu_name(device: torch.device) -> str:
    """As nvidia-smi knows it, whatever CUDA_VISIBLE_DEVICES says."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def run_profile(options: Options, contender: str) -> None:
    """One contender on the first shape that is asked for."""
    shape, directions = wanted_groups(options)[0]
    bench, _ = make_bench(options)
    profile(contender, shape, directions[0], bench)
