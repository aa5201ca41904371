"""The demo's report shows what report.json holds, and stands alone."""

import base64
import re
from pathlib import Path
from typing import Any

import pytest
from longtake.bench.report import write_report


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("report")
    write_report(report(), folder)
    return folder, (folder / "report.html").read_text()


def report() -> dict[str, Any]:
    grid = {"frames": [8, 64], "depths": [0.0, 1.0], "accuracy": [[1.0, 0.875], [0.5, 0.625]], "chance": 0.1458}
    full = {**grid, "control": [[0.125, 0.375], [0.0, 0.1875]]}
    stage = {"steps": 3, "seconds": 1.5, "max_frames": 8, "max_tokens": 90, "losses": [3.0, 2.0, 1.0]}
    return {
        "needle": {"short": full, "long": full, "unseen": {**grid, "control": None}},
        "stages": {
            "0": {**stage, "losses": {"vision": [9.0], "text": [7.0, 6.0]}},
            **{str(number): stage for number in range(1, 6)},
        },
        "parity": {"1": {"loss": 2.0, "grad_norm": 4.0}, "4": {"loss": 2.0, "grad_norm": 4.000004}},
        "seconds": 321.0,
        "peak_rss_gib": 3.25,
        "versions": {"torch": "<2.13>"},
    }


def test_the_page_holds_the_picture_itself_and_refers_to_nothing_else(page: tuple[Path, str]):
    folder, html = page
    [picture] = re.findall('src="data:image/png;base64,([^"]*)"', html)
    assert base64.b64decode(picture) == (folder / "report.png").read_bytes()
    assert not re.search(r"https?:|<link|<script", html)


def test_every_cell_stands_in_the_tables(page: tuple[Path, str]):
    cells = re.findall("<td>([^<]*)</td>", page[1])
    assert [cells.count(value) for value in ("0.875", "0.188")] == [3, 2]  # 3 accuracies, 2 controls


def test_the_difference_between_ranks_is_relative(page: tuple[Path, str]):
    assert "1.0e-06" in page[1]


def test_text_is_escaped(page: tuple[Path, str]):
    assert "&lt;2.13&gt;" in page[1]
