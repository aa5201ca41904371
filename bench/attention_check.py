"""Is a kernel right? Each candidate on masks of every kind, against float64, on poisoned memory, and twice.

Three ideas:
- What a kernel does not write is NaN, and so is what lies around its inputs: neither passes unseen. Gradients lie
  between guards, which must still be NaN afterwards.
- The limit is twice what plain PyTorch in the same dtype loses against float64, plus a floor.
- The second run must give the same bits, but for dq of the fused backward, whose sums are in an order of chance.
"""

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.candidates import Config
from ..kernels.visibility import Visibility
from .attention_cases import Block, Case, cases, chunks, dense_forward, make_block, rows_of, surrounded

NOT_REPEATED = {"hopper_backward": ("dq",)}
FLOORS = {torch.float32: 1e-6, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}  # of out, as part of its largest value
FLOAT32_FLOOR = 1e-5  # of lse and of gradients: sums of many numbers


def _imported(module: str, function: str) -> Callable[..., Any]:
    """The function of a kernel module, which is imported when it is first called."""

    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(f"..kernels.{module}", __package__), function)(*args, **options)

    return call


# Config.kernel -> host function; and what all backward kernels are given
KERNELS: dict[str, Callable[..., Any]] = {
    "flash_forward": _imported("flash_forward", "forward"),
    "hopper_forward": _imported("hopper_forward", "forward"),
    "decode": _imported("decode", "forward"),
    "flash_dkdv": _imported("flash_backward", "dkdv"),
    "flash_dq": _imported("flash_backward", "dq"),
    "hopper_backward": _imported("hopper_backward", "backward"),
    "prepare": _imported("flash_prepare", "prepare"),
}
GRADIENTS = {"dkdv": ("dk", "dv"), "dq": ("dq",), "backward": ("dq", "dk", "dv")}  # by direction


@dataclass(frozen=True)
class Verdict:
    """error: the largest, as part of the largest value; None: not known. problem: "" where all is right."""

    error: float | None
    problem: str


def check_candidate(
    direction: str,
    config: Config,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quick: bool = False,
) -> Verdict:
    """Runs a candidate on all cases of its direction; `quick`: on two or three small ones.

    Stops at the first case that is wrong. An error that a kernel raises is a problem like others; but after one of CUDA
    the process can do nothing more on that GPU.
    """
    worst = 0.0
    for case in cases(direction, config, device, quick=quick):
        try:
            verdict = _check_case(case, direction, config, head_dim, dtype, device)
        except Exception as error:  # whatever it is: the other candidates are still to be tried
            first_line = (str(error).strip() or "no message").splitlines()[0]
            return Verdict(None, f"{case}: {type(error).__name__}: {first_line}")
        if verdict.problem:
            return verdict
        worst = max(worst, verdict.error or 0.0)
    return Verdict(worst, "")


# One case


def _check_case(
    case: Case, direction: str, config: Config, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Verdict:
    block = make_block(case, head_dim, dtype, device)
    run = _run_backward if direction in GRADIENTS else _run_forward
    expected = _expected(case, direction, block)
    limits = _limits(case, direction, block, expected)
    worst = 0.0
    with poisoned():
        found, again = (run(case, direction, config, block) for _ in range(2))
    for name, tensor in found.items():
        error = deviation(tensor, expected[name])
        if not error <= limits[name]:
            if error == float("inf"):
                return Verdict(None, f"{case}: {name} has NaN or infinity where it should not, or not where it should")
            return Verdict(error, f"{case}: {name} is off by {error:.1e}, the limit is {limits[name]:.1e}")
        if name not in NOT_REPEATED.get(config.kernel, ()) and not torch.equal(tensor, again[name]):
            return Verdict(error, f"{case}: {name} differs between two runs")
        worst = max(worst, error)
    return Verdict(worst, "")


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch.empty and its like return is full of NaN (PyTorch does that for its deterministic mode)."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def _run_forward(case: Case, direction: str, config: Config, block: Block) -> dict[str, Tensor]:
    state = None
    if block.before:
        state = block.before["out"].clone(), block.before["lse"].clone()
    out, lse = KERNELS[config.kernel](
        block.q,
        block.k,
        block.v,
        case.visibility,
        scale=block.q.shape[-1] ** -0.5,
        config=config,
        state=state,
        final=case.mode in ("whole", "last"),
    )
    wanted = block.q.dtype if case.mode in ("whole", "last") else torch.float32
    if out.dtype != wanted:
        raise TypeError(f"out is {out.dtype}, not {wanted}")
    if case.mode == "next" and state is not None and out.data_ptr() != state[0].data_ptr():
        raise ValueError("the state was not updated in place")
    return {"out": out, "lse": lse}


def _run_backward(case: Case, direction: str, config: Config, block: Block) -> dict[str, Tensor]:
    add = case.mode == "next"
    like = {"dq": block.q, "dk": block.k, "dv": block.v}
    buffers, grads = {}, {}
    for name in GRADIENTS[direction]:
        dtype = like[name].dtype if case.mode == "whole" else torch.float32
        if direction == "backward" and name == "dq":  # it can only be added to
            start, dtype = block.before["dq"] if add else torch.zeros_like(like[name]), torch.float32
        else:
            start = block.before[name] if add else torch.full_like(like[name], torch.nan)
        grads[name] = surrounded(start.to(dtype), 8)
        buffers[name] = grads[name]._base
    lse2, delta = KERNELS["prepare"](block.out, block.lse, block.dout, block.dlse if block.dlse.any() else None)
    KERNELS[config.kernel](
        block.q,
        block.k,
        block.v,
        block.dout,
        lse2,
        delta,
        case.visibility,
        scale=block.q.shape[-1] ** -0.5,
        config=config,
        **grads,
        add=add,
    )
    for name, buffer in buffers.items():
        if int(buffer.isnan().sum()) < buffer.numel() - grads[name].numel():
            raise ValueError(f"something was written outside {name}")
    return grads


# What is right, and how far from it a kernel may be


def _expected(case: Case, direction: str, block: Block) -> dict[str, Tensor]:
    """float64, by name."""
    q, k, v, before = block.q, block.k, block.v, block.before
    scale = q.shape[-1] ** -0.5
    if direction not in GRADIENTS:
        state = (before["out"], before["lse"]) if before else None
        return dict(zip(("out", "lse"), dense_forward(q, k, v, case.visibility, scale, state), strict=True))
    names = ("dq", "dk", "dv")
    starts = [before.get(name, torch.zeros_like(x)) for name, x in zip(names, (q, k, v), strict=True)]
    dq, dk, dv = (start.double().clone() for start in starts)
    for rows in chunks(len(q)):
        reference.backward(
            q[rows],
            k,
            v,
            block.out[rows],
            block.lse[:, rows],
            block.dout[rows],
            rows_of(case.visibility, rows),
            scale=scale,
            grads=(dq[rows], dk, dv),
            dlse=block.dlse[:, rows],
        )
    return {"dq": dq, "dk": dk, "dv": dv}


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; infinite where one is finite and the other not."""
    found, expected, finite = found.double(), expected.double(), expected.isfinite()
    if not torch.equal(found.isfinite(), finite) or not torch.equal(found[~finite], expected[~finite]):
        return float("inf")
    found, expected = found[finite], expected[finite]
    if not expected.numel():
        return 0.0
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    return difference / largest if largest else difference


def _limits(case: Case, direction: str, block: Block, expected: dict[str, Tensor]) -> dict[str, float]:
    """By name: twice what plain PyTorch in the dtype of the inputs loses, and a floor."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (block.q, block.k, block.v))
    with torch.enable_grad():
        out, lse = _plain(q, k, v, case.visibility)
    floor = FLOORS[q.dtype]
    if direction not in GRADIENTS:
        alone, lse64 = dense_forward(block.q, block.k, block.v, case.visibility, q.shape[-1] ** -0.5)
        loss = deviation(out.detach().masked_fill(lse64.T[..., None] == -torch.inf, 0), alone)
        return {"out": 2 * loss + floor, "lse": FLOAT32_FLOOR}
    sums = (out * block.dout).sum(dtype=torch.float32) + (lse.nan_to_num(neginf=0.0) * block.dlse).sum()
    grads = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(sums, (q, k, v)), strict=True))
    limits = {}
    for name in GRADIENTS[direction]:
        loss = deviation(grads[name].float() + block.before.get(name, 0.0), expected[name])
        limits[name] = 2 * loss + max(floor, FLOAT32_FLOOR)
    return limits


def _plain(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> tuple[Tensor, Tensor]:
    """out, and lse in float32, as a reader of the formula would write them, everything in q's dtype."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    key = torch.arange(len(k), device=k.device)
    visible = (visibility.start[:, None] <= key) & (key < visibility.end[:, None])
    sees = visible.any(1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible & sees[:, None], -torch.inf)
    weights = scores.softmax(-1) * sees[:, None]  # a row that sees nothing: no NaN, and no weight
    lse = torch.where(sees, scores.float().logsumexp(-1), -torch.inf)
    return torch.einsum("hqk,khd->qhd", weights, v), lse
