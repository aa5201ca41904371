"""Which keys a query sees: one interval of key positions for each query row, whatever the mask.

A mask is two non-decreasing rows of *global* key positions, `lo <= position <= hi`. Because a shard keeps its
tokens in increasing position, what a row sees is one range of *local* key indices, `start <= j < end`.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .device import is_capturing, to_device
from .tiles import Tile, plan_tiles

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Raises ValueError where `cu_seqlens` is not a list of offsets that rises from 0 to `num_tokens`."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or cu_seqlens.dtype not in INTEGERS:
        got = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens must be a 1-D integer tensor [num_docs + 1], got {got}")
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {first}: put a 0 before the first document's end")
    falls = (cu_seqlens.diff() < 0).nonzero()
    if len(falls):
        i = int(falls[0])
        before, after = cu_seqlens[i : i + 2].tolist()
        raise ValueError(f"cu_seqlens must not decrease, got {after} after {before} at index {i + 1}")
    if last != num_tokens:
        raise ValueError(f"cu_seqlens must end at the number of tokens, {num_tokens}, got {last}")


def check_window(window: int | None) -> None:
    """Raises ValueError for one that hides everything, or that is no number of tokens."""
    if window is not None and not (isinstance(window, int) and 0 < window < 2**62):
        raise ValueError(f"window must be an integer from 1 (itself alone) to 2**62, got {window}; None: no window")


def document_bounds(
    positions: Tensor, first: Tensor, last: Tensor, *, causal: bool = False, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """`lo, hi` int64 [n] of queries at `positions` [n], whose documents hold the keys `first` to `last` [n].

    A position may lie before its document's keys (more queries than keys). A row that sees nothing has lo = hi + 1.
    """
    check_window(window)
    lo, hi = first, last
    if window is not None:
        lo, hi = torch.maximum(lo, positions - window + 1), torch.minimum(hi, positions + window - 1)
    if causal:
        hi = torch.minimum(hi, positions)
    return lo, torch.maximum(hi, lo - 1)


def mask_bounds(
    positions: Tensor,
    *,
    num_tokens: int,
    causal: bool = False,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """First and last global key position that the queries at global `positions` see.

    Args:
        positions: int64 [n], non-decreasing, each in [0, num_tokens).
        num_tokens: length of the packed stream.
        causal: no key after the query.
        window: only keys with |query - key| < window.
        cu_seqlens: integer [num_docs + 1], rising from 0 to num_tokens; tokens see their own document alone.

    Returns:
        lo, hi: int64 [n], both non-decreasing; query i sees the keys `lo[i] <= position <= hi[i]`.

    Raises:
        ValueError: window < 1, or cu_seqlens that is not a list of offsets of num_tokens tokens.
    """
    if cu_seqlens is None:
        first, last = torch.zeros_like(positions), torch.full_like(positions, num_tokens - 1)
    else:
        check_cu_seqlens(cu_seqlens, num_tokens)
        offsets = cu_seqlens.to(positions)
        document = torch.searchsorted(offsets, positions, right=True)
        first, last = offsets[document - 1], offsets[document] - 1
    return document_bounds(positions, first, last, causal=causal, window=window)


@dataclass(frozen=True, eq=False)
class Visibility:
    """The mask between the query rows and the key rows that meet in one block, made once per layout.

    Attributes:
        start, end: int32 [num_queries], row i sees the local keys `start[i] <= j < end[i]`.
        num_keys: key rows of the block.
        host: the same mask on the CPU, where it was made there. Counts are taken from it, without a wait.

    Both rows are non-decreasing. A row that sees nothing has start == end at its insertion point.
    """

    start: Tensor
    end: Tensor
    num_keys: int
    host: "Visibility | None" = field(default=None, repr=False)
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_bounds(cls, lo: Tensor, hi: Tensor, key_positions: Tensor) -> "Visibility":
        """From `lo, hi` int64 [num_queries] of `mask_bounds` and `key_positions` int64 [num_keys], increasing."""
        start = torch.searchsorted(key_positions, lo, out_int32=True)
        end = torch.searchsorted(key_positions, hi, right=True, out_int32=True)
        return cls(start, end, len(key_positions))

    def to(self, device: torch.device) -> "Visibility":
        """The same mask for tensors on `device`. From the CPU to a GPU without a wait, then or later."""
        if device == self.start.device:
            return self
        rows = to_device(self.start, device), to_device(self.end, device)
        return Visibility(*rows, self.num_keys, host=self if self.start.is_cpu else None)

    @property
    def kstart(self) -> Tensor:
        """int32 [num_keys], non-decreasing: key j is seen by the rows `kstart[j] <= i < kend[j]`."""
        return self.memo("kstart", lambda: self._rows_up_to_key(self.end))

    @property
    def kend(self) -> Tensor:
        """See `kstart`."""
        return self.memo("kend", lambda: self._rows_up_to_key(self.start))

    def _rows_up_to_key(self, bounds: Tensor) -> Tensor:
        key = torch.arange(self.num_keys, dtype=torch.int32, device=bounds.device)
        return torch.searchsorted(bounds, key, right=True, out_int32=True)

    @cached_property
    def area(self) -> int:
        """Number of visible (query, key) pairs."""
        counted = self.host or self
        return int((counted.end - counted.start).sum(dtype=torch.int64))

    def memo(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was first asked for under `key`: kept as long as the mask is.

        But not what is made while a CUDA graph is recorded: until its first replay that holds anything.
        """
        if key in self._memo:
            return self._memo[key]
        made = make()
        if not is_capturing(self.start.device):
            self._memo[key] = made
        return made

    @property
    def transposed(self) -> "Visibility":
        """The same mask with keys as rows: what a kernel that walks the queries of a key tile works on."""

        def make() -> Visibility:
            return Visibility(self.kstart, self.kend, len(self.start), host=self.host and self.host.transposed)

        return self.memo("transposed", make)

    def tile_spans(self, rows: int) -> Tensor:
        """Keys that each tile of `rows` query rows spans, hidden ones between included: int32 [ceil(Tq / rows)]."""
        last = torch.arange(rows - 1, len(self.end) + rows - 1, rows, device=self.end.device)
        return self.end[last.clamp_(max=len(self.end) - 1)] - self.start[::rows]

    def longest_first(self, rows: int) -> Tensor:
        """Numbers of the tiles of `rows` query rows, those that span most keys first: int32 [ceil(Tq / rows)].

        Made on the device without a wait, on first use. Kernels take their tiles in this order, so that the short
        ones fill the chip at the end (longest processing time first), whatever the mask.
        """
        return self.memo(
            ("longest_first", rows), lambda: self.tile_spans(rows).argsort(descending=True, stable=True).int()
        )

    def visited(self, rows: int, keys: int) -> int:
        """Pairs of a query tile of `rows` and a key tile of `keys` that a kernel visits.

        Waits for the device, once, where the mask was not made on the CPU.
        """

        def count() -> int:
            tiles = ((self.host or self).tile_spans(rows) + keys - 1).div(keys, rounding_mode="floor")
            return int(tiles.sum(dtype=torch.int64))

        return self.memo(("visited", rows, keys), count)

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """The CPU backend's plan, made on first use and shared by all layers, forward and backward."""
        return plan_tiles(self.start, self.end)
