import json
from pathlib import Path

import pytest
from longtake.bench.attention import COLUMNS, format_row, main


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
