"""Every attention kernel that ships, and its launches: what `longtake bench compiled` compiles."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import flash_prepare
from ..kernels.candidates import Config, candidates
from ..kernels.visibility import Visibility
from .recorder import Launch, record

TARGETS = {"sm_90a": (90, "hopper"), "sm_80": (80, "ampere")}  # capability, and architecture of the candidates
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HOST = {  # kernel: module of its host function, and its name there
    "flash_forward": ("flash_forward", "forward"),
    "hopper_forward": ("hopper_forward", "forward"),
    "decode": ("decode", "forward"),
    "prepare": ("flash_prepare", "prepare"),
    "flash_dkdv": ("flash_backward", "dkdv"),
    "flash_dq": ("flash_backward", "dq"),
    "hopper_backward": ("hopper_backward", "backward"),
}
PREPARE = Config("prepare", 0, 0, 0, 0)  # goes before every backward kernel; chooses its tiles itself


@dataclass(frozen=True)
class Variant:
    """How a kernel is launched.

    step: the "only" one; or of a ring the "first", which writes float32, a "middle" one, which folds or adds in place,
    or the "last", which folds and writes in q's dtype. group: query heads to a key head.
    """

    step: str
    group: int

    def __str__(self) -> str:
        return f"{self.step} x{self.group}"


MIDDLE, ONLY = Variant("middle", 7), Variant("only", 1)  # grouped and not, folding or adding and writing fresh
FIRST, LAST = Variant("first", 7), Variant("last", 7)
# prepare: with out in q's dtype and a gradient of lse. Backward: not the last, which adds as a middle one does.
OTHER_STEPS = {"prepare": (LAST,)} | dict.fromkeys(("flash_dkdv", "flash_dq", "hopper_backward"), (FIRST,))
STEPPED_HEAD_DIMS = (64, 80, 128, 256)  # other steps change no loop, and 72 and 96 are cut in two parts as 80 is


def variants(kernel: str, head_dim: int, dtype: str) -> tuple[Variant, ...]:
    """Those that are compiled of a kernel: the code of other dtypes differs from that of bf16 in types alone."""
    if dtype != "bf16":
        return (MIDDLE,)
    others = OTHER_STEPS.get(kernel, (FIRST, LAST)) if head_dim in STEPPED_HEAD_DIMS else ()
    return (MIDDLE, ONLY, *others)


@dataclass(frozen=True)
class Case:
    """A candidate and one way to launch it; dtype: a key of DTYPES."""

    config: Config
    head_dim: int
    dtype: str
    variant: Variant

    @property
    def tile(self) -> str:
        """As in "128x64w8s3": rows x keys, warps, stages."""
        c = self.config
        return f"{c.rows}x{c.keys}w{c.warps}s{c.stages}" if c.rows else "-"

    def __str__(self) -> str:
        return f"{self.config.kernel} D{self.head_dim} {self.dtype} {self.tile} {self.variant}"


def cases(target: str) -> Iterator[Case]:
    """All that ship for "sm_90a" or "sm_80"."""
    short = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
    shipped = [(config, head_dim, short[dtype]) for _, head_dim, dtype, config, _ in candidates(TARGETS[target][1])]
    shipped += [(PREPARE, head_dim, dtype) for config, head_dim, dtype in shipped if config.kernel == "flash_dkdv"]
    for config, head_dim, dtype in dict.fromkeys(shipped):
        for variant in variants(config.kernel, head_dim, dtype):
            yield Case(config, head_dim, dtype, variant)


def compiled(target: str, case: Case) -> tuple[list[Launch], list[Launch]]:
    """What the launches of a case run, and what they run for another length: the same, or users wait for the compiler
    in the middle of their work.
    """
    capability, kernel = TARGETS[target][0], case.config.kernel
    rows = (case.config.rows,) * 2 if kernel == "decode" else (300, 4096)
    one = record(capability, lambda: launch(case, rows[0], num_keys=300))
    other = record(capability, lambda: launch(case, rows[1], num_keys=4096))

    def own(launches: list[Launch]) -> list[Launch]:
        return [x for x in launches if (x.kernel.name == "prepare_kernel") == (kernel == "prepare")]

    return own(one), own(other)


def launch(case: Case, num_rows: int, *, num_keys: int, key_heads: int = 2) -> None:
    """Calls the host function on tensors of those sizes, all keys visible to all rows."""
    kernel, variant = case.config.kernel, case.variant
    module, name = HOST[kernel]
    host = getattr(importlib.import_module(f"..kernels.{module}", __package__), name)
    heads = key_heads * variant.group
    dtype = DTYPES[case.dtype]
    carried = dtype if variant.step == "only" else torch.float32

    def new(num: int, of_heads: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(num, of_heads, case.head_dim, dtype=dtype)

    q, dout, out = new(num_rows, heads), new(num_rows, heads), new(num_rows, heads, carried)
    k, v = new(num_keys, key_heads), new(num_keys, key_heads)
    lse = torch.empty(heads, num_rows)
    if kernel == "prepare":
        out = out.to(dtype) if variant.step == "last" else out
        host(out, lse, dout, None if variant.step == "only" else torch.empty_like(lse))
        return
    zero, all_keys = torch.zeros(num_rows, dtype=torch.int64), torch.full((num_rows,), num_keys - 1)
    visibility = Visibility.from_bounds(zero, all_keys, torch.arange(num_keys))
    call: Any = partial(host, scale=1.0, config=case.config)
    if name == "forward":
        state = (out, lse) if variant.step in ("middle", "last") else None
        call(q, k, v, visibility, state=state, final=variant.step in ("only", "last"))
        return
    lse2, delta = flash_prepare.prepare(out, lse, dout, None)
    grads = {
        "dq": {"dq": new(num_rows, heads, carried)},
        "dkdv": {"dk": new(num_keys, key_heads, carried), "dv": new(num_keys, key_heads, carried)},
    }
    grads["backward"] = {"dq": new(num_rows, heads, torch.float32)} | grads["dkdv"]
    call(q, k, v, dout, lse2, delta, visibility, add=variant.step == "middle", **grads[name])
