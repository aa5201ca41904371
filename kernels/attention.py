"""Attention on one device: the public function, and the block form that a ring step uses."""

import importlib
from functools import lru_cache
from typing import Any, Literal, Protocol, cast, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .visibility import Visibility, check_cu_seqlens, document_bounds

BACKENDS = ("cpu", "reference")  # modules of this folder that follow `Backend`
DEFAULT_BACKENDS = {"cpu": "cpu"}  # by device type


class Backend(Protocol):
    """A module with these two functions. Tensors as in `block_forward` and `block_backward`."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visibility: Visibility,
        *,
        scale: float,
        state: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        visibility: Visibility,
        *,
        scale: float,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dlse: Tensor | None = None,
    ) -> None: ...


def find_backend(name: str | None, device: torch.device) -> Backend:
    """The backend of that name, or the one for that device. Raises ValueError where there is none."""
    chosen = name or DEFAULT_BACKENDS.get(device.type)
    if chosen not in BACKENDS:
        problem = f"unknown backend {name!r}" if name else f"no backend for tensors on {device.type}"
        raise ValueError(f"{problem}: backend must be one of {', '.join(BACKENDS)}")
    return cast(Backend, importlib.import_module(f".{chosen}", __package__))


def block_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    state: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over one block of keys, folded into the carried softmax state (FlashAttention, sec. 3.1).

    Args:
        q: [Tq, Hq, D]. k, v: [Tk, Hkv, D], Hkv divides Hq. Any of Tq, Tk, Hq may be 0.
        visibility: the keys that each row sees.
        scale: of the scores, usually D ** -0.5.
        state: (out, lse) of the blocks before, updated in place.
        backend: a name in `BACKENDS`; None: by device.

    Returns:
        out [Tq, Hq, D] and natural-log lse [Hq, Tq], float32, float64 for float64 input. Rows that have seen
        nothing have out 0 and lse -inf.
    """
    return find_backend(backend, q.device).forward(q, k, v, visibility, scale=scale, state=state)


def block_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    dlse: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, added to those of the blocks before (FlashAttention-2, algorithm 2).

    Args:
        q, k, v, visibility, scale, backend: as in `block_forward`.
        out, lse: [Tq, Hq, D] and [Hq, Tq], the final ones, after all blocks.
        dout: [Tq, Hq, D], gradient of out. dlse: [Hq, Tq], gradient of lse, if any.
        dq, dk, dv: float32 (float64) shaped as q, k, v, added to in place; None: zeros.

    Returns:
        dq, dk, dv.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype) if dx is None else dx for x, dx in ((q, dq), (k, dk), (v, dv)))
    find_backend(backend, q.device).backward(
        q, k, v, out, lse, dout, visibility, scale=scale, dq=dq, dk=dk, dv=dv, dlse=dlse
    )
    return dq, dk, dv


class Attention(torch.autograd.Function):
    """`block_forward` over all keys at once; out comes back in q's dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visibility: Visibility,
        scale: float,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        out, lse = block_forward(q, k, v, visibility, scale=scale, backend=backend)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        ctx.visibility, ctx.scale, ctx.backend = visibility, scale, backend
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides the names)
        ctx: Any, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        grads = block_backward(q, k, v, out, lse, dout, ctx.visibility, scale=ctx.scale, dlse=dlse, backend=ctx.backend)
        return *(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)), None, None, None


@lru_cache(maxsize=64)
def attention_visibility(
    query_offsets: tuple[int, ...],
    key_offsets: tuple[int, ...],
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Visibility:
    """Of documents whose queries and keys end together (bottom-right aligned); kept, as every layer asks."""
    queries, keys = torch.tensor(query_offsets), torch.tensor(key_offsets)
    document = torch.repeat_interleave(torch.arange(len(queries) - 1), queries.diff())
    first, last = keys[document], keys[document + 1] - 1
    positions = torch.arange(query_offsets[-1]) - queries[document + 1] + last + 1
    lo, hi = document_bounds(positions, first, last, causal=causal, window=window)
    return Visibility.from_bounds(lo.to(device), hi.to(device), torch.arange(key_offsets[-1], device=device))


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError where q, k, v do not fit together."""
    if q.dim() not in (3, 4):
        raise ValueError(f"q must be [B, S, H, D] or packed [T, H, D], got {list(q.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape, got {list(k.shape)} and {list(v.shape)}")
    if k.dim() != q.dim() or k.shape[:-3] != q.shape[:-3] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must match q in batch and head_dim, got q {list(q.shape)} and k {list(k.shape)}")
    heads, key_heads = q.shape[-2], k.shape[-2]
    if heads % max(key_heads, 1) or (heads and not key_heads):
        raise ValueError(f"q's heads must be a multiple of k's, got {heads} and {key_heads}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k, v must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}: cast them alike")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")


def offsets_of(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Where each document of x [B, S, H, D] or [T, H, D] starts, and where the last one ends."""
    if cu_seqlens is not None:
        return tuple(cu_seqlens.tolist())
    batch, seq = (1, *x.shape[:1]) if x.dim() == 3 else x.shape[:2]
    return tuple(seq * i for i in range(batch + 1))


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v, with gradients for q, k, v and through lse.

    Args:
        q: [B, Sq, Hq, D], or packed [T, Hq, D]. k, v: [B, Sk, Hkv, D] or [T, Hkv, D], Hkv divides Hq.
        causal: no key after the query; where Sq != Sk the last query sees the last key (bottom-right).
        window: only keys less than `window` positions away.
        scale: default D ** -0.5.
        cu_seqlens: integer [num_docs + 1] from 0 to T; packed tokens see their own document alone.
        return_lse: also return the natural-log sum of exponentials, -inf for a row that sees nothing.
        backend: a name in `BACKENDS`; None: by device.

    Returns:
        out shaped and typed as q; with return_lse also lse, float32 (float64), [B, Hq, Sq] or [Hq, T].

    Raises:
        ValueError: shapes, dtypes, devices or heads that do not fit, a bad cu_seqlens, window or backend.
    """
    check_shapes(q, k, v)
    find_backend(backend, q.device)
    if cu_seqlens is not None:
        if q.dim() != 3:
            raise ValueError(f"cu_seqlens needs packed q, k, v [T, H, D], got q {list(q.shape)}")
        if q.shape[0] != k.shape[0]:
            raise ValueError(f"cu_seqlens needs as many keys as queries, got {k.shape[0]} and {q.shape[0]}")
        check_cu_seqlens(cu_seqlens, q.shape[0])
    visibility = attention_visibility(offsets_of(q, cu_seqlens), offsets_of(k, cu_seqlens), causal, window, q.device)
    packed = (x if x.dim() == 3 else x.flatten(0, 1) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = Attention.apply(*packed, visibility, scale, backend)
    out = out.view(q.shape)
    if not return_lse:
        return out
    return out, lse if q.dim() == 3 else lse.unflatten(1, q.shape[:2]).transpose(0, 1)
