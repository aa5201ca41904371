"""What the watchdog says of lanes whose events and communicators are doubles, by a clock of the test."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from longtake.comm.transport import Operation
from longtake.comm.watchdog import EXIT_CODE, Flight, Lane, Watchdog

EXCHANGE = Operation("exchange", "ring", 3, sends=((1, 4096),), receives=((7, 512),))


class Switch:
    def __init__(self, on: bool) -> None:
        self.on = on

    def query(self) -> bool:
        return self.on


class Link:
    def __init__(self, error: str | None = None) -> None:
        self.error = error

    def check_async_error(self) -> None:
        if self.error:
            raise RuntimeError(self.error)

    def abort(self) -> None:
        time.sleep(60)  # waits for kernels, which wait for another communicator's


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def watched(lane: Lane, clock: Clock) -> Watchdog:
    return Watchdog([lane], deadline=timedelta(seconds=10), clock=clock)


def test_a_transfer_that_outlasts_the_deadline_is_named_with_its_sizes() -> None:
    clock, lane = Clock(), Lane(stream=None, communicator=Link())
    lane.flights.append(Flight(EXCHANGE, Switch(True), [], done=Switch(False)))
    dog = watched(lane, clock)
    assert dog.poll() is None
    clock.now = 10.0
    assert dog.poll() is None
    clock.now = 10.1
    assert dog.poll() == (
        "rank 3, axis ring: exchange sending 4096 bytes to rank 1, receiving 512 bytes from rank 7: not done after 10 s"
    )


def test_the_clock_starts_when_the_operands_are_ready_and_the_transfers_before_are_done() -> None:
    clock, lane = Clock(), Lane(stream=None, communicator=Link())
    ready, done = Switch(False), Switch(False)
    first = Flight(EXCHANGE, ready, [], done=done)
    second = Flight(EXCHANGE, Switch(True), [], done=Switch(False))
    lane.flights.extend([first, second])
    dog = watched(lane, clock)
    clock.now = 100.0
    assert dog.poll() is None  # the kernels before it still run
    ready.on = done.on = True
    assert dog.poll() is None and list(lane.flights) == [second]
    clock.now = 110.5
    assert dog.poll() is not None


def test_a_call_that_does_not_return_is_late_too() -> None:
    clock, lane = Clock(), Lane(stream=None)  # the communicator is being made
    lane.flights.append(Flight(Operation("connecting", "sp", 0, (), ()), Switch(True), []))
    dog = watched(lane, clock)
    assert dog.poll() is None
    clock.now = 10.1
    assert dog.poll() == "rank 0, axis sp: connecting of nothing: not done after 10 s"


def test_an_error_of_the_communicator_is_named() -> None:
    lane = Lane(stream=None, communicator=Link("NCCL_ERROR_REMOTE_ERROR"))
    lane.flights.append(Flight(EXCHANGE, Switch(True), [], done=Switch(False)))
    problem = watched(lane, Clock()).poll()
    assert problem is not None and problem.startswith("rank 3, axis ring") and problem.endswith("REMOTE_ERROR")


def test_what_is_done_is_forgotten_with_its_tensors() -> None:
    lane = Lane(stream=None, communicator=Link())
    lane.flights.append(Flight(EXCHANGE, Switch(True), ["tensor"], done=Switch(True)))
    assert watched(lane, Clock()).poll() is None and not lane.flights


def said_by_the_thread(lane: Lane, prepare: Callable[[], None] = lambda: None) -> list[str]:
    """Until it first fails, for 10 seconds at most."""
    said, over = [], threading.Event()

    def fail(message: str) -> None:
        said.append(message)
        over.set()

    Watchdog([lane], deadline=timedelta(seconds=1), prepare=prepare, fail=fail).start()
    over.wait(10)
    return said


def test_the_thread_says_what_is_wrong_and_aborts_nothing() -> None:
    assert said_by_the_thread(Lane(stream=None, communicator=Link("gone"))) == ["between transfers: gone"]


class Forbidden:
    def query(self) -> bool:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("ready", [True, False])
def test_an_event_that_cannot_be_queried_is_no_silent_end(ready: bool) -> None:
    lane = Lane(stream=None, communicator=Link())
    events = (Switch(True), Forbidden()) if ready else (Forbidden(), None)
    lane.flights.append(Flight(EXCHANGE, events[0], [], done=events[1]))
    expected = "transfers cannot be watched: operation not permitted when stream is capturing"
    assert said_by_the_thread(lane) == [expected]


def test_a_thread_that_cannot_be_prepared_is_no_silent_end() -> None:
    def prepare() -> None:
        raise RuntimeError("no device 9")

    assert said_by_the_thread(Lane(stream=None), prepare) == ["transfers cannot be watched: no device 9"]


def test_a_process_ends_also_where_nobody_reads_what_it_says() -> None:
    program = """
import sys
from longtake.comm.watchdog import end_process
sys.stderr.close()
end_process("no matter what")
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=50, check=False).returncode == EXIT_CODE


@pytest.mark.parametrize("hangs", ["time.sleep(60)", "threading.Event().wait(60)"])
def test_a_process_that_hangs_ends_with_a_word_and_an_exit_code(hangs: str) -> None:
    program = f"""
import threading, time
from datetime import timedelta
from tests.comm.test_watchdog import EXCHANGE, Flight, Lane, Link, Switch, Watchdog
lane = Lane(stream=None, communicator=Link())
lane.flights.append(Flight(EXCHANGE, Switch(True), [], done=Switch(False)))
Watchdog([lane], deadline=timedelta(seconds=0.5)).start()
{hangs}
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == EXIT_CODE
    assert "longtake: rank 3, axis ring: exchange sending 4096 bytes to rank 1" in ended.stderr
