"""Milliseconds of calls that take turns, on a GPU by its own clock.

Three ideas:
- One call of each in every round, each round starting with another: what drifts (heat, power) meets all alike.
- Only the GPU's time counts: it spins before a call for as long as the host needs to launch it, and its L2 cache is
  overwritten. What the host needs is told apart, as `host_ms`.
- Time is the budget, not a count: rounds go on until it is spent, but at least `MIN_ROUNDS`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Call = Callable[[], object]
Clock = Callable[[Sequence[Call]], list[float]]  # median milliseconds of each call, all run in turns

MIN_ROUNDS, MAX_ROUNDS = 3, 200
HEAT_SECONDS = 3.0
FLUSH_BYTES = 2**28  # several times the L2 cache of any GPU
SPIN_CLOCKS = 2.0e6  # of the GPU in a millisecond, rounded up
LONG_SECONDS = 0.02
MAX_SPIN_MS = 3.0  # a call that waits for the GPU must not be spun for as long as it takes


@dataclass(frozen=True)
class Timing:
    """ms: median; low, high: the fifths at either end begin there; host_ms: what it takes to launch the call."""

    ms: float
    low: float
    high: float
    num_calls: int
    host_ms: float = 0.0


Stopwatch = Callable[[Sequence[Call]], list[Timing]]


@dataclass
class Allowance:
    """What a stopwatch may spend on the rounds of its next measurement; may be changed in between."""

    seconds: float


def summary(samples: Sequence[float], host_ms: float = 0.0) -> Timing:
    """Of milliseconds, one or more."""
    cuts = quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples
    return Timing(median(samples), cuts[0], cuts[-1], len(samples), host_ms)


def medians(stopwatch: Stopwatch) -> Clock:
    """A clock that asks the stopwatch."""
    return lambda calls: [timing.ms for timing in stopwatch(calls)]


def turns(num_calls: int, round_index: int) -> list[int]:
    """The order of the calls in a round."""
    return [(round_index + i) % num_calls for i in range(num_calls)]


def product(device: torch.device, size: int = 8192) -> Call:
    """A bfloat16 matrix product by cuBLAS: what this chip reaches now. 2 size^3 floating-point operations."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def cuda_clock(device: torch.device, *, seconds: float = 0.5, heat_seconds: float = HEAT_SECONDS) -> Clock:
    """Medians of `cuda_stopwatch`."""
    return medians(cuda_stopwatch(device, Allowance(seconds), heat_seconds=heat_seconds))


def cuda_stopwatch(device: torch.device, allowance: Allowance, *, heat_seconds: float = HEAT_SECONDS) -> Stopwatch:
    """A stopwatch made of CUDA events.

    Args:
        device: the GPU, whose current stream the calls use.
        allowance: for the rounds of a measurement together.
        heat_seconds: how long the GPU multiplies matrices before the first measurement; and, at most, before a later
            one, as long as it was idle in between.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    heater = product(device)
    idle_since: float | None = None

    def measure(calls: Sequence[Call]) -> list[Timing]:
        nonlocal idle_since
        host = [_host_ms(call, device) for call in calls]  # compiles, too
        idle = heat_seconds if idle_since is None else time.perf_counter() - idle_since
        _heat(heater, min(idle, heat_seconds), device)
        samples = _rounds(len(calls), allowance, lambda order: _timed_round(calls, host, order, flush, device))
        idle_since = time.perf_counter()
        return [summary(*pair) for pair in zip(samples, host, strict=True)]

    return measure


def _rounds(
    num_calls: int, allowance: Allowance, timed_round: Callable[[Sequence[int]], list[tuple[int, float]]]
) -> list[list[float]]:
    """Milliseconds of each call, round after round in turns, until the allowance is spent."""
    samples: list[list[float]] = [[] for _ in range(num_calls)]
    deadline = time.perf_counter() + allowance.seconds
    for round_index in range(MAX_ROUNDS):
        if round_index >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        for i, ms in timed_round(turns(num_calls, round_index)):
            samples[i].append(ms)
    return samples


def _host_ms(call: Call, device: torch.device) -> float:
    """Of launching the call, once it has been compiled: least of three, of one where the GPU is long at it."""
    least = float("inf")
    for repeat in range(4):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        launched = time.perf_counter()
        torch.cuda.synchronize(device)
        if repeat:
            least = min(least, 1e3 * (launched - began))
            if time.perf_counter() - began > LONG_SECONDS:
                break
    return least


def _heat(heater: Call, seconds: float, device: torch.device) -> None:
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        for _ in range(20):
            heater()
        torch.cuda.synchronize(device)


def _timed_round(
    calls: Sequence[Call], host: Sequence[float], order: Sequence[int], flush: torch.Tensor, device: torch.device
) -> list[tuple[int, float]]:
    """(index, milliseconds) of each call."""
    events = []
    for i in order:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(int(SPIN_CLOCKS * min(1.5 * host[i], MAX_SPIN_MS)))
        began.record()
        calls[i]()
        ended.record()
        events.append((i, began, ended))
    torch.cuda.synchronize(device)
    return [(i, began.elapsed_time(ended)) for i, began, ended in events]


def wall_stopwatch(allowance: Allowance) -> Stopwatch:
    """A stopwatch for a CPU, where a call is over when it returns. Each call runs once before."""

    def timed(call: Call) -> float:
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)

    def measure(calls: Sequence[Call]) -> list[Timing]:
        for call in calls:
            call()
        samples = _rounds(len(calls), allowance, lambda order: [(i, timed(calls[i])) for i in order])
        return [summary(times) for times in samples]

    return measure


def fake_stopwatch(calls: Sequence[Call]) -> list[Timing]:
    """For rehearsals and tests: runs each call once and claims that all took a millisecond."""
    for call in calls:
        call()
    return [Timing(1.0, 1.0, 1.0, 1) for _ in calls]
