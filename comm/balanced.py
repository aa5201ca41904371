"""Deal the blocks of packed documents to ranks: equal tokens, near-equal causal area, few key rows to send.

A rank needs all rows of a document up to its own last token there: its height. What is sent is the sum of heights
over ranks and documents, less the tokens themselves: so few ranks a document, and low heights.
1. Ranks take their shares one after another. Of each document a run of blocks is left, and a rank takes from its
   ends only: light blocks from the bottom; heavy ones from the top, which lowers it for all that come later.
2. A rank takes whole runs, the densest first, while others can still fill its share. What is missing comes from
   the two ends of a line of runs: for a line of one document that is a zigzag. The area says how much from each.
3. The cheapest of several such shares counts: the heights of this rank, and of what is left, each as often as its
   area needs ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

TOLERANCE = 0.02  # of the mean area: how far a rank may lie above it
NUM_LINES = 2  # lines of each kind to try: with 1 the area misses its tolerance on 16 ranks, 3 gain nothing
FINE = 4  # a missed area costs FINE times that part of all the rows of a rotation


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a packed sequence. A run is the blocks whose first tokens lie in the same document."""

    size: int  # tokens in a block
    before: np.ndarray  # float64 [num_blocks + 1]: causal area before each block
    start: np.ndarray  # int64 [num_runs]: first token of the run's document
    length: np.ndarray  # int64 [num_runs]: tokens of the run's document

    def height(self, end: np.ndarray) -> np.ndarray:
        """int64 [num_runs]: tokens of each run's document before block `end`."""
        return np.minimum(end * self.size - self.start, self.length)


@dataclass(frozen=True, eq=False)
class Rest:
    """What is left of each run: blocks lo <= block < hi, both int64 [num_runs]."""

    blocks: Blocks
    lo: np.ndarray
    hi: np.ndarray

    @property
    def count(self) -> np.ndarray:
        return self.hi - self.lo

    @property
    def area(self) -> np.ndarray:
        return self.blocks.before[self.hi] - self.blocks.before[self.lo]

    def without(self, runs: np.ndarray, bottom: np.ndarray, top: np.ndarray) -> "Rest":
        """The rest after so many blocks of these runs were taken from below and from above."""
        lo, hi = self.lo.copy(), self.hi.copy()
        lo[runs] += bottom
        hi[runs] -= top
        return Rest(self.blocks, lo, hi)


@dataclass(frozen=True)
class Share:
    """What a rank is to take: so many blocks, with an area between low and high."""

    count: int
    low: float
    high: float
    mean: float  # of all ranks


def deal(cu_seqlens: np.ndarray, block: int, ring: int) -> np.ndarray:
    """int64 [num_blocks]: the ring rank of each block of `block` tokens, the last one ragged. cu_seqlens: int64."""
    rest = _cut(cu_seqlens, block)
    total = float(rest.blocks.before[-1])
    mean = total / ring
    owner = np.full(rest.blocks.before.size - 1, ring - 1)
    fine = FINE * ring * float(cu_seqlens[-1])
    for rank in range(ring - 1):
        later = ring - rank - 1
        count = -(-int(rest.count.sum()) // (later + 1))
        low = rest.area.sum() - later * mean * (1 + TOLERANCE / 2)
        share = Share(count, low, mean * (1 + TOLERANCE), mean)
        ways = list(_shares(rest, share))
        left = ways[int(np.argmin([_cost(rest, way, share, fine) for way in ways]))]
        for run in np.flatnonzero(left.count < rest.count):
            owner[rest.lo[run] : left.lo[run]] = rank
            owner[left.hi[run] : rest.hi[run]] = rank
        rest = left
    if cu_seqlens[-1] % block:
        _fill_up(owner, ring)
    return owner


def _cut(cu_seqlens: np.ndarray, block: int) -> Rest:
    """All blocks of the packed sequence."""
    lengths = np.diff(cu_seqlens)
    area = np.concatenate([[0.0], np.cumsum(lengths * (lengths + 1) / 2)])
    edges = np.append(np.arange(0, cu_seqlens[-1], block), cu_seqlens[-1])
    document = np.minimum(np.searchsorted(cu_seqlens, edges, side="right") - 1, lengths.size - 1)
    height = edges - cu_seqlens[document]
    before = area[document] + height * (height + 1) / 2
    lo = np.flatnonzero(np.diff(document[:-1], prepend=-1))
    hi = np.append(lo[1:], edges.size - 1)
    return Rest(Blocks(block, before, cu_seqlens[document[lo]], lengths[document[lo]]), lo, hi)


def _cost(rest: Rest, left: Rest, share: Share, fine: float) -> float:
    """Heights of the rank that leaves `left` of `rest`, those to come, and the fine for an area that it missed."""
    height = rest.blocks.height
    now = np.where(left.hi < rest.hi, height(rest.hi), np.where(left.lo > rest.lo, height(left.lo), 0)).sum()
    later = (height(left.hi) * np.maximum(1, left.area / share.mean))[left.count > 0].sum()
    taken = rest.area.sum() - left.area.sum()
    miss = max(0.0, taken - share.high, share.low - taken) / share.mean
    return float(now + later + fine * miss)


def _shares(rest: Rest, share: Share) -> Iterator[Rest]:
    """What each way to take the share leaves."""
    whole = _whole_runs(rest, share)
    for runs in [whole, whole[:0]] if whole.size else [whole]:
        left = rest.without(runs, np.zeros_like(runs), rest.count[runs])
        area = rest.area[runs].sum()
        missing = Share(share.count - int(rest.count[runs].sum()), share.low - area, share.high - area, share.mean)
        if missing.count == 0:
            yield left
            continue
        for line in _lines(left, missing):
            yield from _both_ends(left, line, missing)


def _whole_runs(rest: Rest, share: Share) -> np.ndarray:
    """int64: runs to take whole, the densest first, as long as whole shorter ones can fill the share."""
    runs = np.flatnonzero(rest.count)
    runs = runs[np.argsort(-rest.area[runs] / rest.count[runs], kind="stable")]
    counts, areas = rest.count[runs], rest.area[runs]
    count_before, area_before = np.append(0, np.cumsum(counts)), np.append(0, np.cumsum(areas))
    chosen, count, area = [], share.count, 0.0
    for index, run in enumerate(runs):
        open_count = count - counts[index]
        if open_count < 0:
            continue
        lightest = area_before[-1] - np.interp(count_before[-1] - open_count, count_before, area_before)
        densest = np.interp(count_before[index + 1] + open_count, count_before, area_before) - area_before[index + 1]
        if area + areas[index] + lightest <= share.high and area + areas[index] + densest >= share.low:
            chosen.append(run)
            count, area = open_count, area + areas[index]
    return np.array(chosen, dtype=np.int64)


def _lines(rest: Rest, share: Share) -> Iterator[np.ndarray]:
    """Lines of runs to take from both ends of: all by height with a high one last, and single ones that suffice."""
    runs = np.flatnonzero(rest.count)
    runs = runs[np.argsort(rest.blocks.height(rest.hi)[runs], kind="stable")]
    for run in runs[-NUM_LINES:]:
        yield np.append(runs[runs != run], run)
    before = rest.blocks.before
    top = before[rest.hi] - before[np.maximum(rest.hi - share.count, 0)]
    alone = runs[(rest.count[runs] >= share.count) & (top[runs] >= share.low)]
    for run in np.union1d(alone[:NUM_LINES], alone[-NUM_LINES:]):
        yield np.array([run])


def _both_ends(rest: Rest, line: np.ndarray, share: Share) -> Iterator[Rest]:
    """The fewest and the most blocks from the far end of the line that meet the area, the others from the near end."""
    counts = rest.count[line]
    edges = np.append(0, np.cumsum(counts))
    blocks = np.arange(edges[-1]) + np.repeat(rest.lo[line] - edges[:-1], counts)
    area = np.append(0, np.cumsum(np.diff(rest.blocks.before)[blocks]))
    far = np.arange(share.count + 1)
    areas = area[-1] - area[edges[-1] - far] + area[share.count - far]
    miss = np.maximum(0, np.maximum(share.low - areas, areas - share.high))
    best = np.flatnonzero(miss == miss.min())
    for num_far in {int(best[0]), int(best[-1])}:
        bottom = np.clip(share.count - num_far - edges[:-1], 0, counts)
        top = np.clip(num_far - (edges[-1] - edges[1:]), 0, counts)
        yield rest.without(line, bottom, top)


def _fill_up(owner: np.ndarray, ring: int) -> None:
    """Give the owner of the ragged last block one more where it has a block less than others: in place."""
    count = np.bincount(owner, minlength=ring)
    if count[owner[-1]] < count.max():
        owner[np.flatnonzero(count[owner] == count.max())[-1]] = owner[-1]
