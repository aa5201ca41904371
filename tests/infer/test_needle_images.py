"""Needles: what can be asked of them, and that test renderings are none of the training ones."""

import numpy as np
import pytest
from longtake.infer.needle_images import (
    ALL_NEEDLES,
    CHANCE,
    COLOUR_QUESTION,
    COLOURS,
    HELD_OUT,
    OTHER_COLOUR,
    OUTLINES,
    SHAPE_QUESTION,
    SHAPES,
    Needle,
    Split,
    place,
    render,
    training_needle,
)

GREY = np.full((32, 32, 3), 100, dtype=np.uint8)


def test_questions_are_those_with_a_named_answer():
    assert Needle("red", "star").questions == [(COLOUR_QUESTION, "red"), (SHAPE_QUESTION, "star")]
    assert Needle("red", "arrow").questions == [(COLOUR_QUESTION, "red")]
    assert Needle(OTHER_COLOUR, "star").questions == [(SHAPE_QUESTION, "star")]


def test_chance_is_that_of_a_guess_at_each_question():
    assert pytest.approx((1 / 8 + 1 / 6) / 2) == CHANCE


def test_each_colour_has_one_held_out_combination():
    assert sorted(colour for colour, _ in HELD_OUT) == sorted(COLOURS)


def test_training_needles_are_all_but_the_held_out_ones():
    rng = np.random.default_rng(0)
    drawn = {training_needle(rng) for _ in range(5000)}
    named = {needle for needle in drawn if len(needle.questions) == 2}
    assert named == {needle for needle in ALL_NEEDLES if not needle.held_out}


def test_the_middle_of_a_square_has_its_colour_and_the_rim_the_dimmed_background():
    for colour, rgb in COLOURS.items():
        picture = render(Needle(colour, "square"), GREY, split="test", rng=np.random.default_rng(1))
        assert np.abs(picture[16, 16].astype(int) - rgb).max() <= 19  # +-18 and rounding
        assert (picture[0, 0] == 45).all()


def test_test_and_training_bands_do_not_meet():
    rng = np.random.default_rng(2)
    for split, parity in (("train", 0), ("test", 1)):
        for radius, x, y, degrees in (place(split, rng) for _ in range(500)):
            assert (11.2 <= radius <= 12.6) == (parity == 1)
            cells = (np.floor((x + 1.5) / 0.75), np.floor((y + 1.5) / 0.75))
            assert sum(cells) % 2 == parity
            assert np.floor((degrees + 12) / 3) % 2 == parity
            assert max(abs(x), abs(y)) <= 1.5 and abs(degrees) <= 12


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_outline_stays_inside_the_picture(split: Split):
    for shape in OUTLINES:
        assert max(x * x + y * y for _, outline in OUTLINES[shape] for x, y in outline) <= 1.5
    rng = np.random.default_rng(3)
    for shape in SHAPES:
        picture = render(Needle("white", shape), GREY, split=split, rng=rng)
        assert (picture[[0, -1]] < 130).mean() > 0.7, shape


def test_the_picture_follows_from_the_generator():
    a, b = (render(Needle("blue", "ring"), GREY, split="train", rng=np.random.default_rng(4)) for _ in "ab")
    assert (a == b).all()


def test_larger_pictures_are_the_same_needle():
    large = np.full((128, 128, 3), 100, dtype=np.uint8)
    small, big = (
        render(Needle("green", "star"), background, split="test", rng=np.random.default_rng(5)).astype(float)
        for background in (GREY, large)
    )
    shrunk = big.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small).mean() < 3  # only the edges differ, by how they are sampled


@pytest.mark.parametrize("colour, shape", [("mauve", "star"), ("red", "blob")])
def test_unknown_names_are_refused(colour: str, shape: str):
    with pytest.raises(ValueError, match=r"'(mauve|blob)'"):
        Needle(colour, shape)
