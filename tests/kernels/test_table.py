"""The table that chooses kernels: what a mask costs each, what measurements change, and how the file fares."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.kernels import table
from longtake.kernels.candidates import LISTED_HEAD_DIMS, Config
from longtake.kernels.table import Choice, Entry, cache_file, choose, pairs, read_entries, write_entries
from longtake.kernels.visibility import Visibility

from tests.kernels.masks import dense, shard_visibility

CPU = torch.device("cpu")
LARGE, SMALL = Config("flash_forward", 128, 128, 8, 2), Config("flash_forward", 16, 16, 4, 2)
GLUON = Config("hopper_forward", 128, 128, 4, 2)
KERNELS = frozenset({"flash_forward", "hopper_forward"})


def entry(config: Config, cost: float | None, length: int = 0, **fields: Any) -> Entry:
    return replace(Entry("forward", 64, "bfloat16", length, config, cost), **fields)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Any:
    """chosen(entries, visibility, ...): what `choose` picks where these are the table."""

    def pick(entries: Sequence[Entry], visibility: Visibility, **options: Any) -> Config | None:
        monkeypatch.setattr(table, "entries_for", lambda device: tuple(entries))
        given: Any = {"head_dim": 64, "dtype": torch.bfloat16, "device": CPU, "kernels": KERNELS} | options
        choice = choose("forward", visibility, **given)
        return choice and choice.config

    return pick


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the tables, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read_entries.cache_clear()
    table.entries_for.cache_clear()
    yield tmp_path / "longtake"
    read_entries.cache_clear()
    table.entries_for.cache_clear()


# What a mask makes of costs


def test_short_documents_get_small_tiles_and_long_ones_large(chosen: Any) -> None:
    entries = [entry(LARGE, 1.0), entry(SMALL, 1.5)]  # a pair is cheaper in large tiles
    assert chosen(entries, shard_visibility(1024, lengths=[32] * 32)) == SMALL
    assert chosen(entries, shard_visibility(1024)) == LARGE


@pytest.mark.parametrize("direction", ["forward", "dkdv"])
def test_pairs_are_those_of_the_tiles_that_are_visited(direction: str) -> None:
    visibility = shard_visibility(200, lengths=[30, 100, 70])
    seen = dense(visibility) if direction == "forward" else dense(visibility).T
    config = Config("any", 32, 16, 4, 2)
    rows, keys = (32, 16) if direction == "forward" else (16, 32)
    visited = 0
    for tile in seen.split(rows):
        columns = tile.any(0).nonzero()
        visited += -(-int(columns[-1] - columns[0] + 1) // keys)
    assert pairs(direction, visibility, config) == visited * rows * keys


def test_head_dims_dtypes_and_kernels_are_told_apart(chosen: Any) -> None:
    entries = [
        entry(LARGE, 1.0, head_dim=128),
        entry(LARGE, 1.0, dtype="float16"),
        entry(LARGE, 1.0, direction="dq"),
        entry(SMALL, 9.0),
    ]
    assert chosen(entries, shard_visibility(300)) == SMALL
    assert chosen(entries, shard_visibility(300), head_dim=100) == LARGE
    assert chosen(entries, shard_visibility(300), kernels={"decode"}) is None


@pytest.mark.parametrize(("head_dim", "listed"), [(1, 64), (64, 64), (65, 72), (97, 128), (200, 256)])
def test_a_head_dim_is_served_by_the_next_one_that_is_listed(head_dim: int, listed: int) -> None:
    assert table.listed_head_dim(head_dim) == listed
    assert listed in LISTED_HEAD_DIMS


# What measurements change


@pytest.mark.parametrize(
    ("gluon", "serves"),
    [(entry(GLUON, 0.9, 1024), GLUON), (entry(GLUON, 1.1, 1024), LARGE), (entry(GLUON, 0.1), LARGE)],
)
def test_a_gluon_kernel_serves_where_it_was_measured_ahead(gluon: Entry, serves: Config, chosen: Any) -> None:
    assert chosen([entry(LARGE, 1.0, 1024), gluon], shard_visibility(300)) == serves


def test_an_unmeasured_gluon_kernel_serves_by_hand_alone(chosen: Any) -> None:
    entries = [entry(LARGE, 1.0), entry(GLUON, 0.1)]
    assert chosen(entries, shard_visibility(300)) == LARGE
    assert chosen(entries, shard_visibility(300), unmeasured=True) == GLUON
    measured = [entry(LARGE, 1.0, 1024), *entries]  # of the other kernel
    assert chosen(measured, shard_visibility(300), unmeasured=True, kernels={"hopper_forward"}) == GLUON


def test_a_refused_candidate_never_serves(chosen: Any) -> None:
    entries = [entry(LARGE, 1.0, 1024), entry(GLUON, None, 1024, why="refused: wrong"), entry(GLUON, 0.1)]
    assert chosen(entries, shard_visibility(300)) == LARGE
    assert chosen(entries, shard_visibility(300), unmeasured=True, kernels={"hopper_forward"}) is None


def test_each_length_has_measurements_of_its_own(chosen: Any) -> None:
    entries = [entry(LARGE, 3.0, 1024), entry(SMALL, 1.0, 1024), entry(LARGE, 1.0, 8192), entry(SMALL, 3.0, 8192)]
    assert chosen(entries, shard_visibility(2048)) == SMALL  # 1,024 keys a row on average
    assert chosen(entries, shard_visibility(8192)) == LARGE


def test_where_a_length_has_no_measurement_the_nearest_serves(chosen: Any) -> None:
    entries = [entry(LARGE, 1.0, 1024), entry(LARGE, None, 65536), entry(SMALL, None, 1024), entry(SMALL, 1.0, 8192)]
    assert chosen(entries, shard_visibility(100_000)) == SMALL
    assert chosen(entries, shard_visibility(100)) == LARGE


@pytest.mark.parametrize(("keys", "length"), [(0, 1024), (150, 1024), (2800, 1024), (3000, 8192), (1e6, 65536)])
def test_the_nearest_length_is_so_as_a_ratio(keys: float, length: int) -> None:
    assert table.nearest_length(keys) == length


# While a CUDA graph is recorded


def uncountable(self: Visibility, *tile: int) -> int:
    raise AssertionError("tiles are counted, which waits for the device")


def test_nothing_is_counted_while_a_graph_is_recorded(chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "is_capturing", lambda device: True)
    monkeypatch.setattr(Visibility, "visited", uncountable)
    monkeypatch.setattr(Visibility, "area", property(uncountable))
    short = shard_visibility(1024, lengths=[32] * 32)
    assert chosen([entry(LARGE, 1.0), entry(SMALL, 1.5)], short) == LARGE
    measured = [entry(LARGE, 3.0, 1024), entry(SMALL, 1.0, 1024), entry(LARGE, 1.0, 65536), entry(SMALL, 3.0, 65536)]
    assert chosen(measured, shard_visibility(300)) == LARGE


def test_a_choice_made_before_stands_while_a_graph_is_recorded(chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [entry(LARGE, 1.0), entry(SMALL, 1.5)]
    short = shard_visibility(1024, lengths=[32] * 32)
    assert chosen(entries, short) == SMALL
    monkeypatch.setattr(table, "is_capturing", lambda device: True)
    assert chosen(entries, short) == SMALL


# The file


def test_entries_come_back_as_they_were_written(cache: Path) -> None:
    file = cache_file("A GPU")
    entries = (entry(LARGE, 1.25, 1024, why="measured"), entry(GLUON, None, 8192, why="refused: wrong"))
    assert read_entries(file) == ()
    write_entries(file, entries)
    assert read_entries(file) == entries
    write_entries(file, entries[:1])
    assert read_entries(file) == entries[:1]
    assert list(cache.iterdir()) == [file]


@pytest.mark.parametrize(
    "text", ["", "[{]", "3", '["forward"]', '[{"direction": "forward"}]', '[{"config": {}}]', "\0"]
)
def test_a_corrupt_file_is_told_and_what_is_checked_in_serves(text: str, cache: Path) -> None:
    file = cache_file("A GPU")
    write_entries(file, [])
    file.write_text(text)
    with pytest.warns(UserWarning, match=r"tuned-A-GPU-.*\.json cannot be read .*: run `longtake tune` again"):
        assert read_entries(file) == ()


def test_a_file_that_may_not_be_read_is_told(cache: Path) -> None:
    file = cache_file("A GPU")
    file.mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert read_entries(file) == ()


def test_another_gpu_triton_or_source_reads_another_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {cache_file("NVIDIA H100 80GB HBM3"), cache_file("NVIDIA H200")}
    monkeypatch.setattr(table.triton, "__version__", "9.9.9")
    files.add(cache_file("NVIDIA H200"))
    sources = cache / "kernels"
    sources.mkdir(parents=True)
    monkeypatch.setattr(table, "__file__", str(sources / "table.py"))
    files.add(cache_file("NVIDIA H200"))
    (sources / "flash_forward.py").write_text("1")
    files.add(cache_file("NVIDIA H200"))
    (sources / "flash_forward.py").write_text("2")
    files.add(cache_file("NVIDIA H200"))
    assert len(files) == 6
    assert {file.parent for file in files} == {cache}


def test_a_gpu_reads_its_measurements_and_then_what_is_checked_in(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(table, "architecture", lambda device: "hopper")
    gpu, checked_in = torch.device("cuda", 0), table.checked_in("hopper")
    assert table.entries_for(gpu) == checked_in
    assert checked_in
    write_entries(cache_file("A GPU"), [entry(LARGE, 1.0, 1024)])
    assert table.entries_for(gpu) == (entry(LARGE, 1.0, 1024), *checked_in)


def test_a_choice_says_what_the_whole_call_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = entry(LARGE, 0.5, 1024, why="measured")
    monkeypatch.setattr(table, "entries_for", lambda device: (measured,))
    visibility = shard_visibility(300)
    choice = choose("forward", visibility, head_dim=64, dtype=torch.bfloat16, device=CPU, kernels=KERNELS)
    assert choice == Choice(LARGE, 0.5 * (1 + 2 + 3) * 128 * 128, measured)
