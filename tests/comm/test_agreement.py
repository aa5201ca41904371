"""LONGTAKE_DEBUG=1: what two ranks do not agree on is an error on all of them, before the transfer."""

import os

import pytest
import torch
from longtake.comm.agreement import Intent, disagreement
from longtake.comm.mesh import Mesh

from tests.ranks import run_ranks

RANKS = [4, 6, 8]


def test_a_mismatch_names_both_ranks_and_their_sizes() -> None:
    intents = [Intent("exchange", {1: [("bfloat16", 96)]}, {}), Intent("exchange", {}, {0: [("bfloat16", 64)]})]
    problem = disagreement([*intents, Intent("exchange", {}, {})], RANKS)
    assert problem == "rank 4 sends 96 bfloat16 to rank 6, which is ready to receive 64 bfloat16"


def test_dtypes_order_and_what_nobody_expects_count_too() -> None:
    none = Intent("exchange", {}, {})
    sends = Intent("exchange", {2: [("float32", 3), ("int64", 5)]}, {})
    swapped = Intent("exchange", {}, {0: [("int64", 5), ("float32", 3)]})
    assert disagreement([sends, none, swapped], RANKS) is not None
    assert disagreement([sends, none, none], RANKS) == (
        "rank 4 sends 3 float32 and 5 int64 to rank 8, which is ready to receive nothing"
    )
    assert disagreement([none, none, swapped], RANKS) is not None
    fits = Intent("exchange", {}, {0: [("float32", 3), ("int64", 5)]})
    assert disagreement([sends, none, fits], RANKS) is None


def test_different_calls_are_named() -> None:
    problem = disagreement([Intent("exchange", {}, {}), Intent("all_to_all", {}, {})], RANKS[:2])
    assert problem == "rank 4 is in exchange, rank 6 in all_to_all"


def mismatch(rank: int) -> str:
    os.environ["LONGTAKE_DEBUG"] = "1"
    mesh = Mesh(ring=2)
    peer, received = 1 - rank, torch.zeros(4)
    mesh.transport.exchange("ring", send_to=peer, send=[torch.ones(4)], recv_from=peer, recv=[received]).wait()
    assert received.tolist() == [1.0] * 4 and mesh.transport.bytes_sent["ring"] == 16
    with pytest.raises(ValueError) as error:
        mesh.transport.all_to_all("sp", [[torch.ones(2 + rank)]] * 2, [[torch.ones(2)], [torch.ones(2)]])
    return str(error.value)


def test_every_rank_gets_the_same_error_and_none_hangs() -> None:
    # rank 1 would also send itself too much: its own part is compared as well
    expected = "axis sp, transfer 0: rank 1 sends 3 float32 to rank 0, which is ready to receive 2 float32"
    assert run_ranks(mismatch, 2, timeout=30) == [expected] * 2
