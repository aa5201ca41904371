"""Attention backward in Gluon for sm_90, fused: dq, dk and dv in one pass, five products for each tile.

Four ideas:
- A program owns a key tile of one key head and walks the query tiles that see it, for all query heads of the group.
  One warp loads by TMA, two warpgroups with half of the keys each multiply.
- Scores are transposed [keys, rows]: p and ds feed dv and dk from registers. ds goes through shared memory once, where
  both warpgroups read all of it, and each makes half of the columns of dq, which TMA adds to float32 in global memory.
- The row vectors lse2 and delta come by TMA like tiles and are read just before use: no register waits for them.
- Keys past the end read as 0, but exp2(0 - lse2) may be inf, and inf * 0 would reach dq: half a tile that has such keys
  is masked throughout.

The additions to dq have no fixed order: its last bits differ from run to run.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .blocks import LOG2E, split, strides
from .candidates import Config
from .hopper import (
    CONSUMER_REGISTERS,
    LOADER_REGISTERS,
    async_add,
    async_load,
    barriers,
    block_descriptors,
    buffers,
    copy,
    masked,
    mma_layout,
    numbers_descriptor,
    operand,
    pointers,
    products,
    tile,
    weighted,
    zeros,
)
from .visibility import Visibility


@gluon.jit
def _bounds(tiles, ROWS: gl.constexpr, KEYS: gl.constexpr):
    """Of this program's key tile: first key, first row to walk, number of row tiles from there, and their end."""
    Order, KStart, KEnd, num_keys = tiles
    key = gl.load(Order + gl.program_id(0)) * KEYS
    start = gl.load(KStart + key)
    end = gl.load(KEnd + gl.minimum(key + KEYS, num_keys) - 1)
    first = start & -4  # TMA loads row vectors from multiples of 16 bytes alone
    num_tiles = gl.where(end > start, (end - first + ROWS - 1) // ROWS, 0)
    return key, first, num_tiles, first + num_tiles * ROWS


@gluon.jit
def _next(row, head, first, end, ROWS: gl.constexpr):
    """Row tile and head after these: all tiles of a head, then the next head. Flat, since a loop over heads spills."""
    row += ROWS
    wrap = row == end
    return gl.where(wrap, first, row), gl.where(wrap, head + 1, head)


@gluon.jit
def _load_tiles(
    tiles, descs, memory, signals, GROUP: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr
):
    """The warp that loads."""
    k, v, q, dout, lse, delta = descs
    k_memory, v_memory, q_memory, dout_memory, lse_memory, delta_memory = memory
    kv_full, q_full, dout_full, empty = signals
    key, first, num_tiles, end = _bounds(tiles, ROWS, KEYS)
    key_head = gl.program_id(1)
    copy(k, key_head, key, k_memory, 0, kv_full.index(0), 0)
    copy(v, key_head, key, v_memory, 0, kv_full.index(0), 0)
    row = first
    head = key_head * GROUP
    for count in range(num_tiles * GROUP):
        i = count % STAGES
        mbarrier.wait(empty.index(i), ((count // STAGES) & 1) ^ 1)
        copy(q, head, row, q_memory, i, q_full.index(i), lse.block_type.nbytes)
        async_load(lse, [head, row], q_full.index(i), lse_memory.index(i))
        copy(dout, head, row, dout_memory, i, dout_full.index(i), delta.block_type.nbytes)
        async_load(delta, [head, row], dout_full.index(i), delta_memory.index(i))
        row, head = _next(row, head, first, end, ROWS)


@gluon.jit
def _edges(key, tiles, ROWS: gl.constexpr, KEYS: gl.constexpr):
    """Of KEYS keys: the rows from first_row to end_row - 1 that see each, and which row tiles need no mask.

    Those are the tiles that start from left to right - 1.
    """
    _, KStart, KEnd, num_keys = tiles
    keys = key + gl.arange(0, KEYS, gl.SliceLayout(1, mma_layout(ROWS)))
    clamped = gl.minimum(keys, num_keys - 1)
    end_row = gl.where(keys < num_keys, gl.load(KEnd + clamped), 0)
    left = gl.load(KStart + gl.minimum(key + KEYS, num_keys) - 1)
    right = gl.load(KEnd + gl.minimum(key, num_keys - 1)) - ROWS + 1
    right = gl.where(key + KEYS > num_keys, 0, right)  # keys past the end: all tiles, see above
    return gl.load(KStart + clamped), end_row, left, right


@gluon.jit
def _half(parts, WHICH: gl.constexpr, HALF: gl.constexpr):
    """This warpgroup's rows of both parts."""
    first = parts[0].slice(WHICH * HALF, HALF)
    if len(parts) > 1:
        halves = (first, parts[1].slice(WHICH * HALF, HALF))
    else:
        halves = (first,)
    return halves


@gluon.jit
def _await(dk, dv, IN_FLIGHT: gl.constexpr):
    """dk and dv, when all but the last IN_FLIGHT groups of products are done."""
    if len(dk) > 1:
        dk0, dk1, dv0, dv1 = warpgroup_mma_wait(IN_FLIGHT, deps=[dk[0], dk[1], dv[0], dv[1]])
        done = ((dk0, dk1), (dv0, dv1))
    else:
        dk0, dv0 = warpgroup_mma_wait(IN_FLIGHT, deps=[dk[0], dv[0]])
        done = ((dk0,), (dv0,))
    return done


@gluon.jit
def _write(
    X,
    strides,
    block,
    row,
    head,
    num_rows,
    ROWS: gl.constexpr,
    COLUMN: gl.constexpr,
    COLUMNS: gl.constexpr,
    D: gl.constexpr,
    ADD: gl.constexpr,
):
    """Stores a block, or adds it: one program owns it, so the sum has a fixed order, and no register holds what was."""
    p_x, inside = pointers(X, strides, row, head, num_rows, ROWS, COLUMN, COLUMNS, D)
    if ADD:
        gl.atomic_add(p_x, block, mask=inside, sem="relaxed")
    else:
        gl.store(p_x, block.to(X.dtype.element_ty), mask=inside)


@gluon.jit
def _multiply(  # noqa: PLR0915
    work,
    dq_desc,
    dq_memory,
    WHICH: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    ADD: gl.constexpr,
):
    """A warpgroup that multiplies: the first or second half of the tile's keys, and of the columns of dq."""
    tiles, DK, dk_strides, DV, dv_strides, scale, memory, signals, ds_memory, ds_full = work
    k_memory, v_memory, q_memory, dout_memory, lse_memory, delta_memory = memory
    kv_full, q_full, dout_full, empty = signals
    D0: gl.constexpr = split(D)[0]
    D1: gl.constexpr = split(D)[1]
    PARTS: gl.constexpr = 2 if D1 > 0 else 1
    HALF: gl.constexpr = KEYS // 2
    LAYOUT: gl.constexpr = mma_layout(ROWS)  # of scores [keys, rows]
    dtype: gl.constexpr = k_memory[0].dtype
    COLUMNS: gl.constexpr = dq_memory.shape[2]

    key, first, num_tiles, end = _bounds(tiles, ROWS, KEYS)
    key_head = gl.program_id(1)
    key += WHICH * HALF
    first_row, end_row, left, right = _edges(key, tiles, ROWS, HALF)
    columns = gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
    k_tile = tile(k_memory, 0)
    k = _half(k_tile, WHICH, HALF)
    v = _half(tile(v_memory, 0), WHICH, HALF)
    if D1 > 0:
        k_columns = k_tile[WHICH]
        column: gl.constexpr = WHICH * D0
    else:
        k_columns = k_tile[0].slice(WHICH * COLUMNS, COLUMNS, dim=1)
        column: gl.constexpr = WHICH * COLUMNS
    dk = zeros(HALF, D)
    dv = zeros(HALF, D)
    nothing = gl.zeros([HALF, ROWS], gl.float32, LAYOUT)
    no_dq = gl.zeros([ROWS, COLUMNS], gl.float32, mma_layout(COLUMNS))
    log2_scale = scale * LOG2E
    mbarrier.wait(kv_full.index(0), 0)
    row = first
    head = key_head * GROUP
    for count in range(num_tiles * GROUP):
        i = count % STAGES
        phase = (count // STAGES) & 1
        mbarrier.wait(q_full.index(i), phase)
        q = tile(q_memory, i)
        s = products(k, q, nothing)
        mbarrier.wait(dout_full.index(i), phase)
        dout = tile(dout_memory, i)
        dp = products(v, dout, nothing)
        s = warpgroup_mma_wait(PARTS, deps=[s])
        if (row < left) | (row >= right):
            s = masked(s, columns, first_row - row, end_row - row)
        p = gl.exp2(s * log2_scale - lse_memory.index(i).load(LAYOUT))
        dv = weighted(p.to(dtype), dout, dv)
        dp = warpgroup_mma_wait(PARTS, deps=[dp])
        ds = (p * (dp - delta_memory.index(i).load(LAYOUT))).to(dtype)
        # Two buffers: whoever writes one again has waited for ds_full of the turn between, at which the other arrives
        # behind its own reading of that buffer.
        ds_memory.index(count & 1).slice(WHICH * HALF, HALF).store(ds)
        fence_async_shared()  # the products read what was just stored
        mbarrier.arrive(ds_full.index(0), count=1)
        dk = weighted(ds, q, dk)
        mbarrier.wait(ds_full.index(0), count & 1)
        dq = warpgroup_mma(ds_memory.index(count & 1).permute((1, 0)), k_columns, no_dq, use_acc=False, is_async=True)
        dk, dv = _await(dk, dv, 1)
        mbarrier.arrive(empty.index(i), count=1)
        dq = warpgroup_mma_wait(0, deps=[dq]) * scale
        tma.store_wait(0)  # the last addition has read its buffer
        dq_memory.reshape([ROWS, COLUMNS]).store(dq)
        fence_async_shared()  # TMA reads what was just stored
        async_add(dq_desc, [head, row, column], dq_memory)
        row, head = _next(row, head, first, end, ROWS)

    num_keys = tiles[3]
    num_written = num_keys
    if ADD:
        num_written = gl.where(num_tiles > 0, num_keys, 0)  # a tile that no row sees touches no memory
    _write(DK, dk_strides, dk[0] * scale, key, key_head, num_written, HALF, 0, D0, D, ADD)
    _write(DV, dv_strides, dv[0], key, key_head, num_written, HALF, 0, D0, D, ADD)
    if D1 > 0:
        _write(DK, dk_strides, dk[1] * scale, key, key_head, num_written, HALF, D0, D1, D, ADD)
        _write(DV, dv_strides, dv[1], key, key_head, num_written, HALF, D0, D1, D, ADD)
    tma.store_wait(0)  # shared memory must live until the last addition has read it


@gluon.jit(
    do_not_specialize=["num_keys"],
    do_not_specialize_on_alignment=["Order", "KStart", "KEnd"],
)
def backward_kernel(
    q0_desc,
    q1_desc,
    k0_desc,
    k1_desc,
    v0_desc,
    v1_desc,
    dout0_desc,
    dout1_desc,
    lse_desc,
    delta_desc,
    dq0_desc,
    dq1_desc,
    Order,
    KStart,
    KEnd,
    DK,
    DV,
    scale,
    num_keys,
    dk_strides,
    dv_strides,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    ADD: gl.constexpr,
):
    """Grid (key tiles, key heads); KEYS / 2 keys for each warpgroup. ADD: to DK and DV, float32."""
    tiles = (Order, KStart, KEnd, num_keys)
    memory = (
        buffers(k0_desc, k1_desc, 1, D),
        buffers(v0_desc, v1_desc, 1, D),
        buffers(q0_desc, q1_desc, STAGES, D),
        buffers(dout0_desc, dout1_desc, STAGES, D),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], lse_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], delta_desc.layout),
    )
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], q0_desc.dtype)
    ds_memory = gl.allocate_shared_memory(q0_desc.dtype, [2, KEYS, ROWS], DS)
    dq0_memory = gl.allocate_shared_memory(gl.float32, dq0_desc.block_shape, dq0_desc.layout)
    dq1_memory = gl.allocate_shared_memory(gl.float32, dq1_desc.block_shape, dq1_desc.layout)
    signals = (
        barriers(1, 2),  # kv_full: both are there
        barriers(STAGES, 1),  # q_full: and lse2
        barriers(STAGES, 1),  # dout_full: and delta
        barriers(STAGES, 2),  # empty: both warpgroups have read all four
    )
    ds_full = barriers(1, 2)  # both halves are stored
    fence_async_shared()  # without it TMA might arrive at barriers that are not initialised in its eyes
    work = (tiles, DK, dk_strides, DV, dv_strides, scale, memory, signals, ds_memory, ds_full)
    descs = ((k0_desc, k1_desc), (v0_desc, v1_desc), (q0_desc, q1_desc), (dout0_desc, dout1_desc), lse_desc, delta_desc)
    gl.warp_specialize(
        [
            (_multiply, (work, dq0_desc, dq0_memory, gl.constexpr(0), GROUP, ROWS, KEYS, D, STAGES, ADD)),
            (_multiply, (work, dq1_desc, dq1_memory, gl.constexpr(1), GROUP, ROWS, KEYS, D, STAGES, ADD)),
            (_load_tiles, (tiles, descs, memory, signals, GROUP, ROWS, KEYS, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )


def backward(
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
    dk: Tensor,
    dv: Tensor,
    add: bool,
) -> None:
    """Adds to dq, float32; writes dk and dv in their dtypes or, with `add`, adds to them, float32.

    q, k, v and dout must fit TMA (`blocks.tma_fits`), and so must dq: its base and strides are multiples of 16 bytes.
    lse2 and delta: see `flash_prepare.prepare`.
    """
    num_keys, key_heads, head_dim = k.shape
    d0, d1 = split(head_dim)
    by_keys = visibility.transposed
    order = by_keys.longest_first(config.keys)
    backward_kernel[(len(order), key_heads)](
        *operand(q, config.rows),
        *operand(k, config.keys),
        *operand(v, config.keys),
        *operand(dout, config.rows),
        numbers_descriptor(lse2, config.rows),
        numbers_descriptor(delta, config.rows),
        *block_descriptors(dq, config.rows, (d0, d1) if d1 else (d0 // 2, d0 // 2)),
        order,
        by_keys.start,
        by_keys.end,
        dk,
        dv,
        scale,
        num_keys,
        strides(dk),
        strides(dv),
        GROUP=q.shape[1] // key_heads,
        ROWS=config.rows,
        KEYS=config.keys,
        D=head_dim,
        STAGES=config.stages,
        ADD=add,
        num_warps=config.warps,
        enable_fp_fusion=True,  # the default until Triton 3.9
    )
