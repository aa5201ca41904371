"""Attention as an operator of PyTorch, opaque to its compiler: `torch.compile(fullgraph=True)`, activation
checkpointing and CUDA graphs treat it as one call.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .backend import block_backward, block_forward
from .visibility import Visibility, check_cu_seqlens, document_bounds

# Graphs that mode="reduce-overhead" records may keep no tensor but their outputs: the masks of a call are kept for all.
KEPT_OUT_OF_GRAPHS = torch.Tag.cudagraph_unsafe


@torch.library.custom_op("longtake::attention", mutates_args=(), tags=[KEPT_OUT_OF_GRAPHS])
def attention_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    deterministic: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """out like q, and lse [Hq, tokens]. Arguments as in `attention.attention`, which has checked them."""
    visibility = visibility_of(q, k, cu_seqlens, causal, window)
    q3, k3, v3 = packed(q, k, v)
    out, lse = block_forward(q3, k3, v3, visibility, scale=scale, final=True, backend=backend)
    return out.view(q.shape), lse


@attention_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    deterministic: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    tokens = q.shape[0] if q.dim() == 3 else q.shape[0] * q.shape[1]
    return q.new_empty(q.shape), q.new_empty((q.shape[-2], tokens), dtype=lse_dtype)


@torch.library.custom_op("longtake::attention_backward", mutates_args=(), tags=[KEPT_OUT_OF_GRAPHS])
def attention_backward_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    deterministic: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, like q, k, v."""
    visibility = visibility_of(q, k, cu_seqlens, causal, window)
    dout = torch.zeros_like(out) if dout is None else dout
    q3, k3, v3, out3, dout3 = packed(q, k, v, out, dout)
    dq, dk, dv = block_backward(
        q3,
        k3,
        v3,
        out3,
        lse,
        dout3,
        visibility,
        scale=scale,
        dlse=dlse,
        final=True,
        deterministic=deterministic,
        backend=backend,
    )
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


@attention_backward_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    grads = attention_backward_operator(*tensors, dout, dlse, cu_seqlens, *ctx.options)
    return *grads, *[None] * (1 + len(ctx.options))


attention_operator.register_autograd(_backward, setup_context=_save)


def packed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, S, H, D] as [B * S, H, D], with contiguous heads."""
    flat = (x if x.dim() == 3 else x.flatten(0, 1) for x in tensors)
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in flat)


def visibility_of(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int | None) -> Visibility:
    """The mask of a call; one is made for all layers and steps that ask for the same."""
    if cu_seqlens is None:
        return _visibility(_even_offsets(q), _even_offsets(k), causal, window, q.device)
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        # Recorded with the graph, so that a replay follows what cu_seqlens then holds; nothing may be read here.
        return _documents(cu_seqlens, cu_seqlens, q.shape[0], k.shape[0], causal, window)
    offsets = _checked_offsets(cu_seqlens, q.shape[0])
    return _visibility(offsets, offsets, causal, window, q.device)


def _even_offsets(x: Tensor) -> tuple[int, ...]:
    """Where each sequence of x [B, S, H, D] or [T, H, D] starts, and where the last one ends."""
    batch, seq = (1, x.shape[0]) if x.dim() == 3 else x.shape[:2]
    return tuple(seq * i for i in range(batch + 1))


_seen_offsets: Any = WeakIdKeyDictionary()  # cu_seqlens -> (version, offsets): a GPU's is waited for once


def _checked_offsets(cu_seqlens: Tensor, num_tokens: int) -> tuple[int, ...]:
    version = None if cu_seqlens.is_cpu or cu_seqlens.is_inference() else cu_seqlens._version
    seen_version, offsets = _seen_offsets.get(cu_seqlens, (None, ()))
    if version is None or version != seen_version or offsets[-1] != num_tokens:
        check_cu_seqlens(cu_seqlens, num_tokens)
        offsets = tuple(cu_seqlens.tolist())
        _seen_offsets[cu_seqlens] = version, offsets
    return offsets


@lru_cache(maxsize=64)
def _visibility(
    query_offsets: tuple[int, ...],
    key_offsets: tuple[int, ...],
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Visibility:
    queries, keys = torch.tensor(query_offsets), torch.tensor(key_offsets)
    return _documents(queries, keys, query_offsets[-1], key_offsets[-1], causal, window).to(device)


def _documents(
    queries: Tensor, keys: Tensor, num_queries: int, num_keys: int, causal: bool, window: int | None
) -> Visibility:
    """Of documents with these offsets, whose queries and keys end together (bottom-right aligned); no wait in it."""
    row = torch.arange(num_queries, device=queries.device)
    document = torch.searchsorted(queries, row, right=True)
    first, last = keys[document - 1].long(), keys[document].long() - 1
    positions = row - queries[document] + last + 1
    lo, hi = document_bounds(positions, first, last, causal=causal, window=window)
    return Visibility.from_bounds(lo, hi, torch.arange(num_keys, device=keys.device))
