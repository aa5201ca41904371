"""Attention forward in Gluon for sm_90: FlashAttention-3 (arXiv 2407.08608) on row intervals.

Three ideas:
- One warp loads tiles by TMA, two warpgroups with half of the rows each multiply; mbarriers say which tiles are full
  and which are free.
- The products for the next scores and for this output run under the softmax, and the warpgroups take turns to start
  theirs (ping-pong): one computes exponentials while the other keeps the tensor cores busy.
- A program takes tile after tile (`hopper_schedule`), and loads the next early.

All partitions hear the same bounds of a tile, so that they agree on the number of its key tiles; which of them need a
mask each warpgroup decides for its own rows. A barrier's phase is the parity of a count that goes on over all tiles.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from .blocks import LN2, LOG2E, before_and_after, split, strides
from .candidates import Config
from .hopper import (
    CONSUMER_REGISTERS,
    LOADER_REGISTERS,
    await_parts,
    barriers,
    buffers,
    copy,
    masked,
    mma_layout,
    operand,
    pointers,
    products,
    scaled,
    scaled_parts,
    tile,
    weighted,
    zeros,
)
from .hopper_schedule import LONGEST_RUN, bounds, draw, heads_at_once, hear, live_tiles, num_programs, tell, tickets
from .visibility import Visibility

FLOOR = gl.constexpr(-1.0e30)  # running maxima start here, not at -inf: no difference of two is NaN


@gluon.jit
def _load_tiles(
    schedule,
    tiles,
    descs,
    memory,
    signals,
    GROUP: gl.constexpr,
    HALF: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The warp that loads. It draws the tiles, and tells the warpgroups when there is none left."""
    q, k, v = descs
    q_memory, k_memory, v_memory, told = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty = signals
    num_tickets = schedule[2] * tiles[3]
    longest_run = schedule[4]
    turn = 0
    count = 0  # of key tiles
    ticket = draw(schedule)
    while ticket < num_tickets:
        row, head, first, num_tiles = bounds(ticket, schedule, tiles, 2 * HALF, KEYS)
        for half in gl.static_range(2):
            mbarrier.wait(q_empty.index(half), (turn & 1) ^ 1)
            tell(told, half, row + half * HALF, head, first, num_tiles)
            copy(q, head, row + half * HALF, q_memory, half, q_full.index(half), 0)
        for j in range(num_tiles):
            i = count % STAGES
            phase = (count // STAGES) & 1
            mbarrier.wait(k_empty.index(i), phase ^ 1)
            copy(k, head // GROUP, first + j * KEYS, k_memory, i, k_full.index(i), 0)
            mbarrier.wait(v_empty.index(i), phase ^ 1)
            copy(v, head // GROUP, first + j * KEYS, v_memory, i, v_full.index(i), 0)
            count += 1
        turn += 1
        ticket = num_tickets
        if count < longest_run:
            ticket = draw(schedule)
    for half in gl.static_range(2):
        mbarrier.wait(q_empty.index(half), (turn & 1) ^ 1)
        tell(told, half, 0, 0, 0, 0)
        mbarrier.arrive(q_full.index(half), count=1)


@gluon.jit
def _edges(row, first, tiles, ROWS: gl.constexpr, KEYS: gl.constexpr):
    """Of ROWS rows: the keys from start to end - 1 that each sees, counted from `first`, and which tiles need no mask.

    Those are left to right - 1.
    """
    Start, End, num_rows, _ = tiles
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, mma_layout(KEYS)))
    rows = gl.minimum(rows, num_rows - 1)  # past the end the last row again: it bounds nothing
    left = (gl.load(Start + gl.minimum(row + ROWS, num_rows) - 1) - first + KEYS - 1) // KEYS
    right = gl.maximum((gl.load(End + gl.minimum(row, num_rows - 1)) - first) // KEYS, left)
    return gl.load(Start + rows) - first, gl.load(End + rows) - first, left, right


@gluon.jit
def _softmax(scores, peak, log2_scale):
    """Weights of these scores against the greatest so far, in base 2, and that one."""
    peak = gl.maximum(peak, gl.max(scores, 1) * log2_scale)
    return gl.exp2(scores * log2_scale - peak[:, None]), peak


@gluon.jit
def _finish_lse(total, peak, old, new, row, head, tiles, ROWS: gl.constexpr, KEYS: gl.constexpr, FOLD: gl.constexpr):
    """Writes the lse of these rows. Returns the factors of this block's sums and of the old output."""
    num_rows = tiles[2]
    OldLse, old_lse_stride = old[2], old[3]
    Lse, lse_stride = new[2], new[3]
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, mma_layout(KEYS)))
    written = rows < num_rows
    decay = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, mma_layout(KEYS)))
    kept = decay
    if FOLD:
        # What was before is one more tile, of maximum `past` and sum 1 (0 where lse is -inf).
        past = gl.load(OldLse + head.to(gl.int64) * old_lse_stride + rows, mask=written, other=0.0) * LOG2E
        past = gl.maximum(past, FLOOR)
        written = written & (total > 0.0)  # a row that sees nothing keeps its lse, to the bit
        new_peak = gl.maximum(peak, past)
        decay = gl.exp2(peak - new_peak)
        kept = gl.where(past > FLOOR, gl.exp2(past - new_peak), 0.0)
        total = total * decay + kept
        peak = new_peak
    seen = total > 0.0
    total = gl.where(seen, total, 1.0)
    lse = gl.where(seen, (peak + gl.log2(total)) * LN2, float("-inf"))
    gl.store(Lse + head.to(gl.int64) * lse_stride + rows, lse, mask=written)
    norm = 1.0 / total
    return decay * norm, kept * norm


@gluon.jit
def _write(
    new,
    old,
    acc,
    decay,
    kept,
    row,
    head,
    tiles,
    ROWS: gl.constexpr,
    COLUMN: gl.constexpr,
    COLUMNS: gl.constexpr,
    D: gl.constexpr,
    FOLD: gl.constexpr,
):
    """Writes decay * acc to the columns from COLUMN on; FOLD: plus kept times the old output."""
    if FOLD and COLUMNS > 64:  # half by half: what is loaded takes registers
        WIDTH: gl.constexpr = COLUMNS // 2
        left, right = acc.reshape([ROWS, 2, WIDTH]).permute((0, 2, 1)).split()
        left = gl.convert_layout(left, mma_layout(WIDTH))
        right = gl.convert_layout(right, mma_layout(WIDTH))
        _write(new, old, left, decay, kept, row, head, tiles, ROWS, COLUMN, WIDTH, D, FOLD)
        _write(new, old, right, decay, kept, row, head, tiles, ROWS, COLUMN + WIDTH, WIDTH, D, FOLD)
    else:
        out = scaled(acc, decay, COLUMNS)
        if FOLD:
            p_old, inside = pointers(old[0], old[1], row, head, tiles[2], ROWS, COLUMN, COLUMNS, D)
            out += scaled(gl.load(p_old, mask=inside, other=0.0), kept, COLUMNS)
        p_new, inside = pointers(new[0], new[1], row, head, tiles[2], ROWS, COLUMN, COLUMNS, D)
        gl.store(p_new, out.to(new[0].dtype.element_ty), mask=inside)


@gluon.jit
def _multiply(  # noqa: PLR0915
    work,
    WHICH: gl.constexpr,
    HALF: gl.constexpr,
    KEYS: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    FOLD: gl.constexpr,
):
    """A warpgroup that multiplies: the first or second half of each tile's rows."""
    tiles, old, new, memory, signals, order, log2_scale = work
    q_memory, k_memory, v_memory, told = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty = signals
    D0: gl.constexpr = split(D)[0]
    D1: gl.constexpr = split(D)[1]
    PARTS: gl.constexpr = 2 if D1 > 0 else 1
    dtype: gl.constexpr = q_memory[0].dtype
    nothing = gl.zeros([HALF, KEYS], gl.float32, mma_layout(KEYS))
    lowest = gl.full([HALF], FLOOR, gl.float32, gl.SliceLayout(1, mma_layout(KEYS)))
    columns = gl.arange(0, KEYS, gl.SliceLayout(0, mma_layout(KEYS)))
    q = tile(q_memory, WHICH)
    turn = 0
    count = 0  # of key tiles
    mbarrier.wait(q_full.index(WHICH), 0)
    num_tiles = hear(told, WHICH, 3)
    while num_tiles > 0:
        row = hear(told, WHICH, 0)
        head = hear(told, WHICH, 1)
        first = hear(told, WHICH, 2)
        start, end, left, right = _edges(row, first, tiles, HALF, KEYS)
        acc = zeros(HALF, D)

        i = count % STAGES
        mbarrier.wait(k_full.index(i), (count // STAGES) & 1)
        scores = warpgroup_mma_wait(0, deps=[products(q, tile(k_memory, i), nothing)])
        mbarrier.arrive(k_empty.index(i), count=1)
        if (left > 0) | (right <= 0):
            scores = masked(scores, columns, start, end)
        weights, peak = _softmax(scores, lowest, log2_scale)
        total = gl.sum(weights, 1)
        weights = weights.to(dtype)
        for j in range(1, num_tiles):
            before = i  # the tile whose weights are known
            before_phase = ((count + j - 1) // STAGES) & 1
            i = (count + j) % STAGES
            mbarrier.wait(k_full.index(i), ((count + j) // STAGES) & 1)
            mbarrier.wait(order.index(WHICH), ((count - turn + j) & 1) ^ (1 - WHICH))
            scores = products(q, tile(k_memory, i), nothing)
            mbarrier.wait(v_full.index(before), before_phase)
            acc = weighted(weights, tile(v_memory, before), acc)
            mbarrier.arrive(order.index(1 - WHICH), count=1)
            scores = warpgroup_mma_wait(PARTS, deps=[scores])
            mbarrier.arrive(k_empty.index(i), count=1)
            # A branch here would serialise the products of a plain kernel (ptxas C7515), but not of a warpgroup's own.
            if (j < left) | (j >= right):
                scores = masked(scores, columns, start - j * KEYS, end - j * KEYS)
            weights, new_peak = _softmax(scores, peak, log2_scale)
            decay = gl.exp2(peak - new_peak)
            total = total * decay + gl.sum(weights, 1)
            peak = new_peak
            weights = weights.to(dtype)
            acc = await_parts(acc, 0)
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = scaled_parts(acc, decay, D)
        mbarrier.arrive(q_empty.index(WHICH), count=1)  # the loader fetches the next tile's under what is left of this
        count += num_tiles
        mbarrier.wait(v_full.index(i), ((count - 1) // STAGES) & 1)
        acc = weighted(weights, tile(v_memory, i), acc)

        decay, kept = _finish_lse(total, peak, old, new, row, head, tiles, HALF, KEYS, FOLD)
        acc = await_parts(acc, 0)
        mbarrier.arrive(v_empty.index(i), count=1)
        _write(new, old, acc[0], decay, kept, row, head, tiles, HALF, 0, D0, D, FOLD)
        if D1 > 0:
            _write(new, old, acc[1], decay, kept, row, head, tiles, HALF, D0, D1, D, FOLD)
        turn += 1
        mbarrier.wait(q_full.index(WHICH), turn & 1)
        num_tiles = hear(told, WHICH, 3)


@gluon.jit(
    do_not_specialize=["num_rows", "num_heads", "heads_at_once", "longest_run", "old_lse_stride", "lse_stride"],
    do_not_specialize_on_alignment=["Order", "Live", "Start", "End", "OldLse", "Lse"],
)
def forward_kernel(
    q0_desc,
    q1_desc,
    k0_desc,
    k1_desc,
    v0_desc,
    v1_desc,
    Drawn,
    Order,
    Live,
    Start,
    End,
    OldOut,
    OldLse,
    Out,
    Lse,
    scale,
    num_rows,
    num_heads,
    heads_at_once,
    longest_run,
    old_strides,
    out_strides,
    old_lse_stride,
    lse_stride,
    GROUP: gl.constexpr,
    HALF: gl.constexpr,
    KEYS: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    FOLD: gl.constexpr,
    IN_PLACE: gl.constexpr,
):
    """Grid: see `hopper_schedule.num_programs`; HALF rows for each warpgroup.

    FOLD: OldOut, OldLse are blocks before; IN_PLACE: they are Out, Lse as well, and only the Live [1] first tiles of
    Order are visited: those behind them span no key.
    """
    if IN_PLACE:
        num_tiles = gl.load(Live)
    else:
        num_tiles = (num_rows + 2 * HALF - 1) // (2 * HALF)
    schedule = (Drawn, Order, num_tiles, heads_at_once, longest_run)
    tiles = (Start, End, num_rows, num_heads)
    old = (OldOut, old_strides, OldLse, old_lse_stride)
    new = (Out, out_strides, Lse, lse_stride)
    memory = (
        buffers(q0_desc, q1_desc, 2, D),
        buffers(k0_desc, k1_desc, STAGES, D),
        buffers(v0_desc, v1_desc, STAGES, D),
        gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )
    signals = (
        barriers(2, 1),  # q_full, q_empty: a warpgroup's rows
        barriers(2, 1),
        barriers(STAGES, 1),  # k_full, k_empty: a key tile, which both warpgroups have read
        barriers(STAGES, 2),
        barriers(STAGES, 1),  # v_full, v_empty
        barriers(STAGES, 2),
    )
    order = barriers(2, 1)  # whose turn it is to start products
    fence_async_shared()  # without it TMA might arrive at barriers that are not initialised in its eyes
    work = (tiles, old, new, memory, signals, order, scale * LOG2E)
    descs = ((q0_desc, q1_desc), (k0_desc, k1_desc), (v0_desc, v1_desc))
    gl.warp_specialize(
        [
            (_multiply, (work, gl.constexpr(0), HALF, KEYS, D, STAGES, FOLD)),
            (_multiply, (work, gl.constexpr(1), HALF, KEYS, D, STAGES, FOLD)),
            (_load_tiles, (schedule, tiles, descs, memory, signals, GROUP, HALF, KEYS, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    config: Config,
    state: tuple[Tensor, Tensor] | None = None,
    final: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `backend.block_forward`; q, k and v must fit TMA (`blocks.tma_fits`)."""
    num_rows, heads, head_dim = q.shape
    (old_out, old_lse), (out, lse) = before_and_after(q, state, final)
    in_place = state is not None and not final
    order = visibility.longest_first(config.rows)
    forward_kernel[(num_programs(visibility, config, heads),)](
        *operand(q, config.rows // 2),
        *operand(k, config.keys),
        *operand(v, config.keys),
        tickets(q.device),
        order,
        live_tiles(visibility, config.rows) if in_place else order,
        visibility.start,
        visibility.end,
        old_out,
        old_lse,
        out,
        lse,
        scale,
        num_rows,
        heads,
        heads_at_once(k, heads),
        LONGEST_RUN,
        strides(old_out),
        strides(out),
        old_lse.stride(0),
        lse.stride(0),
        GROUP=heads // k.shape[1],
        HALF=config.rows // 2,
        KEYS=config.keys,
        D=head_dim,
        STAGES=config.stages,
        FOLD=state is not None,
        IN_PLACE=in_place,
        num_warps=config.warps,
        enable_fp_fusion=True,  # the default until Triton 3.9
    )
    return out, lse
