"""Which tile a program of the Gluon forward takes next, so that it runs well beside NCCL's kernels.

A program fills a multiprocessor, so theirs wait for one of ours to end, or one of ours for theirs.
- Whoever is free draws a ticket, the longest tiles first. None has a share of its own: one that starts late holds up
  no tile.
- After LONGEST_RUN a program makes room, for a kernel of higher priority if one waits, else for the next of its own.

The loading warp draws and works out the bounds; the warpgroups that multiply read them from shared memory.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .candidates import Config
from .device import is_capturing, multiprocessors
from .visibility import Visibility

LONGEST_RUN = 256  # key tiles: about half a millisecond at head dim 128, where a start takes some microseconds
L2_BYTES = 32 * 2**20  # of keys and values that programs read at a time: most of an H100's L2 cache


# On the host


def tickets(device: torch.device) -> Tensor:
    """int32 [1], zero: the tickets drawn in a launch."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def num_programs(visibility: Visibility, config: Config, heads: int) -> int:
    """One for each multiprocessor, and another for each that will make room, unless there are fewer tickets.

    One at least goes on until no ticket is left, since each that makes room has visited LONGEST_RUN key tiles.
    """
    device = visibility.start.device
    num_tiles = -(-len(visibility.start) // config.rows)
    if is_capturing(device):  # nothing may be read back
        visited = num_tiles * -(-visibility.num_keys // config.keys)
    else:
        visited = visibility.visited(config.rows, config.keys)
    made_room = (visited + num_tiles) * heads // LONGEST_RUN  # of a tile without keys one is visited
    return min(multiprocessors(device) + made_room, num_tiles * heads)


def live_tiles(visibility: Visibility, rows: int) -> Tensor:
    """int32 [1]: how many tiles of `rows` query rows span a key. Counted on the device, on first use."""
    return visibility.memo(
        ("live_tiles", rows), lambda: visibility.tile_spans(rows).count_nonzero().to(torch.int32).reshape(1)
    )


def heads_at_once(k: Tensor, heads: int) -> int:
    """Query heads whose tiles come mixed: those whose keys and values fit L2_BYTES, but one key head's at least.

    The more there are, the evener the short tiles at the end fill the chip; where their keys leave the cache before
    the others read them, each tile reads its own from global memory.
    """
    num_keys, key_heads, head_dim = k.shape
    fit = L2_BYTES // (2 * num_keys * head_dim * k.element_size())
    return min(max(fit, 1), key_heads) * (heads // key_heads)


# On the device. schedule: Drawn (`tickets`), Order (`longest_first`), row tiles, `heads_at_once`, LONGEST_RUN.
# tiles: Start, End, rows, heads. told: int32 [8, 1] in shared memory, four numbers for each half of a tile's rows.


@gluon.jit
def draw(schedule):
    """The next ticket: a number that no program of this launch has had."""
    return gl.atomic_add(schedule[0], 1, sem="relaxed")


@gluon.jit
def bounds(ticket, schedule, tiles, ROWS: gl.constexpr, KEYS: gl.constexpr):
    """Of a ticket's tile: first row, head, first key and number of key tiles.

    That is one at least, wholly masked if no row sees a key: no partition needs a branch for such tiles.
    """
    _, Order, num_tiles, at_once, _ = schedule
    Start, End, num_rows, num_heads = tiles
    first_head = ticket // (num_tiles * at_once) * at_once
    heads = gl.minimum(at_once, num_heads - first_head)
    ticket -= first_head * num_tiles
    row = gl.load(Order + ticket // heads) * ROWS
    first = gl.load(Start + row)
    end = gl.load(End + gl.minimum(row + ROWS, num_rows) - 1)
    return row, first_head + ticket % heads, first, gl.maximum((end - first + KEYS - 1) // KEYS, 1)


@gluon.jit
def tell(told, half, row, head, first, num_tiles):
    """One warp writes the bounds of a tile for the warpgroup with that half of its rows; num_tiles 0: there is none."""
    number: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    told.index(4 * half).store(gl.full([1], row, gl.int32, number))
    told.index(4 * half + 1).store(gl.full([1], head, gl.int32, number))
    told.index(4 * half + 2).store(gl.full([1], first, gl.int32, number))
    told.index(4 * half + 3).store(gl.full([1], num_tiles, gl.int32, number))


@gluon.jit
def hear(told, half, i: gl.constexpr):
    """Number i of what was told to that half: row, head, first key, number of key tiles."""
    return gl.max(told.index(4 * half + i).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
