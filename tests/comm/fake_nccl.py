"""NCCL and CUDA streams for ranks that are threads of this process, on CPU tensors: doubles with real signatures.

What a rank puts on a communication stream runs when it can: at once (eager), or only when somebody waits for it
(lazy), which shows a receive that is used before it was waited for, and a sent buffer that is overwritten too early.
The current stream is the thread itself: its work is done when the call returns, and to wait for an event holds it up.
Checked at each group: it stands behind the current stream, in one stream and one communicator; sizes and dtypes fit
those of the peer; no buffer is one of a transfer in flight. All threads waiting with nothing to run is a deadlock.
"""

import ctypes
import threading
import uuid
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

NCCL_UINT8 = 1


class DeadlockError(AssertionError):
    pass


@dataclass(eq=False)
class Event:
    done: bool = False
    of_current: bool = False
    behind: list["Group"] = field(default_factory=list)  # those that have run when it is done

    def query(self) -> bool:
        return self.done


@dataclass(eq=False)
class Op:
    address: int
    num_bytes: int
    datatype: int
    route: tuple[bytes, int, int]  # communicator, from, to
    is_send: bool
    done: bool = False

    def overlaps(self, other: "Op") -> bool:
        clash = not (self.is_send and other.is_send)
        return (
            clash and self.address < other.address + other.num_bytes and other.address < self.address + self.num_bytes
        )


@dataclass(eq=False)
class Group:
    ops: list[Op]
    posted: bool = False
    waited_for: bool = False


class World:
    """What the ranks share: their streams, and the operations that wait for their match."""

    def __init__(self, num_ranks: int, *, lazy: bool) -> None:
        self.num_ranks, self.lazy = num_ranks, lazy
        self.changed = threading.Condition()
        self.streams: list[Stream] = []
        self.links: dict[tuple[bytes, int, int], tuple[deque[Op], deque[Op]]] = defaultdict(lambda: (deque(), deque()))
        self.joined: dict[bytes, int] = defaultdict(int)
        self.objects: dict[tuple[Any, ...], dict[int, Any]] = defaultdict(dict)
        self.waiting: list[Callable[[], bool]] = []
        self.num_over = 0
        self.error: BaseException | None = None
        self.kept: list[Any] = []  # transports, whose tensors others may write to when their rank is over

    def wait_until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            self.waiting.append(condition)
            while not condition():
                self._check()
                if self._step():
                    self.changed.notify_all()
                elif len(self.waiting) + self.num_over < self.num_ranks or any(met() for met in self.waiting):
                    self.changed.wait()
                else:
                    heads = [stream.items[0] for stream in self.streams if stream.items]
                    self.fail(DeadlockError(f"every rank waits, and nothing can run: {heads}"))
            self.waiting.remove(condition)

    def fail(self, error: BaseException) -> None:
        """The first error is every rank's."""
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def put(self, stream: "Stream", item: tuple[str, Any]) -> None:
        with self.changed:
            self._check()
            stream.items.append(item)
            while not self.lazy and self._step():
                pass
            self.changed.notify_all()

    def _step(self) -> bool:
        """Run what stands at the head of each stream and can run; whether anything did."""
        progress = False
        for stream in self.streams:
            while stream.items and self._run(*stream.items[0]):
                stream.items.popleft()
                progress = True
        return progress

    def _run(self, kind: str, item: Any) -> bool:
        if kind == "record":
            item.done = True
        if kind in ("record", "wait"):
            return item.done
        if not item.posted:
            item.posted = True
            for op in item.ops:
                self.links[op.route][0 if op.is_send else 1].append(op)
        for op in item.ops:
            self._match(*self.links[op.route])
        return all(op.done for op in item.ops)

    def _match(self, sends: deque[Op], receives: deque[Op]) -> None:
        while sends and receives:
            send, receive = sends.popleft(), receives.popleft()
            if (send.num_bytes, send.datatype) != (receive.num_bytes, receive.datatype):
                self.fail(AssertionError(f"{send} meets {receive}"))
                self._check()
            ctypes.memmove(receive.address, send.address, send.num_bytes)
            send.done = receive.done = True

    def gather(self, rank: int, ranks: list[int], key: tuple[Any, ...], obj: Any) -> list[Any]:
        found = self.objects[key]
        with self.changed:
            found[rank] = obj
            self.changed.notify_all()
        self.wait_until(lambda: len(found) == len(ranks))
        return [found[r] for r in ranks]


class Stream:
    def __init__(self, world: World, device: torch.device) -> None:
        self.world, self.items, self.groups, self.device = world, deque(), [], device
        self.behind_current = False
        self.cuda_stream = id(self)
        with world.changed:
            world.streams.append(self)

    def record_event(self) -> Event:
        event = Event(behind=list(self.groups))
        self.world.put(self, ("record", event))
        return event

    def wait_event(self, event: Event) -> None:
        self.behind_current = self.behind_current or event.of_current
        self.world.put(self, ("wait", event))


@dataclass
class CurrentStream:
    world: World

    def record_event(self) -> Event:
        return Event(done=True, of_current=True)

    def wait_event(self, event: Event) -> None:
        self.world.wait_until(lambda: event.done)
        for group in event.behind:
            group.waited_for = True


class FakeCuda:
    """Stands for torch.cuda, and for CUDA's driver. prepared: what threads set of their own state, in order."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.capturing = False  # the current stream
        self.prepared: list[tuple[str, Any]] = []

    def is_available(self) -> bool:
        return True

    def device(self, device: torch.device) -> AbstractContextManager[None]:
        return nullcontext()

    def Stream(self, device: torch.device, priority: int) -> Stream:
        assert priority < 0, "transfers go before kernels"
        return Stream(self.world, device)

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def set_device(self, device: torch.device) -> None:
        self.prepared.append((threading.current_thread().name, device))

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        self.prepared.append((threading.current_thread().name, mode._obj.value))
        return 0

    def current_stream(self, device: torch.device) -> CurrentStream:
        return CurrentStream(self.world)


class FakeNccl:
    """Stands for cupy.cuda.nccl in one rank."""

    available = True
    NCCL_UINT8 = NCCL_UINT8

    def __init__(self, world: World) -> None:
        self.world = world
        self.group: list[tuple[Op, Stream]] | None = None
        self.num_groups = 0

    def get_unique_id(self) -> bytes:
        return uuid.uuid4().bytes

    def NcclCommunicator(self, ndev: int, commId: bytes, rank: int, config: Any = None) -> "Communicator":
        with self.world.changed:
            self.world.joined[commId] += 1
            self.world.changed.notify_all()
        self.world.wait_until(lambda: self.world.joined[commId] == ndev)
        return Communicator(self, commId, rank)

    def groupStart(self) -> None:
        assert self.group is None, "a group within a group"
        self.group = []

    def groupEnd(self) -> None:
        assert self.group, "a group without operations"
        ops, streams = [op for op, _ in self.group], {id(stream): stream for _, stream in self.group}
        self.group = None
        self.num_groups += 1
        assert len(streams) == 1, "a group on several streams"
        assert len({op.route[0] for op in ops}) == 1, "a group on several communicators"
        (stream,) = streams.values()
        assert stream.behind_current, "the group does not wait for the current stream"
        stream.behind_current = False
        groups = [group for s in self.world.streams for group in s.groups if not group.waited_for]
        in_flight = [op for group in groups for op in group.ops]
        assert not any(new.overlaps(old) for new in ops for old in in_flight), "a buffer of a transfer in flight"
        group = Group(ops)
        stream.groups.append(group)
        self.world.put(stream, ("group", group))


class Communicator:
    """Stands for cupy.cuda.nccl.NcclCommunicator."""

    def __init__(self, nccl: FakeNccl, name: bytes, rank: int) -> None:
        self._nccl, self._name, self._rank = nccl, name, rank

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._add(Op(sendbuf, count, datatype, (self._name, self._rank, peer), True), stream)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._add(Op(recvbuf, count, datatype, (self._name, peer, self._rank), False), stream)

    def check_async_error(self) -> None:
        pass

    def _add(self, op: Op, stream: int) -> None:
        assert self._nccl.group is not None, "an operation outside of a group"
        assert op.num_bytes > 0 and op.datatype == NCCL_UINT8
        (found,) = (s for s in self._nccl.world.streams if s.cuda_stream == stream)
        self._nccl.group.append((op, found))


def run_threads(body: Callable[..., Any], num_ranks: int, *args: Any, lazy: bool) -> list[Any]:
    """body(rank, world, *args) on each rank, a thread; results in rank order. The first error is raised."""
    world = World(num_ranks, lazy=lazy)
    results: list[Any] = [None] * num_ranks

    def run(rank: int) -> None:
        try:
            results[rank] = body(rank, world, *args)
        except BaseException as error:
            world.fail(error)
        finally:
            with world.changed:
                world.num_over += 1
                world.changed.notify_all()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if world.error is not None:
        raise world.error
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results
