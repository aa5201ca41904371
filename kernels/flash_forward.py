"""Attention forward in plain Triton: FlashAttention-2 on row intervals, for any GPU and for the interpreter."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# (jit code has types of its own)

import triton
import triton.language as tl
from torch import Tensor

from .blocks import (
    LN2,
    LOG2E,
    before_and_after,
    load,
    load_block,
    operands,
    scaled,
    scores,
    split,
    store_block,
    strides,
    tile_bounds,
    use_tma,
    visible,
    weighted,
    zeros,
)
from .table import Config
from .visibility import Visibility

FLOOR = tl.constexpr(-1.0e30)  # running maxima start here, not at -inf: no difference of two is NaN


@triton.jit
def _walk(
    state,
    q,
    keys,
    start,
    end,
    log2_scale,
    first,
    begin,
    stop,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
):
    """The online softmax over the key tiles `begin` to `stop`. state: acc [ROWS, D] in parts, total and peak [ROWS]."""
    acc, total, peak = state
    K, k_strides, V, v_strides, head, num_keys = keys
    for i in tl.range(begin, stop):
        key = first + i * KEYS
        s = scores(q, load(K, k_strides, key, head, num_keys, KEYS, D, UPPER))
        if UPPER:
            s = visible(s, key, start, end, KEYS, LOWER)
        new_peak = tl.maximum(peak, tl.max(s, 1) * log2_scale)
        p = tl.math.exp2(s * log2_scale - new_peak[:, None])
        decay = tl.math.exp2(peak - new_peak)
        total = total * decay + tl.sum(p, 1)
        acc = weighted(p, load(V, v_strides, key, head, num_keys, KEYS, D, UPPER), scaled(acc, decay[:, None]))
        peak = new_peak
    return acc, total, peak


@triton.jit
def _write(
    block,
    new,
    old,
    row,
    head,
    num_rows,
    ROWS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Writes block [ROWS, COLUMNS] and with FOLD what was there before, each weighed by [ROWS, 1]."""
    if D > 128 and COLUMNS > 64:  # in pieces: 256 columns, and as many of before, would spill
        a, b = block.reshape([ROWS, 2, COLUMNS // 2]).permute(0, 2, 1).split()
        _write(a, new, old, row, head, num_rows, ROWS, COLUMN, COLUMNS // 2, D, FOLD)
        _write(b, new, old, row, head, num_rows, ROWS, COLUMN + COLUMNS // 2, COLUMNS // 2, D, FOLD)
    else:
        Out, out_strides, weight = new
        block = block * weight
        if FOLD:
            OldOut, old_strides, kept = old
            block += load_block(OldOut, old_strides, row, head, num_rows, ROWS, COLUMN, COLUMNS, D, True) * kept
        store_block(Out, block, out_strides, row, head, num_rows, ROWS, COLUMN, COLUMNS, D)


@triton.jit(
    do_not_specialize=["num_rows", "num_keys", "old_lse_stride", "lse_stride"],
    do_not_specialize_on_alignment=["Start", "End", "Order", "OldLse", "Lse"],
)
def forward_kernel(
    Q0,
    Q1,
    K0,
    K1,
    V0,
    V1,
    Start,
    End,
    Order,
    OldOut,
    OldLse,
    Out,
    Lse,
    scale,
    num_rows,
    num_keys,
    all_strides,
    old_lse_stride,
    lse_stride,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    FOLD: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """Grid (query tiles, query heads). FOLD: OldOut, OldLse are of the blocks before; IN_PLACE: Out, Lse are the same.

    all_strides: of q, k, v, the old out and out.
    """
    q_strides, k_strides, v_strides, old_strides, out_strides = all_strides
    row = tl.load(Order + tl.program_id(0)) * ROWS
    head = tl.program_id(1)
    last = tl.minimum(row + ROWS, num_rows) - 1
    first, left, right, count = tile_bounds(Start, End, row, last, KEYS, 1)
    rows = row + tl.arange(0, ROWS)
    clamped = tl.minimum(rows, last)  # rows past the end repeat the last: they bound nothing
    start = tl.load(Start + clamped)
    end = tl.load(End + clamped)
    q = load((Q0, Q1), q_strides, row, head, num_rows, ROWS, D, True)
    keys = ((K0, K1), k_strides, (V0, V1), v_strides, head // GROUP, num_keys)
    log2_scale = scale * LOG2E

    state = (zeros(ROWS, D), tl.zeros([ROWS], tl.float32), tl.full([ROWS], FLOOR, tl.float32))
    state = _walk(state, q, keys, start, end, log2_scale, first, 0, left, KEYS, D, True, True)
    state = _walk(state, q, keys, start, end, log2_scale, first, left, right, KEYS, D, False, False)
    state = _walk(state, q, keys, start, end, log2_scale, first, right, count, KEYS, D, False, True)
    acc, total, peak = state

    written = num_rows
    if IN_PLACE:
        written = tl.where(count > 0, num_rows, 0)  # a tile that sees no key leaves the state alone
    inside = rows < written
    weight = tl.full([ROWS], 1.0, tl.float32)
    kept = None
    if FOLD:
        # What was before is one more tile, of maximum `before` and sum 1 (0 where lse is -inf).
        before = tl.load(OldLse + head.to(tl.int64) * old_lse_stride + rows, mask=inside, other=0.0) * LOG2E
        before = tl.maximum(before, FLOOR)
        new_peak = tl.maximum(peak, before)
        weight = tl.math.exp2(peak - new_peak)
        kept = tl.where(before > FLOOR, tl.math.exp2(before - new_peak), 0.0)
        total = total * weight + kept
        peak = new_peak
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    lse = tl.where(seen, (peak + tl.math.log2(total)) * LN2, float("-inf"))
    tl.store(Lse + head.to(tl.int64) * lse_stride + rows, lse, mask=inside)
    new = (Out, out_strides, (weight / total)[:, None])
    old = (OldOut, old_strides, (kept / total)[:, None] if FOLD else None)
    D0: tl.constexpr = split(D)[0]
    D1: tl.constexpr = split(D)[1]
    _write(acc[0], new, old, row, head, written, ROWS, 0, D0, D, FOLD)
    if D1 > 0:
        _write(acc[1], new, old, row, head, written, ROWS, D0, D1, D, FOLD)


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
    """See `backend.block_forward`. With `final`, out is a new tensor in q's dtype; lse stays the state's own."""
    num_rows, heads, head_dim = q.shape
    (old_out, old_lse), (out, lse) = before_and_after(q, state, final)
    tma = use_tma(q, k, v)
    forward_kernel[-(-num_rows // config.rows), heads](
        *operands(q, config.rows, tma),
        *operands(k, config.keys, tma),
        *operands(v, config.keys, tma),
        visibility.start,
        visibility.end,
        visibility.longest_first(config.rows),
        old_out,
        old_lse,
        out,
        lse,
        scale,
        num_rows,
        k.shape[0],
        (*(strides(x, tma) for x in (q, k, v)), strides(old_out), strides(out)),
        old_lse.stride(0),
        lse.stride(0),
        GROUP=heads // k.shape[1],
        ROWS=config.rows,
        KEYS=config.keys,
        D=head_dim,
        FOLD=state is not None,
        IN_PLACE=out is old_out and state is not None,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    return out, lse
