"""What a kernel is tried on: masks of every kind, random inputs, and what steps of a ring before may have left."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..comm.layout import zigzag
from ..kernels import reference
from ..kernels.candidates import ONLY_MEASURED, Config
from ..kernels.visibility import Visibility, mask_bounds

CHUNK = 512  # query rows of the dense reference at once

# whole: one call, in the dtype of the inputs. first, next, last: of the steps of a ring; state and sums are float32
Mode = Literal["whole", "first", "next", "last"]


@dataclass(frozen=True)
class Case:
    """A mask with the heads (of q, of k and v) and the mode that it is tried with.

    margin: numbers of NaN after each row of each head of the inputs; odd: TMA cannot load them.
    """

    name: str
    visibility: Visibility
    heads: tuple[int, int] = (2, 2)
    mode: Mode = "whole"
    margin: int = 0

    def __str__(self) -> str:
        return f"{self.name}, heads {self.heads[0]}:{self.heads[1]}, {self.mode}"


def cases(direction: str, config: Config, device: torch.device, *, quick: bool = False) -> list[Case]:
    """What a candidate must get right: lengths of a few of its tiles and, on a GPU, of many."""
    if direction == "decode":
        few = list(_decode_cases(config.keys, device))
        return few[-3:-1] if quick else few
    tile = max(config.rows, config.keys)
    length = 2 * tile + 5 if quick else 3 * tile + 1
    masks = {name: _visibility(*mask, device) for name, mask in _bounds(length, tile).items()}
    if quick:
        whole = [Case(name, masks[name], heads=(2, 1)) for name in ("causal", "window")]
        return [*whole, Case("empty rows", masks["empty rows"], heads=(2, 1), mode="next")]
    found = [Case(name, mask) for name, mask in masks.items()]
    found += [Case("packed", masks["packed"], heads, margin=8) for heads in ((6, 1), (14, 2), (8, 1))]
    found += [Case(name, masks[name], mode="first") for name in ("zigzag, later keys hidden", "empty rows")]
    found += [Case(name, masks[name], mode="next") for name in ("zigzag, later keys hidden", "empty rows")]
    if direction == "forward":
        found.append(Case("empty rows", masks["empty rows"], mode="last"))
    if config.kernel not in ONLY_MEASURED:
        found.append(Case("window", masks["window"], margin=1))
    if device.type == "cuda":
        many = {name: _visibility(*mask, device) for name, mask in _bounds(4096, tile).items() if "zigzag" in name}
        found += [Case(f"long {name}", mask, heads=(8, 2), margin=8) for name, mask in many.items()]
    return found


def _bounds(n: int, tile: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By name, for about n rows and keys: lo, hi of the query rows and the positions of the keys."""
    everything = torch.arange(n)

    def of(queries: Tensor, keys: Tensor, num_tokens: int, **mask: Any) -> tuple[Tensor, Tensor, Tensor]:
        return *mask_bounds(queries, num_tokens=num_tokens, **mask), keys

    layout = zigzag(2 * n + 5, ring=2)
    outer, inner = layout.ring_part(0), layout.ring_part(1)
    generator = torch.Generator().manual_seed(tile)
    lo, hi = torch.randint(-3, n + 3, (2, n), generator=generator).sort().values
    documents = torch.tensor([0, 1, tile - 1, tile - 1, n // 2 + 3, n])
    return {
        "full": of(everything, everything, n),
        "causal": of(everything, everything, n, causal=True),
        "window": of(everything, everything, n, causal=True, window=tile // 2 + 3),
        "window both ways": of(everything, everything, n, window=tile + 5),
        "packed": of(everything, everything, n, causal=True, cu_seqlens=documents),
        "zigzag on itself": of(outer, outer, layout.num_tokens, causal=True),
        "zigzag, later keys hidden": of(inner, outer, layout.num_tokens, causal=True),
        "offset": of(everything[n - tile :], everything, n, causal=True),
        "empty rows": of(everything, everything[tile + 7 :], n, causal=True),
        "random intervals": (lo, torch.maximum(hi, lo - 1), everything),
    }


def _visibility(lo: Tensor, hi: Tensor, keys: Tensor, device: torch.device) -> Visibility:
    return Visibility.from_bounds(*(x.to(device) for x in (lo, hi, keys)))


def _decode_cases(tile: int, device: torch.device) -> Iterator[Case]:
    """One or few rows against many keys."""
    n = 20 * tile + 3
    tails = {
        "one row": ([0], [n - 1]),
        "rows of three sequences": ([0, n // 2, n - 5], [n // 2 - 1, n - 6, n - 1]),
        "last 16 rows": ([0] * 16, list(range(n - 16, n))),
        "a row without keys": ([0, n // 3, n // 3], [n // 3 - 1, n // 3 - 1, n - 1]),
    }
    keys = torch.arange(n)
    masks = {name: _visibility(torch.tensor(lo), torch.tensor(hi), keys, device) for name, (lo, hi) in tails.items()}
    for name, mask in masks.items():
        yield Case(name, mask, heads=(8, 1), margin=8)
    yield Case("last 16 rows", masks["last 16 rows"], heads=(14, 2))
    yield Case("one row", masks["one row"], heads=(2, 2), margin=1)
    for mode in ("first", "next", "last"):
        yield Case("a row without keys", masks["a row without keys"], heads=(6, 1), mode=mode)


@dataclass(frozen=True)
class Block:
    """Inputs of a case, and what came before it. out, lse: the final ones, for a backward."""

    q: Tensor  # [Tq, Hq, D]
    k: Tensor  # [Tk, Hkv, D]
    v: Tensor
    dout: Tensor
    dlse: Tensor  # [Hq, Tq]
    out: Tensor
    lse: Tensor
    before: dict[str, Tensor] = field(default_factory=dict)


def make_block(case: Case, head_dim: int, dtype: torch.dtype, device: torch.device) -> Block:
    """Random normal inputs; where steps came before this one, what they left."""
    generator = torch.Generator().manual_seed(0)
    num_rows, num_keys = len(case.visibility.start), len(case.visibility.kstart)
    heads, key_heads = case.heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, dout = (normal(num_rows, heads, head_dim) for _ in range(2))
    k, v = (normal(num_keys, key_heads, head_dim) for _ in range(2))
    q, k, v, dout = (surrounded(x.to(device, dtype), case.margin) for x in (q, k, v, dout))
    dlse = (normal(heads, num_rows) * (case.mode != "whole")).to(device)
    before: dict[str, Tensor] = {}
    if case.mode in ("next", "last"):
        lse = normal(heads, num_rows)
        lse[:, ::3] = -torch.inf  # rows that have seen nothing so far
        out = normal(num_rows, heads, head_dim).masked_fill(lse.T[..., None] == -torch.inf, 0)
        grads = normal(num_rows, heads, head_dim), *(normal(num_keys, key_heads, head_dim) for _ in range(2))
        for name, x in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True):
            before[name] = x.to(device)
    # For a backward, out and lse are those after all steps; here, for simplicity, those of this one.
    out, lse = dense_forward(q, k, v, case.visibility, head_dim**-0.5)
    return Block(q, k, v, dout, dlse, out.to(dtype if case.mode == "whole" else torch.float32), lse.float(), before)


def surrounded(x: Tensor, margin: int) -> Tensor:
    """x [T, H, D], as part of a larger tensor of NaN, where there is a margin."""
    if not margin:
        return x
    num_rows, heads, head_dim = x.shape
    around = x.new_full((num_rows + 2 * margin, heads, head_dim + margin), torch.nan)
    inside = around[margin : margin + num_rows, :, :head_dim]
    inside.copy_(x)
    return inside


def rows_of(visibility: Visibility, rows: slice) -> Visibility:
    """For the reference, which reads no more than start and end."""
    return Visibility(visibility.start[rows], visibility.end[rows], visibility.num_keys)


def chunks(num_rows: int) -> Iterator[slice]:
    return (slice(row, row + CHUNK) for row in range(0, num_rows, CHUNK))


def dense_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    scale: float,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """out, lse in float64."""
    if state is None:
        out, lse = torch.zeros_like(q).double(), q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float64)
    else:
        out, lse = (x.double().clone() for x in state)
    for rows in chunks(len(q)):
        part = rows_of(visibility, rows)
        reference.forward(q[rows], k, v, part, scale=scale, state=(out[rows], lse[:, rows]))
    return out, lse
