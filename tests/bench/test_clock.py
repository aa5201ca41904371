"""The clock: turns, medians, its budget; with CUDA's events on a clock that calls set forward."""

from collections.abc import Callable

import pytest
import torch
from longtake.bench import clock
from longtake.bench.clock import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    Allowance,
    cuda_clock,
    cuda_stopwatch,
    fake_stopwatch,
    medians,
    product,
    summary,
    turns,
    wall_stopwatch,
)

CPU = torch.device("cpu")


class Host:
    """A clock that calls set forward, and CUDA's part of the stopwatch on it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.spins: list[int] = []  # clocks that the GPU was told to spin

    def perf_counter(self) -> float:
        return self.seconds

    def call(self, milliseconds: float, log: list[float] | None = None) -> Callable[[], None]:
        def run() -> None:
            self.seconds += milliseconds / 1e3
            if log is not None:
                log.append(milliseconds)

        return run


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.when = host.seconds

        def elapsed_time(self, other: "Event") -> float:
            return 1e3 * (other.when - self.when)

    monkeypatch.setattr(clock, "time", host)
    monkeypatch.setattr(clock, "FLUSH_BYTES", 64)
    monkeypatch.setattr(clock, "product", lambda device: host.call(100.0))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", host.spins.append)
    return host


def test_medians_of_calls_in_turns(host: Host) -> None:
    log: list[float] = []
    times = cuda_clock(CPU, seconds=0.0, heat_seconds=0.0)([host.call(4.0, log), host.call(1.0, log)])
    assert times == pytest.approx([4.0, 1.0])
    assert log[-2 * MIN_ROUNDS :] == [4.0, 1.0, 1.0, 4.0, 4.0, 1.0], "each round starts with another"


def test_the_gpu_spins_while_the_host_launches(host: Host) -> None:
    cuda_clock(CPU, seconds=0.0, heat_seconds=0.0)([host.call(1.0), host.call(1000.0)])
    assert min(host.spins) == pytest.approx(1.5 * clock.SPIN_CLOCKS)
    assert max(host.spins) == pytest.approx(clock.MAX_SPIN_MS * clock.SPIN_CLOCKS)
    assert len(host.spins) == 2 * MIN_ROUNDS


def test_a_long_call_is_made_twice_before_it_is_timed(host: Host) -> None:
    log: list[float] = []
    cuda_clock(CPU, seconds=0.0, heat_seconds=0.0)([host.call(500.0, log)])
    assert len(log) == 2 + MIN_ROUNDS


def test_rounds_go_on_until_the_allowance_is_spent(host: Host) -> None:
    allowance = Allowance(0.0)
    watch = cuda_stopwatch(CPU, allowance, heat_seconds=0.0)
    (least,) = watch([host.call(1.0)])
    allowance.seconds = 0.05
    (more,) = watch([host.call(1.0)])
    allowance.seconds = 1000.0
    (most,) = watch([host.call(1.0)])
    assert (least.num_calls, most.num_calls) == (MIN_ROUNDS, MAX_ROUNDS)
    assert 50 <= more.num_calls <= 52
    assert (more.low, more.ms, more.high, more.host_ms) == pytest.approx((1.0, 1.0, 1.0, 1.0))


def test_heats_up_first_and_then_for_as_long_as_it_was_idle(host: Host) -> None:
    watch = cuda_stopwatch(CPU, Allowance(0.0), heat_seconds=3.0)
    spent = []
    for idle in (0.0, 0.5, 100.0):
        host.seconds += idle
        began = host.seconds
        watch([])
        spent.append(host.seconds - began)
    assert spent == pytest.approx([4.0, 2.0, 4.0]), "in bursts of 20 products, 2 s here"


def test_a_summary_leaves_the_fifths_at_both_ends() -> None:
    timing = summary([5.0, 1.0, 2.0, 3.0, 4.0, 100.0], host_ms=0.5)
    assert (timing.ms, timing.low, timing.high, timing.num_calls, timing.host_ms) == (3.5, 2.0, 5.0, 6, 0.5)
    assert summary([2.0]).low == summary([2.0]).high == 2.0


def test_turns() -> None:
    assert [turns(3, i) for i in range(4)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]


def test_the_canary_is_a_product() -> None:
    out = product(CPU, 16)()
    assert isinstance(out, torch.Tensor) and out.shape == (16, 16) and out.dtype == torch.bfloat16


def test_a_fake_clock_runs_each_call_once() -> None:
    log: list[float] = []
    assert medians(fake_stopwatch)([Host().call(1.0, log), Host().call(2.0, log)]) == [1.0, 1.0]
    assert log == [1.0, 2.0]


def test_a_cpus_stopwatch_takes_turns_until_the_allowance_is_spent(host: Host) -> None:
    log: list[float] = []
    timings = wall_stopwatch(Allowance(0.2))([host.call(10.0, log), host.call(20.0, log)])
    assert [timing.ms for timing in timings] == pytest.approx([10.0, 20.0])
    num_rounds = 7  # of 30 ms
    assert [timing.num_calls for timing in timings] == [num_rounds] * 2
    assert log[:6] == [10.0, 20.0, 10.0, 20.0, 20.0, 10.0] and len(log) == 2 + 2 * num_rounds
