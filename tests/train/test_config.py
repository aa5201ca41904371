"""A run's settings are checked when they are made."""

from pathlib import Path
from typing import Any

import pytest
from longtake.train.command import parse
from longtake.train.config import TrainConfig

FIELDS: dict[str, Any] = {"stage": 3, "model": Path("m"), "data": Path("d"), "out": Path("o"), "steps": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stage": 6}, "stage must be one of 1, 2, 3, 4, 5, got 6"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"steps": 0}, "steps 0 and epochs 0: give one, and leave the other 0"),
        ({"epochs": 2}, "steps 1 and epochs 2: give one, and leave the other 0"),
        ({"warmup": 2, "warmup_ratio": 0.1}, "warmup 2 and warmup_ratio 0.1: give one, the other 0"),
        ({"warmup_ratio": 3.0}, "warmup_ratio must be less than 1, got 3.0: warmup is a number of steps"),
        (
            {"accumulation": 4, "global_batch": 8},
            "accumulation 4 and global_batch 8: leave accumulation 1, global_batch sets it, or make global_batch 0",
        ),
        ({"batch_size": -2}, "batch_size must be at least 1, got -2"),
        ({"ulysses": 0}, "ulysses must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"seed": 2**63}, rf"seed must be less than 2\*\*63, got {2**63}"),
        ({"low_rank": -8}, "low_rank must be at least 0, got -8"),
        ({"clip": 0.0}, "clip must be more than 0, got 0.0"),
        ({"learning_rate": -1e-3}, "learning_rate must be more than 0, got -0.001"),
        ({"max_fps": 0.0}, "max_fps must be more than 0, got 0.0"),
        ({"stage": 1, "low_rank": 4}, "low_rank 4 has nothing to train: stage 1 leaves the llm alone"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_number(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        TrainConfig(**FIELDS | fields)


def test_the_stage_says_what_is_left_open() -> None:
    assert [TrainConfig(**FIELDS | {"stage": stage}).rank_of_update for stage in range(1, 6)] == [0, 0, 0, 8, 0]
    assert TrainConfig(**FIELDS | {"stage": 4, "low_rank": 0}).rank_of_update == 0
    assert TrainConfig(**FIELDS | {"low_rank": 4}).rank_of_update == 4
    assert TrainConfig(**FIELDS).plan.name == "short supervised fine-tuning"


@pytest.mark.parametrize(("data", "batch_size", "accumulation"), [(1, 2, 12), (4, 2, 3), (3, 8, 1), (24, 1, 1)])
def test_the_global_batch_stays_on_any_number_of_groups(data: int, batch_size: int, accumulation: int) -> None:
    config = TrainConfig(**FIELDS | {"global_batch": 24, "batch_size": batch_size})
    resolved = config.resolve(data=data, num_samples=None)
    assert (resolved.accumulation, resolved.global_batch, resolved.steps) == (accumulation, 0, 1)
    assert resolved.resolve(data=data, num_samples=None) == resolved


@pytest.mark.parametrize(
    ("data", "batch_size", "cure"),
    [(3, 16, "take batch_size 8"), (8, 2, "take batch_size 1"), (5, 1, "take larger groups, ring x ulysses")],
)
def test_a_global_batch_that_cannot_be_split_is_refused_with_what_to_do(data: int, batch_size: int, cure: str) -> None:
    config = TrainConfig(**FIELDS | {"global_batch": 24, "batch_size": batch_size})
    message = f"^global_batch 24 is no multiple of batch_size {batch_size} x {data} data-parallel groups: {cure}"
    with pytest.raises(ValueError, match=message):
        config.resolve(data=data, num_samples=100)


@pytest.mark.parametrize(("num_samples", "steps", "warmup"), [(40, 15, 2), (41, 16, 2), (1, 1, 1), (400, 150, 15)])
def test_epochs_and_the_warm_up_ratio_follow_the_data(num_samples: int, steps: int, warmup: int) -> None:
    config = TrainConfig(**FIELDS | {"steps": 0, "epochs": 3, "warmup_ratio": 0.1, "global_batch": 8})
    resolved = config.resolve(data=4, num_samples=num_samples)
    assert (resolved.steps, resolved.warmup, resolved.epochs, resolved.warmup_ratio) == (steps, warmup, 0, 0.0)
    unknown = config.resolve(data=4, num_samples=None)
    assert (unknown.steps, unknown.warmup, unknown.epochs, unknown.warmup_ratio) == (0, 0, 3, 0.1)


def test_resolving_fills_in_what_was_left_to_the_stage() -> None:
    resolved = TrainConfig(**FIELDS | {"stage": 4}).resolve(data=2, num_samples=9)
    assert (resolved.learning_rate, resolved.schedule, resolved.low_rank) == (2e-5, "constant", 8)
    own = {"stage": 4, "learning_rate": 0.1, "schedule": "cosine", "low_rank": 0, "accumulation": 3, "warmup": 1}
    assert TrainConfig(**FIELDS | own).resolve(data=2, num_samples=9) == TrainConfig(**FIELDS | own)


def test_a_flag_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a-file.toml"
    path.write_text('stage = 5\nmodel = "m-1"\ndata = "d"\nout = "o"\nsteps = 3\nbetas = [0.9, 0.98]\nrecompute = true')
    flags = ["--batch-size", "2", "--max_fps=1.5", "--out=runs/my-run", "--layout", "zigzag"]
    config, asked = parse([f"--config={path}", *flags, "--resume"])
    expected = {"stage": 5, "model": Path("m-1"), "steps": 3, "betas": (0.9, 0.98), "recompute": True, "batch_size": 2}
    expected |= {"max_fps": 1.5, "out": Path("runs/my-run"), "layout": "zigzag"}
    assert asked.resume and config == TrainConfig(**FIELDS | expected)
    assert parse(["--config", str(path)])[1].resume is False
