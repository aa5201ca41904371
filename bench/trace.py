"""`longtake bench ring --trace FILE`: one forward and backward of the ring in a profile that shows what hides what.

Each rank writes a Chrome trace (https://ui.perfetto.dev opens it) with a range for each step's kernel and, on tracks
of their own, for the exchange of each step's keys and gradients, from its start until the rank has waited for it. On a
GPU these are the host's ranges; there the streams below show when NCCL's kernels and the others ran.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile, record_function

from ..comm.launch import launch
from ..comm.layout import zigzag
from ..comm.mesh import Mesh
from ..comm.transport import Handle, Transport
from .ring import Setting, make_plan, ours, results, shards

Interval = tuple[float, float]  # begin and end
LINE = "{:>4} {:>12} {:>10} {:>13}  {}"
HEADER = LINE.format("rank", "exchange ms", "kernel ms", "under kernels", "trace")
TRACKS = {"keys": 900_000_001, "gradients": 900_000_002}  # thread ids that no thread has


class Traced:
    """A transport that marks in a profile what a ring of `num_steps` does on route `direct`: see `Transport`.

    What a rank does between the start of the exchange for step i + 1 and its next call here is the kernel of step i;
    after the last step's keys have landed, that step's. Keys travel in `dtype`, their gradients in float32.
    """

    def __init__(self, inner: Transport, *, num_steps: int, dtype: torch.dtype) -> None:
        self.inner, self.num_steps, self.dtype = inner, num_steps, dtype
        self.bytes_sent = inner.bytes_sent
        self.started = {"keys": 0, "gradients": 0}  # exchanges in this pass; those of step 0 stay at home
        self.kernel: record_function | None = None

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """A forward or a backward."""
        self.started = dict.fromkeys(self.started, 0)
        yield
        self.end_kernel()

    def begin_kernel(self, step: int) -> None:
        self.kernel = record_function(f"ring step {step}: kernel").__enter__()

    def end_kernel(self) -> None:
        if self.kernel is not None:
            self.kernel.__exit__(None, None, None)
            self.kernel = None

    def all_to_all(self, axis: str, send: Sequence[Sequence[Tensor]], recv: Sequence[Sequence[Tensor]]) -> None:
        self.end_kernel()
        self.inner.all_to_all(axis, send, recv)

    def exchange(
        self,
        axis: str,
        *,
        send_to: int | None,
        send: Sequence[Tensor],
        recv_from: int | None,
        recv: Sequence[Tensor],
    ) -> "TracedHandle":
        self.end_kernel()
        track = "keys" if recv[0].dtype == self.dtype else "gradients"
        self.started[track] += 1
        step = self.started[track]
        span = record_function(f"ring step {step}: exchange of {track}").__enter__()
        handle = self.inner.exchange(axis, send_to=send_to, send=send, recv_from=recv_from, recv=recv)
        if track == "keys":
            self.begin_kernel(step - 1)
        is_last = track == "keys" and step == self.num_steps - 1
        return TracedHandle(self, handle, span, step if is_last else None)


@dataclass(frozen=True)
class TracedHandle:
    """An exchange under way. next_kernel: the step whose kernel begins when it has been waited for, if one does."""

    traced: Traced
    handle: Handle
    span: record_function
    next_kernel: int | None

    def wait(self) -> None:
        self.traced.end_kernel()
        self.handle.wait()
        self.span.__exit__(None, None, None)
        if self.next_kernel is not None:
            self.traced.begin_kernel(self.next_kernel)


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Their union: in order, without overlap."""
    union: list[Interval] = []
    for begin, end in sorted(intervals):
        if union and begin <= union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        else:
            union.append((begin, end))
    return union


def covered(exchanges: Iterable[Interval], kernels: Iterable[Interval]) -> tuple[float, float]:
    """How long any exchange is under way, and how much of that time some kernel runs."""
    flights, busy = merged(exchanges), merged(kernels)
    under = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in flights for b in busy)
    return sum(end - begin for begin, end in flights), under


def intervals(events: Iterable[dict[str, Any]], *, on_gpu: bool) -> tuple[list[Interval], list[Interval]]:
    """Exchanges and kernels of a Chrome trace, in microseconds: of the GPU's streams, or the ranges of `Traced`."""
    exchanges: list[Interval] = []
    kernels: list[Interval] = []
    for event in events:
        name, span = event.get("name", ""), (event.get("ts", 0.0), event.get("ts", 0.0) + event.get("dur", 0.0))
        if on_gpu and event.get("cat") == "kernel":
            (exchanges if "nccl" in name.lower() else kernels).append(span)
        elif not on_gpu and event.get("cat") == "user_annotation" and name.startswith("ring step"):
            (exchanges if "exchange" in name else kernels).append(span)
    return exchanges, kernels


def on_own_tracks(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events with the exchanges moved: one thread's ranges must nest, and these do not."""

    def track(event: dict[str, Any]) -> str:
        return event.get("name", "").partition(": exchange of ")[2] if event.get("cat") == "user_annotation" else ""

    tracks = [track(event) for event in events]
    found = {(name, event["pid"]) for name, event in zip(tracks, events, strict=True) if name}
    names = [
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": TRACKS[name], "args": {"name": f"exchange of {name}"}}
        for name, pid in sorted(found)
    ]
    moved = (event | {"tid": TRACKS[name]} if name else event for name, event in zip(tracks, events, strict=True))
    return [*names, *moved]


def profile_ring(mesh: Mesh, setting: Setting) -> profile:
    """A forward and a backward in zigzag, after one to warm up. Collective."""
    layout = zigzag(setting.num_tokens, ring=mesh.ring)
    plan = make_plan(mesh, layout, torch.tensor([0, setting.num_tokens]), "direct")
    kernel, tensors = ours(plan), shards(layout, mesh, setting)
    results(kernel, tensors)
    *qkv, dout = tensors
    traced = Traced(mesh.transport, num_steps=mesh.ring, dtype=dout.dtype)
    mesh.transport = traced
    device = torch.get_device_module(mesh.device)
    device.synchronize()
    mesh.barrier()
    with profile() as recorded:
        with traced.one_pass():
            out = kernel(*qkv)
        with traced.one_pass():
            torch.autograd.grad(out, qkv, dout)
        device.synchronize()
    mesh.transport = traced.inner
    return recorded


def trace_rank(setting: Setting, world: int, file: Path) -> list[dict[str, Any]]:
    """One rank's part; all ranks' rows, from the first rank."""
    mesh = Mesh(ring=world)
    recorded = profile_ring(mesh, setting)
    path = file.with_stem(f"{file.stem}-rank{mesh.rank}")
    recorded.export_chrome_trace(str(path))
    trace = json.loads(path.read_text())
    exchanges, kernels = intervals(trace["traceEvents"], on_gpu=mesh.device.type == "cuda")
    trace["traceEvents"] = on_own_tracks(trace["traceEvents"])
    path.write_text(json.dumps(trace))
    flying, under = covered(exchanges, kernels)
    busy = sum(end - begin for begin, end in merged(kernels))
    row = {"kernel_ms": busy / 1e3, "exchange_ms": flying / 1e3, "hidden_ms": under / 1e3, "file": str(path)}
    rows = mesh.gather_objects(row)
    return rows if mesh.rank == 0 else []


def format_row(rank: int, row: dict[str, Any]) -> str:
    hidden = f"{100 * row['hidden_ms'] / row['exchange_ms']:.0f} %" if row["exchange_ms"] else "-"
    return LINE.format(rank, f"{row['exchange_ms']:.2f}", f"{row['kernel_ms']:.2f}", hidden, row["file"])


def run(setting: Setting, world: int, file: Path, *, share_gpu: bool) -> None:
    """Profiles the ring on `world` ranks and prints what was hidden. Raises ValueError for fewer than two."""
    if world < 2:
        raise ValueError(f"--trace shows what travels between ranks: --world must be at least 2, got {world}")
    setting = replace(setting, dtype="bfloat16")  # by which keys are told from their float32 gradients
    rows = launch(trace_rank, setting, world, file, world_size=world, share_gpu=share_gpu)
    for rank, row in enumerate(rows):
        print(format_row(rank, row) if rank else f"{HEADER}\n{format_row(rank, row)}")
