"""Attention over a block as its definition says, dense and in float64. All backends are held against it.

lse_i = log sum_j e^(s_ij),  out_i = sum_j e^(s_ij - lse_i) v_j,  s_ij = scale q_i k_j,  j in [start_i, end_i)
"""

import torch
from torch import Tensor

from .backend import running
from .visibility import Visibility


def grouped(q: Tensor, k: Tensor, visibility: Visibility, scale: float) -> Tensor:
    """Scores float64 [Hkv, G, Tq, Tk], -inf where hidden; G query heads share a key head."""
    heads = k.shape[1]
    scores = scale * torch.einsum("qhgd,khd->hgqk", q.double().unflatten(1, (heads, -1)), k.double())
    key = torch.arange(k.shape[0], device=k.device)
    visible = (visibility.start[:, None] <= key) & (key < visibility.end[:, None])
    return scores.masked_fill(~visible, -torch.inf)


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
    if state is None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        state = (
            q.new_zeros(q.shape, dtype=dtype),
            q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=dtype),
        )
    out, lse = state
    if q.numel() == 0:
        return out, lse
    scores = grouped(q, k, visibility, scale)
    old_lse = lse.double()
    new_lse = torch.logaddexp(old_lse, scores.logsumexp(-1).flatten(0, 1))  # [Hq, Tq]
    norm = new_lse.masked_fill(new_lse == -torch.inf, 0)
    weights = (scores.flatten(0, 1) - norm[..., None]).exp().unflatten(0, scores.shape[:2])
    kept = (old_lse - norm).exp().T[..., None] * out.double()
    out.copy_(kept + torch.einsum("hgqk,khd->qhgd", weights, v.double()).flatten(1, 2))
    lse.copy_(new_lse)
    return out, lse


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
    scores = grouped(q, k, visibility, scale)
    heads = scores.shape[:2]
    norm = lse.double().masked_fill(lse == -torch.inf, 0).unflatten(0, heads)
    p = (scores - norm[..., None]).exp()  # [Hkv, G, Tq, Tk]
    q, dout = (x.double().unflatten(1, heads) for x in (q, dout))
    dp = torch.einsum("qhgd,khd->hgqk", dout, v.double())
    delta = (dout * out.double().unflatten(1, heads)).sum(-1).permute(1, 2, 0)
    if dlse is not None:
        delta = delta - dlse.double().unflatten(0, heads)
    ds = scale * p * (dp - delta[..., None])
    dq += torch.einsum("hgqk,khd->qhgd", ds, k.double()).flatten(1, 2)
    dk += torch.einsum("hgqk,qhgd->khd", ds, q)
    dv += torch.einsum("hgqk,qhgd->khd", p, dout)
    return dq, dk, dv
