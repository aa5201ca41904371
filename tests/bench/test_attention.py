"""The command: the CPU's table; the steps on a GPU, and their rehearsal from end to end."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.bench import attention, attention_gpu, attention_peers, attention_run
from longtake.bench.attempts import directly
from longtake.bench.attention import COLUMNS, format_row, main
from longtake.bench.attention_gpu import Group
from longtake.bench.attention_run import Options, wanted_groups
from longtake.bench.attention_shapes import Shape, plain, tiny
from longtake.bench.attention_verdicts import shipped
from longtake.bench.clock import Allowance, Call, Stopwatch, Timing, fake_stopwatch
from longtake.bench.sensors import Sensors


def test_prints_a_table_and_writes_the_same_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "attention.json"
    main(["--lengths", "64", "--repeats", "1", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["shape"], row["direction"]) for row in rows] == [
        ([1, 64, 2, 64], "forward"),
        ([1, 64, 2, 64], "forward+backward"),
    ]
    assert all(row["ratio"] > 0 and row["gflops"] > 0 and row["peak_mib"] >= 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_length_that_is_not_timed_shows_its_memory() -> None:
    row = dict.fromkeys(COLUMNS) | {"device": "cpu", "shape": [1, 8], "direction": "forward", "peak_mib": 12.3}
    assert format_row(row).split() == ["cpu", "1x8", "forward", "-", "-", "-", "-", "12"]


@pytest.mark.parametrize("flags", [["--quick"], ["--only", "d128-full-8k"], ["--profile"], ["--sanitize"]])
def test_what_needs_a_gpu_says_so(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA GPU here: --dry-run rehearses"):
        main(flags)


def test_groups_are_picked_by_name() -> None:
    def names(*only: str) -> list[str]:
        found = wanted_groups(Options(only=only))
        return [f"{shape.name} {','.join(directions)}" for shape, directions in found]

    assert names("d128-full-8k") == ["d128-full-8k forward,backward"]
    assert names("packed-300-backward", "d64-full-1k*") == ["packed-300 backward", "d64-full-1k forward,backward"]
    assert len(names()) > len(wanted_groups(Options(quick=True))) == 8
    with pytest.raises(ValueError, match="no shape is called 'd128': there are d128-full-8k, "):
        names("d128", "d128-full-8k")


def test_the_rehearsal_goes_through_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rehearsal.json"
    main(["--dry-run", "--only", "d80-full-4k,packed-300-forward,ring-late-queries-backward", "--json", str(file)])
    printed = capsys.readouterr().out
    for text in (
        "not run here: hopper_forward, hopper_backward (Gluon kernels, which the interpreter cannot run)",
        "right: flash_forward, float32",
        "right: decode, float32",
        "4 of 4 candidates are right",
        "called each of ours once on each shape",
        "without compute-sanitizer: clean",
        "(a rehearsal: all times are made up)",
        "made up: forward, head dims 72 and 80",
    ):
        assert text in printed
    assert "WRONG" not in printed
    report = json.loads(file.read_text())
    assert report["rehearsal"] and report["wrong"] == {} and report["gpu"].startswith("none")
    groups = {group["name"]: {row["contender"]: row for row in group["rows"]} for group in report["groups"]}
    assert set(groups) == {
        "d80-full-4k-forward",
        "d80-full-4k-backward",
        "packed-300-forward",
        "ring-late-queries-backward",
    }
    for rows in groups.values():
        assert rows["triton"]["timing"]["ms"] == 1.0
        assert rows["gluon"]["note"].startswith("not run here")
    assert groups["d80-full-4k-backward"]["triton"]["kernels"][0].startswith("flash_dkdv")
    assert groups["packed-300-forward"]["FlexAttention"]["timing"] is not None
    assert groups["ring-late-queries-backward"]["triton"]["over_plain"] == 1.0
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_rehearsal_sees_to_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append(arguments))
    attention.interpret(["--dry-run"])
    assert started == [], "as in these tests"
    monkeypatch.delenv("TRITON_INTERPRET")
    attention.interpret(["--dry-run", "--quick"])  # triton is imported here: too late
    assert started == [[sys.executable, "-m", "longtake.bench.attention", "--dry-run", "--quick"]]
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_the_command_alone_imports_no_triton() -> None:
    program = "import sys, longtake.bench.attention; sys.exit('triton' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0


SHAPE = plain(72, "full", 4096)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU that is a CPU, with one shape to measure and no time to take; what was done, in order."""
    steps: list[str] = []

    def stopwatch(device: torch.device, allowance: Allowance) -> Stopwatch:
        def measure(calls: Sequence[Call]) -> list[Timing]:
            steps.append(f"time {allowance.seconds:.1f} s")
            return fake_stopwatch(calls)

        return measure

    def check_all(items: Sequence[object], *args: object, **options: object) -> dict[object, str]:
        steps.append("check")
        return {}

    def sanitize(command: Sequence[str], prefixes: dict[str, list[str]], seconds: float) -> dict[str, str]:
        steps.append(f"sanitize {','.join(prefixes)} {command[-1]}")
        return dict.fromkeys(prefixes, "clean")

    def shapes() -> list[Shape]:
        return [tiny(SHAPE)]

    for name, value in {
        "device_of": lambda options: torch.device("cpu"),
        "gpu_name": lambda device: "GPU-0",
        "architecture": lambda device: "hopper",
        "cuda_stopwatch": stopwatch,
        "check_all": check_all,
        "find_sanitizer": lambda: "/bin/compute-sanitizer",
        "sanitize": sanitize,
        "all_shapes": shapes,
        "quick_shapes": shapes,
        "CANARY_SIZE": 64,
        "in_processes": lambda count, seconds: directly,
    }.items():
        monkeypatch.setattr(attention_run, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention_peers, "BACKENDS", ("cpu",))
    monkeypatch.setattr(attention_gpu, "choices_of", lambda *args: [])
    monkeypatch.setattr(attention_run, "call_once", lambda what, **options: steps.append(f"call {what[1]} {what[2]}"))
    monkeypatch.chdir(tmp_path)
    attention_run.make_bench.cache_clear()
    return steps


def test_on_a_gpu_correctness_comes_first(gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr(Sensors, "__enter__", lambda self: begun.append("sensors") or self)
    monkeypatch.setattr(Sensors, "__exit__", lambda self, *error: begun.append("ended"))
    main([])
    calls = ["call forward cpu", "call backward cpu"]
    assert gpu == ["check", "sanitize memcheck,racecheck,synccheck --sanitize", *calls, "time 2.0 s", "time 2.0 s"]
    assert begun == ["sensors", "ended"] * 2
    (file,) = (tmp_path / "bench" / "results").glob("*.json")
    report = json.loads(file.read_text())
    assert not report["rehearsal"] and [group["name"] for group in report["groups"]] == [
        "d72-full-4k-forward",
        "d72-full-4k-backward",
    ]
    assert report["sanitizers"] == {"memcheck": "clean", "racecheck": "clean", "synccheck": "clean"}
    assert file.with_suffix(".png").exists()


def test_quick_leaves_the_sanitizer_out(gpu: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick"])
    assert [step.split()[0] for step in gpu] == ["check", "call", "call", "time", "time"]
    assert "compute-sanitizer: not run: --quick" in capsys.readouterr().out


def test_only_head_dims_that_are_timed_are_checked(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(attention_run, "check_all", lambda items, *args, **options: asked.extend(items) or {})
    main(["--quick"])
    assert asked == shipped("hopper", (72,), ("bfloat16",))


def test_the_time_for_timing_begins_after_the_checks(gpu: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["--minutes", "0.1"])
    assert gpu[-2:] == ["time 1.5 s", "time 2.0 s"], "half of the 6 s that are left, over the groups that are left"
    main(["--minutes", "-1"])
    assert "for want of time: d72-full-4k-forward, d72-full-4k-backward" in capsys.readouterr().out


def test_what_a_first_call_breaks_is_named_and_left_out(
    gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(what: tuple[Shape, str, str], **options: object) -> None:
        if what[1] == "forward":
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(attention_run, "call_once", breaks)
    with pytest.raises(SystemExit):
        main([])
    why = "RuntimeError: an illegal memory access was encountered"
    assert f"WRONG: d72-full-4k-forward, cpu: {why}" in capsys.readouterr().out.splitlines()
    (file,) = (tmp_path / "bench" / "results").glob("*.json")
    forward, backward = json.loads(file.read_text())["groups"]
    assert (forward["rows"][0]["note"], forward["rows"][0]["timing"]) == (why, None)
    assert forward["rows"][1]["timing"] is not None and backward["rows"][0]["timing"] is not None


def test_a_group_that_breaks_costs_no_other(
    gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = attention_run.measure

    def breaks(shape: Shape, direction: str, *args: Any) -> Group:
        if direction == "forward":
            raise RuntimeError("FlexAttention: CUDA error: an illegal memory access was encountered")
        return right(shape, direction, *args)

    monkeypatch.setattr(attention_run, "measure", breaks)
    with pytest.raises(SystemExit):
        main([])
    (file,) = (tmp_path / "bench" / "results").glob("*.json")
    report = json.loads(file.read_text())
    assert list(report["broken"]) == ["d72-full-4k-forward"] and "FlexAttention" in str(report["broken"])
    assert [group["name"] for group in report["groups"]] == ["d72-full-4k-backward"]
    assert file.with_suffix(".png").exists()


def test_what_is_too_large_for_a_gpu_is_told_and_no_fault(
    gpu: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96 GiB")

    monkeypatch.setattr(attention_run, "measure", full)
    main([])
    assert "d72-full-4k-forward: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["kernel", "sanitizer", "answer", "breaks off"])
def test_what_is_wrong_is_named_at_the_end_and_ends_with_1(
    fault: str, gpu: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*args: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    candidate = shipped("hopper", (72,), ("bfloat16",))[0]
    expected = {
        "kernel": "WRONG: forward d72 bfloat16 flash_forward 128x128, 8 warps, 2 stages: out is off",
        "sanitizer": "WRONG: racecheck: found: Race",
        "answer": "WRONG: d72-full-4k-forward, cpu: TypeError",
        "breaks off": "WRONG: timing d72-full-4k-forward: RuntimeError: CUDA error: an illegal memory access",
    }[fault]
    if fault == "kernel":
        monkeypatch.setattr(attention_run, "check_all", lambda *args, **options: {candidate: "out is off"})
    elif fault == "sanitizer":
        monkeypatch.setattr(attention_run, "sanitize", lambda *args: {"racecheck": "found: Race"})
    elif fault == "answer":
        monkeypatch.setattr(attention_peers, "attention", None)
    else:
        monkeypatch.setattr(attention_run, "measure", breaks)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(expected) for line in lines[-3:])
