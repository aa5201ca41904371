"""`longtake bench decode`: one query against a long cache, beside PyTorch's kernels and beside a copy of memory.

    longtake bench decode [--lengths 4096,65536,1048576] [--head-dim 128] [--json FILE]
    longtake bench decode --device cpu        no GPU: every step, on tiny shapes in Triton's interpreter

First ours must agree with float64 on poisoned memory, or it is named as wrong and the exit code is 1. Then all take
turns, with a cold L2 cache. What counts is the bytes of K and V over the time, as a share of what a copy moves (it
reads and writes).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .clock import Allowance, Call, Stopwatch, cuda_stopwatch, fake_stopwatch
from .rows import write_rows

HEADS = ((64, 8), (28, 4))
LENGTHS = (4096, 16384, 65536, 262144, 1048576)
TINY_HEADS, TINY_LENGTHS = ((8, 2), (7, 1)), (1, 600)
COPIED = 2**29  # bytes
AT_ONCE = 65536  # keys of the float64 reference
REHEARSED = "no GPU was timed: the shapes were tiny and the times are made up; run this on a machine with a CUDA GPU"


@dataclass(frozen=True)
class Bench:
    """What all measurements share. copied: bytes that `copy` reads, and writes."""

    device: torch.device
    dtype: torch.dtype
    stopwatch: Stopwatch
    copy: Call
    copied: int


def make_bench(device: torch.device, seconds: float) -> Bench:
    on_gpu = device.type == "cuda"
    source = torch.ones(COPIED if on_gpu else 64, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    stopwatch = cuda_stopwatch(device, Allowance(seconds)) if on_gpu else fake_stopwatch
    dtype = torch.bfloat16 if on_gpu else torch.float16  # the interpreter multiplies bfloat16 wrongly
    return Bench(device, dtype, stopwatch, lambda: target.copy_(source), source.numel())


def ours(q: Tensor, k: Tensor, v: Tensor) -> Call:
    from ..kernels.backend import block_forward

    visibility = everything(len(k), q.device)
    return lambda: block_forward(q, k, v, visibility, scale=q.shape[-1] ** -0.5, final=True, backend="triton")[0]


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Call:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[0].transpose(0, 1)

    return call


def everything(num_keys: int, device: torch.device) -> Any:
    """The Visibility of one query that sees all keys."""
    from ..kernels.visibility import Visibility

    first, last = (torch.tensor([key], device=device) for key in (0, num_keys - 1))
    return Visibility.from_bounds(first, last, torch.arange(num_keys, device=device))


def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In float64, a block of keys at a time."""
    from ..kernels import reference

    state = None
    for keys, values in zip(k.split(AT_ONCE), v.split(AT_ONCE), strict=True):
        mask = everything(len(keys), q.device)
        state = reference.forward(q.double(), keys, values, mask, scale=q.shape[-1] ** -0.5, state=state)
    assert state is not None
    return state[0]


def problem(call: Call, inputs: Sequence[Tensor], peers: Sequence[Tensor]) -> str:
    """What is wrong with our answer: it may lose twice what PyTorch loses, and a little; "" where all is right."""
    from .attention_check import FLOORS, deviation, poisoned

    with poisoned():
        found, again = call(), call()
    assert isinstance(found, Tensor) and isinstance(again, Tensor)
    want = expected(*inputs)
    limit = 2 * min((deviation(peer, want) for peer in peers), default=0.0) + FLOORS[found.dtype]
    error = deviation(found, want)
    if not error <= limit:
        return f"off by {error:.1e} of the largest value, the limit is {limit:.1e}"
    return "" if torch.equal(found, again) else "differs between two runs"


def measure(heads: int, kv_heads: int, length: int, head_dim: int, bench: Bench) -> dict[str, Any]:
    """A row of the table. Times are None of a peer that does not take the shape, and of ours where it is wrong."""
    generator = torch.Generator(bench.device).manual_seed(0)
    sizes = ((1, heads, head_dim), (length, kv_heads, head_dim), (length, kv_heads, head_dim))
    q, k, v = (torch.randn(s, generator=generator, device=bench.device, dtype=bench.dtype) for s in sizes)
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
    calls, answers = {"ours": ours(q, k, v)}, []
    for name in ("flash", "cudnn") if bench.device.type == "cuda" else ("math",):
        call = sdpa(q, k, v, backends[name])
        try:
            answers.append(call())
            calls[name] = call
        except RuntimeError as error:
            print(f"SDPA {name} takes no {heads}:{kv_heads} x {length}: {str(error).splitlines()[0]}", file=sys.stderr)
    wrong = problem(calls["ours"], (q, k, v), answers)
    if wrong:
        del calls["ours"]
    *timings, copy = bench.stopwatch([*calls.values(), bench.copy])
    ms = {name: timing.ms for name, timing in zip(calls, timings, strict=True)}
    row: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "length": length, "head_dim": head_dim, "ms": ms}
    row |= {"wrong": wrong, "copy_gb_s": 2 * bench.copied / copy.ms / 1e6, "gb_s": None, "of_copy": None}
    if not wrong:
        row["gb_s"] = (k.nbytes + v.nbytes) / ms["ours"] / 1e6
        row["of_copy"] = row["gb_s"] / row["copy_gb_s"]
        row["host_ms"] = timings[0].host_ms
    return row


def format_row(row: dict[str, Any]) -> str:
    ms = row["ms"]
    best = min((ms[name] for name in ms if name != "ours"), default=None)
    cells = [f"{row['heads']}:{row['kv_heads']}", str(row["length"]), str(row["head_dim"])]
    numbers = [(ms.get("ours"), 3), (row["gb_s"], 0), (row["of_copy"] and 100 * row["of_copy"], 0)]
    numbers += [(row.get("host_ms"), 3), (ms.get("flash", ms.get("math")), 3), (ms.get("cudnn"), 3)]
    numbers += [(best / ms["ours"] if best and "ours" in ms else None, 2)]
    cells += ["-" if value is None else f"{value:.{digits}f}" for value, digits in numbers]
    return line(cells) + (f"  WRONG: {row['wrong']}" if row["wrong"] else "")


def line(cells: Sequence[str]) -> str:
    return "{:>6} {:>8} {:>4} {:>8} {:>6} {:>7} {:>8} {:>9} {:>9} {:>10}".format(*cells)


def find_device(name: str | None) -> torch.device:
    """Raises ValueError where a GPU is asked for and there is none. On a CPU sees to it that Triton interprets."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA GPU here: --device cpu rehearses what is done on one")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        if "triton" in sys.modules:
            raise ValueError("Triton is imported already and does not interpret: set TRITON_INTERPRET=1 first")
        os.environ["TRITON_INTERPRET"] = "1"
    return device


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="longtake bench decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU where there is one")
    parser.add_argument("--lengths", help=f"comma-separated keys; default {','.join(map(str, LENGTHS))}")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=0.5, help="for the rounds of one row")
    parser.add_argument("--json", type=Path, help="also write the table here")
    args = parser.parse_args(argv)
    device = find_device(args.device)
    on_gpu = device.type == "cuda"
    bench = make_bench(device, args.seconds)
    lengths = [int(n) for n in args.lengths.split(",")] if args.lengths else (LENGTHS if on_gpu else TINY_LENGTHS)
    peers = ("flash ms", "cuDNN ms") if on_gpu else ("math ms", "cuDNN ms")
    print(line(("heads", "keys", "dim", "ms", "GB/s", "% copy", "host ms", *peers, "best/ours")))
    facts = {"torch": torch.__version__, "device": torch.cuda.get_device_name(device) if on_gpu else "cpu"}
    rows = []
    for heads, kv_heads in HEADS if on_gpu else TINY_HEADS:
        for length in lengths:
            rows.append(measure(heads, kv_heads, length, args.head_dim, bench))
            print(format_row(rows[-1]), flush=True)
            write_rows(args.json, facts, rows)
    if not on_gpu:
        print(REHEARSED)
    if any(row["wrong"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
