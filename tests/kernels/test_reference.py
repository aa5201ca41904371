import pytest
import torch
from longtake.kernels.backend import block_backward, block_forward
from longtake.kernels.visibility import Visibility
from torch import Tensor

from tests.kernels.masks import cases, dense

CASES = cases()


def textbook(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> tuple[Tensor, Tensor]:
    """softmax by PyTorch, rows that see nothing set apart; differentiable."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = (scale * q.transpose(0, 1) @ k.mT).masked_fill(~dense(visibility), -torch.inf)
    blind = visibility.start == visibility.end
    weights = scores.masked_fill(blind[:, None], 0).softmax(-1) * ~blind[:, None]
    lse = scores.masked_fill(blind[:, None], 0).logsumexp(-1).masked_fill(blind, -torch.inf)
    return (weights @ v).transpose(0, 1), lse


@pytest.mark.parametrize("name", CASES)
def test_reference_is_softmax_and_its_gradients(name: str) -> None:
    visibility = CASES[name]
    generator = torch.Generator().manual_seed(0)
    tq, tk = len(visibility.start), len(visibility.kstart)
    shapes = [(tq, 6, 5), (tk, 2, 5), (tk, 2, 5), (tq, 6, 5), (6, tq)]
    q, k, v, dout, dlse = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    want_out, want_lse = textbook(q, k, v, visibility, 0.7)
    dlse = dlse.masked_fill(want_lse.isinf(), 0)
    want = torch.autograd.grad([want_out, want_lse], leaves, [dout, dlse])

    q, k, v = (x.detach() for x in leaves)
    out, lse = block_forward(q, k, v, visibility, scale=0.7, backend="reference")
    grads = block_backward(q, k, v, out, lse, dout, visibility, scale=0.7, dlse=dlse, backend="reference")
    torch.testing.assert_close((out, lse, *grads), (want_out, want_lse, *want))
