"""What a launch of a kernel would run on a GPU, found without one, and its static facts.

A host function runs on CPU tensors; Triton compiles its kernels for a target exactly as for those launches, and the
programs that would start are kept instead. Nothing is computed, so the tensors may hold anything.
"""

import io
import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from math import prod
from typing import Any, cast
from unittest.mock import patch

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .sass import Instruction, count, instructions, loops

REGISTERS = 65536  # of an SM
SHARED = {90: 233472, 80: 167936}  # bytes of an SM, by capability; a program takes what it asks for and RESERVED
RESERVED = 1024
WARPS = 64  # of an SM


@dataclass(frozen=True)
class Launch:
    """A kernel as compiled for a launch, what ptxas said to it, and the names of the arguments given by keyword."""

    kernel: CompiledKernel
    log: str
    keywords: frozenset[str]


@dataclass(frozen=True)
class Facts:
    """What can be told of a compiled kernel without running it.

    spilled: bytes stored and loaded, by ptxas. local: the most accesses to local memory in one matrix loop.
    shared: bytes. programs: that fit on an SM. groups: registers asked for by the partitions of a warp-specialised
    kernel. notes: ptxas' warnings C75xx, of serialised wgmma. boxes: "ok", or what TMA copies and buffers disagree in.
    loop: length of a matrix loop's unmasked turn: of the shortest loop, the one without edges, in a warp-specialised
    kernel of the longest, since each partition has one loop. loops: all lengths. order: of that loop, as in `sass`.
    """

    registers: int
    spilled: int
    local: int
    shared: int
    programs: int
    hgmma: int
    hmma: int
    tma_loads: int
    tma_adds: int
    groups: str
    notes: str
    boxes: str
    loop: int
    loops: str
    order: str


class CompileOnly:
    """Stands where Triton looks for the GPU's driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels by device: each target has its own

    def get_current_stream(self, device: int) -> int:
        return 0


def record(capability: int, call: Callable[[], object]) -> list[Launch]:
    """What the launches of `call` would run on a GPU of that capability, 90 or 80.

    This process has no other driver from here on. Every kernel is compiled anew once in a process, past Triton's cache
    on disk, for only then ptxas' own words on it can be read.
    """
    launches: list[Launch] = []
    run = JITFunction.run

    def keep(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> CompiledKernel:
        said = io.StringIO()
        with redirect_stdout(said):
            kernel = cast(CompiledKernel, run(self, *args, grid=grid, warmup=True, **options))
        log = _logs.setdefault(kernel.hash, said.getvalue())
        launches.append(Launch(kernel, log, frozenset(options)))
        return kernel

    driver.set_active(CompileOnly(capability))  # pyright: ignore[reportArgumentType]
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    with patch.object(JITFunction, "run", keep):
        call()
    return launches


_logs: dict[str, str] = {}  # by the kernel's hash: a kernel that this process has compiled is silent at its next launch


def facts(launch: Launch) -> Facts:
    """Reads the program, ptxas' log and Triton's intermediate form."""
    kernel, log = launch.kernel, launch.log
    ttgir = kernel.asm["ttgir"]
    code = machine_code(kernel.asm["cubin"])
    found = loops(code)
    groups = re.search(r"requestedRegisters = array<i32: ([\d, ]+)>", ttgir)
    full = found if groups else sorted(found, key=lambda loop: loop.length)[:1]
    registers = int(_search(r"Used (\d+) registers", log)[1])
    stores, loads = _search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()
    return Facts(
        registers=registers,
        spilled=int(stores) + int(loads),
        local=max((loop.local for loop in found), default=0),
        shared=kernel.metadata.shared,
        programs=programs(kernel.metadata.target.arch, registers, kernel.metadata.shared, kernel.metadata.num_warps),
        hgmma=count(code, "HGMMA"),
        hmma=count(code, "HMMA"),
        tma_loads=count(code, "UTMALDG"),
        tma_adds=count(code, "UTMAREDG"),
        groups=groups[1].replace(" ", "") if groups and count(code, "USETMAXREG") else "-",
        notes=",".join(sorted(set(re.findall(r"\bC75\d\d\b", log)))) or "-",
        boxes="; ".join(box_problems(ttgir, kernel.metadata.tensordesc_meta)) or "ok",
        loop=max((loop.length for loop in full), default=0),
        loops=",".join(str(loop.length) for loop in found) or "-",
        order=" | ".join(dict.fromkeys(loop.order for loop in full)) or "-",
    )


def machine_code(cubin: bytes) -> list[Instruction]:
    """The program's instructions, by the disassembler that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return instructions(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def programs(capability: int, registers: int, shared: int, warps: int) -> int:
    """How many fit on an SM at once, by registers, shared memory and warps."""
    of_a_warp = -(-registers * 32 // 256) * 256  # given out 256 at a time
    return min(REGISTERS // (of_a_warp * warps), SHARED[capability] // (shared + RESERVED), WARPS // warps)


def box_problems(ttgir: str, descriptors: list[dict[str, Any]]) -> list[str]:
    """Where TMA would move other bytes than its buffer holds, its barrier expects, or its descriptor is made for.

    `descriptors` say the box that the host encodes for each argument: the block that the kernel asks for, or a part of
    its columns as wide as the swizzle. Blocks and buffers are written as in "1x128x64xbf16".
    """
    problems: list[str] = []
    copied = expected = 0
    for line in ttgir.splitlines():
        if moved := re.search(r"async_tma_(copy_global_to_local|copy_local_to_global|reduce)", line):
            [block] = re.findall(r"tensordesc<(?:tensor<)?(\w+)", line)
            buffer = re.findall(r"memdesc<(\w+)", line)[-1]
            if num_bytes(block) != num_bytes(buffer):
                problems.append(f"{moved[1]} of {block}, buffer {buffer}")
            copied += num_bytes(buffer) * (moved[1] == "copy_global_to_local")
        elif awaited := re.search(r"barrier_expect %\S+, (\d+)", line):
            expected += int(awaited[1])
    if copied != expected:
        problems.append(f"copies bring {copied} bytes, barriers expect {expected}")
    entry = next(line for line in ttgir.splitlines() if "tt.func public" in line)
    blocks = re.findall(r"tensordesc<(?:tensor<)?(\w+)", entry)
    for block, descriptor in zip(blocks, descriptors, strict=True):
        rows, columns = _shape(block)[:-1], _shape(block)[-1]
        box = descriptor["block_size"]
        whole = box[:-1] == rows and columns % box[-1] == 0
        if not whole or num_bytes(block) != prod(box) * (columns // box[-1]) * descriptor["elem_size"]:
            problems.append(f"box {box} for {block}")
    return problems


def num_bytes(block: str) -> int:
    """Of a block as in "1x128x64xbf16"."""
    return prod(_shape(block)) * int(_search(r"\d+$", block)[0]) // 8


def _shape(block: str) -> list[int]:
    return [int(size) for size in block.split("x")[:-1]]


def _search(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"nothing like {pattern!r} in {text[:200]!r}: does this Triton print it in another way?")
    return found
