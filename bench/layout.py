"""`longtake bench layout`: how even each layout makes the attention, and how few key rows it sends.

    python -m longtake.bench.layout [--rings 4,8,16] [--json FILE]

Four mixes of packed documents, 131,072 tokens each. area: largest / mean causal area of a ring rank; rows: those that
the route `direct` sends, as a part of what the rotation of whole shards does; ms: to compute the layout.
"""

import argparse
import json
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..comm.layout import Layout, balanced, contiguous, zigzag

NUM_TOKENS = 131072
LAYOUTS: dict[str, Callable[[Tensor, int], Layout]] = {
    "contiguous": lambda cu_seqlens, ring: contiguous(int(cu_seqlens[-1]), ring=ring),
    "zigzag": lambda cu_seqlens, ring: zigzag(int(cu_seqlens[-1]), ring=ring),
    "balanced": lambda cu_seqlens, ring: balanced(cu_seqlens, ring=ring),
}


def short_documents() -> list[int]:
    """Lengths of 120 documents, log-normal, the longest 4,926."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < NUM_TOKENS:
        length = int(np.clip(rng.lognormal(6.5, 1.0), 32, 16384))
        lengths.append(min(length, NUM_TOKENS - sum(lengths)))
    rng.shuffle(lengths)
    return lengths


def mixes() -> dict[str, Tensor]:
    """cu_seqlens of each mix."""
    lengths = {
        "short": short_documents(),
        "mixed": [63321, 1747, 65536, 468],
        "long": [16028, 77561, 37483],
        "single": [NUM_TOKENS],
    }
    return {name: torch.tensor([0, *documents]).cumsum(0) for name, documents in lengths.items()}


def measure(layout: Layout, cu_seqlens: Tensor) -> tuple[float, float]:
    """Largest / mean causal area of a ring rank, and rows sent / rows of the rotation.

    A rank receives all rows of a document up to its own last one there, less those that it holds.
    """
    areas, rows = [], -layout.num_tokens
    for ring_rank in range(layout.ring):
        positions = layout.ring_part(ring_rank)
        document = torch.searchsorted(cu_seqlens, positions, right=True) - 1
        height = positions - cu_seqlens[document] + 1
        areas.append(int(height.sum()))
        rows += int(torch.zeros_like(cu_seqlens).scatter_reduce(0, document, height, "amax").sum())
    rotation = max(1, (layout.ring - 1) * layout.num_tokens)
    return max(areas) * layout.ring / max(1, sum(areas)), rows / rotation


def timed(make: Callable[[], Layout], repeats: int = 3) -> tuple[Layout, float]:
    """The layout, and the least milliseconds that it took."""
    times = timeit.repeat(make, number=1, repeat=repeats)
    return make(), 1e3 * min(times)


def run(rings: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of the table, printed as they come."""
    table = []
    for mix, cu_seqlens in mixes().items():
        for ring in rings:
            for name, make in LAYOUTS.items():
                layout, ms = timed(lambda make=make, ring=ring, cu=cu_seqlens: make(cu, ring))
                area, rows = measure(layout, cu_seqlens)
                table.append({"mix": mix, "ring": ring, "layout": name, "area": area, "rows": rows, "ms": ms})
                print(f"{mix:<8}{ring:>6}  {name:<12}{area:>8.3f}{rows:>8.3f}{ms:>8.1f}", flush=True)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="longtake bench layout", description=__doc__)
    parser.add_argument("--rings", default="4,8,16", help="comma-separated ring degrees")
    parser.add_argument("--json", type=Path, help="also write the table here")
    args = parser.parse_args(argv)
    print(f"{'mix':<8}{'ring':>6}  {'layout':<12}{'area':>8}{'rows':>8}{'ms':>8}")
    rows = run([int(ring) for ring in args.rings.split(",")])
    if args.json:
        args.json.write_text(json.dumps({"num_tokens": NUM_TOKENS, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
