"""Calls that may raise, hang or take their process with them, as kernels that a GPU never ran do.

An attempt runs one function on many items and yields what became of each. In processes of their own, a call that
failed costs its process, since a CUDA context that met a bad address fails all that follows; one that hangs is killed.
"""

import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

START_SECONDS = 120.0  # for a process to import what it needs, before the time of its first call begins
NO_ANSWER = "no answer in"
MOST_HANGS = 2


class Outcome(NamedTuple):
    """What the function returned for an item; or None, and why it failed."""

    item: Any
    result: Any
    failure: str | None


Attempt = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Outcome]]


class Refused(Exception):
    """Raised by a function that judges an item: its words alone are why."""


def directly(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Outcome]:
    """In this process, which a call can break."""
    for item in items:
        try:
            yield Outcome(item, function(item), None)
        except Refused as error:
            yield Outcome(item, None, str(error))
        except Exception as error:  # anything that a kernel, or its compiler, does wrong: told, not hidden
            lines = str(error).strip().splitlines() or [""]
            yield Outcome(item, None, f"{type(error).__name__}: {lines[0]}"[:300])


def with_second_try(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    first: Attempt,
    second: Attempt,
    again: Callable[[Outcome], list[Any]],
) -> Iterator[Outcome]:
    """Outcomes of `first`; for a failed one, if `again` names items to run in its place, their outcomes of `second`."""
    later = []
    for outcome in first(function, items):
        instead = again(outcome) if outcome.failure else []
        later += instead
        if not instead:
            yield outcome
    yield from second(function, later)


def sparing(attempt: Attempt, kind: Callable[[Any], Hashable]) -> Attempt:
    """`attempt`, but the rest of a kind is not tried once `MOST_HANGS` of it gave no answer: each costs its time."""

    def spared(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Outcome]:
        hung: Counter[Hashable] = Counter()
        untried = []

        def hopeful() -> Iterator[Any]:
            for item in items:
                if hung[kind(item)] < MOST_HANGS:
                    yield item
                else:
                    untried.append(item)

        for outcome in attempt(function, hopeful()):
            hung[kind(outcome.item)] += str(outcome.failure).startswith(NO_ANSWER)
            yield outcome
        for item in untried:
            yield Outcome(item, None, f"not tried: {MOST_HANGS} of {kind(item)} gave no answer")

    return spared


def short_of_memory(outcome: Outcome) -> list[Any]:
    """The item, if others may have taken the memory that it needs."""
    return [outcome.item] if "out of memory" in str(outcome.failure).lower() else []


def in_processes(count: int, *, seconds: float) -> Attempt:
    """In up to `count` processes at once, in the order in which they end. A call may take so many seconds.

    An item is drawn when a process is free for it.
    """

    def attempt(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Outcome]:
        waiting = iter(items)
        workers: list[_Worker] = []
        try:
            while True:
                while len(workers) < count or not all(worker.busy for worker in workers):
                    item = next(waiting, waiting)
                    if item is waiting:
                        break
                    free = next((worker for worker in workers if not worker.busy), None)
                    if free is None:
                        free = _Worker(function)
                        workers.append(free)
                    free.begin(item, seconds)
                busy = {worker.connection: worker for worker in workers if worker.busy}
                if not busy:
                    return
                left = min(worker.deadline for worker in busy.values()) - time.monotonic()
                ready = wait(list(busy), timeout=max(0.0, left))
                for connection, worker in busy.items():
                    if connection in ready or time.monotonic() > worker.deadline:
                        outcome = worker.end()
                        if outcome is not None:
                            yield outcome
        finally:
            for worker in workers:
                worker.kill()

    return attempt


class _Worker:
    """A process that runs the function, and its successors."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self.busy = False
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.function), daemon=True)
        self.process.start()
        self.started = False
        theirs.close()  # so that the end of the process is the end of the pipe

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def begin(self, item: Any, seconds: float) -> None:
        if not self.process.is_alive():
            self.start()
        self.item, self.seconds, self.busy = item, seconds, True
        self.deadline = time.monotonic() + (seconds if self.started else START_SECONDS)
        with suppress(BrokenPipeError):  # it ended just now, as `end` will find
            self.connection.send(item)

    def end(self) -> Outcome | None:
        """What became of the item, whose answer, end or deadline has come; None: the process is up, its time begins."""
        try:
            if self.connection.poll():
                said = self.connection.recv()
                if said is None:
                    self.started, self.deadline = True, time.monotonic() + self.seconds
                    return None
                outcome = Outcome(*said)
            else:
                outcome = Outcome(self.item, None, f"{NO_ANSWER} {self.seconds:.0f} s")
        except (EOFError, ConnectionError):
            self.process.join()
            outcome = Outcome(self.item, None, f"its process ended with code {self.process.exitcode}")
        self.busy = False
        if outcome.failure:
            self.kill()
        return outcome


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who then ends this process
    connection.send(None)
    while True:
        connection.send(tuple(next(directly(function, [connection.recv()]))))
