"""Runs a Gluon kernel for sm_90 on the CPU: its own source over NumPy, one thread for each partition of its warps.

What the hardware leaves open is taken as badly as it may be, so that a program that relies on luck fails:
- Partitions run one at a time; who goes on is drawn wherever they meet (barriers, copies, products), with long leads.
  Where nobody can go on the kernel has a deadlock, and that is reported at once.
- mbarriers count arrivals, bytes and phases as the hardware does; an arrival too many is an error.
- A TMA load destroys its buffer when it starts, and delivers and arrives at any later point.
- A product or a TMA addition reads shared memory as late as the waits allow, and it is an error if what it reads
  changed since it started. A result that nobody waited for cannot be used.
- What a partition stores to shared memory, products and TMA read as NaN until that partition has made a fence.
- Boxes of descriptors and buffers must agree; addresses outside of a tensor are errors; integers have 32 bits.
Not modelled: layouts and registers, warps within a partition (the compiler puts barriers between them).
"""

import ast
import inspect
import itertools
import random
import textwrap
import threading
from collections.abc import Callable, Sequence
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from longtake.kernels import hopper
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import constexpr
from triton.runtime.jit import JITFunction

CHANGES = (0.0, 0.02, 0.3)  # how often the order in which partitions are preferred changes: drawn for each program


class KernelError(Exception):
    """What the hardware would not have forgiven."""


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


class Program:
    """One program of the grid. `copies`: TMA loads under way."""

    def __init__(self, seed: object) -> None:
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
        for thread in threads:
            thread.start()
        self._hand_over()
        for thread in threads:
            thread.join()
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


def check(holds: object, problem: str) -> None:
    if not holds:
        raise KernelError(problem)


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


# The language


def _to(x: Any, dtype: torch.dtype) -> Any:
    if not dtype.is_floating_point:
        return np.asarray(x).astype(str(dtype).removeprefix("torch."))[()]
    return torch.from_numpy(x).to(dtype).float().numpy()


METHODS: dict[str, Callable[..., Any]] = {  # of blocks, which NumPy does not have
    "to": _to,
    "permute": lambda x, order: x.transpose(order),
    "split": lambda x: (x[..., 0], x[..., 1]),
}


def call(x: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    if isinstance(x, Shared) or name not in METHODS:
        return getattr(x, name)(*args, **kwargs)
    return METHODS[name](x, *args, **kwargs)


def divide(a: Any, b: Any) -> Any:
    check(np.all(a >= 0), "C and Python round the quotient of a negative number differently")
    return a // b


class Rewrite(ast.NodeTransformer):
    """Without decorators; nothing changes in place; methods and integer division as Triton has them."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list = []
        return self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        value = ast.BinOp(ast.Name(ast.unparse(node.target), ast.Load()), node.op, node.value)
        return self.generic_visit(ast.Assign([node.target], value))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node = ast.Call(
            self.visit(node.func), [self.visit(x) for x in node.args], [self.visit(x) for x in node.keywords]
        )
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            head = [node.func.value, ast.Constant(node.func.attr)]
            node = ast.Call(ast.Name("call", ast.Load()), head + node.args, node.keywords)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.FloorDiv):
            return ast.Call(ast.Name("divide", ast.Load()), [node.left, node.right], [])
        return node


def language(program: Program, ids: tuple[int, ...], grid: tuple[int, ...]) -> dict[str, Any]:
    """The names of Gluon that a kernel may use, for one program."""

    def allocate(dtype: torch.dtype, shape: Sequence[int], _layout: object) -> Any:
        if dtype is torch.int64:
            made = [Barrier(program) for _ in range(shape[0])]
            program.running.stores.append(shared(dtype, (1,)))  # until a fence
            return SimpleNamespace(index=lambda i: made[int(i)])
        return shared(dtype, tuple(shape))

    def shared(dtype: torch.dtype, shape: tuple[int, ...]) -> Shared:
        threads, proxy = np.full((2, *shape), np.nan, np.float32)
        return Shared(program, dtype, threads, proxy)

    def fence() -> None:
        for memory in program.running.stores:
            memory.proxy[...] = memory.threads
        program.running.stores.clear()

    def async_load(desc: Descriptor, at: Sequence[int], barrier: Barrier, memory: Shared) -> None:
        box = desc.box(at, memory)
        memory.threads[...] = memory.proxy[...] = np.nan

        def deliver() -> None:
            block = np.zeros(memory.shape, np.float32)
            block[tuple(slice(n) for n in box.shape)] = box.float().numpy()
            memory.threads[...] = memory.proxy[...] = block
            barrier.update(0, -desc.block_type.nbytes)

        program.copies.append(deliver)
        program.meet()

    def async_add(desc: Descriptor, at: Sequence[int], memory: Shared) -> None:
        box, began = desc.box(at, memory), memory.proxy.copy()

        def finish() -> None:
            check(np.array_equal(began, memory.proxy, equal_nan=True), "a buffer changed under a TMA addition")
            box.add_(torch.from_numpy(began[tuple(slice(n) for n in box.shape)]))

        program.running.additions.append(finish)
        program.meet()

    def store_wait(left: int) -> None:
        while len(program.running.additions) > left:
            program.running.additions.pop(0)()

    def multiply(a: Any, b: Shared, total: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        check(is_async, "a product that is waited for at once")
        program.running.products.append(Product(a, b, total, use_acc))
        program.meet()
        return program.running.products[-1]

    def multiply_wait(left: int, deps: Sequence[Product]) -> Any:
        program.meet()
        while len(program.running.products) > left:
            program.running.products.pop(0).finish()
        check(all(x.value is not None for x in deps), "a result is used that was not waited for")
        return deps[0].value if len(deps) == 1 else tuple(x.value for x in deps)

    def where(condition: Any, a: Any, b: Any) -> Any:
        return np.where(condition, a, b) if np.ndim(condition) else (a if condition else b)

    def nothing(*_: object, **__: object) -> None:
        return None

    gl = SimpleNamespace(
        constexpr=lambda x: x,
        program_id=lambda axis: np.int32(ids[axis]),
        num_programs=lambda axis: np.int32(grid[axis]),
        load=load,
        store=lambda p, block, mask: store(p, block, mask),
        atomic_add=lambda p, block, mask, sem: store(p, block, mask, add=True),
        minimum=np.minimum,
        maximum=np.maximum,
        where=where,
        exp2=np.exp2,
        log2=np.log2,
        max=lambda x, axis: x.max(axis),
        sum=lambda x, axis: x.sum(axis),
        zeros=lambda shape, dtype, layout: np.zeros(shape, np.float32),
        full=lambda shape, value, dtype, layout: np.full(shape, value, np.float32),
        arange=lambda start, end, layout: np.arange(start, end, dtype=np.int32),
        convert_layout=lambda x, layout: x,
        static_range=range,
        allocate_shared_memory=allocate,
        warp_specialize=program.specialize,
        NVMMASharedLayout=SimpleNamespace(get_default_for=nothing),
        DotOperandLayout=nothing,
        SliceLayout=nothing,
        float32=torch.float32,
        int32=torch.int32,
        int64=torch.int64,
    )
    mbarrier = SimpleNamespace(
        MBarrierLayout=nothing,
        init=lambda barrier, count: barrier.init(count),
        wait=lambda barrier, parity: barrier.wait(parity),
        arrive=lambda barrier, count: barrier.arrive(count),
        expect=lambda barrier, num_bytes: barrier.arrive(1, num_bytes),
    )
    return {
        "gl": gl,
        "mbarrier": mbarrier,
        "tma": SimpleNamespace(store_wait=store_wait),
        "async_load": async_load,
        "async_add": async_add,
        "fence_async_shared": fence,
        "warpgroup_mma": multiply,
        "warpgroup_mma_wait": multiply_wait,
        "range": lambda *ends: map(np.int32, range(*ends)),
        "nap": program.meet,
    }


class Threads:
    """Takes the place of a kernel in its module, for launches by its host function.

    seed: of what is drawn. edits: (old, new) pieces of source, to plant bugs; each `old` must occur.
    """

    def __init__(self, kernel: JITFunction[Any], *, seed: int = 0, edits: Sequence[tuple[str, str]] = ()) -> None:
        self.kernel, self.seed = kernel, seed
        names = vars(hopper) | kernel.fn.__globals__ | {kernel.fn.__name__: kernel}
        sources = {
            name: textwrap.dedent(inspect.getsource(x.fn)) for name, x in names.items() if isinstance(x, JITFunction)
        }
        for old, new in edits:
            if not any(old in source for source in sources.values()):
                raise ValueError(f"nothing like {old!r} in the kernel")
            sources = {name: source.replace(old, new) for name, source in sources.items()}
        tree = Rewrite().visit(ast.parse("\n".join(sources.values())))
        self.code = compile(ast.fix_missing_locations(tree), kernel.fn.__module__, "exec")
        self.names = {name: x.value if isinstance(x, constexpr) else x for name, x in names.items()} | {
            "call": call,
            "divide": divide,
        }

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, enable_fp_fusion: bool, **kwargs: Any) -> None:
            check(num_warps == 4, "a consumer is a warpgroup of four warps")
            given = dict(zip(self.kernel.arg_names, map(_plain, args), strict=False)) | kwargs
            for ids in itertools.product(*map(range, grid)):
                program = Program((self.seed, ids))
                names = self.names | language(program, ids, grid)
                exec(self.code, names)
                names[self.kernel.fn.__name__](**given)

        return launch


def _plain(x: Any) -> Any:
    """An argument as kernels see it here."""
    if isinstance(x, constexpr):
        return x.value
    if isinstance(x, tuple):
        return tuple(map(_plain, x))
    if isinstance(x, Tensor):
        return Pointers(x)
    if isinstance(x, TensorDescriptor):
        return Descriptor(x)
    if isinstance(x, float):
        return np.float32(x)
    if type(x) is int:
        return np.int32(x) if -(2**31) <= x < 2**31 else np.int64(x)
    return x
