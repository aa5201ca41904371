"""Runs a Gluon kernel for sm_90 on the CPU: its own source over NumPy, one thread for each partition of its warps.

What the hardware leaves open is taken as badly as it may be, so that a program that relies on luck fails:
- Programs run one at a time; who goes on is drawn where one adds to global memory.
- So do the partitions of a program; who goes on is drawn wherever they meet (barriers, copies, products), with long
  leads. Where nobody can go on the kernel has a deadlock, and that is reported at once.
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
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from longtake.kernels import hopper
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import constexpr
from triton.runtime.jit import JITFunction

from tests.kernels.gluon_machine import (
    Barrier,
    Descriptor,
    Grid,
    Pointers,
    Product,
    Program,
    Shared,
    check,
    load,
    store,
)


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
        threads, proxy = np.full((2, *shape), np.nan, np.float64 if dtype is torch.int32 else np.float32)
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

    def atomic_add(pointers: Pointers, block: Any, mask: Any = True, sem: str = "") -> Any:
        check(sem == "relaxed", "an addition that orders other memory")
        program.grid.meet()
        before = load(pointers, mask)
        store(pointers, block, mask, add=True)
        return before

    def where(condition: Any, a: Any, b: Any) -> Any:
        return np.where(condition, a, b) if np.ndim(condition) else (a if condition else b)

    def nothing(*_: object, **__: object) -> None:
        return None

    gl = SimpleNamespace(
        constexpr=lambda x: x,
        program_id=lambda axis: np.int32(ids[axis]),
        num_programs=lambda axis: np.int32(grid[axis]),
        load=load,
        store=store,
        atomic_add=atomic_add,
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
        BlockedLayout=nothing,
        SwizzledSharedLayout=nothing,
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
            programs = Grid(self.seed)

            def run(ids: tuple[int, ...]) -> None:
                names = self.names | language(Program(programs, (self.seed, ids)), ids, grid)
                exec(self.code, names)
                names[self.kernel.fn.__name__](**given)

            programs.run([partial(run, ids) for ids in itertools.product(*map(range, grid))])

        return launch


def _plain(x: Any) -> Any:
    """An argument as kernels see it here."""
    if type(x) is int:
        return np.int32(x) if -(2**31) <= x < 2**31 else np.int64(x)
    if isinstance(x, tuple):
        return tuple(map(_plain, x))
    if isinstance(x, constexpr):
        return x.value
    seen_as = {Tensor: Pointers, TensorDescriptor: Descriptor, float: np.float32}
    return next((make(x) for kind, make in seen_as.items() if isinstance(x, kind)), x)
