"""Partial attention results of all ranks, merged by their lse: flash-decoding over a distributed cache."""

import torch
from torch import Tensor

from ..comm.mesh import Mesh
from .ulysses import HeadSplit


def merge_partials(out: Tensor, lse: Tensor, heads: HeadSplit, mesh: Mesh) -> Tensor:
    """All heads' attention over all slots, on every rank of the group. Collective.

    out float32 [B, my heads, D] and lse float32 [my heads, B]: over this rank's slots. Returns float32 [B, Hq, D].
    """
    batch, _, head_dim = out.shape
    counts = [s.stop - s.start for s in heads.q]
    outs = [[out.new_empty(batch, h, head_dim) for h in counts] for _ in range(mesh.ring)]
    lses = [[lse.new_empty(h, batch) for h in counts] for _ in range(mesh.ring)]
    recv = [[outs[r][u], lses[r][u]] for r in range(mesh.ring) for u in range(mesh.ulysses)]
    mesh.transport.all_to_all("sp", [[out, lse]] * mesh.sp_size, recv)
    whole = torch.stack([torch.cat(parts, 1) for parts in outs])  # [ring, B, Hq, D]
    weights = torch.stack([torch.cat(parts) for parts in lses]).softmax(0)  # [ring, Hq, B]; own keys: never all -inf
    return (whole * weights.transpose(1, 2)[..., None]).sum(0)
