"""2D sequence-parallel attention: Ulysses (all-to-all over heads) inside a ring (peer to peer over keys).

LongVILA (arXiv 2408.10188, section 3). Three differentiable steps: to_heads, ring_attention, to_tokens.
"""

from torch import Tensor

from ..comm.layout import Layout
from ..comm.mesh import Mesh
from .attention_plan import AttentionPlan, Route, holdings, plan_attention
from .ring import ring_attention
from .ulysses import HeadSplit, to_heads, to_tokens


def parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: Mesh,
    layout: Layout,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    route: Route = "direct",
    backend: str | None = None,
    deterministic: bool = True,
) -> Tensor:
    """Exact attention over a sequence whose tokens `layout` deals out to the ranks of `mesh`.

    q [B, S_local, Hq, D], k, v [B, S_local, Hkv, D] (or packed, without B): this rank's tokens, all heads.
    cu_seqlens [num_documents + 1] bounds the packed documents of the whole sequence. backend, deterministic: as in
    `kernels.attention.attention`. Returns out like q.
    Differentiable in q, k and v. Raises ValueError for shapes that do not fit each other or the layout.
    """
    plan = plan_attention(
        mesh,
        *holdings(layout),
        num_tokens=layout.num_tokens,
        causal=causal,
        window=window,
        cu_seqlens=cu_seqlens,
        route=route,
        backend=backend,
        deterministic=deterministic,
    )
    if q.dim() == 3:
        return planned_attention(q, k, v, plan, scale=scale)
    # All rows of the batch share the mask, so that they can stand in line as more heads.
    batch = q.shape[0]
    q_rows, k_rows, v_rows = (x.transpose(0, 1).flatten(1, 2) for x in (q, k, v))
    out = planned_attention(q_rows, k_rows, v_rows, plan, scale=scale)
    return out.unflatten(1, (batch, q.shape[2])).transpose(0, 1)


def planned_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float | None = None) -> Tensor:
    """2D attention by a plan. q [S_local, Hq, D], k, v [S_local, Hkv, D]; returns [S_local, Hq, D]."""
    heads = HeadSplit(q.shape[1], k.shape[1], plan.mesh.ulysses)
    _check(q, k, v, plan)
    q, k, v = to_heads(q, k, v, heads=heads, plan=plan)
    out = ring_attention(q, k, v, plan, scale=q.shape[-1] ** -0.5 if scale is None else scale)
    return to_tokens(out, heads=heads, plan=plan)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> None:
    expected = plan.counts[plan.mesh.ulysses_rank]
    if (q.shape[0], k.shape[0]) != (expected, expected):
        raise ValueError(
            f"rank {plan.mesh.sp_rank} holds {expected} tokens by the layout, got q with {q.shape[0]} and "
            f"k with {k.shape[0]}: shard with layout.shard(x, mesh.sp_rank)"
        )
    if k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q, k, v do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
