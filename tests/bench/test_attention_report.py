"""Table, goals, JSON and plot, from times that were made up."""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from longtake.bench.attention_gpu import Group, Row
from longtake.bench.attention_report import HEADER, commit, environment, file_for, goals, group_lines, plot, write_json
from longtake.bench.attention_shapes import DIRECTIONS, Shape, plain, ring_step
from longtake.bench.clock import Timing
from longtake.bench.sensors import Reading

FACTS = {"gpu": "Some GPU 80GB", "torch": "2", "triton": "3", "date": "2026-01-02T03:04:05+00:00", "rehearsal": True}


def row(contender: str, ms: float, over_peer: float | None = None, over_plain: float | None = None) -> Row:
    kind = "ours" if contender in ("triton", "gluon") else "peer"
    return Row(contender, kind, Timing(ms, 0.9 * ms, 1.1 * ms, 5, 0.05), 100 / ms, 0.125 / ms, over_peer, over_plain)


def group(shape: Shape, direction: str = "forward", triton_ms: float = 2.0) -> Group:
    rows = (
        row("triton", triton_ms, 1 / triton_ms, 1.02 if shape.mask == "zigzag" else None),
        Row("gluon", "ours", note="left out: hopper_forward is wrong"),
        row("SDPA cuDNN", 1.0, 1.0),
    )
    return Group(shape, direction, rows, 800.0, Reading(1755.0, 612.4, 61.0))


def test_a_line_for_each_and_the_canary_with_clock_and_power() -> None:
    lines = list(group_lines(group(plain(128, "full", 8192))))
    assert [line[: len("d128-full-8k")] for line in lines] == ["d128-full-8k"] * 4
    assert lines[0].split()[1:] == ["forward", "triton", "2", "10.0", "50.0", "6.2", "0.50", "0.050"]
    assert lines[1].split()[1:3] == ["forward", "gluon"] and lines[1].endswith("-  left out: hopper_forward is wrong")
    assert lines[3].endswith("1755 MHz, 612 W, 61 C") and "cuBLAS 8192^3" in lines[3] and "800.0" in lines[3]
    at = HEADER.index("TFLOP/s")
    assert lines[0][at:].startswith("   50.0") and lines[3][at:].startswith("  800.0")


def test_the_share_of_a_plain_call_is_shown() -> None:
    assert next(group_lines(group(ring_step("ring", (2, 5))))).endswith("1.020 of its plain call")


def test_goals_say_what_was_reached() -> None:
    groups = [
        group(plain(128, "full", 8192), triton_ms=0.8),
        group(plain(128, "causal", 8192), triton_ms=2.0),
        group(plain(128, "causal", 4096), triton_ms=0.8),
        group(plain(80, "full", 4096), "backward", triton_ms=1.0),
        group(ring_step("ring", (2, 5)), "backward", triton_ms=1.0),
    ]
    assert goals(groups) == [
        "forward, head dim 128: 1.25 x cuDNN, least 0.50 at d128-causal-8k; goal 1.00: reached",
        "backward, head dim 128: 1.00 x cuDNN, least 1.00 at ring; goal 1.00: reached",
        "backward, head dims 72 and 80: 1.00 x cuDNN, least 1.00 at d80-full-4k; goal 1.30: missed",
        "backward, zigzag shard, triton: up to 1.020 of a plain call of the same area; goal 1.03: reached",
    ]
    assert goals([]) == []


def test_json_holds_all_of_it(tmp_path: Path) -> None:
    file = tmp_path / "new" / "x.json"
    write_json(file, FACTS | {"wrong": {"a kernel": "why"}}, [group(plain(128, "full", 8192))])
    report = json.loads(file.read_text())
    assert report["gpu"] == "Some GPU 80GB" and report["wrong"] == {"a kernel": "why"} and report["rehearsal"]
    (found,) = report["groups"]
    assert found["name"] == "d128-full-8k-forward" and found["shape"]["heads"] == 16
    assert found["reading"] == {"clock_mhz": 1755.0, "power_w": 612.4, "temperature_c": 61.0}
    assert found["rows"][0]["timing"] == {"ms": 2.0, "low": 1.8, "high": 2.2, "num_calls": 5, "host_ms": 0.05}
    assert found["rows"][1]["timing"] is None and found["rows"][1]["note"].startswith("left out")
    assert [path.name for path in file.parent.iterdir()] == ["x.json"]


def test_the_plot_is_a_picture_even_of_nothing(tmp_path: Path) -> None:
    groups = [group(plain(128, "full", length), direction) for length in (1024, 8192) for direction in DIRECTIONS]
    for some in (groups, []):
        plot(some, FACTS, tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_files_are_named_for_gpu_and_date() -> None:
    assert file_for(Path("results"), FACTS) == Path("results/Some-GPU-80GB-2026-01-02T0304.json")


def test_versions_are_known() -> None:
    facts = environment(torch.device("cpu"))
    assert facts["torch"] == version("torch") and facts["gpu"].startswith("none")
    assert {"driver", "cudnn", "triton", "longtake commit", "date"} <= set(facts)


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    clean = commit(tmp_path)
    assert clean is not None and len(clean) == 12
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == f"{clean}-dirty"


@pytest.mark.parametrize("contender", ["triton", "gluon", "SDPA flash", "SDPA cuDNN"])
def test_everyone_has_a_colour(contender: str) -> None:
    from longtake.bench.attention_report import COLORS

    assert contender in COLORS
