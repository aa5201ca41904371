"""The layout benchmark prints its table and writes the same numbers."""

import json
from pathlib import Path

import pytest
from longtake.bench.layout import NUM_TOKENS, main, mixes


def test_every_mix_has_the_same_number_of_tokens() -> None:
    assert {int(cu_seqlens[-1]) for cu_seqlens in mixes().values()} == {NUM_TOKENS}


def test_table_and_json_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--rings", "4", "--json", str(tmp_path / "layout.json")])
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    rows = json.loads((tmp_path / "layout.json").read_text())["rows"]
    assert len(rows) == 4 * 3
    for cells, row in zip(printed, rows, strict=True):
        assert cells[:3] == [row["mix"], str(row["ring"]), row["layout"]]
        assert [float(cell) for cell in cells[3:5]] == pytest.approx([row["area"], row["rows"]], abs=5e-4)
