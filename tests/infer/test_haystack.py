"""Haystacks and the clips that are written from them."""

from pathlib import Path

import numpy as np
import pytest
from longtake.infer.haystack import (
    PHOTOGRAPHS,
    UNSEEN_PHOTOGRAPHS,
    Clip,
    Photographs,
    VideoFile,
    plan_trials,
    write_clips,
    write_video,
)
from longtake.infer.needle_images import Needle
from longtake.model.media import probe, read_frames

SOURCE = Photographs(names=("chelsea.png",))


def decoded(path: Path, size: int = 32) -> np.ndarray:
    """All frames, float [n, size, size, 3] in 0..255."""
    count = probe(path).num_frames
    return read_frames(path, list(range(count)), size=size).permute(0, 2, 3, 1).double().numpy()


def test_seen_and_unseen_photographs_have_nothing_in_common():
    assert not set(PHOTOGRAPHS) & set(UNSEEN_PHOTOGRAPHS)


@pytest.mark.parametrize("augment", [0.0, 1.0])
def test_frames_differ_and_follow_from_the_generator(augment: float):
    source = Photographs(names=("chelsea.png", "astronaut.png"), augment=augment)
    frames, again = (source.frames(40, np.random.default_rng(0)) for _ in "ab")
    assert frames.shape == (40, 32, 32, 3) and frames.dtype == np.uint8
    assert (frames == again).all()
    assert (np.abs(np.diff(frames.astype(int), axis=0)).mean(axis=(1, 2, 3)) > 0.5).all()


def test_a_photograph_keeps_its_mean_colour():
    photograph = Photographs(names=("chelsea.png",), size=64)
    frames = np.concatenate([photograph.frames(32, np.random.default_rng(seed)) for seed in range(20)])
    whole = photograph.pyramids[0][0].mean(dim=(0, 2, 3)).numpy()
    assert np.abs(frames.mean(axis=(0, 1, 2)) - whole).max() < 15


def test_a_video_holds_the_frames_written_to_it(tmp_path: Path):
    frames = SOURCE.frames(20, np.random.default_rng(1))
    write_video(tmp_path / "a.mp4", frames)
    back = decoded(tmp_path / "a.mp4")
    assert back.shape == frames.shape
    assert np.abs(back - frames).mean() < 6  # crf 18, and colour at half the resolution


def test_the_needle_is_encoded_at_its_position_and_left_out_of_the_control(tmp_path: Path):
    clip = Clip("a.mp4", 9, 4, Needle("white", "square"), "test", (7,))
    write_clips(tmp_path / "needle", [clip], source=SOURCE)
    write_clips(tmp_path / "control", [clip], source=SOURCE, control=True)
    needle, control = decoded(tmp_path / "needle/a.mp4"), decoded(tmp_path / "control/a.mp4")
    gap = np.abs(needle - control).mean(axis=(1, 2, 3))
    assert gap.argmax() == 4 and gap[4] > 40
    assert np.delete(gap, 4).max() < 8  # the coder's own changes
    assert needle[4, 12:20, 12:20].min() > 200


def test_an_image_is_written_without_loss(tmp_path: Path):
    clip = Clip("a.png", 1, 0, Needle("red", "ring"), "train", (3,))
    write_clips(tmp_path, [clip], source=SOURCE)
    from PIL import Image

    assert (np.asarray(Image.open(tmp_path / "a.png")) == clip.pixels(SOURCE)[0]).all()


def test_trials_stand_at_their_depths_in_grid_order():
    trials = plan_trials([8, 10], [0, 0.5, 1], needles=2, seed=0)
    assert [clip.num_frames for clip in trials] == [8] * 6 + [10] * 6
    assert [clip.position for clip in trials] == [0, 0, 4, 4, 7, 7, 0, 0, 5, 5, 9, 9]
    assert len({clip.name for clip in trials}) == 12


def test_every_second_needle_is_held_out():
    trials = plan_trials([8], [0.5], needles=20, seed=1)
    assert [clip.needle is not None and clip.needle.held_out for clip in trials] == [False, True] * 10


def test_a_cell_does_not_depend_on_the_other_cells():
    alone = plan_trials([64], [0.5], needles=4, seed=2)
    assert plan_trials([8, 64], [0, 0.5], needles=4, seed=2)[-4:] == alone


def test_another_seed_gives_other_pixels():
    a, b = (plan_trials([8], [0.5], needles=1, seed=seed)[0].pixels(SOURCE) for seed in (0, 1))
    assert (a != b).any()


@pytest.mark.parametrize("frames, depths, needles", [([0], [0.5], 1), ([8], [1.5], 1), ([8], [0.5], 0)])
def test_impossible_grids_are_refused(frames: list[int], depths: list[float], needles: int):
    with pytest.raises(ValueError, match=r"0|1\.5"):
        plan_trials(frames, depths, needles=needles, seed=0)


def test_a_users_video_gives_consecutive_frames_and_starts_again_at_its_end(tmp_path: Path):
    frames = SOURCE.frames(12, np.random.default_rng(3))
    write_video(tmp_path / "own.mp4", frames)
    given = VideoFile(tmp_path / "own.mp4").frames(30, np.random.default_rng(4))
    assert given.shape == (30, 32, 32, 3)
    assert (given[:12] == given[12:24]).all()
    whole = decoded(tmp_path / "own.mp4").round().astype(np.uint8)
    start = next(i for i in range(12) if (whole[i] == given[0]).all())
    assert (given[1] == whole[(start + 1) % 12]).all()
