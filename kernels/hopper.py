"""What the Gluon kernels for sm_90 share: descriptors, tiles, and names that Triton 3.6 and 3.9 have in common.

A kernel takes two TMA descriptors for each tensor [T, H, D], one for each part of the head dim (`blocks.split`); where
there is one part the second is not used. They are arguments of their own: Triton 3.6 cannot launch tuples of them.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .blocks import split

# For each thread of the two warpgroups that multiply, and of the one that loads: an SM has 512 for the three.
CONSUMER_REGISTERS = gl.constexpr(240)
LOADER_REGISTERS = gl.constexpr(24)


@builtin
def _async_add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    """Adds a block in shared memory to global memory: Triton 3.6 and 3.7 compile this, but have no word for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


async_load: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the latter until 3.7
async_add: Any = getattr(tma, "async_atomic_add", _async_add)


# On the host


@cache
def _layout(box: tuple[int, ...], dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for(list(box), getattr(gl, str(dtype).removeprefix("torch.")))


def block_descriptors(x: Tensor, rows: int, columns: tuple[int, int]) -> tuple[TensorDescriptor, TensorDescriptor]:
    """For blocks of `rows` rows and each of these widths of x [T, H, D]: boxes [1, rows, width] of its [H, T, D] view.

    What lies outside of [T, D] reads as 0 and is not written; in a view [T, H * D] the next head would be.
    """
    num_rows, heads, head_dim = x.shape
    row_stride = x.stride(0) if num_rows > 1 else heads * head_dim  # of a dimension of 1 torch may say anything
    head_stride = x.stride(1) if heads > 1 else head_dim
    shape, strides = [heads, num_rows, head_dim], [head_stride, row_stride, 1]
    boxes = ((1, rows, width) for width in columns)
    first, second = (TensorDescriptor(x, shape, strides, list(box), _layout(box, x.dtype)) for box in boxes)
    return first, second


def operand(x: Tensor, rows: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """For tiles of `rows` rows of both parts of x [T, H, D]; twice the same where there is one."""
    first, second = split(x.shape[2])
    return block_descriptors(x, rows, (first, second or first))


def numbers_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """For `rows` numbers of a head of x [H, T]."""
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [1, rows], _layout((1, rows), x.dtype))


# On the device


@gluon.constexpr_function
def mma_layout(columns: int) -> Any:
    """Of the float32 result of warpgroup_mma, [64, columns] over four warps."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def barriers(NUM: gl.constexpr, ARRIVALS: gl.constexpr):
    """mbarriers [NUM, 1] that each complete with so many arrivals and the bytes that these announce."""
    made = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def buffers(desc0, desc1, NUM: gl.constexpr, D: gl.constexpr):
    """Shared memory for NUM tiles: [NUM, 1, rows, columns] for each part."""
    ROWS: gl.constexpr = desc0.block_shape[1]
    D0: gl.constexpr = split(D)[0]
    D1: gl.constexpr = split(D)[1]
    first = gl.allocate_shared_memory(desc0.dtype, [NUM, 1, ROWS, D0], desc0.layout)
    if D1 > 0:
        parts = (first, gl.allocate_shared_memory(desc1.dtype, [NUM, 1, ROWS, D1], desc1.layout))
    else:
        parts = (first,)
    return parts


@gluon.jit
def tile(memory, i):
    """Tile i of buffers: a matrix [rows, columns] for each part."""
    first = memory[0].index(i).reshape([memory[0].shape[2], memory[0].shape[3]])
    if len(memory) > 1:
        parts = (first, memory[1].index(i).reshape([memory[1].shape[2], memory[1].shape[3]]))
    else:
        parts = (first,)
    return parts


@gluon.jit
def copy(descs, head, row, memory, i, barrier, MORE: gl.constexpr):
    """Starts to load the tile at `row` of `head` into tile i of buffers.

    `barrier` completes with the last byte of it and of MORE that the caller loads.
    """
    num_bytes: gl.constexpr = descs[0].block_type.nbytes + (descs[1].block_type.nbytes if len(memory) > 1 else 0)
    mbarrier.expect(barrier, num_bytes + MORE)
    async_load(descs[0], [head, row, 0], barrier, memory[0].index(i))
    if len(memory) > 1:
        async_load(descs[1], [head, row, memory[0].shape[3]], barrier, memory[1].index(i))


@gluon.jit
def products(a, b, zero):
    """Starts a b^T [rows of a, rows of b]: one group of products for each part of the head dim."""
    result = warpgroup_mma(a[0], b[0].permute((1, 0)), zero, use_acc=False, is_async=True)
    if len(a) > 1:
        result = warpgroup_mma(a[1], b[1].permute((1, 0)), result, is_async=True)
    return result


@gluon.jit
def weighted(weights, x, total):
    """Starts total + weights x, one group for each part."""
    P0: gl.constexpr = gl.DotOperandLayout(0, mma_layout(x[0].shape[1]), 2)
    first = warpgroup_mma(gl.convert_layout(weights, P0), x[0], total[0], is_async=True)
    if len(x) > 1:
        P1: gl.constexpr = gl.DotOperandLayout(0, mma_layout(x[1].shape[1]), 2)
        parts = (first, warpgroup_mma(gl.convert_layout(weights, P1), x[1], total[1], is_async=True))
    else:
        parts = (first,)
    return parts


@gluon.jit
def await_parts(parts, IN_FLIGHT: gl.constexpr):
    """The parts, when all but the last IN_FLIGHT groups are done."""
    if len(parts) > 1:
        done = warpgroup_mma_wait(IN_FLIGHT, deps=[parts[0], parts[1]])
    else:
        done = (warpgroup_mma_wait(IN_FLIGHT, deps=[parts[0]]),)
    return done


@gluon.jit
def masked(scores, columns, start, end):
    """Scores [rows, columns], -inf but in the columns from start [rows] to end - 1.

    `columns` counts them. The caller makes it before its loop: made here, in a branch, it costs 140 bytes of spills.
    """
    visible = (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None])
    return gl.where(visible, scores, float("-inf"))


@gluon.jit
def scaled(block, factor, COLUMNS: gl.constexpr):
    """block [rows, COLUMNS] times factor [rows]."""
    return block * gl.convert_layout(factor, gl.SliceLayout(1, mma_layout(COLUMNS)))[:, None]


@gluon.jit
def scaled_parts(parts, factor, D: gl.constexpr):
    """All parts times factor [rows]."""
    first = scaled(parts[0], factor, split(D)[0])
    if len(parts) > 1:
        done = (first, scaled(parts[1], factor, split(D)[1]))
    else:
        done = (first,)
    return done


@gluon.jit
def zeros(ROWS: gl.constexpr, D: gl.constexpr):
    """float32 parts, to accumulate in."""
    D0: gl.constexpr = split(D)[0]
    D1: gl.constexpr = split(D)[1]
    first = gl.zeros([ROWS, D0], gl.float32, mma_layout(D0))
    if D1 > 0:
        parts = (first, gl.zeros([ROWS, D1], gl.float32, mma_layout(D1)))
    else:
        parts = (first,)
    return parts


@gluon.jit
def pointers(
    X, strides, row, head, num_rows, ROWS: gl.constexpr, COLUMN: gl.constexpr, COLUMNS: gl.constexpr, D: gl.constexpr
):
    """[ROWS, COLUMNS] of X [T, H, D] from `row` of `head` and COLUMN on, and which of them lie in [num_rows, D]."""
    row_stride, head_stride, UNIT = strides
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, mma_layout(COLUMNS)))
    columns = COLUMN + gl.arange(0, COLUMNS, gl.SliceLayout(0, mma_layout(COLUMNS)))
    inside = (rows < num_rows)[:, None]
    if COLUMN + COLUMNS > D:
        inside = inside & (columns < D)[None, :]
    # Offsets from `row` on: those of a tile that starts at 0 would be kept in registers through a loop over tiles.
    p_rows = X + (rows.to(gl.int64) * row_stride + head.to(gl.int64) * head_stride) * UNIT
    return p_rows[:, None] + columns[None, :], inside
