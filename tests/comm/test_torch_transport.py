"""The transport over torch.distributed on gloo ranks: uneven, empty and mixed messages, byte counts, order, failure."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.comm.mesh import TENSOR_AXES, Mesh
from torch import Tensor

from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)


def message(source: int, target: int, axis: str) -> list[Tensor]:
    """What one rank sends another: four dtypes, sizes that differ with the direction, some of them or all empty."""
    generator = torch.Generator().manual_seed(1000 * source + 10 * target + len(axis))
    sizes = [(source + 2 * target + i) % 3 * 5 for i in range(4)] if (source + target) % 4 else [0] * 4
    return [
        torch.randint(0, 2, (size, 3), generator=generator).to(dtype) for size, dtype in zip(sizes, DTYPES, strict=True)
    ]


def num_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def deliver(mesh: Any) -> None:
    """An all-to-all along every axis: what arrives, and the bytes that are counted."""
    for axis in TENSOR_AXES:
        peers = mesh.axis_ranks(axis)
        send = [message(mesh.rank, peer, axis) for peer in peers]
        expected = [message(peer, mesh.rank, axis) for peer in peers]
        recv = [[torch.full_like(tensor, 1) for tensor in tensors] for tensors in expected]
        mesh.transport.all_to_all(axis, send, recv)
        for got, want in zip(recv, expected, strict=True):
            assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
        leaving = sum(num_bytes(tensors) for peer, tensors in zip(peers, send, strict=True) if peer != mesh.rank)
        assert mesh.transport.bytes_sent[axis] == leaving


def all_to_all(rank: int) -> None:
    deliver(Mesh(ring=2, ulysses=2))


def test_all_to_all_delivers_uneven_lists_and_counts_what_leaves() -> None:
    assert run_ranks(all_to_all, 4) == [None] * 4


def exchange(rank: int) -> None:
    mesh = Mesh(ring=4)
    left, right = (rank - 1) % 4, (rank + 1) % 4
    transposed = torch.arange(12.0).view(3, 4).T + rank  # not contiguous
    shape = torch.empty(4, 3), torch.empty(5, dtype=torch.int32)
    send = [transposed, torch.full((5,), rank, dtype=torch.int32)]
    first = mesh.transport.exchange("ring", send_to=right, send=send, recv_from=left, recv=shape)
    late = [torch.empty(1)]
    second = mesh.transport.exchange(
        "ring", send_to=right, send=[torch.tensor([rank + 0.5])], recv_from=left, recv=late
    )
    second.wait()  # handles may be waited for in any order
    first.wait()
    assert torch.equal(shape[0], torch.arange(12.0).view(3, 4).T + left)
    assert shape[1].tolist() == [left] * 5 and late[0].item() == left + 0.5
    assert mesh.transport.bytes_sent["ring"] == 12 * 4 + 5 * 4 + 4

    one_sided = torch.empty(2)
    mesh.transport.exchange(
        "ring",
        send_to=1 if rank == 0 else None,
        send=[torch.ones(2)] if rank == 0 else [],
        recv_from=0 if rank == 1 else None,
        recv=[one_sided] if rank == 1 else [],
    ).wait()
    assert rank != 1 or one_sided.tolist() == [1, 1]
    nothing = torch.empty(0)
    mesh.transport.exchange("ring", send_to=right, send=[nothing], recv_from=None, recv=[]).wait()  # left sends nothing


def test_exchange_keeps_order_and_allows_one_side_or_none() -> None:
    assert run_ranks(exchange, 4) == [None] * 4


def crossing(rank: int) -> None:
    mesh = Mesh(ring=2)
    peer = 1 - rank
    ring, sp = torch.empty(3), [[torch.empty(3)] for _ in range(2)]
    handle = mesh.transport.exchange(
        "ring", send_to=peer, send=[torch.full((3,), 10.0 + rank)], recv_from=peer, recv=[ring]
    )
    mesh.transport.all_to_all("sp", [[torch.full((3,), 20.0 + rank)]] * 2, sp)
    handle.wait()
    assert ring.tolist() == [10.0 + peer] * 3
    assert [buffer.tolist() for (buffer,) in sp] == [[20.0] * 3, [21.0] * 3]


def test_messages_of_two_axes_between_the_same_ranks_are_told_apart() -> None:
    assert run_ranks(crossing, 2) == [None] * 2


FAILING = """
import os, signal, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from longtake.comm.mesh import Mesh

rank, store, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3, timeout=timedelta(seconds=60))
mesh = Mesh(ring=3, deadline=timedelta(seconds=3))
mesh.barrier()
if rank == 2:
    os.kill(os.getpid(), getattr(signal, how))
time.sleep(0.5)
print("began", time.monotonic(), flush=True)
got, send = torch.empty(4), [torch.ones(4)]
peers = {"send_to": 2 - rank, "recv_from": 2} if rank == 0 else {"send_to": None, "recv_from": 2}
mesh.transport.exchange("ring", send=send, recv=[got], **peers).wait()
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_dead_or_stopped_peer_ends_the_others_in_time_with_a_word_on_what_failed(how: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FAILING]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), how],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(3)
    ]
    try:
        for rank, process in enumerate(ranks[:2]):
            out, err = process.communicate(timeout=40)
            assert process.returncode != 0
            assert time.monotonic() - float(out.split()[1]) < 20  # deadline 3 s, on a busy machine
            sending = "sending 16 bytes to rank 2, " if rank == 0 else ""
            assert f"TransferError: rank {rank}, axis ring: exchange {sending}receiving 16 bytes from rank 2: " in err
    finally:
        for process in ranks:
            process.kill()
            process.wait()
