"""Attention on one device: the public function."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from .backend import backend_name
from .operator import attention_operator
from .visibility import check_window


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError where q, k, v do not fit together."""
    if q.dim() not in (3, 4):
        raise ValueError(f"q must be [B, S, H, D] or packed [T, H, D], got {list(q.shape)}")
    if not q.shape[-1]:
        raise ValueError(f"head_dim must be at least 1, got q {list(q.shape)}")
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


def score_scale(scale: float | None, head_dim: int) -> float:
    """The scale given, or head_dim ** -0.5. Raises ValueError for one that turns the order of scores about."""
    given = float(head_dim**-0.5) if scale is None else scale
    if not 0 < given < math.inf:
        raise ValueError(f"scale must be finite and above 0, got {scale}: negate q for a negative one")
    return given


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
    deterministic: bool = True,
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
    deterministic: bool = True,
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
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v, with gradients for q, k, v and through lse.

    Args:
        q: [B, Sq, Hq, D], or packed [T, Hq, D]. k, v: [B, Sk, Hkv, D] or [T, Hkv, D], Hkv divides Hq. Any strides:
            on CUDA, what does not lie in whole 16 bytes is copied first.
        causal: no key after the query; where Sq != Sk the last query sees the last key (bottom-right).
        window: only keys less than `window` positions away: at least 1.
        scale: above 0; default D ** -0.5.
        cu_seqlens: integer [num_docs + 1] from 0 to T; packed tokens see their own document alone. On a GPU it is read
            (and waited for) once, and again when PyTorch has changed it in place, not when other code has.
        return_lse: also return the natural-log sum of exponentials, -inf for a row that sees nothing.
        deterministic: the same bits from the same input; False allows a faster backward, where there is one.
        backend: None: by device, on CUDA by what `longtake tune` measured. Or "triton" (plain Triton kernels),
            "gluon" (Hopper's own), "cpu", "reference" (dense, float64).

    Returns:
        out shaped and typed as q; with return_lse also lse, float32 (float64), [B, Hq, Sq] or [Hq, T].

    Raises:
        ValueError: shapes, dtypes, devices or heads that do not fit, a bad cu_seqlens, window, scale or backend.
    """
    check_shapes(q, k, v)
    check_window(window)
    scale = score_scale(scale, q.shape[-1])
    backend = backend_name(backend, q.device)
    if cu_seqlens is not None:
        if q.dim() != 3:
            raise ValueError(f"cu_seqlens needs packed q, k, v [T, H, D], got q {list(q.shape)}")
        if q.shape[0] != k.shape[0]:
            raise ValueError(f"cu_seqlens needs as many keys as queries, got {k.shape[0]} and {q.shape[0]}")
        if cu_seqlens.device not in (q.device, torch.device("cpu")):
            raise ValueError(f"cu_seqlens must be on the CPU or on {q.device} with q, got {cu_seqlens.device}")
    out, lse = attention_operator(q, k, v, cu_seqlens, causal, window, scale, deterministic, backend)
    if not return_lse:
        return out
    return out, lse if q.dim() == 3 else lse.unflatten(1, q.shape[:2]).transpose(0, 1)
