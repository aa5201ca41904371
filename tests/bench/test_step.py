"""The step benchmark: its documents, its table, and the arithmetic of growth and MFU; not its times."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.bench import step
from longtake.bench.step import HEADER, format_row, growth, main, measure, parse, synthetic_document
from longtake.comm.launch import launch
from longtake.model.shapes import published_shape

from tests.ranks import run_ranks


@pytest.mark.parametrize("num_tokens", [1, 5, 100])
def test_a_document_is_video_and_then_text(num_tokens: int) -> None:
    config = parse(["--shape", "demo"])[0].model
    document = synthetic_document(config, num_tokens)
    visual = document.input_ids == config.video_token_id
    num_visual = len(document.frame_starts) * config.tokens_per_frame
    assert len(document.input_ids) == num_tokens
    assert torch.all(visual[:num_visual])
    assert document.loss_weight.tolist() == [0.0] * num_visual + [1.0] * (num_tokens - num_visual)


def test_table_and_json_agree(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    arguments = "--shape demo --dtype bfloat16 --recompute --lengths 96,64 --steps 1"
    main([*arguments.split(), "--json", str(file)])
    report = json.loads(file.read_text())
    rows = report["rows"]
    assert [row["tokens"] for row in rows] == [64, 96]
    assert capfd.readouterr().out.splitlines() == [HEADER, *(format_row(row) for row in rows)]
    assert (report["dtype"], report["recompute"]) == ("bfloat16", True)
    assert rows[0]["growth"] is None and rows[1]["growth"] == growth(*rows)


def nothing(rows: Sequence[dict[str, Any]]) -> None:
    pass


def measure_on(rank: int) -> list[dict[str, Any]]:
    arguments = "--shape demo --lengths 64,96 --steps 1 --ring 2 --peak-tflops 0.5"
    setting, lengths, _ = parse(arguments.split())
    return measure(setting, lengths, nothing)


def test_the_first_rank_reports_for_all() -> None:
    rows, others = run_ranks(measure_on, 2)
    assert others == []
    assert [(row["tokens"], row["frames"]) for row in rows] == [(64, 14), (96, 21)]
    for row in rows:
        assert len(row["peak_gib"]) == 2 and min(row["peak_gib"]) > 0
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["tokens"] / row["ms"])
        assert row["tflops"] == pytest.approx(sum(row["flops"].values()) / row["ms"] / 1e9 / 2)  # of each rank
        assert row["mfu"] == pytest.approx(row["tflops"] / 0.5)


def test_growth_is_of_the_fullest_rank_per_16k_tokens() -> None:
    before, after = {"tokens": 1024, "peak_gib": [1.0, 2.0]}, {"tokens": 5120, "peak_gib": [2.5, 1.0]}
    assert growth(before, after) == pytest.approx(4 * 0.5)


def test_the_published_shape_is_asked_for_by_name() -> None:
    setting = parse(["--shape", "qwen2-1.5b"])[0]
    assert setting.model == published_shape("qwen2-1.5b")


def out_of_memory(*args: object) -> dict[str, Any]:
    raise torch.OutOfMemoryError("tried to allocate 96 GiB")


def test_a_gpu_that_runs_out_of_memory_ends_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setting, _, _ = parse(["--shape", "demo"])
    monkeypatch.setattr(step, "measure_length", out_of_memory)
    assert launch(step.measure, setting, [64, 96], nothing, world_size=1) == []
    assert capsys.readouterr().out == "      64 tokens: out of GPU memory\n"


def test_lengths_and_steps_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1, got 64,0 and 2"):
        parse(["--lengths", "64,0", "--steps", "2"])
