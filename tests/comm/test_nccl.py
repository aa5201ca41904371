"""The NCCL transport on four ranks that are threads, over a double of CuPy's class: see fake_nccl."""

import inspect
import os
import re
import time
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from cupy_backends.cuda.libs import nccl as real_nccl  # what cupy.cuda.nccl hands on
from longtake.comm.mesh import TENSOR_AXES, Mesh
from longtake.comm.nccl import RELAXED, NcclTransport, _allow_queries

from tests.comm import fake_nccl
from tests.comm.fake_nccl import DeadlockError, FakeCuda, FakeNccl, World, run_threads
from tests.comm.test_torch_transport import deliver
from tests.comm.thread_mesh import ThreadMesh

ROOT = Path(__file__).parents[2]
lazily_and_eagerly = pytest.mark.parametrize("lazy", [True, False])


def all_to_all(rank: int, world: World) -> None:
    mesh = ThreadMesh(rank, world, ring=2, ulysses=2)
    before = mesh.nccl.num_groups
    deliver(mesh)
    assert mesh.nccl.num_groups - before <= len(TENSOR_AXES)  # one for all peers; none where nothing travels


@lazily_and_eagerly
def test_all_to_all_delivers_uneven_lists_in_one_group(lazy: bool) -> None:
    run_threads(all_to_all, 4, lazy=lazy)


def exchange(rank: int, world: World) -> None:
    mesh = ThreadMesh(rank, world, ring=4)
    left, right = (rank - 1) % 4, (rank + 1) % 4
    transposed = torch.arange(12.0).view(3, 4).T + rank
    shape = torch.empty(4, 3), torch.empty(5, dtype=torch.int32)
    send = [transposed, torch.full((5,), rank, dtype=torch.int32)]
    first = mesh.transport.exchange("ring", send_to=right, send=send, recv_from=left, recv=shape)
    late = [torch.empty(1, dtype=torch.bfloat16)]
    half = torch.tensor([rank + 0.5], dtype=torch.bfloat16)
    second = mesh.transport.exchange("ring", send_to=right, send=[half], recv_from=left, recv=late)
    second.wait()
    first.wait()
    assert torch.equal(shape[0], torch.arange(12.0).view(3, 4).T + left)
    assert shape[1].tolist() == [left] * 5 and late[0].item() == left + 0.5
    mesh.transport.exchange("ring", send_to=right, send=[torch.empty(0)], recv_from=None, recv=[]).wait()
    assert mesh.transport.bytes_sent["ring"] == 12 * 4 + 5 * 4 + 2


@lazily_and_eagerly
def test_exchange_keeps_order_and_sends_no_empty_message(lazy: bool) -> None:
    run_threads(exchange, 4, lazy=lazy)


def test_axes_of_the_same_ranks_share_a_communicator_and_others_have_their_own() -> None:
    def lanes(rank: int, world: World) -> list[int]:
        grids = [{"ring": 2, "ulysses": 2}, {"ring": 4}, {"data": 2, "ring": 2}, {"data": 4}]
        return [len(ThreadMesh(rank, world, **degrees).transport.lanes) for degrees in grids]

    assert run_threads(lanes, 4, lazy=True) == [[3, 1, 1, 0]] * 4  # sp, ring, ulysses; sp = ring; sp = ring; nothing


def ready_thread(rank: int, world: World) -> list[tuple[str, Any]]:
    cuda = ThreadMesh(rank, world, ring=2).cuda
    until = time.monotonic() + 10
    while len(cuda.prepared) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    return cuda.prepared


def test_the_watchdogs_thread_takes_its_device_and_may_query_while_a_graph_is_recorded() -> None:
    name = "longtake-watchdog"
    assert run_threads(ready_thread, 2, lazy=True) == [[(name, torch.device("cpu")), (name, RELAXED)]] * 2


def test_a_refused_capture_mode_is_an_error() -> None:
    class Refuses(FakeCuda):
        def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
            return 201

    cuda = Refuses(World(1, lazy=True))
    with pytest.raises(RuntimeError, match="CUDA error 201"):
        _allow_queries(torch.device("cpu"), cuda, cuda)


def record(rank: int, world: World) -> list[int]:
    """Flights noted while a graph is recorded, and after."""
    mesh, peer, received = ThreadMesh(rank, world, ring=2), 1 - rank, torch.zeros(3)
    (lane,) = mesh.transport.lanes.values()
    lane.flights.clear()
    noted = []
    for capturing in (True, False):
        mesh.cuda.capturing = capturing
        handle = mesh.transport.exchange(
            "ring", send_to=peer, send=[torch.full((3,), float(rank))], recv_from=peer, recv=[received]
        )
        noted.append(len(lane.flights))
        handle.wait()
        assert received.tolist() == [peer] * 3
    return noted


def test_a_recorded_transfer_is_made_and_not_watched() -> None:
    assert run_threads(record, 2, lazy=True) == [[0, 1]] * 2


def test_what_travels_is_kept_alive_until_it_was_waited_for() -> None:
    def body(rank: int, world: World) -> None:
        mesh = ThreadMesh(rank, world, ring=2)
        sent, received = torch.ones(3), torch.zeros(3)
        refs = weakref.ref(sent), weakref.ref(received)
        peer = 1 - rank
        handle = mesh.transport.exchange("ring", send_to=peer, send=[sent], recv_from=peer, recv=[received])
        del sent, received
        assert all(ref() is not None for ref in refs)
        handle.wait()
        assert all(ref() is None for ref in refs)

    run_threads(body, 2, lazy=True)


def test_a_receive_that_is_not_waited_for_is_seen() -> None:
    def body(rank: int, world: World) -> bool:
        mesh = ThreadMesh(rank, world, ring=2)
        received = torch.full((3,), torch.nan)
        peer = 1 - rank
        mesh.transport.exchange("ring", send_to=peer, send=[torch.ones(3)], recv_from=peer, recv=[received])
        return bool(received.isnan().all())

    assert run_threads(body, 2, lazy=True) == [True, True]
    assert run_threads(body, 2, lazy=False).count(True) <= 1  # whoever came last sees its data


def test_a_buffer_of_a_transfer_in_flight_is_refused() -> None:
    def body(rank: int, world: World) -> None:
        mesh = ThreadMesh(rank, world, ring=2)
        peer, received = 1 - rank, torch.zeros(3)
        for _ in range(2):
            mesh.transport.exchange("ring", send_to=peer, send=[torch.ones(3)], recv_from=peer, recv=[received])

    with pytest.raises(AssertionError, match="in flight"):
        run_threads(body, 2, lazy=True)


def test_a_group_that_does_not_stand_behind_the_current_stream_is_refused() -> None:
    class Hasty(FakeCuda):
        def current_stream(self, device: torch.device) -> Any:
            return fake_nccl.Stream(self.world, device)  # an event of another stream

    def body(rank: int, world: World) -> None:
        axes = {"ring": [0, 1]}
        transport = NcclTransport(
            rank,
            axes,
            device=torch.device("cpu"),
            gather=lambda obj, axis: world.gather(rank, [0, 1], ("ids",), obj),
            deadline=timedelta(days=1),
            nccl=FakeNccl(world),
            cuda=Hasty(world),
            driver=Hasty(world),
        )
        world.kept.append(transport)
        peer = 1 - rank
        transport.exchange("ring", send_to=peer, send=[torch.ones(1)], recv_from=peer, recv=[torch.ones(1)])

    with pytest.raises(AssertionError, match="does not wait for the current stream"):
        run_threads(body, 2, lazy=True)


def test_sizes_that_differ_are_seen() -> None:
    def body(rank: int, world: World) -> None:
        mesh = ThreadMesh(rank, world, ring=2)
        peer = 1 - rank
        mesh.transport.exchange(
            "ring", send_to=peer, send=[torch.ones(3)], recv_from=peer, recv=[torch.ones(3 + rank)]
        ).wait()

    with pytest.raises(AssertionError, match="meets"):
        run_threads(body, 2, lazy=True)


def test_two_axes_issued_in_different_orders_and_waited_for_are_a_deadlock() -> None:
    def body(rank: int, world: World) -> None:
        mesh = ThreadMesh(rank, world, ring=2, ulysses=2)
        axes = ["ring", "ulysses"] if rank in (0, 3) else ["ulysses", "ring"]
        for axis in axes:
            mesh.transport.all_to_all(axis, [[torch.ones(2)]] * 2, [[torch.ones(2)], [torch.ones(2)]])

    with pytest.raises(DeadlockError):
        run_threads(body, 4, lazy=True)


def parameters(documented: str) -> list[str]:
    """Names in "NcclCommunicator.send(self, intptr_t sendbuf, size_t count, ...)"."""
    inside = re.search(r"\((.*?)\)", documented)
    assert inside is not None
    return [part.split("=")[0].split()[-1] for part in inside.group(1).split(",") if part.strip() != "self"]


@pytest.mark.parametrize("name", ["send", "recv", "check_async_error"])
def test_the_double_has_the_signatures_of_cupys_communicator(name: str) -> None:
    real = getattr(real_nccl.NcclCommunicator, name).__doc__
    double = inspect.signature(getattr(fake_nccl.Communicator, name))
    assert [p for p in double.parameters if p != "self"] == [p for p in parameters(real) if p]


def test_the_double_has_the_functions_of_cupys_module() -> None:
    assert parameters(real_nccl.NcclCommunicator.__doc__)[:3] == ["ndev", "commId", "rank"]
    assert list(inspect.signature(FakeNccl.NcclCommunicator).parameters)[1:4] == ["ndev", "commId", "rank"]
    for name in ("groupStart", "groupEnd", "get_unique_id"):
        assert callable(getattr(real_nccl, name)) and callable(getattr(FakeNccl, name))
    assert real_nccl.NCCL_UINT8 == fake_nccl.NCCL_UINT8
    assert len(real_nccl.get_unique_id()) == 128


@pytest.mark.parametrize("given", [None, "0"])
def test_nccl_keeps_the_launch_order_unless_the_user_says_otherwise(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "0")
    if given is None:
        monkeypatch.delenv("NCCL_LAUNCH_ORDER_IMPLICIT")
    run_threads(lambda rank, world: ThreadMesh(rank, world, data=2) and None, 2, lazy=True)
    assert os.environ.get("NCCL_LAUNCH_ORDER_IMPLICIT") == given  # nothing travels
    run_threads(lambda rank, world: ThreadMesh(rank, world, ring=2) and None, 2, lazy=True)
    assert os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"] == (given or "1")


def test_the_transport_nccl_needs_a_gpu_only_where_something_travels() -> None:
    assert Mesh(transport="nccl", device="cpu").transport.bytes_sent == dict.fromkeys(TENSOR_AXES, 0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a GPU"):
            NcclTransport(
                0,
                {"ring": [0, 1]},
                device=torch.device("cpu"),
                gather=lambda obj, axis: [obj],
                deadline=timedelta(seconds=1),
            )
