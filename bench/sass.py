"""Reading SASS, the machine code of NVIDIA's GPUs, as `cuobjdump -sass` lists it: inner loops, what they wait for.

A matrix loop is an innermost loop that holds matrix products; in a kernel without such, one that holds exponentials.
Its order is written as tokens: Hn n asynchronous products (HGMMA), a new token for each group; Wk waiting until at most
k groups are in flight; En n exponentials; B a barrier of the whole program, b of some of its warps. Of a loop without
asynchronous products only the counts are told, as in "M256 E68 B2": ptxas interleaves HMMA with all else.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LINE = re.compile(r"\s*/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_ADDRESS = re.compile(r"0x([0-9a-f]+)$")
_PRODUCTS, _EXPONENTIALS = ("HGMMA", "HMMA"), ("MUFU.EX2",)
_COUNTED = ("H", "M", "E")  # kinds of token that stand for a run of instructions


@dataclass(frozen=True)
class Instruction:
    """One instruction: `opcode` with its modifiers, `operands` as printed, `guarded` by a predicate or not."""

    address: int
    opcode: str
    operands: str
    guarded: bool

    @property
    def target(self) -> int | None:
        """Where a branch goes; None for all else."""
        found = _ADDRESS.search(self.operands) if self.opcode.split(".")[0] == "BRA" else None
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Loop:
    """A matrix loop.

    length: instructions of a turn that skips what its longest forward branch can skip (the mask of an edge tile).
    local: accesses to local memory in the whole body, that is spilled registers.
    """

    length: int
    order: str
    local: int


def instructions(listing: str) -> list[Instruction]:
    """All of a listing of one kernel, in order."""
    found = (_LINE.match(line) for line in listing.splitlines())
    return [Instruction(int(m[1], 16), m[3], m[4], bool(m[2])) for m in found if m]


def count(code: Iterable[Instruction], *names: str) -> int:
    """How many have an opcode that begins with one of the names: "BAR.SYNC" counts BAR.SYNC.DEFER_BLOCKING."""
    return sum(_is(x, names) for x in code)


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """The matrix loops, by address."""
    marks = _PRODUCTS if count(code, *_PRODUCTS) else _EXPONENTIALS
    marked = [x.address for x in code if _is(x, marks)]
    # Behind the last exit stand the spins of barriers that had to wait, out of line: they branch back, and are no loops
    last_exit = max((x.address for x in code if x.opcode == "EXIT" and not x.guarded), default=code[-1].address)
    spans = {
        (x.target, x.address)
        for x in code
        if x.target is not None and x.target < x.address <= last_exit
        if any(x.target <= address <= x.address for address in marked)
    }
    innermost = [
        (start, end) for start, end in spans if not any(start <= s and e <= end for s, e in spans - {(start, end)})
    ]
    return [_loop([x for x in code if start <= x.address <= end]) for start, end in sorted(innermost)]


def _loop(body: Sequence[Instruction]) -> Loop:
    end = body[-1].address
    skips = [
        sum(x.address < y.address < x.target for y in body)
        for x in body
        if x.target is not None and x.address < x.target <= end
    ]
    return Loop(len(body) - max(skips, default=0), order(body), count(body, "LDL", "STL"))


def order(body: Iterable[Instruction]) -> str:
    """Tokens of the module's docstring."""
    tokens: list[str] = []
    last = ""
    for x in body:
        kind = _token(x)
        if kind in _COUNTED and kind == last:
            tokens[-1] = f"{kind}{int(tokens[-1][1:]) + 1}"
        elif kind:
            tokens.append(f"{kind}1" if kind in _COUNTED else kind)
        if kind:
            last = kind
        elif last == "H" and _is(x, ("WARPGROUP.ARRIVE",)):  # begins the next group
            last = ""
    if any(token.startswith("H") for token in tokens):
        return " ".join(tokens)
    totals: Counter[str] = Counter()
    for token in tokens:
        totals[token[0]] += int(token[1:] or 1)
    return " ".join(f"{kind}{totals[kind]}" for kind in "MEBb" if kind in totals)


def _token(x: Instruction) -> str:
    """Kind of the token that the instruction makes or lengthens; "" for most."""
    if _is(x, ("HGMMA",)):
        return "H"
    if _is(x, ("HMMA",)):
        return "M"
    if _is(x, ("MUFU.EX2",)):
        return "E"
    if _is(x, ("WARPGROUP.DEPBAR",)):
        in_flight = _ADDRESS.search(x.operands)
        return f"W{int(in_flight[1], 16) if in_flight else '?'}"
    if _is(x, ("BAR.SYNC", "BAR.RED")):
        return "b" if "," in x.operands else "B"  # 0x2, 0x80: barrier 2, of 0x80 threads
    return ""


def _is(x: Instruction, names: Iterable[str]) -> bool:
    return any(x.opcode == name or x.opcode.startswith(f"{name}.") for name in names)
