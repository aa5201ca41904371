"""Calls that may raise, hang or end their process: what becomes of each, and that the others go on."""

import time

import pytest
from longtake.bench.attempts import Attempt, Outcome, Refused, directly, in_processes, with_second_try

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
