"""What `longtake demo` refuses before it removes or writes anything. That it learns is what `make demo` shows."""

from pathlib import Path

import pytest
from longtake.bench.demo import RECIPE, Demo, main, train_config
from longtake.train.stages import STAGES


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "thesis.txt"
    kept.write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no earlier demo"):
        main(["--out", str(tmp_path)])
    assert kept.read_text() == "years of work"


def test_a_video_that_cannot_be_read_is_named_before_the_last_demo_goes(tmp_path: Path) -> None:
    (tmp_path / "stage0").mkdir()
    with pytest.raises(ValueError, match=r"none\.mp4"):
        main(["--out", str(tmp_path), "--video", str(tmp_path / "none.mp4")])
    assert (tmp_path / "stage0").is_dir()


def test_each_stage_starts_from_the_one_before() -> None:
    demo = Demo(out=Path("runs"), seed=3, video=None, ring=2, ulysses=2)
    assert set(RECIPE) == set(STAGES)
    for stage in STAGES:
        config = train_config(stage, demo)
        assert (config.model, config.out) == (Path(f"runs/stage{stage - 1}"), Path(f"runs/stage{stage}"))
        assert (config.seed, config.ring, config.ulysses) == (3, 2, 2)
