"""The benchmark of decoding, rehearsed: the steps of a GPU on tiny shapes, by a fake clock."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.bench import decode
from longtake.bench.clock import Call, Timing
from torch import Tensor


def one_two_three(calls: Sequence[Call]) -> list[Timing]:
    """A millisecond for the first call, two for the second, and so on."""
    return [Timing(float(i), i, i, 1, 0.5) for i in range(1, len(calls) + 1)]


def test_a_rehearsal_goes_through_all_steps_and_says_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "decode.json"
    decode.main(["--device", "cpu", "--head-dim", "64", "--json", str(file)])
    header, *lines, last = capsys.readouterr().out.splitlines()
    rows = json.loads(file.read_text())["rows"]
    assert [(row["heads"], row["kv_heads"], row["length"]) for row in rows] == [
        (*heads, length) for heads in decode.TINY_HEADS for length in decode.TINY_LENGTHS
    ]
    assert all(not row["wrong"] and set(row["ms"]) == {"ours", "math"} for row in rows)
    assert len(lines) == len(rows) and "GB/s" in header
    assert last == decode.REHEARSED


def test_bytes_are_those_of_the_cache_and_a_copy_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "problem", lambda *args: "")
    bench = decode.Bench(torch.device("cpu"), torch.float16, one_two_three, lambda: None, 30_000)
    row = decode.measure(4, 2, 100, 32, bench)  # 100 x 2 x 32 x 2 bytes twice in 1 ms; 60,000 bytes in 3 ms
    assert row["gb_s"] == pytest.approx(25_600e-6)
    assert row["copy_gb_s"] == pytest.approx(20_000e-6)
    assert decode.format_row(row).split() == ["4:2", "100", "32", "1.000", "0", "128", "0.500", "2.000", "-", "2.00"]


def test_a_wrong_answer_is_named_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = decode.ours

    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Call:
        call: Any = right(q, k, v)
        return lambda: call() + 0.1

    monkeypatch.setattr(decode, "ours", wrong)
    with pytest.raises(SystemExit) as ended:
        decode.main(["--device", "cpu", "--head-dim", "32", "--lengths", "20"])
    assert ended.value.code == 1
    for row in capsys.readouterr().out.splitlines()[1:3]:
        assert row.split()[3] == "-" and "WRONG: off by" in row


def test_a_gpu_that_is_not_there_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA GPU here: --device cpu"):
        decode.main(["--device", "cuda"])


def test_triton_that_cannot_interpret_any_more_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setitem(sys.modules, "triton", sys)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 first"):
        decode.main(["--device", "cpu"])
