"""2D sequence-parallel attention: Ulysses (all-to-all over heads) inside a ring (peer to peer over keys).

LongVILA (arXiv 2408.10188, section 3). Three differentiable steps: to_heads, ring_attention, to_tokens.
"""

from torch import Tensor

from ..comm.layout import Layout
from ..comm.mesh import Mesh
from ..kernels.attention import check_shapes, score_scale
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
    cu_seqlens [num_documents + 1] bounds the packed documents of the whole sequence. scale, backend, deterministic: as
    in `kernels.attention.attention`. Returns out like q.
    Differentiable in q, k and v, once. Raises ValueError as `attention` does, and for q, k, v that do not fit the
    layout or the mesh's device: before anything travels, so that the ranks stay in step.
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
    return planned_attention(q, k, v, plan, scale=scale)


def planned_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float | None = None) -> Tensor:
    """2D attention by a plan; q, k, v, scale, what it returns and raises as in `parallel_attention`."""
    _check(q, k, v, plan)
    scale = score_scale(scale, q.shape[-1])
    if q.dim() == 4:  # all rows of the batch share the mask, so that they can stand in line as more heads
        q_rows, k_rows, v_rows = (x.transpose(0, 1).flatten(1, 2) for x in (q, k, v))
        out = planned_attention(q_rows, k_rows, v_rows, plan, scale=scale)
        return out.unflatten(1, (q.shape[0], q.shape[2])).transpose(0, 1)
    heads = HeadSplit(q.shape[1], k.shape[1], plan.mesh.ulysses)
    q, k, v = to_heads(q, k, v, heads=heads, plan=plan)
    return to_tokens(ring_attention(q, k, v, plan, scale=scale), heads=heads, plan=plan)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> None:
    check_shapes(q, k, v)
    mesh, expected = plan.mesh, plan.counts[plan.mesh.ulysses_rank]
    if (q.shape[-3], k.shape[-3]) != (expected, expected):
        raise ValueError(
            f"rank {mesh.sp_rank} holds {expected} tokens by the layout, got q with {q.shape[-3]} and "
            f"k with {k.shape[-3]}: shard with layout.shard(x, mesh.sp_rank)"
        )
    if q.device.type != mesh.device.type:
        raise ValueError(f"q, k, v must be on the mesh's device, {mesh.device}, got {q.device}")
