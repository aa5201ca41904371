"""`longtake bench attention`: our attention beside that of others, on this machine's GPU or, without one, its CPU.

On a GPU, in this order: every kernel that ships against float64 on poisoned memory, some under compute-sanitizer, each
of ours once on each shape, then times in turns with PyTorch's, FlexAttention's and, where installed, FlashAttention's
kernels. A table comes on stdout, who is being called on stderr, JSON and a plot in bench/results/. Exit code 1:
something of ours is wrong, and named; it is not timed. What hangs is ended, and the rest goes on.

On a CPU: time and peak memory of causal attention beside PyTorch's. Memory is the growth of a fresh process's peak,
inputs and gradients included; lengths above --longest-timed are measured for memory alone.

    longtake bench attention                                  all: checks (5 minutes or so on 16 cores), 8.5 of timing
    longtake bench attention --quick                          a shape of each kind: small checks, 2 minutes of timing
    longtake bench attention --only 'ring-*,d128-causal-8k'   these alone; one direction: d128-causal-8k-backward
    longtake bench attention --dry-run                        no GPU: every step, on tiny shapes in Triton's interpreter
    ncu --clock-control none --launch-count 5 --profile-from-start off --set full -o report \\
        longtake bench attention --only d128-causal-8k-forward --profile gluon
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention import attention

DIRECTIONS = ("forward", "forward+backward")
COLUMNS = ("device", "shape", "direction", "ms", "gflops", "sdpa_ms", "ratio", "peak_mib")
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, causal=True)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def inputs(length: int, heads: int, head_dim: int, direction: str) -> list[Tensor]:
    """q, k, v float32 [1, S, H, D]."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, length, heads, head_dim)
    needs_grad = direction != "forward"
    return [torch.randn(shape, generator=generator).requires_grad_(needs_grad) for _ in range(3)]


def call(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Forward, and backward where the inputs want gradients."""
    out = kernel(q, k, v)
    if out.requires_grad:
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def best_times(kernels: Sequence[Kernel], qkv: Sequence[Tensor], repeats: int) -> list[float]:
    """Least milliseconds of each kernel over `repeats` rounds in turns, after one to warm up."""
    times = [float("inf")] * len(kernels)
    for round_index in range(repeats + 1):
        for i, kernel in enumerate(kernels):
            began = time.perf_counter()
            call(kernel, *qkv)
            if round_index:
                times[i] = min(times[i], 1e3 * (time.perf_counter() - began))
    return times


def peak_resident_mib() -> float:
    """Of this process. ru_maxrss would not do: it outlives exec and so begins at the parent's size."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024


def memory_growth(length: int, heads: int, head_dim: int, direction: str, threads: int) -> float:
    """MiB by which one call raises the peak of the process that it is first run in."""
    torch.set_num_threads(threads)
    call(ours, *inputs(8, heads, head_dim, direction))
    before = peak_resident_mib()
    call(ours, *inputs(length, heads, head_dim, direction))
    return peak_resident_mib() - before


def in_fresh_process(function: Callable[..., float], *args: object) -> float:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def run(
    lengths: Sequence[int], *, heads: int = 2, head_dim: int = 64, longest_timed: int = 16384, repeats: int = 4
) -> list[dict[str, Any]]:
    """Rows of the table: a dict of `COLUMNS` for each length and direction; times are None above `longest_timed`."""
    threads = torch.get_num_threads()
    rows = []
    for length in lengths:
        for direction in DIRECTIONS:
            row: dict[str, Any] = dict.fromkeys(COLUMNS)
            row |= {"device": f"cpu, {threads} threads", "shape": [1, length, heads, head_dim]}
            row |= {"direction": direction}
            row["peak_mib"] = in_fresh_process(memory_growth, length, heads, head_dim, direction, threads)
            if length <= longest_timed:
                rounds = repeats * max(1, longest_timed // length)  # short calls are the noisy ones
                ms, sdpa_ms = best_times([ours, sdpa], inputs(length, heads, head_dim, direction), rounds)
                # 2 matrix products forward, 5 backward, each 2 flops for each visible pair and channel.
                products = 2 if direction == "forward" else 7
                flops = 2 * products * heads * head_dim * length * (length + 1) / 2
                row |= {"ms": ms, "gflops": flops / ms / 1e6, "sdpa_ms": sdpa_ms, "ratio": ms / sdpa_ms}
            rows.append(row)
            print(format_row(row), flush=True)
    return rows


def format_row(row: dict[str, Any]) -> str:
    cells = [row["device"], "x".join(map(str, row["shape"])), row["direction"]]
    numbers = [(row["ms"], 1), (row["gflops"], 1), (row["sdpa_ms"], 1), (row["ratio"], 2), (row["peak_mib"], 0)]
    cells += ["-" if value is None else f"{value:.{digits}f}" for value, digits in numbers]
    return line(cells)


def line(cells: Sequence[str]) -> str:
    return "{:<15} {:<15} {:<17} {:>9} {:>8} {:>9} {:>6} {:>9}".format(*cells)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="longtake bench attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="write the table here too (GPU: default a file in bench/results, with a plot beside it; --dry-run: in a "
        "temporary folder)",
    )
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument("--quick", action="store_true", help="a shape of each kind, small checks, no compute-sanitizer")
    gpu.add_argument("--only", type=lambda text: tuple(text.split(",")), default=(), help="names of shapes, * fits all")
    gpu.add_argument("--minutes", type=float, help="of timing; no shape starts later (8.5; --quick: 2)")
    gpu.add_argument(
        "--profile",
        nargs="?",
        const="triton",
        metavar="WHO",
        help="call WHO (triton) on the first shape of --only, between cudaProfilerStart and Stop, and do nothing else",
    )
    gpu.add_argument("--dry-run", action="store_true", help="rehearse it all without a GPU; times are made up")
    gpu.add_argument("--sanitize", action="store_true", help="what compute-sanitizer is run on: a few small checks")
    cpu = parser.add_argument_group("on a CPU")
    cpu.add_argument("--cpu", action="store_true", help="measure it although there is a GPU")
    cpu.add_argument("--lengths", default="4096,16384,65536", help="comma-separated tokens")
    cpu.add_argument("--heads", type=int, default=2)
    cpu.add_argument("--head-dim", type=int, default=64)
    cpu.add_argument("--longest-timed", type=int, default=16384, help="above it: memory only")
    cpu.add_argument("--repeats", type=int, default=4)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.dry_run:
        interpret(sys.argv[1:] if argv is None else argv)
    if args.dry_run or (torch.cuda.is_available() and not args.cpu):
        measure_gpu(args)
    elif args.quick or args.only or args.profile or args.sanitize:
        raise ValueError("no CUDA GPU here: --dry-run rehearses what is done on one")
    else:
        measure_cpu(args)


def interpret(argv: Sequence[str]) -> None:
    """Sees to it that Triton interprets, which it decides when it is first imported: if need be, by starting anew."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton" in sys.modules:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "longtake.bench.attention", *argv])


def measure_gpu(args: argparse.Namespace) -> None:
    """Ends with exit code 1 where something of ours is wrong."""
    from . import attention_run as steps

    minutes = args.minutes or (2.0 if args.quick else 8.5)
    options = steps.Options(args.quick, args.only, minutes, args.json, args.dry_run)
    if args.profile:
        steps.run_profile(options, args.profile)
    elif not (steps.run_sanitized(options) if args.sanitize else steps.run(options)):
        sys.exit(1)


def measure_cpu(args: argparse.Namespace) -> None:
    print(line(("device", "shape", "direction", "ms", "GFLOP/s", "SDPA ms", "ratio", "peak MiB")))
    rows = run(
        [int(length) for length in args.lengths.split(",")],
        heads=args.heads,
        head_dim=args.head_dim,
        longest_timed=args.longest_timed,
        repeats=args.repeats,
    )
    if args.json:
        report = {"torch": torch.__version__, "machine": platform.machine(), "rows": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
