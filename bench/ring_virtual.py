"""`longtake bench ring --virtual RINGxULYSSES`: the ranks of a grid, one after another on one device.

    longtake bench ring --virtual 8x1 [--layouts contiguous,zigzag,balanced] [--link-gbs 50] [--json FILE]

The attention block of each (rank, step) of the plan is timed by itself, forward and backward; nothing is sent. One
causal sequence, then packed documents of mixed lengths. Of the Ulysses ranks of a ring rank, which all see the same
tokens, the one with most heads stands for all.

area, time: of the busiest ring rank / the mean, visible (query, key) pairs and measured time. fwd, bwd: of the ring
rank that takes longest. even: the mean of a ring rank. hidden, in turn: what a layer would take on these ranks, were
each to send and receive at --link-gbs at once, transfers hidden behind kernels or not.

The model of these two: all ranks begin each step together. While step i computes, the keys of step i + 1 fly, and in
backward the gradients of step i - 1 too; a flight takes the bytes of its busier direction over the link's speed. A step
takes the larger of both (hidden) or their sum (in turn), of its slowest rank; last, the last gradients fly alone. Not
in it: the all-to-all of Ulysses, latency, and what a transfer takes from a kernel that runs beside it.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor

from ..comm.layout import Layout
from ..comm.mesh import Grid, Mesh, default_device
from ..kernels.backend import block_backward, block_forward
from ..kernels.visibility import Visibility
from ..model.attention_plan import AttentionPlan, Route, holdings, plan_attention, take
from ..model.batch import LAYOUTS
from ..model.ulysses import HeadSplit
from .clock import Allowance, Call, Stopwatch, cuda_stopwatch, wall_stopwatch
from .peaks import device_name
from .ring import sequences

LINE = "{:<9} {:<10} {:>6} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9}"
HEADER = LINE.format("sequence", "layout", "area", "time", "fwd ms", "bwd ms", "even ms", "hidden", "in turn")
Block = tuple[Tensor, Tensor, Visibility]


@dataclass(frozen=True)
class Setting:
    """What is measured. Heads are Qwen2-1.5B's by default; link_gbs: 10^9 bytes a second, each way."""

    ring: int
    ulysses: int
    num_tokens: int
    num_heads: int = 12
    num_kv_heads: int = 2
    head_dim: int = 128
    dtype: str = "bfloat16"
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    route: Route = "direct"
    link_gbs: float = 50.0

    def __post_init__(self) -> None:
        for name in ("ring", "ulysses", "num_tokens", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.link_gbs > 0:
            raise ValueError(f"link_gbs must be more than 0, got {self.link_gbs}")
        if unknown := [name for name in self.layouts if name not in LAYOUTS]:
            raise ValueError(f"layouts must be of {', '.join(LAYOUTS)}, got {unknown[0]!r}")


class VirtualRank(Grid):
    """A rank without a process: what layouts and plans ask of a `Mesh`."""

    def __init__(self, setting: Setting, ring_rank: int, device: torch.device) -> None:
        rank = ring_rank * setting.ulysses + busiest_rank(setting)[0]
        super().__init__(rank, ring=setting.ring, ulysses=setting.ulysses)
        self.device = device


def busiest_rank(setting: Setting) -> tuple[int, int, int]:
    """The Ulysses rank that most query heads fall to, how many, and how many key heads its ring carries."""
    split = HeadSplit(setting.num_heads, setting.num_kv_heads, setting.ulysses)
    num_heads = [heads.stop - heads.start for heads in split.q]
    rank = num_heads.index(max(num_heads))
    uneven, kv = split.kv_of_q(rank), split.kv[rank]
    return rank, num_heads[rank], len(uneven) if uneven else kv.stop - kv.start


def whole_tensors(setting: Setting, device: torch.device) -> list[Tensor]:
    """q, k, v, dout [T, H, D] of the whole sequence, with the heads that one Ulysses rank works with."""
    _, num_heads, num_kv_heads = busiest_rank(setting)
    generator, dtype = torch.Generator(device).manual_seed(0), getattr(torch, setting.dtype)
    shapes = [(setting.num_tokens, n, setting.head_dim) for n in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]


def virtual_mesh(setting: Setting, ring_rank: int, device: torch.device) -> Mesh:
    return cast(Mesh, VirtualRank(setting, ring_rank, device))


def make_plan(
    setting: Setting, layout: Layout, cu_seqlens: Tensor, ring_rank: int, device: torch.device
) -> AttentionPlan:
    return plan_attention(
        virtual_mesh(setting, ring_rank, device),
        *holdings(layout),
        num_tokens=setting.num_tokens,
        causal=True,
        cu_seqlens=cu_seqlens,
        route=setting.route,
    )


def rank_tensors(plan: AttentionPlan, layout: Layout, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Block]]:
    """q and dout of the plan's ring rank, and the key block of each of its steps."""
    q, k, v, dout = tensors
    mine = layout.ring_part(plan.mesh.ring_rank).to(q.device)
    blocks = []
    for step, visibility in zip(plan.steps, plan.visibility, strict=True):
        rows = take(layout.ring_part(step.source), step.rows).to(q.device)
        blocks.append((k[rows], v[rows], visibility))
    return q[mine], dout[mine], blocks


def forward(q: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """out in float32 and lse of one rank, all steps in turn."""
    state = None
    for k, v, visibility in blocks:
        state = block_forward(q, k, v, visibility, scale=q.shape[-1] ** -0.5, state=state)
    assert state is not None
    return state


def step_calls(q: Tensor, dout: Tensor, blocks: Sequence[Block]) -> list[Call]:
    """The forward call of each step, then the backward call of each, as the ring makes them.

    The carried state and dq are written in place, call after call: their values drift, the work stays.
    """
    scale, last = q.shape[-1] ** -0.5, len(blocks) - 1
    out, lse = forward(q, blocks)
    carried = out.clone(), lse.clone()
    out, dq = out.to(q.dtype), torch.zeros_like(out)

    def forward_call(i: int) -> Call:
        state = carried if i else None
        return lambda: block_forward(q, *blocks[i], scale=scale, state=state, final=i == last)

    def backward_call(i: int) -> Call:
        k, v, visibility = blocks[i]
        grads = (dq if i else None, None, None)
        return lambda: block_backward(q, k, v, out, lse, dout, visibility, scale=scale, grads=grads, final=last == 0)

    return [make(i) for make in (forward_call, backward_call) for i in range(len(blocks))]


def flights(plan: AttentionPlan) -> tuple[np.ndarray, np.ndarray]:
    """Rows of keys, and rows of gradients, that fly while each step computes: [num_steps + 1, 2], sent and received.

    The last row: after the last step.
    """
    num_steps = len(plan.steps)
    keys, gradients = np.zeros((2, num_steps + 1, 2))
    num_rows = [step.num_rows for step in plan.steps]
    for i, step in enumerate(plan.steps):
        if i:
            keys[i - 1] = step.num_send_rows, step.num_rows
        if plan.route == "relay":  # each shard's gradients go on to the right, at last to its owner
            gradients[i + 1] = step.num_rows, num_rows[(i + 1) % num_steps]
        elif i:
            gradients[i + 1] = step.num_rows, step.num_send_rows
    return keys, gradients


def project(compute: np.ndarray, flying: np.ndarray, *, hidden: bool) -> float:
    """Time of a pass over all ranks that begin each step together.

    compute, flying: [num_ranks, num_steps + 1], what each step computes and what flies meanwhile, in one unit.
    """
    steps = np.maximum(compute, flying) if hidden else compute + flying
    return float(steps.max(axis=0).sum())


def flight_ms(plan: AttentionPlan, k: Tensor, link_gbs: float) -> tuple[np.ndarray, np.ndarray]:
    """What flies during each step, forward and backward: [num_steps + 1] milliseconds on the busier direction."""
    keys, gradients = flights(plan)
    row = 2 * k.shape[1] * k.shape[2]  # elements of k and v
    keys, gradients = keys * row * k.element_size(), gradients * row * max(4, k.element_size())
    return tuple(num_bytes.max(axis=1) / (1e6 * link_gbs) for num_bytes in (keys, keys + gradients))


def measure(
    setting: Setting, layout: Layout, cu_seqlens: Tensor, tensors: Sequence[Tensor], stopwatch: Stopwatch
) -> dict[str, Any]:
    """A row of the table; area, forward_ms and backward_ms: of each ring rank and step."""
    device = tensors[0].device
    areas, times, flying = [], [], []
    for ring_rank in range(setting.ring):
        plan = make_plan(setting, layout, cu_seqlens, ring_rank, device)
        ms = [timing.ms for timing in stopwatch(step_calls(*rank_tensors(plan, layout, tensors)))]
        times.append(np.reshape(ms, (2, setting.ring)))
        areas.append([visibility.area for visibility in plan.visibility])
        flying.append(flight_ms(plan, tensors[1], setting.link_gbs))
    return summary(np.array(areas), np.stack(times, axis=1), np.stack(flying, axis=1))


def summary(areas: np.ndarray, times: np.ndarray, flying: np.ndarray) -> dict[str, Any]:
    """areas [num_ranks, num_steps]; times [2, num_ranks, num_steps] and flying [2, num_ranks, num_steps + 1] in ms."""
    compute = np.pad(times, ((0, 0), (0, 0), (0, 1)))  # nothing is computed after the last step
    rank_ms = times.sum(axis=(0, 2))
    layer = {
        name: sum(project(*each, hidden=hidden) for each in zip(compute, flying, strict=True))
        for name, hidden in (("hidden_ms", True), ("in_turn_ms", False))
    }
    return {
        "area_balance": balance(areas.sum(axis=1)),
        "time_balance": balance(rank_ms),
        "even_ms": float(rank_ms.mean()),
        **layer,
        "area": areas.tolist(),
        "forward_ms": times[0].tolist(),
        "backward_ms": times[1].tolist(),
    }


def balance(values: np.ndarray) -> float:
    """Largest / mean; 1 where there is nothing."""
    return float(values.max() / values.mean()) if values.any() else 1.0


def run(setting: Setting, device: torch.device, stopwatch: Stopwatch, *, blocks: bool = False) -> list[dict[str, Any]]:
    """Rows of the table, printed as they come; with `blocks` each (rank, step) below."""
    table, tensors = [], whole_tensors(setting, device)
    print(HEADER, flush=True)
    for sequence, cu_seqlens in sequences(setting.num_tokens).items():
        for name in setting.layouts:
            layout = LAYOUTS[name](cu_seqlens, virtual_mesh(setting, 0, device))
            row = {"sequence": sequence, "layout": name} | measure(setting, layout, cu_seqlens, tensors, stopwatch)
            table.append(row)
            print("\n".join([format_row(row), *(format_blocks(row) if blocks else ())]), flush=True)
    return table


def format_row(row: dict[str, Any]) -> str:
    slowest = [max(map(sum, row[key])) for key in ("forward_ms", "backward_ms")]
    balances = [f"{row[key]:.3f}" for key in ("area_balance", "time_balance")]
    numbers = [*slowest, *(row[key] for key in ("even_ms", "hidden_ms", "in_turn_ms"))]
    return LINE.format(row["sequence"], row["layout"], *balances, *(f"{ms:.2f}" for ms in numbers))


def format_blocks(row: dict[str, Any]) -> list[str]:
    """A line for each ring rank: forward + backward milliseconds of each step."""
    ranks = enumerate(zip(row["forward_ms"], row["backward_ms"], strict=True))
    return [
        f"  rank {rank}: " + "  ".join(f"{f:.2f}+{b:.2f}" for f, b in zip(*both, strict=True)) for rank, both in ranks
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="longtake bench ring", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--virtual", metavar="RINGxULYSSES", required=True, help="the grid, as 8x1")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="comma-separated (all)")
    parser.add_argument("--route", choices=get_args(Route), default="direct", help="how keys travel (direct)")
    parser.add_argument("--link-gbs", type=float, default=50.0, help="GB/s from a rank, each way (50)")
    parser.add_argument("--tokens", type=int, help="of all ranks together (131072; 2048 on a CPU)")
    parser.add_argument("--heads", type=int, default=12, help="query heads (12)")
    parser.add_argument("--kv-heads", type=int, default=2, help="key and value heads (2)")
    parser.add_argument("--head-dim", type=int, default=128, help="(128)")
    parser.add_argument("--seconds", type=float, default=0.5, help="for the rounds of one rank (0.5)")
    parser.add_argument("--blocks", action="store_true", help="also print the time of each (rank, step)")
    parser.add_argument("--json", type=Path, help="also write the table here, with each (rank, step)")
    return parser.parse_args(argv)


def make_setting(args: argparse.Namespace, device: torch.device) -> Setting:
    """Raises ValueError for what cannot be measured."""
    ring, x, ulysses = args.virtual.partition("x")
    if not (x and ring.isdecimal() and ulysses.isdecimal()):
        raise ValueError(f"--virtual must be a grid like 8x1 (ring x Ulysses), got {args.virtual!r}")
    on_gpu = device.type == "cuda"
    return Setting(
        ring=int(ring),
        ulysses=int(ulysses),
        num_tokens=(131072 if on_gpu else 2048) if args.tokens is None else args.tokens,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        dtype="bfloat16" if on_gpu else "float32",
        layouts=tuple(args.layouts.split(",")),
        route=args.route,
        link_gbs=args.link_gbs,
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = default_device()
    setting = make_setting(args, device)
    allowance = Allowance(args.seconds)
    stopwatch = cuda_stopwatch(device, allowance) if device.type == "cuda" else wall_stopwatch(allowance)
    rows = run(setting, device, stopwatch, blocks=args.blocks)
    if args.json:
        report = {"torch": torch.__version__, "device": device_name(device), "setting": asdict(setting), "rows": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
