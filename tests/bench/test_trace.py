"""The trace of the ring: what its arithmetic makes of intervals, and that the ranges are those of the ring's steps."""

import json
from typing import Any

import pytest
from longtake.bench.ring import main
from longtake.bench.trace import TRACKS, covered, format_row, intervals, merged, on_own_tracks

WORLD = 3
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"  # and _backward


def test_merged_intervals_do_not_overlap() -> None:
    assert merged([(4, 6), (0, 2), (1, 3), (6, 7), (5, 5.5)]) == [(0, 3), (4, 7)]


@pytest.mark.parametrize(
    ("exchanges", "kernels", "expected"),
    [
        ([(0, 10)], [(2, 5)], (10, 3)),
        ([(0, 10)], [(2, 5), (4, 6), (8, 20)], (10, 6)),  # two kernels at once count once
        ([(0, 4), (2, 6)], [(1, 5)], (6, 4)),  # and so do two exchanges
        ([(0, 4)], [(4, 8)], (4, 0)),
        ([], [(4, 8)], (0, 0)),
    ],
)
def test_covered_time(exchanges: list, kernels: list, expected: tuple[float, float]) -> None:
    assert covered(exchanges, kernels) == expected


def span(name: str, cat: str, begin: float, end: float) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 7, "tid": 8, "ts": begin, "dur": end - begin}


EVENTS = [
    span("ring step 1: exchange of keys", "user_annotation", 0, 5),
    span("ring step 0: kernel", "user_annotation", 1, 4),
    span("ring step 1: exchange of keys", "gpu_user_annotation", 0, 50),
    span("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "kernel", 10, 20),
    span("flash_forward", "kernel", 12, 30),
    span("aten::mm", "cpu_op", 0, 100),
    {"ph": "M", "name": "process_name", "pid": 7},
]


def test_on_a_gpu_streams_count_and_on_a_cpu_ranges() -> None:
    assert intervals(EVENTS, on_gpu=True) == ([(10, 20)], [(12, 30)])
    assert intervals(EVENTS, on_gpu=False) == ([(0, 5)], [(1, 4)])


def test_exchanges_get_a_named_track_and_nothing_else_moves() -> None:
    name, moved, *rest = on_own_tracks(EVENTS)
    assert name["args"] == {"name": "exchange of keys"} and (name["pid"], name["tid"]) == (7, TRACKS["keys"])
    assert moved == EVENTS[0] | {"tid": TRACKS["keys"]}
    assert rest == EVENTS[1:]


def test_a_share_of_nothing_is_not_a_number() -> None:
    row = {"kernel_ms": 3.0, "exchange_ms": 4.0, "hidden_ms": 1.0, "file": "f"}
    assert format_row(1, row).split() == ["1", "4.00", "3.00", "25", "%", "f"]
    assert format_row(0, row | {"exchange_ms": 0.0, "hidden_ms": 0.0}).split() == ["0", "0.00", "3.00", "-", "f"]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """The ring's ranges and attention's calls of each rank, by their start."""
    folder = tmp_path_factory.mktemp("trace")
    arguments = f"--tokens 384 --heads 2 --kv-heads 1 --head-dim 16 --world {WORLD} --trace {folder / 'ring.json'}"
    main(arguments.split())
    events = [json.loads((folder / f"ring-rank{rank}.json").read_text())["traceEvents"] for rank in range(WORLD)]
    mine = [[e for e in each if e.get("name", "").startswith(("ring step", ATTENTION))] for each in events]
    return [sorted(each, key=lambda event: event["ts"]) for each in mine]


def test_each_step_has_a_kernel_and_each_but_the_first_its_exchanges(traces: list) -> None:
    """Keys in the forward and again in the backward, gradients in the backward."""
    steps = range(WORLD)
    keys = [f"ring step {step}: exchange of keys" for step in steps[1:]]
    kernels = [f"ring step {step}: kernel" for step in steps]
    gradients = [f"ring step {step}: exchange of gradients" for step in steps[1:]]
    for events in traces:
        names = [event["name"] for event in events]
        assert [name for name in names if "keys" in name] == 2 * keys
        assert [name for name in names if "kernel" in name] == 2 * kernels
        assert [name for name in names if "gradients" in name] == gradients


def test_the_next_keys_fly_while_a_step_computes(traces: list) -> None:
    for events in traces:
        flights = [event for event in events if "keys" in event["name"]]
        kernels = [event for event in events if "kernel" in event["name"] and f"step {WORLD - 1}" not in event["name"]]
        for flight, kernel in zip(flights, kernels, strict=True):
            assert flight["ts"] <= kernel["ts"]
            assert kernel["ts"] + kernel["dur"] <= flight["ts"] + flight["dur"]


def test_all_attention_runs_inside_a_kernels_range(traces: list) -> None:
    for events in traces:
        kernels = [(event["ts"], event["ts"] + event["dur"]) for event in events if "kernel" in event["name"]]
        calls = [(event["ts"], event["ts"] + event["dur"]) for event in events if event["name"].startswith(ATTENTION)]
        found = [[begin <= call[0] and call[1] <= end for call in calls] for begin, end in kernels]
        assert all(any(inside) for inside in zip(*found, strict=True))
        assert sum(map(any, found)) >= WORLD  # the last of three ranks works in each step, the others in most


def test_kernels_do_not_overlap(traces: list) -> None:
    for events in traces:
        kernels = [(event["ts"], event["ts"] + event["dur"]) for event in events if "kernel" in event["name"]]
        assert merged(kernels) == kernels


def test_one_rank_has_nothing_to_show() -> None:
    with pytest.raises(ValueError, match="--world must be at least 2, got 1"):
        main(["--trace", "ring.json", "--world", "1"])
