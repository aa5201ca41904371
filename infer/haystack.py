"""Haystacks: frames that look natural, from photographs or from the user's own video, and mp4 files of them.

A photograph becomes film by panning and zooming: segments of 8 to 32 frames, each a smooth path over one picture.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Protocol

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image
from torch.nn import functional as F

from ..model.media import probe, read_frames
from .needle_images import HELD_OUT_NEEDLES, SEEN_NEEDLES, Needle, Split, render

# Photographs in the wheels of scikit-image and matplotlib. matplotlib ships a single one.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "chelsea.png",
    "coins.png",
    "grace_hopper.jpg",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
)
UNSEEN_PHOTOGRAPHS = ("camera.png", "coffee.png", "grass.png", "rocket.jpg")


class Source(Protocol):
    def frames(self, num_frames: int, rng: np.random.Generator) -> np.ndarray:
        """uint8 [num_frames, size, size, 3]"""
        ...


@dataclass(frozen=True, eq=False)
class Photographs:
    """Frames by panning and zooming over still pictures, which differ at every call.

    augment: the share of segments that are flipped, turned, recoloured or inverted (for training).
    """

    names: Sequence[str] = PHOTOGRAPHS
    size: int = 32
    augment: float = 0.0

    @cached_property
    def pyramids(self) -> list[list[torch.Tensor]]:
        """For each photograph its halvings, float32 [1, 3, H, W] in 0..255, down to twice the frame's size."""
        return [_pyramid(_photograph(name), self.size) for name in self.names]

    def frames(self, num_frames: int, rng: np.random.Generator) -> np.ndarray:
        segments, missing = [], num_frames
        while missing:
            length = min(int(rng.integers(8, 33)), missing)
            segment = self._segment(length, rng)
            segments.append(_augmented(segment, rng) if rng.random() < self.augment else segment)
            missing -= length
        return np.concatenate(segments)

    def _segment(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """One path of a square window, whose centre and side move smoothly."""
        pyramid = self.pyramids[rng.integers(len(self.pyramids))]
        height, width = pyramid[0].shape[2:]
        shortest = min(height, width)
        sides = shortest * np.exp(rng.uniform(np.log(0.2), np.log(0.95), 2))
        ends = rng.uniform(0, 1, (2, 2))
        pace = 0.5 - 0.5 * np.cos(np.pi * np.linspace(0, 1, length + 2)[1:-1])
        side = sides[0] + (sides[1] - sides[0]) * pace
        x = (ends[0, 0] + (ends[1, 0] - ends[0, 0]) * pace) * (width - side)
        y = (ends[0, 1] + (ends[1, 1] - ends[0, 1]) * pace) * (height - side)
        level = min(max(int(np.log2(side.min() / self.size)), 0), len(pyramid) - 1)
        return _crop(pyramid[level], x / width, y / height, side / width, side / height, self.size)


@dataclass(frozen=True, eq=False)
class VideoFile:
    """Consecutive frames of the user's own video from a random place on, and from its start again at its end.

    The video is decoded once, at most `max_frames` frames of it, spread over its whole length.
    """

    path: Path
    size: int = 32
    max_frames: int = 2048

    @cached_property
    def pixels(self) -> np.ndarray:
        """uint8 [n, size, size, 3]"""
        available = probe(self.path).num_frames
        indices = np.linspace(0, available - 1, min(available, self.max_frames)).round().astype(int)
        return read_frames(self.path, indices.tolist(), size=self.size).permute(0, 2, 3, 1).contiguous().numpy()

    def frames(self, num_frames: int, rng: np.random.Generator) -> np.ndarray:
        start = rng.integers(len(self.pixels))
        return self.pixels[(start + np.arange(num_frames)) % len(self.pixels)]


@dataclass(frozen=True)
class Clip:
    """A haystack of `num_frames` frames with a needle, if any, as frame `position`; an image is a clip of one frame.

    name: its file's, .mp4 or .png. key: what its pixels are drawn from, so that it does not matter which rank does.
    """

    name: str
    num_frames: int
    position: int
    needle: Needle | None
    split: Split
    key: tuple[int, ...]

    def pixels(self, source: Source, *, control: bool = False) -> np.ndarray:
        """uint8 [num_frames, size, size, 3]; in a control the needle's frame is left as the haystack has it."""
        rng = np.random.default_rng(self.key)
        frames = source.frames(self.num_frames, rng)
        if self.needle is not None and not control:
            background = frames[self.position]
            frames[self.position] = render(self.needle, background, split=self.split, rng=rng)
        return frames


def plan_trials(
    frames: Sequence[int], depths: Sequence[float], *, needles: int, seed: int, held_out: bool = True
) -> list[Clip]:
    """Test clips, `needles` for each cell, in the order [frames, depths, needles], the needle at int(depth x frames).

    With `held_out` every second needle is a combination that no training image shows. A cell's clips do not depend
    on the other cells. Raises ValueError for no frames or needles, or a depth outside 0..1.
    """
    for count in (*frames, needles):
        if count < 1:
            raise ValueError(f"frames and needles must be at least 1, not {count}")
    trials = []
    for count, depth in product(frames, depths):
        if not 0 <= depth <= 1:
            raise ValueError(f"depth {depth} is not between 0 and 1")
        key = (seed, count, round(depth * 10**6))
        rng = np.random.default_rng(key)
        seen, unseen = rng.permutation(len(SEEN_NEEDLES)), rng.permutation(len(HELD_OUT_NEEDLES))
        for index in range(needles):
            if held_out and index % 2:
                needle = HELD_OUT_NEEDLES[unseen[index // 2 % len(unseen)]]
            else:
                needle = SEEN_NEEDLES[seen[index % len(seen)]]
            position = min(int(depth * count), count - 1)
            name = f"frames{count}-depth{depth:g}-{index}.mp4"
            trials.append(Clip(name, count, position, needle, "test", (*key, index)))
    return trials


def write_clips(folder: Path, clips: Iterable[Clip], *, source: Source, control: bool = False) -> None:
    """Writes each clip's file below `folder`, the needle encoded inside it unless `control`."""
    folder.mkdir(parents=True, exist_ok=True)
    for clip in clips:
        pixels = clip.pixels(source, control=control)
        if clip.name.endswith(".png"):
            Image.fromarray(pixels[0]).save(folder / clip.name)
        else:
            write_video(folder / clip.name, pixels)


def write_video(path: Path, frames: np.ndarray, *, fps: int = 8, crf: int = 18) -> None:
    """Encodes uint8 [n, height, width, 3] as an H.264 mp4."""
    num_frames, height, width = frames.shape[:3]
    reformatter = VideoReformatter()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": str(crf), "preset": "ultrafast"}
        stream.codec_context.thread_count = 1  # with threads, opening the encoder takes 5 ms
        for index in range(num_frames):
            rgb = av.VideoFrame.from_ndarray(frames[index], format="rgb24")
            container.mux(stream.encode(reformatter.reformat(rgb, format="yuv420p")))
        container.mux(stream.encode())


def _photograph(name: str) -> np.ndarray:
    """uint8 [H, W, 3] of a photograph in the wheels."""
    if name == "grace_hopper.jpg":
        path = files("matplotlib") / "mpl-data" / "sample_data" / name
    else:
        path = files("skimage") / "data" / name
    with path.open("rb") as file:
        return np.asarray(Image.open(file).convert("RGB"))


def _pyramid(picture: np.ndarray, size: int) -> list[torch.Tensor]:
    levels = [torch.tensor(picture).permute(2, 0, 1)[None].float()]
    while min(levels[-1].shape[2:]) >= 4 * size:
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels


def _crop(
    picture: torch.Tensor, x: np.ndarray, y: np.ndarray, width: np.ndarray, height: np.ndarray, size: int
) -> np.ndarray:
    """Windows of `picture` (x, y, width, height float [n], as shares of it), uint8 [n, size, size, 3]."""
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    across = 2 * (torch.tensor(x)[:, None] + torch.tensor(width)[:, None] * centres) - 1
    down = 2 * (torch.tensor(y)[:, None] + torch.tensor(height)[:, None] * centres) - 1
    shape = (len(x), size, size)
    grid = torch.stack([across[:, None, :].expand(shape), down[:, :, None].expand(shape)], dim=-1)
    flat = grid.view(1, len(x) * size, size, 2).float()
    sampled = F.grid_sample(picture, flat, padding_mode="border", align_corners=False)
    return sampled[0].permute(1, 2, 0).reshape(*shape, 3).round().to(torch.uint8).numpy()


def _augmented(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same random turn and recolouring for all frames of a segment, uint8 [n, size, size, 3]."""
    if rng.random() < 0.5:
        frames = frames[:, :, ::-1]
    if rng.random() < 0.5:
        frames = frames.swapaxes(1, 2)
    frames = frames[..., rng.permutation(3)]
    if rng.random() < 0.25:
        frames = 255 - frames
    gain = rng.uniform(0.6, 1.3, 3).astype(np.float32)
    return np.clip(frames * gain, 0, 255).astype(np.uint8)
