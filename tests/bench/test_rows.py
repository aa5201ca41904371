"""Tables are written as they come: what breaks off has kept its rows."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from longtake.bench import comm, decode, ring, step
from longtake.bench.rows import write_rows
from longtake.comm.launch import launch


def note_count(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    with file.open("a") as log:
        log.write(f"{len(rows)}\n")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    for rows in ([{"ms": 1.0}], [{"ms": 1.0}, {"ms": 2.0}]):
        write_rows(file, {"torch": "2"}, rows)
        assert json.loads(file.read_text()) == {"torch": "2", "rows": rows}
    write_rows(None, {}, [])
    assert list(tmp_path.iterdir()) == [file]


def test_a_row_of_decoding_is_written_before_the_next_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks_off(heads: int, kv_heads: int, length: int, *rest: Any) -> dict[str, Any]:
        if length > 20:
            raise KeyboardInterrupt
        return {"heads": heads, "kv_heads": kv_heads, "length": length}

    monkeypatch.setattr(decode, "measure", breaks_off)
    monkeypatch.setattr(decode, "format_row", str)
    file = tmp_path / "decode.json"
    with pytest.raises(KeyboardInterrupt):
        decode.main(["--device", "cpu", "--lengths", "20,30", "--json", str(file)])
    assert [row["length"] for row in json.loads(file.read_text())["rows"]] == [20]


def test_ranks_write_their_table_as_it_comes(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("comm", "ring", "step")]
    keep_comm, keep_ring, keep_step = (partial(note_count, file) for file in files)
    launch(comm.benchmark, comm.Setting(4096, 1), 2, keep_comm, world_size=2)
    launch(ring.benchmark, ring.Setting(64, 2, 1, 8, 1), 1, keep_ring, world_size=1)
    setting, _, _ = step.parse(["--shape", "demo", "--steps", "1"])
    launch(step.measure, setting, [64, 96], keep_step, world_size=1)
    num_rows = 8, 2, 2  # two operations, sizes and ways; two sequences; two lengths
    for file, count in zip(files, num_rows, strict=True):
        assert file.read_text().split() == [str(i) for i in range(1, count + 1)]
