"""The machine that `gluon_threads` runs kernels on: partitions of a program, barriers, shared memory, TMA, pointers."""

import random
import threading
from collections.abc import Callable, Sequence
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

CHANGES = (0.0, 0.02, 0.3)  # how often the order in which partitions are preferred changes: drawn for each program


class KernelError(Exception):
    """What the hardware would not have forgiven."""


def check(holds: object, problem: str) -> None:
    if not holds:
        raise KernelError(problem)


# Who runs


class Partition:
    """One partition: products in flight, additions whose buffer may still be read, stores without a fence yet."""

    def __init__(self) -> None:
        self.may_go = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.finished = False
        self.products: list[Product] = []
        self.additions: list[Callable[[], None]] = []
        self.stores: list[Shared] = []


def run_in_turns(threads: Sequence[threading.Thread], hand_over: Callable[[], None]) -> None:
    """To their ends: each waits until it is handed its first turn."""
    for thread in threads:
        thread.start()
    hand_over()
    for thread in threads:
        thread.join()


class Grid:
    """The programs of a launch: one runs at a time, and who goes on is drawn where one meets the others."""

    def __init__(self, seed: object) -> None:
        self.random = random.Random(str(seed))
        self.waiting: list[threading.Semaphore] = []
        self.error: BaseException | None = None

    def run(self, programs: Sequence[Callable[[], None]]) -> None:
        """Runs them to their ends. Raises what the first that failed raised."""
        threads = [threading.Thread(target=self._run, args=(program, self._wait())) for program in programs]
        run_in_turns(threads, self._hand_over)
        if self.error:
            raise self.error

    def meet(self) -> None:
        """The running program goes on when it is drawn."""
        may_go = self._wait()
        self._hand_over()
        may_go.acquire()

    def _run(self, program: Callable[[], None], may_go: threading.Semaphore) -> None:
        may_go.acquire()
        try:
            program()
        except BaseException as error:
            self.error = self.error or error
        self._hand_over()

    def _wait(self) -> threading.Semaphore:
        self.waiting.append(threading.Semaphore(0))
        return self.waiting[-1]

    def _hand_over(self) -> None:
        if self.waiting:
            self.waiting.pop(self.random.randrange(len(self.waiting))).release()


class Program:
    """One program of the grid. `copies`: TMA loads under way."""

    def __init__(self, grid: Grid, seed: object) -> None:
        self.grid = grid
        self.random = random.Random(str(seed))
        self.partitions = [Partition()]
        self.running = self.partitions[0]
        self.copies: list[Callable[[], None]] = []
        self.changes = self.random.choice(CHANGES)
        self.favourites: list[int] = []
        self.error: BaseException | None = None

    def specialize(self, parts: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], *_: object) -> None:
        """Runs the partitions to their ends."""
        check(not self.running.stores, "barriers are initialised without a fence")
        self.partitions = [Partition() for _ in parts]
        threads = [
            threading.Thread(target=self._run, args=(partition, *part))
            for partition, part in zip(self.partitions, parts, strict=True)
        ]
        run_in_turns(threads, self._hand_over)
        if self.error:
            raise self.error

    def _run(self, partition: Partition, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        partition.may_go.acquire()
        try:
            with np.errstate(all="ignore"):
                if not self.error:
                    function(*args)
            left = partition.products or partition.additions
            check(self.error is not None or not left, "a partition ends with products or additions under way")
        except BaseException as error:
            self.error = self.error or error
        partition.finished = True
        self._hand_over()

    def meet(self, ready: Callable[[], bool] = lambda: True) -> None:
        """The running partition goes on when it is drawn and `ready`."""
        partition = self.running
        partition.ready = ready
        self._hand_over()
        partition.may_go.acquire()
        if self.error:
            raise KernelError("another partition failed")

    def _hand_over(self) -> None:
        while True:
            actors = [i for i, x in enumerate(self.partitions) if not x.finished and (self.error or x.ready())]
            if self.copies and not self.error:
                actors.append(len(self.partitions))
            if not actors:
                if all(x.finished for x in self.partitions):
                    return
                self.error = KernelError("deadlock")
                continue
            if not self.favourites or self.random.random() < self.changes:
                self.favourites = self.random.sample(range(len(self.partitions) + 1), len(self.partitions) + 1)
            actor = min(actors, key=self.favourites.index)
            if actor < len(self.partitions):
                self.running = self.partitions[actor]
                self.running.may_go.release()
                return
            self.copies.pop(self.random.randrange(len(self.copies)))()


# What they share


class Barrier:
    """An mbarrier."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.count = self.left = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.left = count

    def update(self, arrivals: int, num_bytes: int) -> None:
        self.left -= arrivals
        self.bytes += num_bytes
        check(self.left >= 0, "more arrivals at a barrier than it counts")
        if self.left == 0 and self.bytes == 0:
            self.phase += 1
            self.left = self.count

    def arrive(self, arrivals: int = 1, num_bytes: int = 0) -> None:
        self.update(arrivals, num_bytes)
        self.program.meet()

    def wait(self, parity: int) -> None:
        self.program.meet(lambda: (self.phase & 1) != (int(parity) & 1))


class Shared:
    """Shared memory: what threads see, and what products and TMA see (`proxy`). Views change both."""

    def __init__(self, program: Program, dtype: torch.dtype, threads: np.ndarray, proxy: np.ndarray) -> None:
        self.program, self.dtype, self.threads, self.proxy = program, dtype, threads, proxy
        self.shape = threads.shape

    def view(self, change: Callable[[np.ndarray], np.ndarray]) -> "Shared":
        return Shared(self.program, self.dtype, change(self.threads), change(self.proxy))

    def index(self, i: int) -> "Shared":
        check(0 <= i < self.shape[0], f"buffer {i} of {self.shape[0]}")
        return self.view(lambda x: x[int(i)])

    def reshape(self, shape: Sequence[int]) -> "Shared":
        return self.view(lambda x: x.reshape(shape))

    def permute(self, order: Sequence[int]) -> "Shared":
        return self.view(lambda x: x.transpose(order))

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        where = (slice(None),) * dim + (slice(int(start), int(start) + int(length)),)
        return self.view(lambda x: x[where])

    def store(self, block: np.ndarray) -> None:
        check(block.shape == self.shape, f"stores {block.shape} to {self.shape}")
        self.threads[...] = block
        self.proxy[...] = np.nan
        self.program.running.stores.append(self)
        self.program.meet()

    def load(self, _layout: object) -> np.ndarray:
        if self.dtype is torch.int32:
            check(not np.isnan(self.threads).any(), "numbers are read that nobody stored")
            return self.threads.astype(np.int32)
        return self.threads.copy()


class Product:
    """a b + total, computed when a wait reaches it."""

    def __init__(self, a: Shared | np.ndarray, b: Shared, total: "Product | np.ndarray", use_total: bool) -> None:
        self.operands = (a, b)
        self.began = [_read(x) for x in self.operands]
        check(use_total or isinstance(total, np.ndarray), "the accumulator of a product under way is overwritten")
        self.total = total if use_total else None
        self.value: np.ndarray | None = None

    def finish(self) -> None:
        a, b = (_read(x) for x in self.operands)
        unchanged = all(np.array_equal(x, y, equal_nan=True) for x, y in zip((a, b), self.began, strict=True))
        check(unchanged, "an operand changed under a product")
        total = self.total.value if isinstance(self.total, Product) else self.total
        self.value = (a @ b if total is None else a @ b + total).astype(np.float32)


def _read(x: Shared | np.ndarray) -> np.ndarray:
    return x.proxy.copy() if isinstance(x, Shared) else x


class Descriptor:
    """A TMA descriptor."""

    def __init__(self, made: TensorDescriptor) -> None:
        self.x = torch.as_strided(made.base, made.shape, made.strides, made.base.storage_offset())
        self.block_shape, self.layout, self.dtype = made.block_shape, made.layout, made.base.dtype
        self.block_type = SimpleNamespace(nbytes=prod(made.block_shape) * self.dtype.itemsize)

    def box(self, at: Sequence[int], memory: Shared) -> Tensor:
        """What of the box at these coordinates lies in the tensor."""
        check(memory.shape == tuple(self.block_shape), f"box {self.block_shape} for a buffer {memory.shape}")
        check(memory.dtype == self.dtype and min(at) >= 0, f"{memory.dtype} buffer at {at} of {self.dtype}")
        check(
            at[-1] * self.dtype.itemsize % 16 == 0,
            f"a box at {at}: its first row of bytes must start at a multiple of 16",
        )
        return self.x[tuple(slice(int(a), int(a) + n) for a, n in zip(at, self.block_shape, strict=True))]


class Pointers:
    """A pointer or a block of them: a tensor's memory from its first number on, and offsets into it."""

    def __init__(self, x: Tensor, offsets: Any = 0) -> None:
        extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        self.flat = torch.as_strided(x, (extent,), (1,), x.storage_offset())
        self.offsets = offsets
        self.dtype = SimpleNamespace(element_ty=x.dtype)

    def __add__(self, more: Any) -> "Pointers":
        return Pointers(self.flat, self.offsets + more)

    def __sub__(self, less: Any) -> "Pointers":
        return Pointers(self.flat, self.offsets - less)

    def __getitem__(self, where: Any) -> "Pointers":
        return Pointers(self.flat, self.offsets[where])

    def at(self, mask: Any) -> tuple[np.ndarray, Tensor]:
        """The mask, and the offsets that it lets through."""
        offsets, mask = np.broadcast_arrays(self.offsets, mask)
        chosen = offsets[mask]
        check(not chosen.size or 0 <= chosen.min() <= chosen.max() < len(self.flat), "address outside of a tensor")
        return mask, torch.from_numpy(chosen.astype(np.int64))


def load(pointers: Pointers, mask: Any = True, other: float = 0.0) -> Any:
    mask, where = pointers.at(mask)
    numbers = pointers.flat[where]
    numbers = numbers.float().numpy() if numbers.is_floating_point() else numbers.numpy()
    block = np.full(mask.shape, other, numbers.dtype)
    block[mask] = numbers
    return block if block.shape else block[()]


def store(pointers: Pointers, block: np.ndarray, mask: Any, add: bool = False) -> None:
    mask, where = pointers.at(mask)
    numbers = torch.from_numpy(np.broadcast_to(block, mask.shape)[mask]).to(pointers.flat.dtype)
    pointers.flat.index_put_((where,), numbers, accumulate=add)
