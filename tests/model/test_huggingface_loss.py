"""Gradients of all ranks are added up in a few all-reduces, whatever their dtypes, shapes and owners."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from longtake.comm.mesh import Mesh
from longtake.model import huggingface_loss
from longtake.model.huggingface_loss import sum_gradients
from torch import Tensor, nn

from tests.ranks import run_ranks

SIZES = (5, 7, 1, 40, 3, 2)  # of float32 vectors
OTHERS = {
    "matrix": torch.zeros(3, 4, dtype=torch.float64),
    "number": torch.zeros((), dtype=torch.float64),
    "bfloat16s": torch.zeros(6, dtype=torch.bfloat16),
}


def parameters() -> dict[str, nn.Parameter]:
    named = {f"row{i}": torch.zeros(size) for i, size in enumerate(SIZES)} | OTHERS
    return {name: nn.Parameter(x.clone()) for name, x in named.items()}


def gradient(name: str, like: Tensor, rank: int) -> Tensor | None:
    """Whole numbers, whose sums are the same in every order. Nobody has row2's, rank 1 alone has row4's."""
    if name == "row2" or (name == "row4" and rank != 1):
        return None
    seed = sum(map(ord, name)) + 1000 * rank
    values = torch.randint(-9, 9, like.shape, generator=torch.Generator().manual_seed(seed)).to(like)
    return values.t().contiguous().t() if name == "matrix" else values  # columns end to end


def reduce(rank: int, bucket_bytes: int) -> tuple[int, dict[str, Tensor | None]]:
    """Number of all-reduces, and the gradients afterwards."""
    mesh, frozen = Mesh(data=2, ring=2), nn.Parameter(torch.zeros(2), requires_grad=False)
    model = nn.ParameterDict(parameters() | {"frozen": frozen})
    for name, parameter in model.items():
        parameter.grad = None if parameter is frozen else gradient(name, parameter, rank)
    with (
        patch.object(huggingface_loss, "BUCKET_BYTES", bucket_bytes),
        patch.object(dist, "all_reduce", wraps=dist.all_reduce) as calls,
    ):
        sum_gradients(model, mesh)
    return calls.call_count, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("bucket_bytes", "num_buckets"),
    [
        (2**28, 3),  # one a dtype
        (50, 3 + 3),  # rows 0 and 1; 3, which is larger; 4 and 5 | matrix; number | the last
        (0, 5 + 3),
    ],
)
def test_gradients_add_up_in_few_all_reduces(bucket_bytes: int, num_buckets: int) -> None:
    for num_calls, found in run_ranks(reduce, 4, bucket_bytes):
        assert num_calls == 1 + num_buckets  # and before them, who has a gradient
        assert found.pop("frozen") is None and found.pop("row2") is None
        for name, parameter in parameters().items():
            parts = [part for rank in range(4) if (part := gradient(name, parameter, rank)) is not None]
            if parts:
                assert torch.equal(found[name], sum(parts) / 2), name  # type: ignore[arg-type]
