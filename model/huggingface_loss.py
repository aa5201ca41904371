"""The loss of a batch whose tokens are spread over ranks, and its gradients."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..comm.mesh import Mesh
from .once import OnceDifferentiable

IGNORED = -100
BUCKET_BYTES = 2**28  # of gradients in one all-reduce; besides them there is a copy of as many


class LabelledTokens:
    """What this rank's tokens predict. rows: int64 [n], those that bear a loss; targets: int64 [n].

    count: number of such tokens on all ranks of the group, a tensor.
    """

    def __init__(self, shifted_labels: Tensor, flat: Tensor, mine: Tensor) -> None:
        """shifted_labels [B, S]: the token after each; flat, mine: places of all tokens, and of this rank's, in it."""
        labels = shifted_labels.flatten()
        targets = labels[mine]
        self.rows = (targets != IGNORED).nonzero().squeeze(1)
        self.targets = targets[self.rows]
        self.count = (labels[flat] != IGNORED).sum()

    def loss(self, logits: Tensor, count: Tensor | int | None) -> Tensor:
        """This rank's part of the mean loss over `count` tokens (None: its own count); logits [..., n, vocab]."""
        scores = logits.flatten(0, -2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        total = F.cross_entropy(scores, self.targets, reduction="sum")
        return total / (self.count if count is None else count)


def shift(labels: Tensor) -> Tensor:
    """labels [B, S] moved one place to the left: what each token predicts."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def sum_over_ranks(part: Tensor, mesh: Mesh, *, gradient: float = 1.0) -> Tensor:
    """The sum of all ranks' scalars, on each rank of the group; backward each has `gradient` times its own part's."""
    return _SumOverRanks.apply(part, mesh, gradient)


class _SumOverRanks(OnceDifferentiable):
    @staticmethod
    def forward(ctx: Any, part: Tensor, mesh: Mesh, gradient: float) -> Tensor:
        ctx.gradient = gradient
        parts = part.new_empty(mesh.sp_size, 1)
        mesh.transport.all_to_all("sp", [[part.reshape(1)]] * mesh.sp_size, [[row] for row in parts])
        return parts.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.gradient, None, None


@torch.no_grad()
def sum_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Add up the gradients of all ranks of a sequence-parallel group, and average over the data axis. Collective.

    For a model that neither FSDP nor DDP wraps: between backward() and the optimizer's step. A parameter without a
    gradient on every rank keeps none.
    """
    if mesh.world_size == 1:
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters]).int().to(mesh.device)
    dist.all_reduce(has_gradient, dist.ReduceOp.MAX)
    for parameter, somewhere in zip(parameters, has_gradient.tolist(), strict=True):
        if somewhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in parameters if parameter.grad is not None]):
        rows = [grad.flatten() for grad in bucket]
        flat = torch.cat(rows) if len(rows) > 1 else rows[0]
        dist.all_reduce(flat)
        flat.div_(mesh.data)
        for grad, summed in zip(bucket, flat.split([len(row) for row in rows]), strict=True):
            grad.copy_(summed.view_as(grad))


def _buckets(grads: Iterable[Tensor]) -> list[list[Tensor]]:
    """Gradients that are reduced together: of one dtype, in their order, up to BUCKET_BYTES; a larger one alone."""
    of_dtype: defaultdict[torch.dtype, list[list[Tensor]]] = defaultdict(list)
    for grad in grads:
        buckets = of_dtype[grad.dtype]
        if not buckets or sum(other.nbytes for other in buckets[-1]) + grad.nbytes > BUCKET_BYTES:
            buckets.append([])
        buckets[-1].append(grad)
    return [bucket for buckets in of_dtype.values() for bucket in buckets]
