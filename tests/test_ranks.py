"""The helper that runs tests on ranks: results in order, the first error with its traceback, no hang."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def double(rank: int, x: torch.Tensor) -> torch.Tensor:
    total = x * rank
    dist.all_reduce(total)
    return total + rank


def test_results_come_back_in_rank_order() -> None:
    results = run_ranks(double, 3, torch.ones(2))
    assert [result.tolist() for result in results] == [[3, 3], [4, 4], [5, 5]]


def fail(rank: int) -> None:
    if rank == 1:
        raise KeyError("the first to fail")
    dist.barrier()


def test_the_first_error_is_raised_with_its_traceback() -> None:
    with pytest.raises(KeyError, match="the first to fail") as caught:
        run_ranks(fail, 3)
    assert "raised on rank 1" in caught.value.__notes__[0] and "in fail" in caught.value.__notes__[0]


def sleep(rank: int) -> None:
    time.sleep(60 * rank)


def test_a_hang_is_cut() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"\[1\]"):
        run_ranks(sleep, 2, timeout=2)
    assert time.monotonic() - began < 10
