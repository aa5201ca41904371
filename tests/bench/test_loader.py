"""The benchmark of the loader: what it computes is checked by hand, what it times is only there."""

import json
from pathlib import Path

import numpy as np
import pytest
from longtake.bench import loader
from longtake.bench.loader import LIMIT, format_row, main, share, shortest_step, verdict, waits
from longtake.model.media import probe, read_frames

SMALL = ["--frames", "4", "--size", "28", "--steps", "2", "--step-seconds", "0.01"]


def test_a_run_prints_and_writes_a_row_for_each_of_what_it_tries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "loader.json"
    tried = ["--lengths", "6,2", "--video-size", "32", "--workers", "0,1", "--prefetch", "2"]
    main([*SMALL, *tried, "--json", str(file)])
    machine, rows_line, header, *lines, last = capsys.readouterr().out.splitlines()
    report = json.loads(file.read_text())
    assert [(row["workers"], row["prefetch"]) for row in report["rows"]] == [(0, 2), (1, 2)]
    for row in report["rows"]:
        assert len(row["reading"]) == 2 and row["longest"] == max(row["reading"]) > 0
        assert row["frames_per_second"] > 0 and row["read"] == pytest.approx(sum(row["reading"]) / 2)
        assert row["shortest"] == pytest.approx(shortest_step(row["reading"], 2))
        assert 0 <= row["share"] < 1
    assert lines == [format_row(row) for row in report["rows"]] and header == loader.HEADER
    assert last == verdict(report["rows"], 0.01)
    assert machine.startswith(report["processor"]) and rows_line.startswith("rows: ")
    assert report["setting"]["lengths"] == [6, 2]


def test_own_data_is_decoded_by_the_ranks_that_share_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, file = loader.write_data(tmp_path, [5], 32), tmp_path / "loader.json"
    main([*SMALL, "--data", str(data), "--ranks", "2", "--workers", "0", "--prefetch", "1", "--json", str(file)])
    [row] = json.loads(file.read_text())["rows"]
    assert row["frames_per_second"] > 0 and len(row["reading"]) == 2
    data.write_text(data.read_text().replace("0.mp4", "gone.mp4"))
    with pytest.raises(ValueError, match=r"rows.jsonl: row 1: .*gone.mp4: no such file"):
        main([*SMALL, "--data", str(data), "--workers", "0"])


def test_videos_are_written_as_asked_for(tmp_path: Path) -> None:
    loader.write_data(tmp_path, [5, 3], 32)
    assert [probe(tmp_path / f"{number}.mp4").num_frames for number in (0, 1)] == [5, 3]
    first, second = (read_frames(tmp_path / f"{number}.mp4", [0], size=32) for number in (0, 1))
    assert not first.equal(second)


def test_waits_by_hand() -> None:
    """A step of 10 s; a video of 25 s after three short ones."""
    reading = [1.0, 1.0, 1.0, 25.0, 1.0, 1.0]
    assert waits(reading, 10, 0) == reading
    assert waits(reading, 10, 1) == [1, 0, 0, 15, 0, 0]  # begun when the step before it has its frames
    assert waits(reading, 10, 2) == [1, 0, 0, 5, 0, 0]  # a step earlier
    assert waits(reading, 10, 3) == [1, 0, 0, 0, 0, 0]
    assert share(waits(reading, 10, 1), 10) == 15 / 65  # the first has nobody to read ahead of it


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_no_depth_helps_where_all_steps_are_alike(prefetch: int) -> None:
    """20 steps that take a second each, or 0.95 of compute and 0.05 of waiting."""
    assert shortest_step([1.0] * 400, prefetch) == pytest.approx(0.95, abs=0.002 * prefetch)


def test_from_the_shortest_step_on_less_than_the_limit_is_waiting() -> None:
    reading = np.random.default_rng().exponential(size=50).tolist()
    found = [shortest_step(reading, prefetch) for prefetch in (0, 1, 2, 4)]
    assert found == sorted(found, reverse=True)
    for prefetch, step in zip((0, 1, 2, 4), found, strict=True):
        assert share(waits(reading, 1.001 * step, prefetch), 1.001 * step) < LIMIT
        assert share(waits(reading, 0.999 * step, prefetch), 0.999 * step) >= LIMIT * 0.999


def test_the_verdict_is_the_fewest_workers_that_are_enough_or_the_step_that_would_be() -> None:
    rows = [
        {"workers": workers, "prefetch": prefetch, "share": part, "shortest": shortest}
        for workers, prefetch, part, shortest in [
            (1, 1, 0.3, 9.0),
            (1, 2, 0.2, 4.5),
            (2, 2, 0.04, 2.0),
            (4, 2, 0.0, 1.0),
        ]
    ]
    assert verdict(rows, 2) == "workers = 2, prefetch = 2: a step of 2 s waits 4.0 % of its time"
    assert verdict(rows[:2], 2).endswith("workers = 1 and prefetch = 2, is enough for steps of 4.50 s")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "1,-1"], "workers must be at least 0, got -1"),
        (["--prefetch=-2"], "prefetch must be at least 0, got -2"),
        (["--steps", "1"], "steps must be at least 2, got 1"),
        (["--lengths", "3,0"], "lengths at least 1, got 0"),
        (["--frames", "0"], "num_frames must be at least 1, got 0"),
        (["--size", "0"], "size 0 must be at least 1"),
        (["--ranks", "0"], "ulysses must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_a_video_is_written(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "write_data", None)
    with pytest.raises(ValueError, match=message):
        main(flags)


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.jsonl: no such file"):
        main(["--data", str(tmp_path / "none.jsonl")])
