import pytest
import torch
import torch.nn.functional as F
from longtake.model.loss import weighted_loss
from torch import nn


def inputs(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, nn.Linear]:
    torch.manual_seed(num_rows)
    hidden = torch.randn(num_rows, 16, requires_grad=True)
    weights = torch.rand(num_rows) * (torch.rand(num_rows) < 0.5)
    return hidden, torch.randint(31, (num_rows,)), weights, nn.Linear(16, 31)


@pytest.mark.parametrize("num_rows", [1, 50, 211])
def test_loss_and_gradients_are_those_of_cross_entropy(num_rows):
    hidden, targets, weights, head = inputs(num_rows)
    weights[-1] = 0.3
    double, reference = hidden.detach().double().requires_grad_(), nn.Linear(16, 31).double()
    reference.load_state_dict(head.state_dict())
    losses = F.cross_entropy(reference(double), targets, reduction="none")
    expected = (losses * weights).sum()
    expected.backward()

    loss = weighted_loss(hidden, targets, weights, head, chunk=16)
    loss.backward()
    # float32 sums of up to 211 terms
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    pairs = [(hidden, double), *zip(head.parameters(), reference.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_rows", [0, 8])
def test_no_weighted_row_gives_zero_and_zero_gradients(num_rows):
    hidden, targets, weights, head = inputs(num_rows)
    loss = weighted_loss(hidden, targets, torch.zeros_like(weights), head)
    loss.backward()
    assert loss.item() == 0
    for tensor in (hidden, *head.parameters()):
        assert tensor.grad is not None and not tensor.grad.any()


def test_the_head_sees_weighted_rows_alone_one_chunk_at_a_time():
    hidden, targets, weights, head = inputs(300)
    sizes = []

    def logits(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return head(rows)

    weighted_loss(hidden, targets, weights, logits, chunk=64).backward()
    assert max(sizes) <= 64
    assert sum(sizes) == 2 * weights.count_nonzero()  # once forward, once again backward


def test_rows_that_are_given_are_not_looked_for():
    hidden, targets, weights, head = inputs(40)
    expected = weighted_loss(hidden, targets, weights, head)
    rows = weights.nonzero()[:, 0]
    assert torch.equal(weighted_loss(hidden, targets, weights, head, rows=rows), expected)
    fewer = weighted_loss(hidden, targets, weights, head, rows=rows[1:])
    assert fewer < expected


def test_targets_without_weight_may_be_anything():
    hidden, targets, weights, head = inputs(40)
    expected = weighted_loss(hidden, targets, weights, head)
    targets[weights == 0] = -100
    assert torch.equal(weighted_loss(hidden, targets, weights, head), expected)


def test_loss_is_float32_for_bfloat16_logits():
    hidden, targets, weights, head = inputs(40)
    loss = weighted_loss(hidden.bfloat16(), targets, weights, head.bfloat16())
    logits = head(hidden.bfloat16()).float()
    expected = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
