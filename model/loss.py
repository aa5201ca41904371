"""The language modelling loss over the few tokens of a long sequence that bear one."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def weighted_loss(
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    logits: Callable[[Tensor], Tensor],
    *,
    rows: Tensor | None = None,
    chunk: int = 1024,
) -> Tensor:
    """The sum of weights * negative log-likelihood, a float32 scalar (float64 for float64 logits).

    hidden [T, C]; targets int64 [T]; weights float32 [T]; logits: [n, C] -> [n, vocab]; rows: int64 [n],
    those with a weight, which are looked for (and waited for) where they are not given. Only they
    reach the head, `chunk` at a time, and run again in the backward pass: [T, vocab] never exists.
    Without such a row the result is a zero that depends on hidden and on the head, whose gradients
    are zeros.
    """
    rows = weights.nonzero().squeeze(1) if rows is None else rows
    hidden, targets, weights = hidden[rows], targets[rows], weights[rows]

    def chunk_loss(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        scores = logits(hidden)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return (F.cross_entropy(scores, targets, reduction="none") * weights).sum()

    parts = zip(hidden.split(chunk), targets.split(chunk), weights.split(chunk), strict=True)  # one, if empty
    losses = [checkpoint(chunk_loss, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(losses).sum()
