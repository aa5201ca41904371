"""`longtake bench comm`: bandwidth of all-to-all (axis ulysses) and ring exchange between the ranks of this host.

    longtake bench comm [--world 8] [--max-bytes 1073741824] [--json FILE]
    longtake bench comm --world 4 --share-gpu     several ranks on one GPU, over loopback: it works, it is not fast

Who: nccl, our transport on NCCL; torch, our transport on torch.distributed's point-to-point calls; library, what
torch.distributed has for it itself. bytes: that a rank sends, in an all-to-all its own share included. us: of a call
among several in a row, on the slowest rank, median of the repeats. alg: bytes / time. bus: what a rank's link carries,
alg x (n - 1) / n for the all-to-all of n ranks, alg for the exchange, as nccl-tests count it. peak: bus over
--link-gbs, the link's speed in one direction, by default NVLink's on an SXM board.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.launch import launch
from ..comm.mesh import Mesh, default_device
from .clock import Call
from .peaks import LINK_GBS, device_name, peak
from .rows import write_rows

LINE = "{:<11} {:<8} {:>11} {:>10} {:>9} {:>9} {:>7}"
HEADER = LINE.format("operation", "who", "bytes", "us", "alg GB/s", "bus GB/s", "peak")
LEAST_BYTES = 1024
IN_A_ROW, ROW_BYTES = 20, 2**26  # calls between two looks at the clock: at most so many, of so many bytes together


@dataclass(frozen=True)
class Setting:
    """What is measured. link_gbs: 10^9 bytes a second in one direction; None: not known."""

    max_bytes: int
    repeats: int
    link_gbs: float | None = None

    def __post_init__(self) -> None:
        if self.max_bytes < LEAST_BYTES or self.repeats < 1:
            got = f"{self.max_bytes} and {self.repeats}"
            raise ValueError(f"max_bytes must be at least {LEAST_BYTES} and repeats at least 1, got {got}")
        if self.link_gbs is not None and not self.link_gbs > 0:
            raise ValueError(f"link_gbs must be more than 0, got {self.link_gbs}")


def sizes(max_bytes: int) -> list[int]:
    """From 1 KiB up, each four times the one before."""
    return [LEAST_BYTES * 4**i for i in range(32) if LEAST_BYTES * 4**i <= max_bytes]


def bus_bandwidth(operation: str, bandwidth: float, num_ranks: int) -> float:
    """What the link of a rank carries, of bytes / time: in an all-to-all its own share stays at home."""
    return bandwidth * (num_ranks - 1) / num_ranks if operation == "all_to_all" else bandwidth


def all_to_all(who: str, mesh: Mesh, send: Tensor, recv: Tensor) -> Call:
    """Equal shares of both tensors go to and come from each rank."""
    if who == "library":
        return lambda: dist.all_to_all_single(recv, send)
    shares = [[[part] for part in x.chunk(mesh.ulysses)] for x in (send, recv)]
    return lambda: mesh.transport.all_to_all("ulysses", *shares)


def exchange(who: str, mesh: Mesh, send: Tensor, recv: Tensor) -> Call:
    """To the right neighbour, from the left one."""
    right, left = (mesh.ring_rank + 1) % mesh.ring, (mesh.ring_rank - 1) % mesh.ring
    if who != "library":
        sides: dict[str, Any] = {"send_to": right, "send": [send], "recv_from": left, "recv": [recv]}
        return lambda: mesh.transport.exchange("ring", **sides).wait()
    pair = [dist.P2POp(dist.isend, send, right), dist.P2POp(dist.irecv, recv, left)]

    def call() -> None:
        for work in dist.batch_isend_irecv(pair):
            work.wait()

    return call


OPERATIONS = {"all_to_all": all_to_all, "exchange": exchange}


def messages(operation: str, num_bytes: int, rank: int, num_ranks: int, device: torch.device) -> list[Tensor]:
    """What a rank sends and what it must receive, uint8: each value tells who sends to whom.

    Up to num_bytes of an all-to-all, so that the shares are equal.
    """
    if operation == "exchange":
        ranks = rank, (rank - 1) % num_ranks
        return [torch.full((num_bytes,), value % 251, dtype=torch.uint8, device=device) for value in ranks]
    peers = torch.arange(num_ranks, device=device)
    values = (rank * num_ranks + peers) % 251, (peers * num_ranks + rank) % 251
    return [each.to(torch.uint8).repeat_interleave(num_bytes // num_ranks) for each in values]


def measure(operation: str, num_bytes: int, meshes: Mapping[str, Mesh], setting: Setting) -> list[dict[str, Any]]:
    """A row for each who takes part, in turns. Collective. Raises RuntimeError where something else arrives."""
    mesh = meshes["library"]
    send, expected = messages(operation, num_bytes, mesh.rank, mesh.world_size, mesh.device)
    calls: dict[str, Call] = {}
    for who, each in meshes.items():
        recv = torch.zeros_like(send)
        calls[who] = OPERATIONS[operation](who, each, send, recv)
        calls[who]()
        if not torch.equal(recv, expected):
            raise RuntimeError(f"{operation} of {send.numel()} bytes by {who}: rank {mesh.rank} received other bytes")
    times = {who: [] for who in calls}
    for _ in range(setting.repeats):
        for who, call in calls.items():
            times[who].append(timed(call, mesh, max(1, min(IN_A_ROW, ROW_BYTES // num_bytes))))
    rows = []
    for who, mine in times.items():
        seconds = median(map(max, zip(*mesh.gather_objects(mine), strict=True)))
        alg = send.numel() / seconds / 1e9
        row = {"operation": operation, "who": who, "bytes": send.numel(), "us": 1e6 * seconds}
        rows.append(row | {"alg_gbs": alg, "bus_gbs": bus_bandwidth(operation, alg, mesh.world_size)})
    return rows


def timed(call: Call, mesh: Mesh, num_calls: int) -> float:
    """Seconds of one of several calls in a row, all ranks starting together."""
    device = torch.get_device_module(mesh.device)
    device.synchronize()
    mesh.barrier()
    began = time.perf_counter()
    for _ in range(num_calls):
        call()
    device.synchronize()
    return (time.perf_counter() - began) / num_calls


def make_meshes(ring: int, ulysses: int) -> dict[str, Mesh]:
    """By who takes part there: "library" uses no transport, and a mesh to know its place."""
    plain = Mesh(ring=ring, ulysses=ulysses, transport="torch")
    ours = {"nccl": Mesh(ring=ring, ulysses=ulysses, transport="nccl")} if plain.device.type == "cuda" else {}
    return ours | {"torch": plain, "library": plain}


def benchmark(setting: Setting, world: int, keep: Callable[[Sequence[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """One rank's part. The first prints the table as it comes, has `keep` write it, and returns its rows."""
    table: list[dict[str, Any]] = []
    for operation, degrees in (("all_to_all", (1, world)), ("exchange", (world, 1))):
        meshes = make_meshes(*degrees)
        mesh = meshes["library"]
        for num_bytes in sizes(setting.max_bytes):
            for row in measure(operation, num_bytes, meshes, setting):
                table.append(row | {"peak": row["bus_gbs"] / setting.link_gbs if setting.link_gbs else None})
                if mesh.rank == 0:
                    line = format_row(table[-1])
                    print(f"{HEADER}\n{line}" if len(table) == 1 else line, flush=True)
                    keep(table)
    return table if mesh.rank == 0 else []


def format_row(row: dict[str, Any]) -> str:
    share = "-" if row["peak"] is None else f"{100 * row['peak']:.1f} %"
    numbers = [f"{row['us']:.1f}", f"{row['alg_gbs']:.3f}", f"{row['bus_gbs']:.3f}"]
    return LINE.format(row["operation"], row["who"], row["bytes"], *numbers, share)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="longtake bench comm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    num_gpus = torch.cuda.device_count()
    parser.add_argument("--world", type=int, default=num_gpus or 4, help="ranks (as many as GPUs; 4 on a CPU)")
    parser.add_argument("--max-bytes", type=int, help="of a rank (1 GiB; 16 MiB on a CPU, and with --share-gpu)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each row (5)")
    parser.add_argument("--link-gbs", type=float, help="the link's GB/s, each way (by the GPU's name)")
    parser.add_argument("--share-gpu", action="store_true", help="let ranks share a GPU, over loopback")
    parser.add_argument("--json", type=Path, help="also write the table here")
    args = parser.parse_args(argv)
    if args.world < 2:
        raise ValueError(f"--world must be at least 2 (nothing travels otherwise), got {args.world}")
    name = device_name(default_device())
    link_gbs = peak(LINK_GBS, name) if args.link_gbs is None and not args.share_gpu else args.link_gbs
    max_bytes = 2**30 if num_gpus and not args.share_gpu else 2**24
    setting = Setting(max_bytes if args.max_bytes is None else args.max_bytes, args.repeats, link_gbs)
    facts = {"torch": torch.__version__, "device": name, "world": args.world, "setting": asdict(setting)}
    keep = partial(write_rows, args.json, facts)
    launch(benchmark, setting, args.world, keep, world_size=args.world, share_gpu=args.share_gpu)


if __name__ == "__main__":
    main()
