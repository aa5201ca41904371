"""Calls that may raise, hang or end their process: what becomes of each, and that the others go on."""

import importlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from longtake.bench.attempts import (
    Attempt,
    Outcome,
    Refused,
    directly,
    in_processes,
    short_of_memory,
    sparing,
    with_second_try,
)

RAISES = "1 / 0"
REFUSES = "exec('from longtake.bench.attempts import Refused; raise Refused(str(6 * 7))')"
ENDS = "__import__('os')._exit(3)"
HANGS = "__import__('time').sleep(60)"
PROCESS = "__import__('os').getpid()"


@pytest.mark.parametrize("attempt", [directly, in_processes(1, seconds=20)], ids=["directly", "in a process"])
def test_each_item_has_its_outcome_and_a_failure_stops_nothing(attempt: Attempt) -> None:
    items = ["1 + 1", RAISES, REFUSES, "3 + 3"]
    assert list(attempt(eval, items)) == [
        Outcome("1 + 1", 2, None),
        Outcome(RAISES, None, "ZeroDivisionError: division by zero"),
        Outcome(REFUSES, None, "42"),
        Outcome("3 + 3", 6, None),
    ]
    assert list(attempt(eval, [])) == []


def test_one_that_hangs_and_one_that_ends_its_process_are_told_and_replaced() -> None:
    began = time.monotonic()
    found = {item: failure or result for item, result, failure in in_processes(2, seconds=5)(eval, [HANGS, ENDS, "7"])}
    assert found == {HANGS: "no answer in 5 s", ENDS: "its process ended with code 3", "7": 7}
    assert time.monotonic() - began < 20


def test_a_process_serves_until_something_fails_in_it() -> None:
    found = list(in_processes(1, seconds=20)(eval, [PROCESS, PROCESS, RAISES, PROCESS]))
    first, second, _, third = [outcome.result for outcome in found]
    assert first == second != third


def test_what_fails_is_tried_again_as_told() -> None:
    def second(function: object, items: list[int]) -> list[Outcome]:
        return [Outcome(item, "second", None) for item in items]

    def parts(outcome: Outcome) -> list[int]:
        return [outcome.item - 1, outcome.item + 1] if outcome.item > 10 else []

    def fails_from_3(item: int) -> str:
        if item >= 3:
            raise Refused("no")
        return "first"

    found = list(with_second_try(fails_from_3, [20, 1, 3], first=directly, second=second, again=parts))
    assert found == [(1, "first", None), (3, None, "no"), (19, "second", None), (21, "second", None)]


def test_what_is_tried_next_is_known_when_a_process_is_free() -> None:
    answers = []

    def items() -> Iterator[str]:
        yield "1"
        yield str(answers)

    for outcome in in_processes(1, seconds=20)(eval, items()):
        answers.append(outcome.result)
    assert answers == [1, [1]]


def test_the_rest_of_a_kind_that_hangs_is_not_tried() -> None:
    hanging = [f"{HANGS}  # {i}" for i in range(4)]
    began = time.monotonic()
    found = list(sparing(in_processes(1, seconds=1), kind=len)(eval, [*hanging, "7"]))
    assert {outcome.item: outcome.failure or outcome.result for outcome in found} == {
        **dict.fromkeys(hanging[:2], "no answer in 1 s"),
        **dict.fromkeys(hanging[2:], f"not tried: 2 of {len(hanging[0])} gave no answer"),
        "7": 7,
    }
    assert time.monotonic() - began < 30


def test_what_a_process_imports_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_import.py").write_text(
        "import os, time\ntime.sleep(5 if 'SLOW_IMPORT' in os.environ else 0)\ndef double(x):\n    return 2 * x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    double = importlib.import_module("slow_to_import").double
    monkeypatch.setenv("SLOW_IMPORT", "1")
    assert list(in_processes(1, seconds=2)(double, [3])) == [(3, 6, None)]


@pytest.mark.parametrize(
    ("failure", "again"),
    [
        ("causal: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", True),
        ("RuntimeError: Triton Error [CUDA]: out of memory", True),
        ("out of resource: shared memory", False),
    ],
)
def test_what_lacked_memory_is_worth_a_second_try(failure: str, again: bool) -> None:
    assert short_of_memory(Outcome("x", None, failure)) == ["x"] * again
