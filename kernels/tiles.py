"""A mask of key intervals cut into rectangles that one attention call can do: full, causal or masked.

Rows fall into runs, on which `start` and `end` each stay or rise by one: a document, a window, a zigzag's chunk.
A run is cut exactly, into a full core and the triangles at its edges; neighbouring short runs share one masked
tile where that costs less than a call each. Equal tiles at a regular stride become one batched call.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import torch
from torch import Tensor

LEAF = 128  # rows of a masked edge tile
CALL = 1024  # what a call and its merge cost, in (query, key) pairs: about 15 us at 4 heads of 32
MAX_MASK = 256 * 256  # elements of the largest mask


class Kind(IntEnum):
    """In order of work: a causal tile holds every row of its run, so it best comes first and needs no merge."""

    CAUSAL = 0  # square; row i sees its first i + 1 keys
    FULL = 1
    MASKED = 2


@dataclass(frozen=True)
class Rectangle:
    """Rows `row ... row + rows` by keys `key ... key + keys`, ends excluded."""

    kind: Kind
    row: int
    key: int
    rows: int
    keys: int


@dataclass(frozen=True, eq=False)
class Tile:
    """One call: `count` equal rectangles, the i-th moved by `i * row_step` rows and `i * key_step` keys.

    Attributes:
        rectangle: the first one.
        mask: float32 [rows, keys] of 0 and -inf, the same for each rectangle; None unless the kind is MASKED.
        empty: bool [rows], rows that the mask hides from all keys; None: there are none.
        first: no tile before this one has touched any of these rows.
    """

    rectangle: Rectangle
    count: int
    row_step: int
    key_step: int
    mask: Tensor | None
    empty: Tensor | None
    first: bool


@dataclass(frozen=True)
class Run:
    """Rows `row ... row + rows`; the first sees the keys `start ... end`, each next one those plus the rises."""

    row: int
    rows: int
    start: int
    end: int
    start_rises: int  # 0 or 1
    end_rises: int  # 0 or 1

    @property
    def last_end(self) -> int:
        return self.end + self.end_rises * (self.rows - 1)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, self.end - self.start, self.start_rises, self.end_rises

    @property
    def cost(self) -> int:
        """Of its exact cut, in pairs: the calls and the area."""
        width, rises = self.end - self.start, self.start_rises + self.end_rises
        calls = rises + (width > 1 or not rises)
        growth = (self.end_rises - self.start_rises) * self.rows * (self.rows - 1) // 2
        return calls * CALL + self.rows * width + growth


def find_runs(start: Tensor, end: Tensor) -> list[Run]:
    """The runs of rows that see something, from `start, end` int32 [num_queries], non-decreasing."""
    if not len(start):
        return []
    rises = torch.stack([start.diff(), end.diff()])  # [2, n - 1]: from row i to row i + 1
    seen = end > start
    breaks = (rises > 1).any(0) | (seen[1:] != seen[:-1])
    turns = torch.zeros_like(breaks)
    turns[1:] = (rises[:, 1:] != rises[:, :-1]).any(0)
    cuts = [0]
    for i in (breaks | turns).nonzero().flatten().tolist():
        # A turn right after a cut is the new run's first step, not its end.
        if breaks[i] or i > cuts[-1]:
            cuts.append(i + 1)
    firsts = torch.tensor(cuts)
    seconds = (firsts + 1).clamp(max=len(start) - 1)
    bounds = [x[rows].tolist() for rows in (firsts, seconds) for x in (start, end)]
    lengths = [b - a for a, b in pairwise([*cuts, len(start)])]
    return [
        Run(row, rows, s, e, *((s2 - s, e2 - e) if rows > 1 else (0, 0)))
        for row, rows, s, e, s2, e2 in zip(cuts, lengths, *bounds, strict=True)
        if e > s
    ]


def cut(runs: Sequence[Run]) -> Iterator[Rectangle]:
    """Rectangles of all runs: neighbours that cost less as one masked rectangle are one."""
    series = [0]  # series[i]: the stretch of equally shaped runs that run i is in; they will share their calls
    for a, b in pairwise(runs):
        series.append(series[-1] + (a.shape != b.shape))
    length = torch.tensor(series).bincount().tolist()
    group: list[Run] = []
    cost = 0
    for run, stretch in zip(runs, series, strict=False):
        alone = run.cost if length[stretch] == 1 else run.cost - CALL + CALL // length[stretch]
        together = masked_cost([*group[:1], run])
        if group and together <= cost + alone:
            group.append(run)
            cost = together
        else:
            yield from cut_group(group)
            group, cost = [run], min(alone, masked_cost([run]))
    yield from cut_group(group)


def box(runs: Sequence[Run]) -> Rectangle:
    """The masked rectangle around neighbouring runs."""
    first, last = runs[0], runs[-1]
    rows, keys = last.row + last.rows - first.row, last.last_end - first.start
    return Rectangle(Kind.MASKED, first.row, first.start, rows, keys)


def masked_cost(runs: Sequence[Run]) -> float:
    around = box(runs)
    area = around.rows * around.keys
    return CALL + area if area <= MAX_MASK else float("inf")


def cut_group(runs: Sequence[Run]) -> Iterator[Rectangle]:
    if len(runs) == 1 and runs[0].cost <= masked_cost(runs):
        yield from cut_run(runs[0])
    elif runs:
        yield box(runs)


def cut_run(run: Run) -> Iterator[Rectangle]:
    """The exact cut of a run: a full core between the triangles of its edges; of a band, in blocks of rows."""
    width = run.end - run.start
    if not (run.start_rises or run.end_rises):
        yield Rectangle(Kind.FULL, run.row, run.start, run.rows, width)
        return
    band = run.start_rises and run.end_rises
    narrow = band and width <= LEAF
    # The two triangles of a block of a band must not meet: at most width - 1 rows. A power of two, at least half of
    # that, lets the parts of all blocks fall in step, and their cores not overlap, so that each is one call.
    block = run.rows if not band else LEAF if narrow else 1 << (width - 1).bit_length() - 1
    for offset in range(0, run.rows, block):
        row, rows = run.row + offset, min(block, run.rows - offset)
        start, end = run.start + run.start_rises * offset, run.end + run.end_rises * offset
        if narrow:
            yield Rectangle(Kind.MASKED, row, start, rows, width + rows - 1)
            continue
        core_start, core_end = start + run.start_rises * rows, end - run.end_rises
        if run.end_rises:
            yield Rectangle(Kind.CAUSAL, row, core_end, rows, rows)
        if core_end > core_start:
            yield Rectangle(Kind.FULL, row, core_start, rows, core_end - core_start)
        if run.start_rises:
            yield from cut_upper(row, start, rows)


def cut_upper(row: int, key: int, size: int) -> Iterator[Rectangle]:
    """An upper triangle, which no kernel knows, in halves: two triangles and the rectangle beside them."""
    if size <= LEAF:
        yield Rectangle(Kind.MASKED, row, key, size, size)
        return
    half = 1 << (size - 1).bit_length() - 1  # a power of two, so that equal parts fall in step
    yield Rectangle(Kind.FULL, row, key + half, half, size - half)
    yield from cut_upper(row, key, half)
    yield from cut_upper(row + half, key + half, size - half)


def hidden(rectangle: Rectangle, start: Tensor, end: Tensor) -> Tensor | None:
    """bool [rows, keys], what the rectangle's mask hides; None where it needs none."""
    if rectangle.kind is not Kind.MASKED:
        return None
    rows = slice(rectangle.row, rectangle.row + rectangle.rows)
    key = torch.arange(rectangle.key, rectangle.key + rectangle.keys, dtype=torch.int32)
    return (key < start[rows, None]) | (key >= end[rows, None])


def progressions(rectangles: Sequence[Rectangle]) -> Iterator[tuple[Rectangle, int, int, int]]:
    """Equal rectangles, in row order, as `(first, count, row_step, key_step)` with keys that do not overlap."""
    i = 0
    while i < len(rectangles):
        first, count, row_step, key_step = rectangles[i], 1, 1, 1
        if i + 1 < len(rectangles) and rectangles[i + 1].key > first.key:
            row_step, key_step = rectangles[i + 1].row - first.row, rectangles[i + 1].key - first.key
            while i + count < len(rectangles) and (
                rectangles[i + count].row == first.row + count * row_step
                and rectangles[i + count].key == first.key + count * key_step
            ):
                count += 1
        overlap = -(-first.keys // key_step)
        for j in range(min(overlap, count)):
            yield rectangles[i + j], len(range(j, count, overlap)), row_step * overlap, key_step * overlap
        i += count


def plan_tiles(start: Tensor, end: Tensor) -> tuple[Tile, ...]:
    """Tiles that hold each visible pair once, from `start, end` int32 [num_queries], non-decreasing."""
    groups: dict[tuple[Kind, int, int, bytes], list[Rectangle]] = defaultdict(list)
    for rectangle in cut(find_runs(start, end)):
        hides = hidden(rectangle, start, end)
        pattern = b"" if hides is None else hides.numpy().tobytes()
        groups[rectangle.kind, rectangle.rows, rectangle.keys, pattern].append(rectangle)
    tiles = []
    touched = torch.zeros(len(start), dtype=torch.bool)
    for group in sorted(groups, key=lambda group: group[0]):
        mask = empty = None
        if (hides := hidden(groups[group][0], start, end)) is not None:
            mask = torch.zeros(hides.shape).masked_fill_(hides, -torch.inf)
            empty = hides.all(1) if hides.all(1).any() else None
        for rectangle, count, row_step, key_step in progressions(groups[group]):
            reach = rectangle.row + (count - 1) * row_step + rectangle.rows
            rows = touched[rectangle.row : reach].unfold(0, rectangle.rows, row_step)
            tiles.append(Tile(rectangle, count, row_step, key_step, mask, empty, first=not rows.any()))
            rows.fill_(True)
    return tuple(tiles)
