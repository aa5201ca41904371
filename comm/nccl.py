"""The transport over NCCL communicators of our own, through CuPy's bindings, which take pointers and streams as ints.

One communicator and one high-priority stream for each axis along which tensors travel. A transfer waits on the GPU for
the current stream, which has written what is sent and has done with the buffers that are filled; who needs the result
has the current stream wait for it. The host waits for nothing.

NCCL runs the operations of one communicator in the order of its calls. Where several communicators share a GPU (ours
and those of torch.distributed, which FSDP2 uses), all ranks must issue the operations of all of them in one order: a
rank whose GPU is filled by A, waiting for a peer whose GPU is filled by B, hangs. One program on all ranks, from one
thread at a time, does that; and NCCL (from 2.26 on) then keeps this order on the GPU as well, by
NCCL_LAUNCH_ORDER_IMPLICIT, which is set here: in time, where the process has launched nothing of NCCL's before.

Transfers that are recorded into a CUDA graph are not under the watchdog's eyes.
"""

import ctypes
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .transport import Operation
from .watchdog import Flight, Lane, Watchdog

Piece = tuple[int, Tensor]  # the peer along the axis, and what goes to it or comes from it
HIGH_PRIORITY = -1
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


def load_nccl() -> ModuleType:
    """CuPy's NCCL bindings. Raises ValueError where they, or the library, are not there."""
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise ValueError(
            f"no NCCL through CuPy ({error}): see `longtake doctor`, or Mesh(transport='torch')"
        ) from error
    if not nccl.available:
        raise ValueError("CuPy found no libnccl.so.2: see `longtake doctor`, or Mesh(transport='torch')")
    return nccl


@dataclass(frozen=True, eq=False)
class Landing:
    """The handle of a transfer. Its tensors are kept until the current stream waits for it: whoever frees them then
    frees them behind it. (record_stream would keep the memory until the allocator next looks at its events.)"""

    flight: Flight | None
    current_stream: Callable[[], Any]

    def wait(self) -> None:
        if self.flight is not None:
            self.current_stream().wait_event(self.flight.done)
            self.flight.tensors.clear()


class NcclTransport:
    """See Transport. Collective along all axes, when built.

    axes: the global ranks along each axis through `rank`; axes of the same ranks share a communicator. gather: every
    rank's object along an axis, over the CPU. nccl, cuda, driver: cupy.cuda.nccl, torch.cuda and CUDA's driver.
    Where no axis has two ranks, nothing is needed; else raises ValueError without CuPy or a GPU.
    """

    def __init__(
        self,
        rank: int,
        axes: Mapping[str, list[int]],
        *,
        device: torch.device,
        gather: Callable[[Any, Any], list[Any]],
        deadline: timedelta,
        nccl: Any = None,
        cuda: Any = torch.cuda,
        driver: Any = None,
    ) -> None:
        self.rank, self.axes, self.device, self.cuda = rank, dict(axes), device, cuda
        self.bytes_sent = dict.fromkeys(self.axes, 0)
        self.lanes: dict[tuple[int, ...], Lane] = {}
        shared = {axis: ranks for axis, ranks in self.axes.items() if len(ranks) > 1}
        if not shared:
            return
        if not cuda.is_available():
            raise ValueError("the transport 'nccl' needs a GPU: Mesh(transport='torch') runs on the CPU")
        self.nccl = load_nccl() if nccl is None else nccl
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
        for ranks in shared.values():
            self.lanes.setdefault(tuple(ranks), Lane(cuda.Stream(device, priority=HIGH_PRIORITY)))
        lanes = list(self.lanes.values())
        driver = ctypes.CDLL("libcuda.so.1") if driver is None else driver
        prepare = partial(_allow_queries, lanes[0].stream.device, cuda, driver)
        watchdog = Watchdog(lanes, deadline=deadline, prepare=prepare)
        watchdog.start()
        weakref.finalize(self, watchdog.stop)
        for axis, ranks in shared.items():
            lane = self.lanes[tuple(ranks)]
            if lane.communicator is None:
                lane.communicator = self._connect(axis, lane, gather)

    def _connect(self, axis: str, lane: Lane, gather: Callable[[Any, Any], list[Any]]) -> Any:
        """Everybody is here before anybody enters NCCL: a missing rank is an error of `gather`, not a hang."""
        ranks = self.axes[axis]
        mine = self.nccl.get_unique_id() if self.rank == ranks[0] else None
        unique_id = gather(mine, axis)[0]
        with self._flight(lane, Operation("connecting", axis, self.rank, (), ()), []):
            return self.nccl.NcclCommunicator(len(ranks), unique_id, ranks.index(self.rank))

    def all_to_all(self, axis: str, send: Sequence[Sequence[Tensor]], recv: Sequence[Sequence[Tensor]]) -> None:
        num_peers = len(self.axes[axis])
        assert len(send) == len(recv) == num_peers, f"{len(send)} and {len(recv)} lists, {num_peers} peers"
        me = self.axes[axis].index(self.rank)
        landing = self._start(axis, "all_to_all", _pieces(send, but=me), _pieces(recv, but=me))
        for buffer, tensor in zip(recv[me], send[me], strict=True):
            buffer.copy_(tensor)
        landing.wait()

    def exchange(
        self,
        axis: str,
        *,
        send_to: int | None,
        send: Sequence[Tensor],
        recv_from: int | None,
        recv: Sequence[Tensor],
    ) -> Landing:
        sends = [] if send_to is None else [(send_to, x) for x in send if x.numel()]
        return self._start(
            axis, "exchange", sends, [] if recv_from is None else [(recv_from, x) for x in recv if x.numel()]
        )

    def _start(self, axis: str, name: str, sends: Sequence[Piece], receives: Sequence[Piece]) -> Landing:
        """One group of sends and receives on the axis's stream, behind the current one."""
        if not sends and not receives:
            return Landing(None, self._current_stream)
        sends = [(peer, tensor.contiguous()) for peer, tensor in sends]
        operation = Operation(name, axis, self.rank, self._sizes(axis, sends), self._sizes(axis, receives))
        self.bytes_sent[axis] += sum(num_bytes for _, num_bytes in operation.sends)
        lane = self.lanes[tuple(self.axes[axis])]
        with self._flight(lane, operation, [tensor for _, tensor in (*sends, *receives)]) as flight:
            self._group(lane, sends, receives)
        return Landing(flight, self._current_stream)

    @contextmanager
    def _flight(self, lane: Lane, operation: Operation, tensors: list[Tensor]) -> Iterator[Flight]:
        """What the body puts on the lane's stream runs behind the current stream, and under the watchdog's eyes."""
        with self.cuda.device(self.device):
            flight = Flight(operation, self._current_stream().record_event(), tensors)
            lane.stream.wait_event(flight.ready)
            if not self.cuda.is_current_stream_capturing():  # nobody may query a recorded event
                lane.flights.append(flight)
            yield flight
            flight.done = lane.stream.record_event()

    def _group(self, lane: Lane, sends: Sequence[Piece], receives: Sequence[Piece]) -> None:
        """Bytes, whatever the dtype: point to point, NCCL itself sends nothing else."""
        stream, uint8 = lane.stream.cuda_stream, self.nccl.NCCL_UINT8
        self.nccl.groupStart()
        try:
            for peer, tensor in sends:
                lane.communicator.send(tensor.data_ptr(), tensor.nbytes, uint8, peer, stream)
            for peer, tensor in receives:
                assert tensor.is_contiguous(), f"a buffer of strides {tensor.stride()}"
                lane.communicator.recv(tensor.data_ptr(), tensor.nbytes, uint8, peer, stream)
        finally:
            self.nccl.groupEnd()

    def _sizes(self, axis: str, pieces: Sequence[Piece]) -> tuple[tuple[int, int], ...]:
        """(global rank, bytes) of each peer."""
        sizes: dict[int, int] = {}
        for peer, tensor in pieces:
            sizes[self.axes[axis][peer]] = sizes.get(self.axes[axis][peer], 0) + tensor.nbytes
        return tuple(sizes.items())

    def _current_stream(self) -> Any:
        return self.cuda.current_stream(self.device)


def _allow_queries(device: torch.device, cuda: Any, driver: Any) -> None:
    """Let this thread query events of `device`, also while another thread records a graph, which it would spoil."""
    cuda.set_device(device)  # a thread begins on GPU 0, and would make a context there
    if error := driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(RELAXED))):
        raise RuntimeError(f"cuThreadExchangeStreamCaptureMode: CUDA error {error}")


def _pieces(by_peer: Sequence[Sequence[Tensor]], *, but: int) -> list[Piece]:
    """What travels, by peer, in order: nothing to oneself, and no empty tensor."""
    return [(peer, x) for peer, tensors in enumerate(by_peer) if peer != but for x in tensors if x.numel()]
