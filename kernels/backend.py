"""Attention over one block of keys, by whichever backend: what a ring step, a decode step and the operator call."""

import importlib
from typing import Protocol, cast

import torch
from torch import Tensor

from .visibility import Visibility

# name -> module of this folder and, where it holds several, the object in it; all follow `Backend`
BACKENDS = {
    "cpu": ("cpu", None),
    "reference": ("reference", None),
    "tuned": ("cuda", "tuned"),
    "triton": ("cuda", "triton"),
    "gluon": ("cuda", "gluon"),
}
DEFAULT_BACKENDS = {"cpu": "cpu", "cuda": "tuned"}  # by device type


class Backend(Protocol):
    """Two functions, as `block_forward` and `block_backward`, whose callers cast for those that ignore `final`."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visibility: Visibility,
        *,
        scale: float,
        state: tuple[Tensor, Tensor] | None = None,
        final: bool = False,
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
        grads: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
        dlse: Tensor | None = None,
        final: bool = False,
        deterministic: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def backend_name(name: str | None, device: torch.device) -> str:
    """The name given, or the one for that device. Raises ValueError where there is none."""
    chosen = name or DEFAULT_BACKENDS.get(device.type)
    if chosen not in BACKENDS:
        problem = f"unknown backend {name!r}" if name else f"no backend for tensors on {device.type}"
        raise ValueError(f"{problem}: backend must be one of {', '.join(BACKENDS)}")
    return chosen


def find_backend(name: str | None, device: torch.device) -> Backend:
    """The backend of that name, or the one for that device. Raises ValueError where there is none."""
    module, attribute = BACKENDS[backend_name(name, device)]
    found = importlib.import_module(f".{module}", __package__)
    return cast(Backend, found if attribute is None else getattr(found, attribute))


def running(grads: tuple[Tensor | None, ...], *inputs: Tensor) -> list[Tensor]:
    """The gradients so far, zeros in float32 (float64) where there are none yet."""
    return [
        x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32)) if grad is None else grad
        for grad, x in zip(grads, inputs, strict=True)
    ]


def block_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    state: tuple[Tensor, Tensor] | None = None,
    final: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over one block of keys, folded into the carried softmax state (FlashAttention, sec. 3.1).

    Args:
        q: [Tq, Hq, D]. k, v: [Tk, Hkv, D], Hkv divides Hq. Any of Tq, Tk, Hq may be 0.
        visibility: the keys that each row sees.
        scale: of the scores, usually D ** -0.5.
        state: (out, lse) of the blocks before, as they came back; updated in place.
        final: no block follows: out comes back in q's dtype.
        backend: a name in `BACKENDS`; None: by device.

    Returns:
        out [Tq, Hq, D] and natural-log lse [Hq, Tq], float32, float64 for float64 input. Rows that have seen
        nothing have out 0 and lse -inf.
    """
    run = find_backend(backend, q.device).forward
    out, lse = run(q, k, v, visibility, scale=scale, state=state, final=final)
    return out.to(q.dtype) if final else out, lse


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
    grads: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    dlse: Tensor | None = None,
    final: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, added to those of the blocks before (FlashAttention-2, algorithm 2).

    Args:
        q, k, v, visibility, scale, backend: as in `block_forward`.
        out, lse: [Tq, Hq, D] and [Hq, Tq], the final ones, after all blocks.
        dout: [Tq, Hq, D], gradient of out. dlse: [Hq, Tq], gradient of lse, if any.
        grads: dq, dk, dv so far, float32 (float64), shaped as q, k, v and added to in place; None: nothing yet.
        final: no block follows: gradients come back in the dtypes of q, k, v.
        deterministic: the same bits from the same input; False allows a kernel that is faster without.

    Returns:
        dq, dk, dv.
    """
    run = find_backend(backend, q.device).backward
    dq, dk, dv = run(
        q,
        k,
        v,
        out,
        lse,
        dout,
        visibility,
        scale=scale,
        grads=grads,
        dlse=dlse,
        final=final,
        deterministic=deterministic,
    )
    return (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)) if final else (dq, dk, dv)
