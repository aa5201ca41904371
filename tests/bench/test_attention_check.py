"""The check of a kernel: a right one passes, and each way to be wrong is caught and named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from longtake.bench import attention_check
from longtake.bench.attention_cases import cases
from longtake.bench.attention_check import GRADIENTS, KERNELS, Verdict, check_candidate, deviation, poisoned
from longtake.kernels import reference
from longtake.kernels.candidates import Config
from torch import Tensor

CPU = torch.device("cpu")
CONFIGS = {
    "forward": Config("flash_forward", 16, 16, 4, 2),
    "decode": Config("decode", 1, 16, 4, 2),
    "dkdv": Config("flash_dkdv", 16, 16, 4, 2),
    "dq": Config("flash_dq", 16, 16, 4, 2),
    "backward": Config("hopper_backward", 16, 16, 4, 2),
}
Host = Callable[..., Any]


def right_forward(q: Tensor, k: Tensor, v: Tensor, visibility: Any, *, state: Any, final: bool, **rest: Any) -> Any:
    """As a kernel's host function: fresh memory is written, a state that is not final is updated in place."""
    out, lse = reference.forward(
        q, k, v, visibility, scale=rest["scale"], state=tuple(x.clone() for x in state) if state else None
    )
    if state is None or final:
        fresh = torch.empty(q.shape, dtype=q.dtype if final else torch.float32)
        return fresh.copy_(out), lse if state is None else state[1].copy_(lse)
    return state[0].copy_(out), state[1].copy_(lse)


def right_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, rest: Any, mask: Any, **options: Any
) -> None:
    """dq, dk, dv: those that are asked for. `out` and `rest` are what `prepare` passes on."""
    lse, dlse = rest
    found = reference.backward(q, k, v, out, lse, dout, mask, scale=options["scale"], dlse=dlse)
    for name, grad in zip(("dq", "dk", "dv"), found, strict=True):
        if name in options:
            added = options["add"] or (name == "dq" and "dk" in options)
            options[name].copy_(options[name] + grad if added else grad)


@pytest.fixture(autouse=True)
def right_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNELS:
        backward = name in ("flash_dkdv", "flash_dq", "hopper_backward")
        monkeypatch.setitem(KERNELS, name, right_backward if backward else right_forward)
    monkeypatch.setitem(KERNELS, "prepare", lambda out, lse, dout, dlse: (out, (lse, dlse)))


def check(direction: str, *, quick: bool = False, dtype: torch.dtype = torch.float32) -> Verdict:
    return check_candidate(direction, CONFIGS[direction], 24, dtype, CPU, quick=quick)


def plant(
    monkeypatch: pytest.MonkeyPatch, direction: str, spoil: Callable[..., None], when: Host = lambda **_: True
) -> None:
    """The right kernel, whose results are spoiled afterwards in the calls that `when` picks."""
    kernel = CONFIGS[direction].kernel
    right = KERNELS[kernel]

    def wrong(*args: Any, **options: Any) -> Any:
        found = right(*args, **options)
        if when(args=args, **options):
            spoil(found if direction not in GRADIENTS else [options[name] for name in GRADIENTS[direction]])
        return found

    monkeypatch.setitem(KERNELS, kernel, wrong)


@pytest.mark.parametrize("direction", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_kernel_passes(direction: str, dtype: torch.dtype) -> None:
    verdict = check(direction, dtype=dtype)
    assert verdict.problem == ""
    assert verdict.error is not None and verdict.error < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("direction", CONFIGS)
@pytest.mark.parametrize("quick", [True, False])
def test_a_wrong_number_is_named(direction: str, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(found: list[Tensor]) -> None:
        found[0][-1, -1, -1] += 0.01 * found[0].abs().max()

    plant(monkeypatch, direction, spoil)
    verdict = check(direction, quick=quick)
    name = GRADIENTS.get(direction, ("out",))[0]
    assert f"{name} is off by" in verdict.problem
    assert verdict.error == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("direction", CONFIGS)
def test_what_is_not_written_is_seen(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if direction in GRADIENTS:
        # Its memory comes from the caller: a kernel that does nothing.
        monkeypatch.setitem(KERNELS, CONFIGS[direction].kernel, lambda *args, **options: None)
    else:

        def forgetful(q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
            out, lse = right_forward(q, *args, **options)
            fresh = torch.empty_like(out)
            fresh[1:] = out[1:]
            return fresh, lse

        monkeypatch.setitem(KERNELS, CONFIGS[direction].kernel, forgetful)
    problem = check(direction).problem
    assert "has NaN or infinity where it should not" in problem or (direction == "backward" and "dq is off" in problem)


def test_memory_is_poisoned_only_inside() -> None:
    with poisoned():
        assert torch.empty(1000).isnan().all() and torch.empty_like(torch.zeros(9, dtype=torch.float16)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_lies_around_an_input_must_not_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def reads_past_the_end(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
        out, lse = right_forward(q, k, v, *args, **options)
        if q.stride(0) > q.shape[1] * q.shape[2]:
            out += 0 * q.as_strided((1,), (1,), q.storage_offset() + q.shape[2])
        return out, lse

    monkeypatch.setitem(KERNELS, "flash_forward", reads_past_the_end)
    assert "has NaN" in check("forward").problem


def test_what_lies_around_a_gradient_must_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(found: list[Tensor]) -> None:
        dk = found[0]
        dk.as_strided((1,), (1,), dk.storage_offset() + dk.shape[2]).fill_(0)

    plant(monkeypatch, "dkdv", spoil)
    assert "something was written outside dk" in check("dkdv").problem


@pytest.mark.parametrize("direction", ["forward", "decode", "dkdv", "dq"])
def test_two_runs_must_give_the_same_bits(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spoil(found: list[Tensor]) -> None:
        calls.append(0)
        found[-1][-1, -1:] *= 1 + 1e-7 * (len(calls) % 2)

    plant(monkeypatch, direction, spoil)
    assert "differs between two runs" in check(direction).problem


def test_only_dq_of_the_fused_backward_need_not_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spoil(found: list[Tensor], which: int) -> None:
        calls.append(0)
        found[which] *= 1 + 1e-7 * (len(calls) % 2)

    with monkeypatch.context() as patch:
        plant(patch, "backward", lambda found: spoil(found, 0))
        assert check("backward").problem == ""
    plant(monkeypatch, "backward", lambda found: spoil(found, 1))
    assert "dk differs between two runs" in check("backward").problem


def test_a_state_must_be_updated_in_place_and_no_call_before_the_last_may_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def copies(*args: Any, **options: Any) -> Any:
        return tuple(x.clone() for x in right_forward(*args, **options))

    def rounds(*args: Any, **options: Any) -> Any:
        out, lse = right_forward(*args, **options)
        return out.to(args[0].dtype), lse

    monkeypatch.setitem(KERNELS, "flash_forward", copies)
    assert "next: ValueError: the state was not updated in place" in check("forward").problem
    monkeypatch.setitem(KERNELS, "flash_forward", rounds)
    assert "first: TypeError: out is torch.float16, not torch.float32" in check("forward", dtype=torch.float16).problem


def test_an_error_of_the_kernel_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("out of shared memory\nand more")

    monkeypatch.setitem(KERNELS, "flash_dq", fails)
    verdict = check("dq")
    assert verdict == Verdict(None, "full, heads 2:2, whole: RuntimeError: out of shared memory")


def test_the_cases_hold_what_is_promised() -> None:
    found = cases("forward", CONFIGS["forward"], CPU)
    names = {case.name for case in found}
    assert names >= {"full", "causal", "window", "packed", "zigzag on itself", "offset", "empty rows"}
    assert {case.mode for case in found} == {"whole", "first", "next", "last"}
    assert {case.heads[0] // case.heads[1] for case in found} >= {1, 6, 7, 8}
    assert all(len(case.visibility.start) % 16 for case in found if case.name != "offset"), "ragged"
    empty = next(case.visibility for case in found if case.name == "empty rows")
    assert (empty.start == empty.end).sum() > 16, "a whole tile without keys, and part of one"
    assert any(case.margin % 8 for case in found), "TMA cannot load these"
    hopper = cases("forward", Config("hopper_forward", 16, 16, 4, 2), CPU)
    assert not any(case.margin % 8 for case in hopper), "and Gluon kernels need not"


def test_a_deviation_is_relative_and_infinities_must_agree() -> None:
    expected = torch.tensor([1.0, -4.0, -torch.inf])
    assert deviation(torch.tensor([1.0, -4.2, -torch.inf]), expected) == pytest.approx(0.05)
    assert deviation(torch.tensor([1.0, -4.0, 0.0]), expected) == float("inf")
    assert deviation(torch.tensor([1.0, torch.nan, -torch.inf]), expected) == float("inf")
    assert deviation(torch.tensor([1.0, -4.0, torch.inf]), expected) == float("inf")


def test_kernels_are_found_by_name() -> None:
    assert set(attention_check.KERNELS) == {config.kernel for config in CONFIGS.values()} | {
        "hopper_forward",
        "prepare",
    }
