"""The CPU backend: attention over a block by PyTorch's flash kernels, one call for each tile of the plan.

The forward returns lse and the backward takes it, so tiles fold into one carried float32 state and gradients
add up. Facts of torch 2.13 that this file rests on: grouped queries are native; `is_causal` aligns top-left; a
row whose keys are all masked yields out 0 but lse 0; a call without keys kills the process; a last stride other
than 1 is silently misread.
"""

import torch
from torch import Tensor

from .backend import running
from .tiles import Kind, Tile
from .visibility import Visibility

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def operand(x: Tensor) -> Tensor:
    """Half precision is worked on in float32, so that nothing is rounded between tiles or ring steps."""
    return (x if x.dtype == torch.float64 else x.float()).contiguous()


def windows(x: Tensor, first: int, size: int, step: int, count: int) -> Tensor:
    """View [count, H, size, D] of `count` stretches of `size` rows of x [T, H, D], `step` rows apart."""
    stretch = x[first : first + (count - 1) * step + size]
    return stretch.unfold(0, size, step).transpose(2, 3)


def query_rows(tile: Tile, x: Tensor) -> Tensor:
    """View [count, H, rows, D] of the tile's query rows of x [Tq, H, D]."""
    return windows(x, tile.rectangle.row, tile.rectangle.rows, tile.row_step, tile.count)


def key_rows(tile: Tile, x: Tensor) -> Tensor:
    """View [count, H, keys, D] of the tile's key rows of x [Tk, H, D]."""
    return windows(x, tile.rectangle.key, tile.rectangle.keys, tile.key_step, tile.count)


def lse_rows(tile: Tile, lse: Tensor) -> Tensor:
    """View [count, H, rows] of the tile's rows of lse [H, Tq]."""
    return query_rows(tile, lse.T.unsqueeze(-1)).squeeze(-1)


def tile_mask(tile: Tile, q: Tensor) -> Tensor | None:
    return None if tile.mask is None else tile.mask.to(q.dtype)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    state: tuple[Tensor, Tensor] | None = None,
    final: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `backend.block_forward`. Updates `state` in place."""
    q, k, v = operand(q), operand(k), operand(v)
    out, lse = state or (q.new_zeros(q.shape), q.new_full((q.shape[1], q.shape[0]), -torch.inf))
    if q.numel() == 0:
        return out, lse
    for tile in visibility.tiles:
        q_tile, k_tile, v_tile = query_rows(tile, q), key_rows(tile, k), key_rows(tile, v)
        part, part_lse = flash(
            q_tile,
            k_tile,
            v_tile,
            0.0,
            tile.rectangle.kind is Kind.CAUSAL,
            attn_mask=tile_mask(tile, q),
            scale=scale,
        )
        if tile.empty is not None:
            part_lse.masked_fill_(tile.empty, -torch.inf)
        out_tile, lse_tile = query_rows(tile, out), lse_rows(tile, lse)
        if tile.first and state is None:
            out_tile.copy_(part)
            lse_tile.copy_(part_lse)
        else:
            fold(out_tile, lse_tile, part, part_lse)
    return out, lse


def fold(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merges a part into out [..., D] and lse [...] in place; either side, or both, may have seen nothing."""
    # The part's share is e^part_lse / (e^lse + e^part_lse); where both are -inf it is taken as 0.
    share = (part_lse - lse).sigmoid_().nan_to_num_(nan=0.0)
    out.lerp_(part, share.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, part_lse))


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    dlse: Tensor | None = None,
    final: bool = False,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `backend.block_backward`."""
    dq, dk, dv = running(grads, q, k, v)
    if q.numel() == 0:
        return dq, dk, dv
    head_dim = q.shape[-1]
    q, k, v, out, dout = operand(q), operand(k), operand(v), operand(out), operand(dout)
    if dlse is not None:
        q, k, v, out, dout = carry_dlse(q, k, v, out, dout, dlse)
    # A row that sees nothing anywhere must not meet exp(-inf - -inf) in a masked tile.
    lse = lse.masked_fill(lse == -torch.inf, 0)
    for tile in visibility.tiles:
        parts = flash_backward(
            query_rows(tile, dout),
            query_rows(tile, q),
            key_rows(tile, k),
            key_rows(tile, v),
            query_rows(tile, out),
            lse_rows(tile, lse),
            0.0,
            tile.rectangle.kind is Kind.CAUSAL,
            attn_mask=tile_mask(tile, q),
            scale=scale,
        )
        targets = query_rows(tile, dq), key_rows(tile, dk), key_rows(tile, dv)
        for target, part in zip(targets, parts, strict=True):
            target.add_(part[..., :head_dim])
    return dq, dk, dv


def carry_dlse(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Appends a column to each head, q, k, v 0, dout 1, out -dlse: so `dP - sum(dout * out)` gains dlse."""
    q, k, v, out = (torch.nn.functional.pad(x, (0, 1)) for x in (q, k, v, out))
    dout = torch.nn.functional.pad(dout, (0, 1), value=1.0)
    out[..., -1] = -dlse.T
    return q, k, v, out, dout
