"""Attention of one or a few query rows over a long cache ("flash decoding"), in plain Triton.

Four ideas:
- The keys of a tile are split over programs, enough to fill the GPU. Each writes its part of the softmax, (out, lse)
  in float32; a second kernel merges the parts by their lse and folds in the carried state.
- The query heads of a group share their keys, so they are rows of one tile: M = GROUP x ROWS, padded to 16. So few
  rows make warp-wide products (HMMA) on Hopper too: what takes time is reading K and V, 16 bytes a thread (cp.async).
- For the same reason a head dim is padded to one power of two, not cut in parts: columns past it are not read.
- Nothing but data depends on the lengths: bounds are read on the device, and no length is specialised on. A growing
  cache compiles once, and a CUDA graph replays over bounds that have changed.

The caller's choice is `Config.rows`, the most query rows of a tile. A tile walks all keys from the first that one of
its rows sees to the last. Rows of one sequence see about the same keys and share the reading: 16. Rows of several
sequences see keys far apart, with hidden ones between them: 1, which is never wrong.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import LN2, LOG2E, before_and_after, load_block, strides, tile_bounds, visible
from .device import multiprocessors
from .table import Config
from .visibility import Visibility

FLOOR = tl.constexpr(-1.0e30)  # running maxima start here, not at -inf: no difference of two is NaN
RESIDENT = 2  # programs that a multiprocessor holds
LEAST_TILES = 4  # of keys, in a split: with fewer it starts up longer than it reads
MOST_ROWS = 32  # of a tile, all heads of a group counted: with more, programs outgrow their half of the registers
AT_ONCE = 32  # splits that the merging kernel loads together


def num_splits(num_programs: int, num_key_tiles: int, num_multiprocessors: int) -> int:
    """Into how many splits to cut the keys: they fill the GPU once, unless they would become too short.

    num_programs: pairs of a query tile and a kv head. num_key_tiles: of all keys, whatever is visible.
    """
    return max(1, min(RESIDENT * num_multiprocessors // num_programs, num_key_tiles // LEAST_TILES))


@triton.jit
def _visit(
    state,
    q,
    keys,
    key,
    start,
    end,
    log2_scale,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """The online softmax over one tile of keys. state, in base 2: acc [M, COLUMNS], total [M, KEYS], peak [M].

    The total stays apart by column up to the end, as a sum over keys takes all warps through shared memory.
    """
    acc, total, peak = state
    K, k_strides, V, v_strides, head, stop = keys
    k = load_block(K, k_strides, key, head, stop, KEYS, 0, COLUMNS, D, EDGE)
    v = load_block(V, v_strides, key, head, stop, KEYS, 0, COLUMNS, D, EDGE)
    s = tl.dot(q, k.T, input_precision="ieee")
    if EDGE:
        s = visible(s, key, start, end, KEYS, ROWS > 1)
        if ROWS > 1:  # keys between those of two rows may not be written yet, and 0 x NaN is NaN
            v = tl.where(tl.max(s, 0)[:, None] > float("-inf"), v, 0.0)
    new_peak = tl.maximum(peak, tl.max(s, 1) * log2_scale)
    p = tl.math.exp2(s * log2_scale - new_peak[:, None])
    decay = tl.math.exp2(peak - new_peak)[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc * decay, input_precision="ieee")
    return acc, total * decay + p, new_peak


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_heads",
        "q_row_stride",
        "q_head_stride",
        "k_row_stride",
        "k_head_stride",
        "v_row_stride",
        "v_head_stride",
    ],
    do_not_specialize_on_alignment=["Start", "End"],
)
def decode_kernel(
    Q,
    K,
    V,
    Start,
    End,
    Part,
    PartLse,
    scale,
    num_rows,
    num_heads,
    q_row_stride,
    q_head_stride,
    Q_UNIT: tl.constexpr,
    k_row_stride,
    k_head_stride,
    K_UNIT: tl.constexpr,
    v_row_stride,
    v_head_stride,
    V_UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (splits, query tiles, kv heads). Part [Tq, Hq, splits, D]; PartLse [Tq, Hq, splits], in base 2."""
    split = tl.program_id(0)
    num_splits = tl.num_programs(0)
    row = tl.program_id(1) * ROWS
    key_head = tl.program_id(2)
    last = tl.minimum(row + ROWS, num_rows) - 1
    first, left, right, count = tile_bounds(Start, End, row, last, KEYS, 1)  # pyright: ignore[reportGeneralTypeIssues]
    stop = tl.load(End + last)
    share = count // num_splits
    longer = count % num_splits  # splits from the front with one tile more: the last has an edge to mask
    begin = split * share + tl.minimum(split, longer)
    finish = begin + share + (split < longer).to(tl.int32)

    m = tl.arange(0, M)
    rows = row + m // GROUP
    heads = key_head * GROUP + m % GROUP
    inside = (m < GROUP * ROWS) & (rows < num_rows)
    clamped = tl.minimum(rows, last)  # rows past the end repeat the last: they bound nothing
    start = tl.load(Start + clamped)
    end = tl.load(End + clamped)
    columns = tl.arange(0, COLUMNS)
    block = inside[:, None] & (columns < D)[None, :]  # [M, COLUMNS]
    q_rows = Q + (rows.to(tl.int64) * q_row_stride + heads.to(tl.int64) * q_head_stride) * Q_UNIT
    q = tl.load(q_rows[:, None] + columns[None, :], mask=block, other=0.0)
    state = tl.zeros([M, COLUMNS], tl.float32), tl.zeros([M, KEYS], tl.float32), tl.full([M], FLOOR, tl.float32)
    k_strides = (k_row_stride, k_head_stride, K_UNIT)  # a tuple from the host would be specialised on
    keys = (K, k_strides, V, (v_row_stride, v_head_stride, V_UNIT), key_head, stop)
    log2_scale = scale * LOG2E

    for i in tl.range(tl.maximum(begin, left), tl.minimum(finish, right)):
        state = _visit(state, q, keys, first + i * KEYS, start, end, log2_scale, ROWS, KEYS, D, COLUMNS, False)
    num_left = tl.maximum(tl.minimum(finish, left) - begin, 0)
    behind = tl.maximum(begin, right)
    for edge in tl.range(0, num_left + tl.maximum(finish - behind, 0), num_stages=1):  # one or two as a rule
        i = tl.where(edge < num_left, begin + edge, behind + edge - num_left)
        state = _visit(state, q, keys, first + i * KEYS, start, end, log2_scale, ROWS, KEYS, D, COLUMNS, True)

    acc, total, peak = state
    sums = tl.sum(total, 1)
    seen = sums > 0.0
    norm = tl.where(seen, sums, 1.0)
    part = (rows.to(tl.int64) * num_heads + heads) * num_splits + split
    tl.store(PartLse + part, tl.where(seen, peak + tl.math.log2(norm), float("-inf")), mask=inside)
    # Parts of rows that saw nothing are not read.
    part_pointers = Part + part[:, None] * D + columns[None, :]
    tl.store(part_pointers, acc / norm[:, None], mask=block & seen[:, None])


@triton.jit(
    do_not_specialize=[
        "num_splits",
        "old_row_stride",
        "old_head_stride",
        "out_row_stride",
        "out_head_stride",
        "old_lse_stride",
        "lse_stride",
    ],
    do_not_specialize_on_alignment=["Start", "End", "OldOut", "OldLse", "Out", "Lse"],
)
def merge_kernel(
    Part,
    PartLse,
    Start,
    End,
    OldOut,
    OldLse,
    Out,
    Lse,
    num_splits,
    old_row_stride,
    old_head_stride,
    out_row_stride,
    out_head_stride,
    old_lse_stride,
    lse_stride,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    FOLD: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """Grid (Tq, Hq): a row's out and lse from its parts. FOLD: and OldOut, OldLse; IN_PLACE: they are Out, Lse too."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    sees = tl.load(End + row) > tl.load(Start + row)
    columns = tl.arange(0, COLUMNS)
    acc = tl.zeros([COLUMNS], tl.float32)
    total = tl.full((), 0.0, tl.float32)
    peak = tl.full((), FLOOR, tl.float32)
    if FOLD:  # what was before is one more part
        old_lse = tl.load(OldLse + head * old_lse_stride + row) * LOG2E
        old = OldOut + row * old_row_stride + head * old_head_stride
        acc = tl.load(old + columns, mask=columns < D, other=0.0)
        total = tl.where(old_lse > FLOOR, 1.0, 0.0)
        peak = tl.maximum(old_lse, FLOOR)

    base = (row * tl.num_programs(1) + head) * num_splits
    for i in tl.range(0, tl.where(sees, num_splits, 0), SPLITS):
        split = i + tl.arange(0, SPLITS)
        lse = tl.load(PartLse + base + split, mask=split < num_splits, other=float("-inf"))
        mask = (lse > FLOOR)[:, None] & (columns < D)[None, :]
        part = tl.load(Part + (base + split)[:, None] * D + columns[None, :], mask=mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        weight = tl.math.exp2(lse - new_peak)
        decay = tl.math.exp2(peak - new_peak)
        acc = acc * decay + tl.sum(part * weight[:, None], 0)
        total = total * decay + tl.sum(weight, 0)
        peak = new_peak

    norm = tl.where(total > 0.0, total, 1.0)
    lse = tl.where(total > 0.0, (peak + tl.math.log2(norm)) * LN2, float("-inf"))
    width = D
    if IN_PLACE:
        width = tl.where(sees, D, 0)  # a row that sees no key leaves the state alone
    out = Out + row * out_row_stride + head * out_head_stride
    tl.store(out + columns, (acc / norm).to(Out.dtype.element_ty), mask=columns < width)
    tl.store(Lse + head * lse_stride + row, lse, mask=width > 0)


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
    """See `backend.block_forward`."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    rows = max(1, min(config.rows, MOST_ROWS // group))
    num_tiles = -(-num_rows // rows)
    splits = num_splits(num_tiles * num_kv_heads, -(-k.shape[0] // config.keys), multiprocessors(q.device))
    part = torch.empty(num_rows, num_heads, splits, head_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(num_rows, num_heads, splits, dtype=torch.float32, device=q.device)
    columns = max(32, triton.next_power_of_2(head_dim))  # with 16 each warp would repeat the products of all
    decode: Any = decode_kernel
    decode[splits, num_tiles, num_kv_heads](
        q,
        k,
        v,
        visibility.start,
        visibility.end,
        part,
        part_lse,
        scale,
        num_rows,
        num_heads,
        *(number for x in (q, k, v) for number in strides(x) or ()),
        GROUP=group,
        ROWS=rows,
        M=max(16, triton.next_power_of_2(group * rows)),
        KEYS=config.keys,
        D=head_dim,
        COLUMNS=columns,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    (old_out, old_lse), (out, lse) = before_and_after(q, state, final)
    merge: Any = merge_kernel
    merge[num_rows, num_heads](
        part,
        part_lse,
        visibility.start,
        visibility.end,
        old_out,
        old_lse,
        out,
        lse,
        splits,
        *old_out.stride()[:2],
        *out.stride()[:2],
        old_lse.stride(0),
        lse.stride(0),
        D=head_dim,
        COLUMNS=columns,
        SPLITS=AT_ONCE,
        FOLD=state is not None,
        IN_PLACE=state is not None and not final,
        enable_fp_fusion=True,
    )
    return out, lse
