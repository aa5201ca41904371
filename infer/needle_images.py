"""Needles: coloured shapes on a dimmed picture, and the questions that only a frame with one can answer.

Training and test renderings of the same needle differ: they take alternate bands of radius, offset and rotation.
"""

from dataclasses import dataclass
from math import cos, pi, sin
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "test"]
Point = tuple[float, float]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 220, 50),
    "cyan": (50, 215, 225),
    "pink": (240, 110, 200),
    "orange": (240, 140, 30),
    "white": (236, 236, 236),
}
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
OTHER_COLOUR = "other"
OTHER_SHAPES = ("diamond", "hexagon", "bar", "crescent", "arrow", "hourglass")
HELD_OUT = (
    ("red", "circle"),
    ("green", "ring"),
    ("blue", "star"),
    ("yellow", "triangle"),
    ("cyan", "square"),
    ("pink", "cross"),
    ("orange", "ring"),
    ("white", "triangle"),
)
COLOUR_QUESTION = "what colour is the shape ?"
SHAPE_QUESTION = "which shape is it ?"
CHANCE = (1 / len(COLOURS) + 1 / len(SHAPES)) / 2


@dataclass(frozen=True)
class Needle:
    """A coloured shape. `colour` is a name of COLOURS or OTHER_COLOUR, `shape` one of SHAPES or OTHER_SHAPES."""

    colour: str
    shape: str

    def __post_init__(self) -> None:
        if self.colour not in COLOURS and self.colour != OTHER_COLOUR:
            raise ValueError(f"colour {self.colour!r} is none of {[*COLOURS, OTHER_COLOUR]}")
        if self.shape not in SHAPES + OTHER_SHAPES:
            raise ValueError(f"shape {self.shape!r} is none of {[*SHAPES, *OTHER_SHAPES]}")

    @property
    def questions(self) -> list[tuple[str, str]]:
        """(question, answer) pairs; none about a colour or a shape that has no name here."""
        colour = [(COLOUR_QUESTION, self.colour)] if self.colour in COLOURS else []
        shape = [(SHAPE_QUESTION, self.shape)] if self.shape in SHAPES else []
        return colour + shape

    @property
    def held_out(self) -> bool:
        return (self.colour, self.shape) in HELD_OUT


ALL_NEEDLES = tuple(Needle(colour, shape) for colour in COLOURS for shape in SHAPES)
SEEN_NEEDLES = tuple(needle for needle in ALL_NEEDLES if not needle.held_out)
HELD_OUT_NEEDLES = tuple(Needle(*pair) for pair in HELD_OUT)


def training_needle(rng: np.random.Generator, *, others: float = 0.17) -> Needle:
    """A needle for training: never a held-out combination; a share `others` each of unnamed colours and shapes."""
    kind = rng.random()
    if kind < others:
        return Needle(OTHER_COLOUR, str(rng.choice(SHAPES)))
    if kind < 2 * others:
        return Needle(str(rng.choice(list(COLOURS))), str(rng.choice(OTHER_SHAPES)))
    return SEEN_NEEDLES[rng.integers(len(SEEN_NEEDLES))]


def render(needle: Needle, background: np.ndarray, *, split: Split, rng: np.random.Generator) -> np.ndarray:
    """Draws `needle` on a dimmed `background`, uint8 [size, size, 3], 4 x supersampled; returns the like."""
    size = background.shape[0]
    radius, x, y, degrees = place(split, rng)
    unit = 4 * size / 32
    turn = degrees * pi / 180

    def to_canvas(point: Point) -> Point:
        across = 16 + x + radius * (point[0] * cos(turn) - point[1] * sin(turn))
        down = 16 + y + radius * (point[0] * sin(turn) + point[1] * cos(turn))
        return unit * across, unit * down

    mask = Image.new("L", (4 * size, 4 * size))
    draw = ImageDraw.Draw(mask)
    for fill, outline in OUTLINES[needle.shape]:
        draw.polygon([to_canvas(point) for point in outline], fill=fill)
    alpha = np.asarray(mask.reduce(4), dtype=np.float32)[..., None] / 255
    blend = alpha * _pigment(needle.colour, rng) + (1 - alpha) * 0.45 * background
    return blend.round().astype(np.uint8)


def place(split: Split, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Radius, offset across and down (in 32nds of the picture) and rotation in degrees, from the split's bands."""
    test = split == "test"
    if test:
        radius = rng.uniform(11.2, 12.6)
    else:
        radius = rng.uniform(10, 11.2) if rng.random() < 1.2 / 2.6 else rng.uniform(12.6, 14)
    column, row = rng.integers(4), rng.integers(2)
    cell = (column, 2 * row + (column + test) % 2)  # a checkerboard: black cells train, white ones test
    x, y = ((index + rng.random()) * 0.75 - 1.5 for index in cell)
    band = 2 * rng.integers(4) + test
    return radius, x, y, (band + rng.random()) * 3 - 12


def _pigment(colour: str, rng: np.random.Generator) -> np.ndarray:
    """RGB, float64 [3]: a named colour +- 18, or one that is far from all named ones."""
    if colour in COLOURS:
        return np.clip(COLOURS[colour] + rng.uniform(-18, 18, 3), 0, 255)
    named = np.array(list(COLOURS.values()))
    while True:
        candidate = rng.uniform(0, 255, 3)
        if candidate.max() > 90 and np.abs(named - candidate).max(axis=1).min() > 60:
            return candidate


def _regular(corners: int, *, start: float = -pi / 2, radius: float = 1.0) -> list[Point]:
    angles = [start + 2 * pi * corner / corners for corner in range(corners)]
    return [(radius * cos(angle), radius * sin(angle)) for angle in angles]


def _star() -> list[Point]:
    outer, inner = _regular(5), _regular(5, start=-pi / 2 + pi / 5, radius=0.42)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _box(across: float, down: float) -> list[Point]:
    return [(-across, -down), (across, -down), (across, down), (-across, down)]


def _shifted(outline: list[Point], across: float) -> list[Point]:
    return [(x + across, y) for x, y in outline]


# Each shape is a few polygons within the unit circle, drawn in order: 255 paints, 0 cuts out.
OUTLINES: dict[str, list[tuple[int, list[Point]]]] = {
    "circle": [(255, _regular(40, radius=0.9))],
    "square": [(255, _box(0.78, 0.78))],
    "triangle": [(255, _regular(3))],
    "cross": [(255, _box(0.95, 0.3)), (255, _box(0.3, 0.95))],
    "star": [(255, _star())],
    "ring": [(255, _regular(40, radius=0.95)), (0, _regular(40, radius=0.55))],
    "diamond": [(255, [(0, -1), (0.65, 0), (0, 1), (-0.65, 0)])],
    "hexagon": [(255, _regular(6, radius=0.95))],
    "bar": [(255, _box(0.95, 0.3))],
    "crescent": [(255, _regular(40, radius=0.95)), (0, _shifted(_regular(40, radius=0.8), 0.4))],
    "arrow": [(255, [(0, -1), (0.8, -0.1), (-0.8, -0.1)]), (255, _box(0.25, 0.9))],
    "hourglass": [(255, [(-0.8, -0.9), (0.8, -0.9), (-0.8, 0.9), (0.8, 0.9)])],
}
