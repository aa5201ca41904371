"""A mixture's order is a pure function of seed and place, with every source in its share."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from longtake.train.mixture import Mixture, open_mixture


def mixture(sizes: Sequence[int], counts: Sequence[int] | None = None) -> Mixture[int]:
    """Datasets of numbers, the i-th from 1000 i on."""
    return Mixture([range(1000 * i, 1000 * i + size) for i, size in enumerate(sizes)], counts)


def test_each_epoch_of_one_dataset_has_every_sample_once_in_an_order_of_its_own() -> None:
    whole = mixture([7]).order(5, 0, 21)
    epochs = [whole[0:7], whole[7:14], whole[14:21]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert whole != mixture([7]).order(6, 0, 21)


@pytest.mark.parametrize("counts", [None, [2, 9, 4]])
def test_the_order_depends_on_the_place_alone(counts: list[int] | None) -> None:
    mixed = mixture([5, 4, 6], counts)
    whole = mixed.order(3, 0, 60)
    for consumed in (41, 0, 14, 15, 16, 29, 3):  # in no order, as after a restart
        assert mixture([5, 4, 6], counts).order(3, consumed, 13) == whole[consumed : consumed + 13]
    assert mixed.order(3, 7, 0) == []


def test_every_epoch_has_its_counts_and_no_sample_comes_twice_before_all_of_its_source_have_come() -> None:
    mixed, sizes, counts = mixture([5, 4, 6], [2, 9, 4]), [5, 4, 6], [2, 9, 4]
    drawn = [mixed[index] for index in mixed.order(0, 0, 15 * 8)]
    for epoch in range(8):
        sources = Counter(number // 1000 for number in drawn[15 * epoch : 15 * (epoch + 1)])
        assert [sources[i] for i in range(3)] == counts
    for i, size in enumerate(sizes):
        mine = [number for number in drawn if number // 1000 == i]
        for start in range(0, len(mine) - size + 1, size):
            assert sorted(mine[start : start + size]) == list(range(1000 * i, 1000 * i + size))


def test_sources_are_spread_over_the_epoch() -> None:
    mixed = mixture([500, 500], [500, 500])
    first = Counter(index // 500 for index in mixed.order(1, 0, 200))
    assert 60 < first[0] < 140  # 100 expected, 6 standard deviations


def open_text(folder: Path, text: str, sizes: dict[str, int]) -> Mixture[int]:
    (folder / "mix.toml").write_text(text)
    return open_mixture(folder / "mix.toml", lambda data, media: range(sizes[data.name]))


def test_repeat_says_how_often_an_epoch_goes_over_a_source(tmp_path: Path) -> None:
    text = '[[source]]\ndata = "a"\n[[source]]\ndata = "b"\nrepeat = 3\n[[source]]\ndata = "c"\nrepeat = 0.5'
    mixed = open_text(tmp_path, text, {"a": 10, "b": 4, "c": 7})
    assert mixed.counts == (10, 12, 4) and len(mixed) == 26


@pytest.mark.parametrize(
    ("weights", "counts"), [((1, 1), (55, 55)), ((3, 1), (83, 27)), ((1, 2), (37, 73)), ((9, 1), (99, 11))]
)
def test_weights_share_an_epoch_as_long_as_all_sources_out(
    tmp_path: Path, weights: tuple[float, float], counts: tuple[int, int]
) -> None:
    text = "\n".join(f'[[source]]\ndata = "{n}"\nweight = {w}' for n, w in zip("ab", weights, strict=True))
    mixed = open_text(tmp_path, text, {"a": 10, "b": 100})
    assert mixed.counts == counts


def test_paths_start_from_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "mix.toml").write_text('[[source]]\ndata = "x/a.jsonl"\nmedia = "/videos"\n[[source]]\ndata = "b"')
    opened = []
    open_mixture(tmp_path / "mix.toml", lambda *paths: opened.append(paths) or range(3))
    assert opened == [(tmp_path / "x/a.jsonl", Path("/videos")), (tmp_path / "b", None)]


BAD = {
    "no toml": ("[[source", "not a mixture file"),
    "no sources": ("seed = 3", r"list of \[\[source\]\] tables, this has seed"),
    "empty": ("", r"this has nothing"),
    "no tables": ("source = [1]", "list of .* tables, this has source"),
    "none": ("source = []", "list of .* tables, this has source"),
    "no data": ("[[source]]\nweight = 1", "source 1: no path in 'data'"),
    "unknown key": ('[[source]]\ndata = "a"\nratio = 1', "source 1: unknown key 'ratio'"),
    "both": ('[[source]]\ndata = "a"\nrepeat = 1\nweight = 1', "source 1: give repeat or weight, not both"),
    "a weight here and none there": (
        '[[source]]\ndata = "a"\nweight = 1\n[[source]]\ndata = "a"',
        "sources 1 and 2: give all of them a weight, or none",
    ),
    "no weight": ('[[source]]\ndata = "a"\nweight = 0', "source 1: weight must be a number above 0, got 0"),
    "no number": ('[[source]]\ndata = "a"\nrepeat = "2"', "source 1: repeat must be a number above 0, got '2'"),
    "media": ('[[source]]\ndata = "a"\nmedia = 2', "source 1: media must be a folder, got 2"),
    "too little": ('[[source]]\ndata = "a"\nrepeat = 0.01', "has 10 samples, of which an epoch would take none"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_mixture_is_named_with_its_source_and_key(tmp_path: Path, case: str) -> None:
    text, reason = BAD[case]
    with pytest.raises(ValueError, match=f"{tmp_path / 'mix.toml'}: .*{reason}"):
        open_text(tmp_path, text, {"a": 10})
