import time
from pathlib import Path

import pytest
from longtake.bench.sensors import Reading, Sensors, parse, summarise


def test_medians_of_a_time() -> None:
    samples = [(float(i), (1000.0 + i, 300.0, 50.0)) for i in range(10)]
    assert summarise(samples, 2.0, 4.0) == Reading(1003.0, 300.0, 50.0)
    assert summarise(samples, 20.0, 30.0) == Reading()


def test_what_a_driver_does_not_tell_is_left_out() -> None:
    assert parse("1755, 612.35, 61\n") == (1755.0, 612.35, 61.0)
    assert parse("1755, [N/A], 61") is None
    assert parse("No devices were found") is None


def test_reads_nvidia_smi_until_the_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1 $2" = "-i GPU-7" ] && echo 1700, 500.5, 60\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with Sensors("GPU-7") as sensors:
        began = time.perf_counter()
        while sensors.since(began) == Reading() and time.perf_counter() < began + 10:
            time.sleep(0.01)
        assert sensors.since(began) == Reading(1700.0, 500.5, 60.0)
    assert not sensors.thread.is_alive()


def test_knows_nothing_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with Sensors("0") as sensors:
        assert sensors.since(0.0) == Reading()
