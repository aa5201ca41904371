"""The page of a dry run says what the run would be, at any number of ranks."""

import re
from pathlib import Path
from typing import Any

import pytest
from longtake.model.shapes import published_shape
from longtake.train import dry_run
from longtake.train.budget import estimate
from longtake.train.config import TrainConfig
from longtake.train.dry_run import report

SHAPE = published_shape("qwen2-7b")


def make_config(**fields: Any) -> TrainConfig:
    usual = {"stage": 5, "epochs": 6, "context": 131_072, "num_frames": 256, "dtype": "bfloat16", "recompute": True}
    grid = {"ring": 4, "ulysses": 4, "global_batch": 128, "batch_size": 2, "warmup_ratio": 0.03}
    return TrainConfig(model=Path("IN"), data=Path("DATA"), out=Path("OUT"), **usual | grid | fields)


def page(config: TrainConfig, world_size: int, num_samples: int | None = None) -> dict[str, list[str]]:
    """The cells of each line, by its first words."""
    text = report(config, SHAPE, name="a name", world_size=world_size, num_samples=num_samples)
    lines = [re.split("  +", line.strip()) for line in text.splitlines()]
    return {name: cells for name, *cells in lines}


def test_what_depends_on_the_data_is_left_open_until_they_are_known() -> None:
    unknown, known = page(make_config(), 256), page(make_config(), 256, num_samples=15_292)
    assert (unknown["steps"], unknown["warmup"]) == (["by the size of the data"], ["by the size of the data"])
    assert (known["steps"], known["warmup"]) == (["717"], ["22"])  # 6 x 15,292 / 128, and 3 % of them
    for said in (unknown, known):
        assert (said["epochs"], said["global_batch"], said["accumulation"]) == (["6"], ["128"], ["4"])


def test_the_memory_is_the_estimate_with_and_without_recomputation() -> None:
    config = make_config()
    ways = [estimate(make_config(recompute=recompute), SHAPE, 64) for recompute in (True, False)]
    said = page(config, 64)
    for purpose in ways[0]:
        assert said[purpose] == [f"{way[purpose] / 1e9:.2f}" for way in ways]
    assert said["sum"] == [f"{sum(way.values()) / 1e9:.2f}" for way in ways]


def test_a_run_that_names_no_dtype_is_one_in_bfloat16() -> None:
    assert page(make_config(dtype=None), 64) == (said := page(make_config(), 64))
    assert said["dtype"] == ["bfloat16"]


@pytest.mark.parametrize(("spare", "word"), [(0, "fits"), (-1, "DOES NOT FIT")])
def test_one_byte_too_many_does_not_fit(spare: int, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    monkeypatch.setattr(dry_run, "GPU_BYTES", sum(estimate(config, SHAPE, 64).values()) + spare)
    assert [cells for name, cells in page(config, 64).items() if name.startswith("in ")] == [[word, "DOES NOT FIT"]]


@pytest.mark.parametrize(("recompute", "passes"), [(False, 2), (True, 3)])
def test_attention_sends_its_forward_again_where_layers_are_recomputed(recompute: bool, passes: int) -> None:
    [said] = page(make_config(recompute=recompute), 256)["sent a layer"]
    trade = 2 * 8192 * (28 + 4) * 3 / 4 * 128 * 2  # tokens x heads of q, out, k, v to 3 of 4 ranks, in bf16
    assert f"{passes * trade / 1e6:,.1f} MB on ulysses" in said


def test_heads_that_the_degree_does_not_divide_have_no_closed_form() -> None:
    assert page(make_config(ring=2, ulysses=8), 256)["sent a layer"][0].startswith("no closed form")
