"""Times a shape: everyone in turns, on the same tensors, after their answers were seen to agree."""

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.candidates import Config
from ..kernels.operator import packed
from ..kernels.table import Choice
from .attention_peers import (
    FASTEST,
    Call,
    Contender,
    Inputs,
    Kind,
    NotServedError,
    contenders,
    mask_of,
    random_inputs,
    twin_inputs,
)
from .attention_shapes import Shape, operations
from .clock import Stopwatch, Timing
from .sensors import Reading

AGREEMENT = {"forward": 0.03, "backward": 0.1}  # of a row: 16-bit rounding costs a tenth of it, a lost tile more
CANARY = "cuBLAS 8192^3"

Candidate = tuple[str, int, str, Config]  # direction, listed head dim, dtype, config


@dataclass(frozen=True)
class Row:
    """What one contender did. timing None: `note` says why. over_peer: the best peer's time over this one's.

    over_plain: this one's time over its plain call's, of zigzag steps. wrong: the note is about an error of ours.
    """

    contender: str
    kind: Kind
    timing: Timing | None = None
    tflops: float | None = None
    of_cublas: float | None = None
    over_peer: float | None = None
    over_plain: float | None = None
    kernels: tuple[str, ...] = ()
    note: str = ""
    wrong: bool = False


@dataclass(frozen=True)
class Group:
    """One shape in one direction."""

    shape: Shape
    direction: str
    rows: tuple[Row, ...]
    cublas_tflops: float
    reading: Reading

    @property
    def name(self) -> str:
        return group_name(self.shape, self.direction)


def group_name(shape: Shape, direction: str) -> str:
    return f"{shape.name}-{direction}"


@dataclass(frozen=True)
class Bench:
    """What all measurements share.

    canary: a matrix product, of so many operations. wrong: candidates that must not be timed. reading_since: of the
    GPU's sensors, from a time of time.perf_counter on.
    """

    device: torch.device
    dtype: torch.dtype
    stopwatch: Stopwatch
    canary: Callable[[], object]
    canary_operations: float
    wrong: Collection[Candidate] = ()
    reading_since: Callable[[float], Reading] = lambda began: Reading()


@dataclass(frozen=True)
class Ready:
    """A contender that may be timed, and what it answered."""

    contender: Contender
    call: Call
    answer: tuple[Tensor, ...]
    kernels: tuple[str, ...] = ()


def measure(shape: Shape, direction: str, bench: Bench, left_out: Mapping[str, str] | None = None) -> Group:
    """Everyone who can, in turns with the canary. left_out: those of ours who must not be called, and why."""
    left_out = left_out or {}
    inputs = random_inputs(shape, bench.dtype, bench.device)
    everyone = contenders(shape, bench.device)
    prepared = {
        one.name: Row(one.name, one.kind, note=left_out[one.name], wrong=True)
        if one.name in left_out
        else prepare(one, shape, inputs, direction, bench.wrong)
        for one in everyone
    }
    ready = [one for one in prepared.values() if isinstance(one, Ready)]
    strays = disagreeing(ready, direction)
    ready = [one for one in ready if one.contender.name not in strays]
    began = time.perf_counter()
    *timings, canary = bench.stopwatch([*(one.call for one in ready), bench.canary])
    reading = bench.reading_since(began)
    cublas = bench.canary_operations / canary.ms / 1e9
    timed = rows_of(list(zip(ready, timings, strict=True)), operations(shape, direction), cublas)
    untimed = {name: row for name, row in prepared.items() if isinstance(row, Row)}
    rows = untimed | strays | timed
    return Group(shape, direction, tuple(rows[one.name] for one in everyone), cublas, reading)


def prepare(
    contender: Contender, shape: Shape, inputs: Inputs, direction: str, wrong: Collection[Candidate]
) -> Ready | Row:
    """Its call, made once; or the row that says why it is not timed. Says on stderr who is called.

    wrong: candidates that must not run. Raises RuntimeError where nothing can be timed in this process any more.
    """
    if contender.on_twin:
        shape, inputs = twin_inputs(shape, inputs)
    name, kind, kernels = contender.name, contender.kind, ()
    device = torch.get_device_module(inputs.q.device)
    try:
        if contender.backend is not None:
            choices = choices_of(contender.backend, shape, inputs, direction)
            for entry in (choice.entry for choice in choices):
                if (entry.direction, entry.head_dim, entry.dtype, entry.config) in wrong:
                    return Row(name, kind, note=f"left out: {describe(entry.config)} is wrong")
            timed = choices if direction == "forward" else choices[1:]
            kernels = tuple(describe(choice.config) for choice in timed)
        print(f"calling {name} on {group_name(shape, direction)}", file=sys.stderr, flush=True)
        call = contender.make(shape, inputs, direction)
        answer = call()
        device.synchronize()  # a fault shows here, and is this one's
        return Ready(contender, call, answer, kernels)
    except NotServedError as error:
        return Row(name, kind, note=f"not run here: {error}")
    except Exception as error:  # of a peer, or of a kernel, whatever it is: the others are still to be timed
        lines = str(error).strip().splitlines() or [""]
        note = f"{type(error).__name__}: {lines[0]}"[:160]
        try:
            device.synchronize()
        except RuntimeError:
            raise RuntimeError(f"{name}: {note}") from error
        return Row(name, kind, note=note, wrong=kind != "peer" and not isinstance(error, torch.OutOfMemoryError))


def call_once(
    what: tuple[Shape, str, str], *, device: torch.device, dtype: torch.dtype, wrong: Collection[Candidate]
) -> None:
    """Has a contender, by name, compile what it launches on a shape in a direction. Raises what breaks this process."""
    shape, direction, name = what
    inputs = random_inputs(shape, dtype, device)
    (contender,) = (one for one in contenders(shape, device) if one.name == name)
    prepare(contender, shape, inputs, direction, wrong)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the processes beside this one


def choices_of(backend: str, shape: Shape, inputs: Inputs, direction: str) -> list[Choice]:
    """What our backend launches: the forward, then the backward's, which follow it. NotServedError: it has none."""
    from ..kernels import cuda

    mask = mask_of(shape, inputs)
    q, k, v, dout = packed(*(x.detach() for x in (inputs.q, inputs.k, inputs.v, inputs.dout)))
    chosen: cuda.CudaBackend = getattr(cuda, backend)
    operands = (q, k, v) if direction == "forward" else (q, k, v, dout)
    needed = ("forward",) if direction == "forward" else ("forward", "dkdv", "dq")
    found = [chosen.find(name, mask, *operands) for name in needed]
    if None in found:
        raise NotServedError(f"no {backend} kernel for head_dim {q.shape[-1]}, {q.dtype} on this device")
    if direction == "backward" and backend in FASTEST:
        found.append(chosen.find("backward", mask, *operands))
    return [choice for choice in found if choice is not None]


def describe(config: Config) -> str:
    return f"{config.kernel} {config.rows}x{config.keys}, {config.warps} warps, {config.stages} stages"


def disagreeing(ready: Sequence[Ready], direction: str) -> dict[str, Row]:
    """Rows of ours whose answer is not that of the first peer, of the first of ours where there is no peer."""
    peers = [one for one in ready if one.contender.kind == "peer"] or list(ready)
    strays = {}
    for one in ready:
        pairs = zip(one.answer, peers[0].answer, strict=True)
        error = max(row_error(found, expected) for found, expected in pairs)
        if one.contender.kind != "peer" and not error <= AGREEMENT[direction]:
            name, kind = one.contender.name, one.contender.kind
            note = f"rows differ by up to {error:.2g} from {peers[0].contender.name}"
            strays[name] = Row(name, kind, kernels=one.kernels, note=note, wrong=True)
    return strays


def row_error(found: Tensor, expected: Tensor) -> float:
    """Of [..., D]: the largest distance of two rows over their length, which counts as at least that of the median."""
    found, expected = (x.detach().float().flatten(0, -2) for x in (found, expected))
    lengths = expected.norm(dim=-1)
    return float(
        ((found - expected).norm(dim=-1) / lengths.clamp(min=float(lengths.median()))).nan_to_num(torch.inf).max()
    )


def rows_of(timed: Sequence[tuple[Ready, Timing]], count: float, cublas_tflops: float) -> dict[str, Row]:
    """By contender, for calls of `count` operations."""
    peers = [timing.ms for one, timing in timed if one.contender.kind == "peer"]
    plain = {one.contender.backend: timing.ms for one, timing in timed if one.contender.kind == "plain call"}
    rows = {}
    for one, timing in timed:
        contender, tflops = one.contender, count / timing.ms / 1e9
        own_plain = plain.get(contender.backend) if contender.kind == "ours" else None
        rows[contender.name] = Row(
            contender.name,
            contender.kind,
            timing,
            tflops,
            of_cublas=tflops / cublas_tflops,
            over_peer=min(peers) / timing.ms if peers else None,
            over_plain=timing.ms / own_plain if own_plain else None,
            kernels=one.kernels,
        )
    return rows


def profile(contender_name: str, shape: Shape, direction: str, bench: Bench, num_calls: int = 5) -> None:
    """Calls one contender between cudaProfilerStart and Stop. Raises ValueError where it cannot be called."""
    inputs = random_inputs(shape, bench.dtype, bench.device)
    names = {one.name: one for one in contenders(shape, bench.device)}
    if contender_name not in names:
        raise ValueError(f"unknown contender {contender_name!r}: one of {', '.join(names)}")
    ready = prepare(names[contender_name], shape, inputs, direction, bench.wrong)
    if isinstance(ready, Row):
        raise ValueError(f"{contender_name} on {group_name(shape, direction)}: {ready.note}")
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.profiler.start()
    for _ in range(num_calls):
        ready.call()
    if on_gpu:
        torch.cuda.synchronize(bench.device)
        torch.cuda.profiler.stop()
    print(f"{num_calls} calls of {contender_name}: {', '.join(ready.kernels) or 'a peer'}")
