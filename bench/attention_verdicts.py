"""Are all kernels right? Each candidate that ships, in processes of their own; a few under compute-sanitizer."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from ..kernels.candidates import candidates
from .attempts import Attempt, Refused, short_of_memory, sparing, with_second_try
from .attention_check import check_candidate
from .attention_gpu import Candidate, describe

CHECK_SECONDS = 40.0  # a candidate that takes longer hangs; compiling is part of it
MOST_PROCESSES, PROCESS_BYTES = 16, 5e9  # at once; what one may need of the GPU's memory
FULL_DTYPES = ("bfloat16",)  # on all cases; other dtypes on the quick ones
SANITIZERS = ("memcheck", "racecheck", "synccheck")
SANITIZED_HEAD_DIMS = (64, 72)  # of one part, and of two
KERNEL_NAMES = tuple(f"{x}_kernel" for x in ("forward", "backward", "dkdv", "dq", "decode", "merge", "prepare"))
FOUND = 9  # exit code of compute-sanitizer where it found something
SANITIZER_SECONDS = 150.0


def shipped(arch: str, head_dims: Collection[int], dtypes: Collection[str]) -> list[Candidate]:
    """All that may run on such a device."""
    found = ((direction, head_dim, dtype, config) for direction, head_dim, dtype, config, _ in candidates(arch))
    return list(dict.fromkeys(one for one in found if one[1] in head_dims and one[2] in dtypes))


def name_of(candidate: Candidate) -> str:
    direction, head_dim, dtype, config = candidate
    return f"{direction} d{head_dim} {dtype} {describe(config)}"


def num_processes(device: torch.device) -> int:
    """For checks at once: of the cores, as many as find memory."""
    count = min(MOST_PROCESSES, os.cpu_count() or 1)
    if device.type == "cuda":
        count = min(count, int(torch.cuda.mem_get_info(device)[0] / PROCESS_BYTES))
    return max(1, count)


def judge(candidate: Candidate, device: torch.device, quick: bool) -> float:
    """The candidate's error; raises Refused where it is wrong. Says on stderr what it is at."""
    print(f"checking {name_of(candidate)}", file=sys.stderr, flush=True)
    direction, head_dim, dtype, config = candidate
    verdict = check_candidate(
        direction, config, head_dim, getattr(torch, dtype), device, quick=quick or dtype not in FULL_DTYPES
    )
    if verdict.problem:
        raise Refused(verdict.problem)
    return verdict.error or 0.0


def check_all(
    items: Sequence[Candidate], device: torch.device, *, together: Attempt, alone: Attempt, quick: bool
) -> dict[Candidate, str]:
    """What is wrong, and why; prints it, and how many are right. `alone`: tries again where memory was short."""
    began = time.monotonic()
    wrong: dict[Candidate, str] = {}
    errors: dict[tuple[str, str], list[float]] = {}
    judging = partial(judge, device=device, quick=quick)
    first = sparing(together, lambda candidate: candidate[3].kernel)
    judged = with_second_try(judging, items, first=first, second=alone, again=short_of_memory)
    for candidate, error, failure in judged:
        if failure:
            wrong[candidate] = failure
            print(f"WRONG: {name_of(candidate)}: {failure}", flush=True)
        else:
            errors.setdefault((candidate[3].kernel, candidate[2]), []).append(error)
    for (kernel, dtype), found in sorted(errors.items()):
        print(f"right: {kernel}, {dtype}: {len(found)} candidates, largest error {max(found):.1e}")
    print(
        f"{len(items) - len(wrong)} of {len(items)} candidates are right ({time.monotonic() - began:.0f} s)", flush=True
    )
    return wrong


def find_sanitizer() -> str | None:
    """compute-sanitizer, in the path or where CUDA is usually installed."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def sanitize(command: Sequence[str], prefixes: Mapping[str, Sequence[str]], seconds: float) -> dict[str, str]:
    """What became of `command` under each tool, all started at once: "clean", or what was found."""
    # PyTorch's cache would hide where a tensor ends.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    deadline = time.monotonic() + seconds
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        logs = {tool: Path(folder) / tool for tool in prefixes}
        processes = {}
        for tool, prefix in prefixes.items():
            with logs[tool].open("w") as log:
                processes[tool] = subprocess.Popen(
                    [*prefix, *command],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # so that what the tool started ends with it
                )
        for tool, process in processes.items():
            try:
                code = process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
            found[tool] = outcome_of(code, logs[tool].read_text(), seconds)
            print(f"{tool}: {found[tool]}", flush=True)
    return found


def outcome_of(code: int | None, log: str, seconds: float) -> str:
    """In words: of the exit code, None where it was killed, and of what was printed."""
    if code == 0:
        return "clean"
    if code is None:
        return f"not finished in {seconds:.0f} s"
    marked = [line for line in log.splitlines() if line.startswith(("=========", "WRONG"))]
    lines = [line.strip("= ") for line in marked or log.splitlines()[-3:]]
    lines = [line for line in lines if line not in ("", "COMPUTE-SANITIZER")]
    return f"{'found' if code == FOUND else f'exit code {code}'}: {'; '.join(lines[:4])}"


def sanitizer_prefixes(tool: str) -> dict[str, list[str]]:
    """The command line of each of `SANITIZERS`, up to what it runs: our kernels alone are watched, not the reference.

    Errors of CUDA's own functions do not count: its libraries ask the driver for what it may not have.
    """
    flags = ["--error-exitcode", str(FOUND), "--print-limit", "20", "--report-api-errors", "no"]
    flags += [flag for name in KERNEL_NAMES for flag in ("--kernel-name", f"kernel_substring={name}")]
    return {name: [tool, "--tool", name, *flags] for name in SANITIZERS}


def sanitized(arch: str, head_dims: Collection[int], dtype: str) -> list[Candidate]:
    """One candidate of each kernel and head dim: what runs under compute-sanitizer, or in its rehearsal."""
    firsts: dict[tuple[str, int], Candidate] = {}
    for candidate in shipped(arch, head_dims, (dtype,)):
        firsts.setdefault((candidate[3].kernel, candidate[1]), candidate)
    return list(firsts.values())


def this_command(*arguments: str) -> list[str]:
    """`longtake bench attention` in a process of its own."""
    return [sys.executable, "-m", "longtake.bench.attention", *arguments]
