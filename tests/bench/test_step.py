"""The step benchmark: its documents, its table, and the arithmetic of growth; not its times."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.bench.step import format_row, growth, main, measure, parse, synthetic_document

from tests.ranks import run_ranks


@pytest.mark.parametrize("num_tokens", [1, 5, 100])
def test_a_document_is_video_and_then_text(num_tokens: int) -> None:
    config = parse([])[0].model
    document = synthetic_document(config, num_tokens)
    visual = document.input_ids == config.video_token_id
    num_visual = len(document.frame_starts) * config.tokens_per_frame
    assert len(document.input_ids) == num_tokens
    assert torch.all(visual[:num_visual])
    assert document.loss_weight.tolist() == [0.0] * num_visual + [1.0] * (num_tokens - num_visual)


def test_table_and_json_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    main(["--lengths", "96,64", "--steps", "1", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["tokens"] for row in rows] == [64, 96]
    assert capsys.readouterr().out.splitlines()[1:] == [format_row(row) for row in rows]


def measure_on(rank: int) -> list[dict[str, Any]]:
    setting, lengths, _ = parse(["--lengths", "64,96", "--steps", "1", "--ring", "2"])
    return measure(setting, lengths)


def test_the_first_rank_reports_for_all() -> None:
    rows, others = run_ranks(measure_on, 2)
    assert others == []
    assert [(row["tokens"], row["frames"]) for row in rows] == [(64, 14), (96, 21)]
    for row in rows:
        assert len(row["peak_gib"]) == 2 and min(row["peak_gib"]) > 0
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["tokens"] / row["ms"])


def test_growth_is_of_the_fullest_rank_per_16k_tokens() -> None:
    before, after = {"tokens": 1024, "peak_gib": [1.0, 2.0]}, {"tokens": 5120, "peak_gib": [2.5, 1.0]}
    assert growth(before, after) == pytest.approx(4 * 0.5)


def test_lengths_and_steps_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1, got 64,0 and 2"):
        parse(["--lengths", "64,0", "--steps", "2"])
