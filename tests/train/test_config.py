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
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": -2}, "batch_size must be at least 1, got -2"),
        ({"ulysses": 0}, "ulysses must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
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


def test_a_flag_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a-file.toml"
    path.write_text('stage = 5\nmodel = "m-1"\ndata = "d"\nout = "o"\nsteps = 3\nbetas = [0.9, 0.98]\nrecompute = true')
    flags = ["--batch-size", "2", "--max_fps=1.5", "--out=runs/my-run", "--layout", "zigzag"]
    config, resume = parse([f"--config={path}", *flags, "--resume"])
    expected = {"stage": 5, "model": Path("m-1"), "steps": 3, "betas": (0.9, 0.98), "recompute": True, "batch_size": 2}
    expected |= {"max_fps": 1.5, "out": Path("runs/my-run"), "layout": "zigzag"}
    assert resume and config == TrainConfig(**FIELDS | expected)
    assert parse(["--config", str(path)])[1] is False
