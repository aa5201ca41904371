"""Attention backward in plain Triton: two kernels on row intervals, the same bits from the same input.

The rows that see a key are an interval too, so dk, dv is dq's walk with rows and keys exchanged. Each program owns
the block that it writes, and walks all query heads of its group: nothing is summed in an order of chance.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# (jit code has types of its own)

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .blocks import (
    LOG2E,
    load,
    operands,
    scaled,
    scores,
    strides,
    tile_bounds,
    use_tma,
    visible,
    weighted,
    write,
    zeros,
)
from .table import Config
from .visibility import Visibility

MOST_COLUMNS = 128  # of dk and dv in one program: two accumulators of more do not fit the registers
ALIGN = tl.constexpr(16)  # dkdv's tiles of query rows start at a multiple: lse2 and delta come in wide copies


@triton.jit
def _late_scores(a, b):
    """`scores(a, b)` of a b that comes to shared memory just now.

    float32 products, without tensor cores, read operands whole into registers, the first one first: it must be b, or
    registers hold all of a over the barrier behind which b can be read.
    """
    if a[0].dtype == tl.float32:
        s = scores(b, a).T
    else:
        s = scores(a, b)
    return s


@triton.jit
def _walk_rows(
    state,
    keys,
    rows,
    tiles,
    begin,
    stop,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
):
    """Adds to state, dk and dv [KEYS, D] in parts, or (), what the tiles `begin` to `stop` of query rows give."""
    dk, dv = state
    k, v, start, end, log2_scale, key_head = keys
    Q, q_strides, DOut, dout_strides, Lse2, Delta, num_rows, padded = rows
    first, left, right = tiles
    count = stop - begin
    for x in tl.range(0, GROUP * count):
        # Heads and tiles in one flat loop: fewer registers than a loop in a loop, and the pipeline fills once.
        g = x // count if GROUP > 1 else 0
        i = x - g * count + begin
        if GROUP > 1 and LOWER:
            i = tl.where(i < left, i, i + right - left)
        head = key_head * GROUP + g
        row = first + i * ROWS
        q = load(Q, q_strides, row, head, num_rows, ROWS, D, UPPER)
        s = scores(k, q)  # [KEYS, ROWS]
        if UPPER:
            s = visible(s, row, start, end, ROWS, LOWER)
        offset = head.to(tl.int64) * padded + row
        columns = tl.arange(0, ROWS)  # past the last row is padding: no mask
        p = tl.math.exp2(s * log2_scale - tl.load(Lse2 + offset + columns)[None, :])
        dout = load(DOut, dout_strides, row, head, num_rows, ROWS, D, UPPER)
        if len(dv) > 0:
            dv = weighted(p, dout, dv)
        if len(dk) > 0:
            dp = scores(v, dout) if len(dv) > 0 else _late_scores(v, dout)
            ds = p * (dp - tl.load(Delta + offset + columns)[None, :])
            dk = weighted(ds, q, dk)
    return dk, dv


def _dkdv_name(specialization: Any) -> str:
    """One name for each kind of launch, so that lists of kernels tell them apart."""
    wanted = (specialization.constants["GRAD_K"], specialization.constants["GRAD_V"])
    return {(True, True): "dkdv_kernel", (True, False): "dk_kernel", (False, True): "dv_kernel"}[wanted]


@triton.jit(
    do_not_specialize=["num_rows", "num_keys"],
    do_not_specialize_on_alignment=["KStart", "KEnd", "Order"],
    repr=_dkdv_name,
)
def dkdv_kernel(
    Q0,
    Q1,
    K0,
    K1,
    V0,
    V1,
    DOut0,
    DOut1,
    KStart,
    KEnd,
    Order,
    Lse2,
    Delta,
    DK,
    DV,
    scale,
    num_rows,
    num_keys,
    padded,
    all_strides,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    ADD: tl.constexpr,
    GRAD_K: tl.constexpr,
    GRAD_V: tl.constexpr,
):
    """Grid (key tiles, key heads). ADD: to what DK, DV hold. GRAD_K, GRAD_V: which of both to make.

    all_strides: of q, k, v, dout, dk, dv.
    """
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides = all_strides
    key = tl.load(Order + tl.program_id(0)) * KEYS
    head = tl.program_id(1)
    last = tl.minimum(key + KEYS, num_keys) - 1
    first, left, right, count = tile_bounds(KStart, KEnd, key, last, ROWS, ALIGN)
    clamped = tl.minimum(key + tl.arange(0, KEYS), last)
    start = tl.load(KStart + clamped)
    end = tl.load(KEnd + clamped)
    k = load((K0, K1), k_strides, key, head, num_keys, KEYS, D, True)
    v = load((V0, V1), v_strides, key, head, num_keys, KEYS, D, True) if GRAD_K else ()
    keys = (k, v, start, end, scale * LOG2E, head)
    rows = ((Q0, Q1), q_strides, (DOut0, DOut1), dout_strides, Lse2, Delta, num_rows, padded)
    tiles = (first, left, right)

    state = (zeros(KEYS, D) if GRAD_K else (), zeros(KEYS, D) if GRAD_V else ())
    if GROUP == 1:
        state = _walk_rows(state, keys, rows, tiles, 0, left, GROUP, ROWS, D, True, True)
        state = _walk_rows(state, keys, rows, tiles, left, right, GROUP, ROWS, D, False, False)
        state = _walk_rows(state, keys, rows, tiles, right, count, GROUP, ROWS, D, False, True)
    else:
        state = _walk_rows(state, keys, rows, tiles, left, right, GROUP, ROWS, D, False, False)
        state = _walk_rows(state, keys, rows, tiles, 0, count - right + left, GROUP, ROWS, D, True, True)
    dk, dv = state

    # All is read anew (volatile: the compiler may not keep it) rather than held in registers through the loops.
    key = tl.load(Order + tl.program_id(0), volatile=True) * KEYS
    written = num_keys
    if ADD:  # a tile that no row sees adds nothing
        last = tl.minimum(key + KEYS, num_keys) - 1
        seen = tl.load(KEnd + last, volatile=True) > tl.load(KStart + key, volatile=True)
        written = tl.where(seen, num_keys, 0)
    if GRAD_K:
        write(DK, scaled(dk, scale), dk_strides, key, head, written, KEYS, D, ADD)
    if GRAD_V:
        write(DV, dv, dv_strides, key, head, written, KEYS, D, ADD)


@triton.jit
def _walk_keys(
    dq,
    q,
    dout,
    lse2,
    delta,
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
    """Adds to dq [ROWS, D], in parts, what the key tiles `begin` to `stop` give."""
    K, k_strides, V, v_strides, head, num_keys = keys
    for i in tl.range(begin, stop):
        key = first + i * KEYS
        k = load(K, k_strides, key, head, num_keys, KEYS, D, UPPER)
        s = scores(q, k)
        if UPPER:
            s = visible(s, key, start, end, KEYS, LOWER)
        p = tl.math.exp2(s * log2_scale - lse2[:, None])
        v = load(V, v_strides, key, head, num_keys, KEYS, D, UPPER)
        ds = p * (_late_scores(dout, v) - delta[:, None])
        dq = weighted(ds, k, dq)
    return dq


@triton.jit(
    do_not_specialize=["num_rows", "num_keys"],
    do_not_specialize_on_alignment=["Start", "End", "Order"],
)
def dq_kernel(
    Q0,
    Q1,
    K0,
    K1,
    V0,
    V1,
    DOut0,
    DOut1,
    Start,
    End,
    Order,
    Lse2,
    Delta,
    DQ,
    scale,
    num_rows,
    num_keys,
    padded,
    all_strides,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    ADD: tl.constexpr,
):
    """Grid (query tiles, query heads). ADD: to what DQ holds. all_strides: of q, k, v, dout, dq."""
    q_strides, k_strides, v_strides, dout_strides, dq_strides = all_strides
    row = tl.load(Order + tl.program_id(0)) * ROWS
    head = tl.program_id(1)
    last = tl.minimum(row + ROWS, num_rows) - 1
    first, left, right, count = tile_bounds(Start, End, row, last, KEYS, 1)
    clamped = tl.minimum(row + tl.arange(0, ROWS), last)
    start = tl.load(Start + clamped)
    end = tl.load(End + clamped)
    q = load((Q0, Q1), q_strides, row, head, num_rows, ROWS, D, True)
    dout = load((DOut0, DOut1), dout_strides, row, head, num_rows, ROWS, D, True)
    vector = head.to(tl.int64) * padded + clamped
    lse2 = tl.load(Lse2 + vector)
    delta = tl.load(Delta + vector)
    keys = ((K0, K1), k_strides, (V0, V1), v_strides, head // GROUP, num_keys)
    log2_scale = scale * LOG2E

    dq = zeros(ROWS, D)
    dq = _walk_keys(dq, q, dout, lse2, delta, keys, start, end, log2_scale, first, 0, left, KEYS, D, True, True)
    dq = _walk_keys(dq, q, dout, lse2, delta, keys, start, end, log2_scale, first, left, right, KEYS, D, False, False)
    dq = _walk_keys(dq, q, dout, lse2, delta, keys, start, end, log2_scale, first, right, count, KEYS, D, False, True)

    written = num_rows
    if ADD:
        written = tl.where(count > 0, num_rows, 0)
    write(DQ, scaled(dq, scale), dq_strides, row, head, written, ROWS, D, ADD)


def dkdv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse2: Tensor,
    delta: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    config: Config,
    dk: Tensor,
    dv: Tensor,
    add: bool,
) -> None:
    """The gradients of k and v: written to dk, dv [Tk, Hkv, D] in their dtype, or added to them, float32.

    lse2, delta: from `prepare`. The other tensors: as in `backend.block_backward`.
    """
    num_keys, key_heads, head_dim = k.shape
    tma = use_tma(q, k, v, dout)
    keys = visibility.transposed
    for grad_k, grad_v in [(True, True)] if head_dim <= MOST_COLUMNS else [(True, False), (False, True)]:
        dkdv_kernel[-(-num_keys // config.keys), key_heads](
            *operands(q, config.rows, tma),
            *operands(k, config.keys, tma),
            *operands(v, config.keys, tma),
            *operands(dout, config.rows, tma),
            keys.start,
            keys.end,
            keys.longest_first(config.keys),
            lse2,
            delta,
            dk,
            dv,
            scale,
            q.shape[0],
            num_keys,
            lse2.stride(0),
            (*(strides(x, tma) for x in (q, k, v, dout)), strides(dk), strides(dv)),
            GROUP=q.shape[1] // key_heads,
            ROWS=config.rows,
            KEYS=config.keys,
            D=head_dim,
            ADD=add,
            GRAD_K=grad_k,
            GRAD_V=grad_v,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )


def dq(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse2: Tensor,
    delta: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    config: Config,
    dq: Tensor,
    add: bool,
) -> None:
    """The gradient of q: written to dq [Tq, Hq, D] in its dtype, or added to it, float32. Arguments as in `dkdv`."""
    num_rows, heads, head_dim = q.shape
    tma = use_tma(q, k, v, dout)
    dq_kernel[-(-num_rows // config.rows), heads](
        *operands(q, config.rows, tma),
        *operands(k, config.keys, tma),
        *operands(v, config.keys, tma),
        *operands(dout, config.rows, tma),
        visibility.start,
        visibility.end,
        visibility.longest_first(config.rows),
        lse2,
        delta,
        dq,
        scale,
        num_rows,
        k.shape[0],
        lse2.stride(0),
        (*(strides(x, tma) for x in (q, k, v, dout)), strides(dq)),
        GROUP=heads // k.shape[1],
        ROWS=config.rows,
        KEYS=config.keys,
        D=head_dim,
        ADD=add,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
