"""A peer to measure against: axolotl-ringmaster, 2D attention that runs on gloo too. Not a dependency.

It works on contiguous shards: its zigzag needs CUDA, and its other balanced schedule as many kv heads as query heads.
On a CPU its ring computes each block by an explicit softmax, all scores of the block in memory; its Ulysses and its
packed documents go through PyTorch's `scaled_dot_product_attention`, documents with a mask over the whole sequence.
"""

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import torch
from torch import Tensor

from ..comm.layout import Layout
from ..comm.mesh import Mesh

PACKAGE = "axolotl-ringmaster"  # imported as `ringmaster`, a name that another package on PyPI has too


def peer_version() -> str | None:
    """Of the installed peer; None without one."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def peer_limit(layout: Layout, num_kv_heads: int) -> str | None:
    """Why the peer cannot do this case, if it cannot."""
    if len(set(layout.counts)) > 1:
        return "needs shards of one length"
    if num_kv_heads % layout.ulysses:
        return f"needs kv heads that {layout.ulysses} divides"
    return None


def peer_attention(
    mesh: Mesh, cu_seqlens: Tensor, *, num_heads: int, num_kv_heads: int
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The peer's causal attention on this grid: q [S_local, Hq, D], k, v [S_local, Hkv, D], out like q. Collective."""
    peer = importlib.import_module("ringmaster")
    config = peer.RingmasterConfig(
        size=mesh.sp_size,
        ring_size=mesh.ring,
        ulysses_size=mesh.ulysses,
        rotate_method=peer.RotateMethod.ALLTOALL,  # the other one has no kernel for CPUs
    )
    runtime = peer.setup(config, device_type="cpu", inner_attn="sdpa")
    if len(cu_seqlens) > 2:
        runtime.varlen = cu_seqlens.to(torch.int32), int(cu_seqlens.diff().max())
    attend = importlib.import_module("transformers").AttentionInterface()[runtime.attn_implementation]
    layer = SimpleNamespace(num_key_value_groups=num_heads // num_kv_heads)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return attend(layer, q, k, v, None, is_causal=True)[0][0]

    return call
