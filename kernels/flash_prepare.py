"""What every backward kernel needs of each row before it runs: lse in base 2, and delta (FlashAttention-2, eq. 4)."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# (jit code has types of its own)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import LOG2E, load_block, strides

PADDING = 128  # rows of lse2 and delta past the last tile that may be read


@triton.jit(
    do_not_specialize=["num_rows", "lse_head", "lse_row", "dlse_head", "dlse_row"],
    do_not_specialize_on_alignment=["Lse", "DLse"],
)
def prepare_kernel(
    Out,
    DOut,
    Lse,
    DLse,
    Lse2,
    Delta,
    num_rows,
    padded,
    out_strides,
    dout_strides,
    lse_head,
    lse_row,
    dlse_head,
    dlse_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
):
    """Grid (row tiles, query heads). lse_head, lse_row and so on are strides."""
    row = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    out = load_block(Out, out_strides, row, head, num_rows, ROWS, 0, COLUMNS, D, True).to(tl.float32)
    dout = load_block(DOut, dout_strides, row, head, num_rows, ROWS, 0, COLUMNS, D, True).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    rows = row + tl.arange(0, ROWS)
    inside = rows < num_rows
    wide_rows = rows.to(tl.int64)
    wide_head = head.to(tl.int64)
    lse = tl.load(Lse + wide_head * lse_head + wide_rows * lse_row, mask=inside, other=float("-inf"))
    if DLse is not None:
        delta -= tl.load(DLse + wide_head * dlse_head + wide_rows * dlse_row, mask=inside, other=0.0)
    seen = lse > float("-inf")
    written = rows < padded
    tl.store(Lse2 + wide_head * padded + rows, tl.where(seen, lse * LOG2E, float("inf")), mask=written)
    tl.store(Delta + wide_head * padded + rows, tl.where(seen, delta, 0.0), mask=written)


def prepare(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    """lse2 = lse / ln 2 and delta = sum(out * dout) - dlse, float32 [Hq, more than Tq + 128].

    out, dout: [Tq, Hq, D]. lse, and dlse where there is one: [Hq, Tq], of any strides. Rows that see nothing, and those
    past Tq, which tiles may read, have lse2 = inf and delta = 0: then every p = exp2(s - lse2) is 0.
    """
    num_rows, heads, head_dim = out.shape
    padded = (-(-num_rows // PADDING) + 1) * PADDING
    lse2, delta = torch.empty(2, heads, padded, dtype=torch.float32, device=out.device)
    columns = triton.next_power_of_2(head_dim)
    rows = 4096 // columns
    prepare_kernel[-(-padded // rows), heads](
        out,
        dout,
        lse,
        dlse,
        lse2,
        delta,
        num_rows,
        padded,
        strides(out),
        strides(dout),
        *lse.stride(),
        *(lse if dlse is None else dlse).stride(),
        ROWS=rows,
        COLUMNS=columns,
        D=head_dim,
        enable_fp_fusion=True,
    )
    return lse2, delta
