"""Sees transfers on a GPU fail or take too long, which their caller cannot: it launches and goes on.

A dead peer leaves a kernel that never ends; every later wait for the GPU would hang, and so would aborting one
communicator while its kernels wait for another's. So a thread polls what is in flight, says what failed, and ends the
process, which ends its kernels. The launcher then ends the other ranks; without one, their own deadlines do.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

from .transport import Operation

EXIT_CODE = 75  # EX_TEMPFAIL: a rank or a link failed, the same command may go through


class Event(Protocol):
    """As torch.cuda.Event: whether all work before it is done."""

    def query(self) -> bool: ...


@dataclass(eq=False)
class Flight:
    """A transfer and its events. ready: its operands are; done: it is, None while the call has not returned.

    tensors: alive until then. since: when it was first seen with nothing left to wait for.
    """

    operation: Operation
    ready: Event
    tensors: list[Any]
    done: Event | None = None
    since: float | None = None


@dataclass(eq=False)
class Lane:
    """A communicator (None: being made), the stream that its transfers run on, in order, and those in flight."""

    stream: Any
    communicator: Any = None
    flights: deque[Flight] = field(default_factory=deque)


def end_process(message: str) -> None:
    """Without cleaning up: that would wait for the GPU."""
    try:
        print(f"longtake: {message}", file=sys.stderr, flush=True)
    finally:  # also where nobody reads what is printed
        os._exit(EXIT_CODE)


class Watchdog:
    """Polls the lanes in a thread of its own. A transfer's clock starts when its operands are ready.

    prepare: the thread's first act. fail: told what is wrong, also where the thread itself cannot go on; its last act.
    """

    def __init__(
        self,
        lanes: list[Lane],
        *,
        deadline: timedelta,
        prepare: Callable[[], None] = lambda: None,
        fail: Callable[[str], None] = end_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lanes, self.deadline, self.clock = lanes, deadline.total_seconds(), clock
        self.prepare, self.fail = prepare, fail
        self.stopped = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="longtake-watchdog", daemon=True).start()

    def stop(self) -> None:
        self.stopped.set()

    def _run(self) -> None:
        problem = None
        try:
            self.prepare()
            while problem is None and not self.stopped.wait(min(1.0, self.deadline / 10)):
                problem = self.poll()
        except Exception as error:  # of CUDA, whoever caused it: a thread that ends would leave hangs unseen
            problem = f"transfers cannot be watched: {error}"
        if problem is not None:
            self.fail(problem)

    def poll(self) -> str | None:
        """Forget what has ended; the first problem in words, or None."""
        for lane in self.lanes:
            while lane.flights and _is_done(lane.flights[0]):
                lane.flights.popleft()
            try:
                if lane.communicator is not None:
                    lane.communicator.check_async_error()
            except Exception as error:  # NcclError, whose module is there on a GPU alone
                return f"{lane.flights[0].operation if lane.flights else 'between transfers'}: {error}"
            if lane.flights and self._late(lane.flights[0]):
                return f"{lane.flights[0].operation}: not done after {self.deadline:g} s"
        return None

    def _late(self, flight: Flight) -> bool:
        if flight.since is None and flight.ready.query():
            flight.since = self.clock()
        return flight.since is not None and self.clock() - flight.since > self.deadline


def _is_done(flight: Flight) -> bool:
    return flight.done is not None and flight.done.query()
