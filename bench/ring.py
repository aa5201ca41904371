"""`longtake bench ring`: 2D attention on the ranks of this host, for each grid and route.

    longtake bench ring [--world 4] [--tokens 4096] [--json FILE]
    longtake bench ring --trace FILE              a profile of one forward and backward, for each rank
    longtake bench ring --virtual RINGxULYSSES    on one device, block by block: see its own --help

One causal sequence in zigzag, then packed documents of mixed lengths in the balanced layout.
ms: of the slowest rank, median of the repeats. MiB: what leaves a rank in a forward and a backward, of the busiest rank
and of all. work: visible (query, key) pairs times heads, counted, of the busiest rank / of the idlest. time: forward
and backward / those of route `direct`. On CPUs the peer does the same work, where it is installed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from ..comm.launch import launch
from ..comm.layout import Layout, balanced, contiguous
from ..comm.mesh import Mesh, default_device
from ..model.attention_plan import AttentionPlan, Route, holdings, plan_attention
from ..model.sequence_parallel import planned_attention
from ..model.ulysses import HeadSplit
from .peaks import device_name
from .peer import PACKAGE, peer_attention, peer_limit, peer_version
from .rows import write_rows

LINE = "{:<9} {:<5} {:<7} {:>9} {:>9} {:>8} {:>8} {:>6} {:>6}  {}"
HEADER = LINE.format("sequence", "grid", "route", "fwd ms", "bwd ms", "MiB max", "MiB all", "work", "time", "").rstrip()
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """What is measured. Causal."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    repeats: int
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def grids(world: int) -> list[tuple[int, int]]:
    """(ring, ulysses) of every grid of `world` ranks, from ring alone to Ulysses alone."""
    return [(ring, world // ring) for ring in range(world, 0, -1) if world % ring == 0]


def sequences(num_tokens: int) -> dict[str, Tensor]:
    """cu_seqlens of one document, and of a mix: log-normal lengths, the mean near a tenth of the sequence."""
    rng, edges = np.random.default_rng(0), [0]
    while edges[-1] < num_tokens:
        length = 1 + int(rng.lognormal(sigma=1.0) * num_tokens / 16)
        edges.append(min(edges[-1] + length, num_tokens))
    return {"causal": torch.tensor([0, num_tokens]), "packed": torch.tensor(edges)}


def make_plan(mesh: Mesh, layout: Layout, cu_seqlens: Tensor, route: Route) -> AttentionPlan:
    return plan_attention(
        mesh, *holdings(layout), num_tokens=layout.num_tokens, causal=True, cu_seqlens=cu_seqlens, route=route
    )


def shards(layout: Layout, mesh: Mesh, setting: Setting) -> list[Tensor]:
    """q, k, v, dout of this rank, [S_local, H, D]; of the same whole sequence on every rank and in every layout."""
    generator = torch.Generator().manual_seed(0)
    heads = (setting.num_heads, setting.num_kv_heads, setting.num_kv_heads, setting.num_heads)
    whole = [torch.randn(setting.num_tokens, h, setting.head_dim, generator=generator) for h in heads]
    dtype = getattr(torch, setting.dtype)
    q, k, v, dout = (layout.shard(x, mesh.sp_rank).to(mesh.device, dtype) for x in whole)
    return [*(x.requires_grad_() for x in (q, k, v)), dout]


@dataclass(frozen=True)
class Case:
    """A kernel, its q, k, v, dout, and what is known of it without a clock. Warm: it was called once.

    The first call makes the plan's tiles, which all layers of a model share.
    """

    kernel: Kernel
    tensors: Sequence[Tensor]
    facts: dict[str, Any]


def route_case(mesh: Mesh, cu_seqlens: Tensor, route: Route, setting: Setting) -> Case:
    """Ours, on the balanced layout (of one document: zigzag). Collective."""
    layout = balanced(cu_seqlens, ring=mesh.ring, ulysses=mesh.ulysses)
    plan = make_plan(mesh, layout, cu_seqlens, route)
    heads = HeadSplit(setting.num_heads, setting.num_kv_heads, mesh.ulysses).q[mesh.ulysses_rank]
    work = sum(visibility.area for visibility in plan.visibility) * (heads.stop - heads.start)
    case = Case(ours(plan), shards(layout, mesh, setting), {"work": mesh.gather_objects(work)})
    results(case.kernel, case.tensors)
    return case


def ours(plan: AttentionPlan) -> Kernel:
    return lambda q, k, v: planned_attention(q, k, v, plan)


def peer_case(mesh: Mesh, cu_seqlens: Tensor, setting: Setting) -> Case | str:
    """The peer, with how far its output and gradients are from ours; or why it cannot. Collective."""
    layout = contiguous(setting.num_tokens, ring=mesh.ring, ulysses=mesh.ulysses)
    limit = peer_limit(layout, setting.num_kv_heads)
    if limit is not None:
        return limit
    theirs = peer_attention(mesh, cu_seqlens, num_heads=setting.num_heads, num_kv_heads=setting.num_kv_heads)
    plan = make_plan(mesh, layout, cu_seqlens, "direct")
    tensors = shards(layout, mesh, setting)
    pairs = zip(results(theirs, tensors), results(ours(plan), tensors), strict=True)
    errors = [float((found - expected).abs().max() / expected.abs().max()) for found, expected in pairs]
    error = max(mesh.gather_objects(max(errors)))
    return Case(theirs, tensors, {"error": error, "note": f"differs from ours by {error:.0e}"})


def results(kernel: Kernel, tensors: Sequence[Tensor]) -> list[Tensor]:
    """out, dq, dk, dv."""
    *qkv, dout = tensors
    out = kernel(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, dout)]


def measure(cases: Mapping[str, Case], mesh: Mesh, repeats: int) -> dict[str, dict[str, Any]]:
    """The rows of cases that take turns. Collective."""
    times = {name: [] for name in cases}
    sent = dict.fromkeys(cases, 0)
    for _ in range(repeats):
        for name, case in cases.items():
            before = bytes_sent(mesh)
            times[name].append(timed(case, mesh))
            sent[name] = bytes_sent(mesh) - before
    rows = {}
    for name, case in cases.items():
        slowest = np.max(mesh.gather_objects(times[name]), axis=0)  # [repeats, 2]
        forward_ms, backward_ms = (1e3 * np.median(slowest, axis=0)).tolist()
        rows[name] = {"forward_ms": forward_ms, "backward_ms": backward_ms, **case.facts}
        if name != "peer":  # whose bytes do not go through our transport
            rows[name]["bytes_sent"] = mesh.gather_objects(sent[name])
    return rows


def timed(case: Case, mesh: Mesh) -> tuple[float, float]:
    """Seconds of one forward and of one backward on this rank, all ranks starting together."""
    *qkv, dout = case.tensors
    device = torch.get_device_module(mesh.device)
    device.synchronize()
    mesh.barrier()
    began = time.perf_counter()
    out = case.kernel(*qkv)
    device.synchronize()
    forward = time.perf_counter() - began
    mesh.barrier()
    began = time.perf_counter()
    torch.autograd.grad(out, qkv, dout)
    device.synchronize()
    return forward, time.perf_counter() - began


def bytes_sent(mesh: Mesh) -> int:
    """By the attention alone: barriers travel along another axis."""
    return mesh.transport.bytes_sent["ring"] + mesh.transport.bytes_sent["ulysses"]


def measure_grid(mesh: Mesh, cu_seqlens: Tensor, setting: Setting) -> dict[str, dict[str, Any]]:
    """A row for each route, and for the peer where it is installed and can run. Collective."""
    routes = get_args(Route) if mesh.ring > 1 else ("direct",)  # in a ring of one they are the same
    cases = {route: route_case(mesh, cu_seqlens, route, setting) for route in routes}
    on_cpu = mesh.device.type == "cpu"  # where the peer has a kernel that we can call
    peer = peer_case(mesh, cu_seqlens, setting) if on_cpu and peer_version() else None
    if isinstance(peer, Case):
        cases["peer"] = peer
    rows = measure(cases, mesh, setting.repeats)
    ours = rows["direct"]["forward_ms"] + rows["direct"]["backward_ms"]
    for row in rows.values():
        row["time"] = (row["forward_ms"] + row["backward_ms"]) / ours
    return rows | {"peer": {"note": peer}} if isinstance(peer, str) else rows


def benchmark(
    setting: Setting, world: int, keep: Callable[[Sequence[dict[str, Any]]], None]
) -> list[dict[str, Any]] | None:
    """One rank's part. The first prints the table as it comes, has `keep` write it, and returns its rows."""
    table, first = [], Mesh(ring=world).rank == 0
    if first:
        print(HEADER, flush=True)
    for name, cu_seqlens in sequences(setting.num_tokens).items():
        for ring, ulysses in grids(world):
            mesh = Mesh(ring=ring, ulysses=ulysses)
            for route, row in measure_grid(mesh, cu_seqlens, setting).items():
                table.append({"sequence": name, "ring": ring, "ulysses": ulysses, "route": route} | row)
                if first:
                    print(format_row(table[-1]), flush=True)
                    keep(table)
    return table if first else None


def format_row(row: dict[str, Any]) -> str:
    cells = [row["sequence"], f"{row['ring']}x{row['ulysses']}", row["route"]]
    cells += [f"{row[key]:.1f}" if key in row else "-" for key in ("forward_ms", "backward_ms")]
    sent, work = row.get("bytes_sent"), row.get("work")
    cells += [f"{max(sent) / 2**20:.2f}", f"{sum(sent) / 2**20:.2f}"] if sent else ["-", "-"]
    cells += [f"{max(work) / min(work):.3f}" if work and min(work) else "-"]
    cells += [f"{row['time']:.2f}" if "time" in row else "-"]
    return LINE.format(*cells, row.get("note", "")).rstrip()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="longtake bench ring", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--virtual", metavar="RINGxULYSSES", help="the ranks of a grid in turn on one device")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="profile the ring instead; writes FILE-rank0, ...")
    parser.add_argument("--world", type=int, default=4, help="ranks (4)")
    parser.add_argument("--tokens", type=int, default=4096, help="of all ranks together (4096)")
    parser.add_argument("--heads", type=int, default=8, help="query heads (8)")
    parser.add_argument("--kv-heads", type=int, default=4, help="key and value heads (4)")
    parser.add_argument("--head-dim", type=int, default=64, help="(64)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(float32; --trace: bf16)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each case (3)")
    parser.add_argument("--share-gpu", action="store_true", help="let ranks share a GPU, over loopback")
    parser.add_argument("--json", type=Path, help="also write the table here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--virtual" for word in words):
        from . import ring_virtual

        ring_virtual.main(words)
        return
    args = parse(words)
    setting = Setting(args.tokens, args.heads, args.kv_heads, args.head_dim, args.repeats, args.dtype)
    if args.trace:
        from . import trace

        trace.run(setting, args.world, args.trace, share_gpu=args.share_gpu)
        return
    installed = peer_version()
    facts = {"torch": torch.__version__, "device": device_name(default_device()), "peer": installed}
    keep = partial(write_rows, args.json, facts | {"setting": asdict(setting)})
    rows = launch(benchmark, setting, args.world, keep, world_size=args.world, share_gpu=args.share_gpu)
    if rows is not None:
        print(f"peer: {PACKAGE} {installed or f'not installed (pip install {PACKAGE})'}")


if __name__ == "__main__":
    main()
