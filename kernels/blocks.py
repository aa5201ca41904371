"""What the plain Triton kernels share: blocks of a packed tensor [T, H, D], and the tiles that a mask spans.

Three ideas:
- A head dim is one or two parts of a power of two of columns (72 and 80 are 64 + 16), a block a tuple of its parts.
- Rows come by TMA over the [H, T, D] view (with H in the middle the reshape would go through registers), or by
  pointers; either way what lies outside [T, D] reads as 0.
- Row i sees the keys start[i] <= j < end[i], both non-decreasing, so that four numbers bound a whole tile.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# (jit code has types of its own)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
Operand = Tensor | TensorDescriptor


@triton.constexpr_function
def split(head_dim: int) -> tuple[int, int]:
    """head_dim as (D0, D1): powers of two from 16 up, D1 = 0 where one is enough."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    return first, max(16, 1 << (rest - 1).bit_length()) if rest > 0 else 0


def is_aligned(x: Tensor) -> bool:
    """Whether kernels can load x [T, H, D] 16 bytes at once: by its base, strides of 8 numbers, no gaps in D."""
    return x.data_ptr() % 16 == 0 and x.stride(2) == 1 and all(n > 0 and n % 8 == 0 for n in x.stride()[:2])


def aligned(x: Tensor) -> Tensor:
    """x, or a copy that is aligned: number by number kernels would load slowly, and spill registers."""
    if is_aligned(x):
        return x
    *shape, head_dim = x.shape
    return torch.empty(*shape, -(-head_dim // 8) * 8, dtype=x.dtype, device=x.device)[..., :head_dim].copy_(x)


def tma_fits(*tensors: Tensor) -> bool:
    """Whether TMA can load these [T, H, D]: 16-bit numbers, aligned, and head_dim of whole 16 bytes."""
    return all(x.dtype.itemsize == 2 and x.shape[2] % 8 == 0 and is_aligned(x) for x in tensors)


def use_tma(*tensors: Tensor) -> bool:
    """Whether to: they fit, on a Hopper GPU or in the interpreter. Newer GPUs run other tiles, which spill with it."""
    if not tma_fits(*tensors):
        return False
    if knobs.runtime.interpret:
        return True
    target: Any = driver.active.get_current_target()
    return target.backend == "cuda" and int(target.arch) // 10 == 9


def operands(x: Tensor, rows: int, tma: bool) -> tuple[Operand, Operand | None]:
    """The kernel arguments for x [T, H, D], one for each part of the head dim: pointers, or descriptors.

    Kernels take each as an argument of its own: inside a tuple Triton 3.6 would not launch a descriptor.
    """
    first, second = split(x.shape[-1])
    if not tma:
        return x, x if second else None
    view = x.transpose(0, 1)
    return (
        TensorDescriptor.from_tensor(view, [1, rows, first]),
        TensorDescriptor.from_tensor(view, [1, rows, second]) if second else None,
    )


def strides(x: Tensor, tma: bool = False) -> tuple[int, int, tl.constexpr] | None:
    """Row and head stride of x [T, H, D], and the unit that they are counted in: of 8 numbers, so that the compiler
    sees where it may load 16 bytes at once, or of 1. None with TMA: its descriptors hold the strides."""
    if tma:
        return None
    unit = 8 if x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 else 1
    return x.stride(0) // unit, x.stride(1) // unit, tl.constexpr(unit)


def before_and_after(
    q: Tensor, state: tuple[Tensor, Tensor] | None, final: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(out, lse) that a forward kernel folds into, and that it writes: the state's own but for the last block's out.

    Without a state both are the new ones, and a kernel does not read them.
    """
    if state is not None and not final:
        return state, state
    out = torch.empty(q.shape, dtype=q.dtype if final else torch.float32, device=q.device)
    if state is not None:
        return state, (out, state[1])
    new = out, torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    return new, new


@triton.jit
def block_pointers(X, strides, row, head, ROWS: tl.constexpr, COLUMN: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of X [T, H, D], from `row` of `head` and from COLUMN on."""
    row_stride, head_stride, UNIT = strides
    base = X + (row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride) * UNIT
    rows = tl.arange(0, ROWS).to(tl.int64)[:, None] * (row_stride * UNIT)
    return base + rows + (COLUMN + tl.arange(0, COLUMNS))[None, :]


@triton.jit
def block_mask(
    row, num_rows, ROWS: tl.constexpr, COLUMN: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, EDGE: tl.constexpr
):
    """bool [ROWS, COLUMNS]: what lies inside [num_rows, D]; without EDGE all rows do."""
    mask = tl.full([ROWS, COLUMNS], True, tl.int1)
    if EDGE:
        mask = mask & (row + tl.arange(0, ROWS) < num_rows)[:, None]
    if COLUMN + COLUMNS > D:
        mask = mask & (COLUMN + tl.arange(0, COLUMNS) < D)[None, :]
    return mask


@triton.jit
def load_block(
    X,
    strides,
    row,
    head,
    num_rows,
    ROWS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    EDGE: tl.constexpr,
):
    """[ROWS, COLUMNS] of X; outside [num_rows, D] it reads 0, without EDGE no row is outside."""
    if strides is None:
        block = X.load([head, row, COLUMN]).reshape([ROWS, COLUMNS])
    else:
        pointers = block_pointers(X, strides, row, head, ROWS, COLUMN, COLUMNS)
        block = tl.load(pointers, mask=block_mask(row, num_rows, ROWS, COLUMN, COLUMNS, D, EDGE), other=0.0)
    return block


@triton.jit
def load(X, strides, row, head, num_rows, ROWS: tl.constexpr, D: tl.constexpr, EDGE: tl.constexpr):
    """The parts of X at `row` of `head`: ([ROWS, D0],), or ([ROWS, D0], [ROWS, D1])."""
    D0: tl.constexpr = split(D)[0]
    D1: tl.constexpr = split(D)[1]
    first = load_block(X[0], strides, row, head, num_rows, ROWS, 0, D0, D, EDGE)
    if D1 > 0:
        parts = (first, load_block(X[1], strides, row, head, num_rows, ROWS, D0, D1, D, EDGE))
    else:
        parts = (first,)
    return parts


@triton.jit
def store_block(
    X,
    block,
    strides,
    row,
    head,
    num_rows,
    ROWS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
):
    """Writes block [ROWS, COLUMNS], in X's dtype, where it lies inside [num_rows, D]."""
    pointers = block_pointers(X, strides, row, head, ROWS, COLUMN, COLUMNS)
    mask = block_mask(row, num_rows, ROWS, COLUMN, COLUMNS, D, True)
    tl.store(pointers, block.to(X.dtype.element_ty), mask=mask)


@triton.jit
def add_block(
    X,
    block,
    strides,
    row,
    head,
    num_rows,
    ROWS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
):
    """Adds block to X, float32, in L2: no register holds what was there. One program owns it: no order matters."""
    pointers = block_pointers(X, strides, row, head, ROWS, COLUMN, COLUMNS)
    mask = block_mask(row, num_rows, ROWS, COLUMN, COLUMNS, D, True)
    tl.atomic_add(pointers, block, mask=mask, sem="relaxed")


@triton.jit
def write(X, parts, strides, row, head, num_rows, ROWS: tl.constexpr, D: tl.constexpr, ADD: tl.constexpr):
    """Stores the parts of a block, or adds them."""
    D0: tl.constexpr = split(D)[0]
    D1: tl.constexpr = split(D)[1]
    if ADD:
        add_block(X, parts[0], strides, row, head, num_rows, ROWS, 0, D0, D)
        if D1 > 0:
            add_block(X, parts[1], strides, row, head, num_rows, ROWS, D0, D1, D)
    else:
        store_block(X, parts[0], strides, row, head, num_rows, ROWS, 0, D0, D)
        if D1 > 0:
            store_block(X, parts[1], strides, row, head, num_rows, ROWS, D0, D1, D)


@triton.jit
def zeros(ROWS: tl.constexpr, D: tl.constexpr):
    """float32 parts, to accumulate in."""
    D0: tl.constexpr = split(D)[0]
    D1: tl.constexpr = split(D)[1]
    if D1 > 0:
        parts = (tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D1], tl.float32))
    else:
        parts = (tl.zeros([ROWS, D0], tl.float32),)
    return parts


@triton.jit
def scaled(parts, factor):
    """All parts times `factor`, a number or [ROWS, 1]."""
    if len(parts) > 1:
        parts = (parts[0] * factor, parts[1] * factor)
    else:
        parts = (parts[0] * factor,)
    return parts


@triton.jit
def scores(a, b):
    """float32 [rows of a, rows of b]: products of rows, over all parts. Only float32 input minds input_precision."""
    s = tl.dot(a[0], b[0].T, input_precision="ieee")
    if len(a) > 1:
        s = tl.dot(a[1], b[1].T, s, input_precision="ieee")
    return s


@triton.jit
def weighted(weights, x, total):
    """total + weights @ x, part by part; the weights are rounded to x's dtype."""
    w = weights.to(x[0].dtype)
    first = tl.dot(w, x[0], total[0], input_precision="ieee")
    if len(x) > 1:
        parts = (first, tl.dot(w, x[1], total[1], input_precision="ieee"))
    else:
        parts = (first,)
    return parts


@triton.jit
def tile_bounds(Start, End, row, last, KEYS: tl.constexpr, ALIGN: tl.constexpr):
    """The tiles of KEYS keys that the rows `row` to `last` span: tile i starts at key first + i KEYS.

    Returns first, left, right, count: tiles 0 to left - 1 need both bounds checked, left to right - 1 none, right to
    count - 1 the upper one. Keys are counted from the first that is seen: what begins where its rows' keys begin
    (full, causal, a document) has no left edge. A tile with an empty row has no key tile free of checks.
    """
    first = tl.load(Start + row)
    if ALIGN > 1:
        first = tl.multiple_of(first // ALIGN * ALIGN, ALIGN)
    left = tl.cdiv(tl.load(Start + last) - first, KEYS)
    right = tl.maximum((tl.load(End + row) - first) // KEYS, left)
    return first, left, right, tl.cdiv(tl.load(End + last) - first, KEYS)


@triton.jit
def visible(s, key, start, end, KEYS: tl.constexpr, LOWER: tl.constexpr):
    """Scores s [rows, KEYS] of the keys from `key` on, -inf where a row does not see one; without LOWER all reach
    its start."""
    keys = (key + tl.arange(0, KEYS))[None, :]
    mask = keys < end[:, None]
    if LOWER:
        mask = (keys >= start[:, None]) & mask
    return tl.where(mask, s, float("-inf"))
