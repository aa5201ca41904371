"""What a vision encoder of Transformers is given, cut into pieces that do not see each other, by family of models.

A family says, of its images and of its videos: the pieces, what the encoder takes for some of them, and how many
feature rows each has. Its feature rows, in order, are its image tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}  # a model's arguments


@dataclass(frozen=True)
class Pieces:
    """costs: float [pieces], of encoding each. rows: feature rows of each; None: all have the same number.

    take: the pixels of some pieces, and the encoder's other arguments for them.
    trim: rows [n, C] that the encoder has of some pieces, without those that are nobody's tokens.
    """

    costs: Tensor
    take: Callable[[slice], tuple[Tensor, dict[str, Any]]]
    rows: tuple[int, ...] | None = None
    trim: Callable[[Tensor, slice], Tensor] = lambda rows, pieces: rows


class Family(Protocol):
    """base: a model without its head; arguments: what it was called with, by name."""

    kinds: tuple[str, ...]

    def pieces(self, base: Any, kind: str, arguments: dict[str, Any]) -> Pieces: ...

    def blank(self, base: Any) -> tuple[Tensor, dict[str, Any]]:
        """What get_image_features takes for the least image that goes through all of the encoder."""
        ...


class Images:
    """Images [images, 3, H, W] that have as many rows each."""

    kinds: tuple[str, ...] = ("image",)

    def pieces(self, base: Any, kind: str, arguments: dict[str, Any]) -> Pieces:
        pixels = arguments[PIXELS[kind]]
        return Pieces(torch.ones(len(pixels)), take=lambda images: (pixels[images], {}))

    def blank(self, base: Any) -> tuple[Tensor, dict[str, Any]]:
        return torch.zeros(1, *_image_shape(base)), {}


class Grids:
    """Patches [n, values] of images and videos of grid_thw [images, 3], whose frames are encoded each by itself."""

    kinds: tuple[str, ...] = ("image", "video")

    def pieces(self, base: Any, kind: str, arguments: dict[str, Any]) -> Pieces:
        pixels, grid = arguments[PIXELS[kind]], arguments[f"{kind}_grid_thw"]
        frames = grid.repeat_interleave(grid[:, 0], 0)
        frames[:, 0] = 1
        sizes = frames.prod(1).cpu()
        ends = [0, *accumulate(sizes.tolist())]
        return Pieces(
            sizes * (sizes + _linear_cost(base.visual)),
            rows=tuple((sizes // base.visual.spatial_merge_size**2).tolist()),
            take=lambda some: (pixels[ends[some.start] : ends[some.stop]], {f"{kind}_grid_thw": frames[some]}),
        )

    def blank(self, base: Any) -> tuple[Tensor, dict[str, Any]]:
        side, patches = base.visual.spatial_merge_size, base.visual.patch_embed.proj
        values = patches.in_channels * math.prod(patches.kernel_size)
        return torch.zeros(side * side, values), {"image_grid_thw": torch.tensor([[1, side, side]])}


class Crops:
    """LLaVA-OneVision: images in several crops, whose features are packed with newlines, and videos [B, F, 3, H, W].

    Images of a sample with several are not cropped: of such samples two or three make a piece, as one would be cropped.
    Frames are encoded as videos of one frame, whose last row is the newline that only a whole video ends with.
    """

    kinds: tuple[str, ...] = ("image", "video")

    def pieces(self, base: Any, kind: str, arguments: dict[str, Any]) -> Pieces:
        return (self._images if kind == "image" else self._frames)(base, arguments)

    def _images(self, base: Any, arguments: dict[str, Any]) -> Pieces:
        from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches  # slow

        config, pixels, sizes = base.config, arguments["pixel_values"], arguments["image_sizes"]
        per_sample = arguments.get("batch_num_images")
        counts = [1] * len(sizes) if per_sample is None else [m for n in map(int, per_sample) for m in _units(n)]
        images = [0, *accumulate(counts)]
        crops = [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            if n == 1
            else 1
            for n, first in zip(counts, images, strict=False)
            for size in sizes[first : first + n].tolist()
        ]
        ends = [0, *accumulate(crops)]
        packed, _ = base.pack_image_features(
            [torch.zeros(n, _side(base) ** 2, 1) for n in crops],
            sizes.cpu(),
            image_newline=torch.zeros(1),
            vision_aspect_ratio=arguments.get("vision_aspect_ratio") or config.vision_aspect_ratio,
        )
        rows = [len(image) for image in packed]

        def take(some: slice) -> tuple[Tensor, dict[str, Any]]:
            first, last = images[some.start], images[some.stop]
            mine = pixels[first:last] if pixels.dim() == 5 else pixels[ends[first] : ends[last]]
            return mine, {"image_sizes": sizes[first:last], "batch_num_images": counts[some]}

        def per_piece(values: list[int]) -> list[int]:
            return [sum(values[a:b]) for a, b in pairwise(images)]

        return Pieces(torch.tensor(per_piece(crops)), rows=tuple(per_piece(rows)), take=take)

    def _frames(self, base: Any, arguments: dict[str, Any]) -> Pieces:
        videos = arguments["pixel_values_videos"]
        pixels, pooled = videos.flatten(0, 1)[:, None], math.ceil(_side(base) / 2) ** 2
        ends_video = torch.arange(len(pixels)) % videos.shape[1] == videos.shape[1] - 1

        def trim(rows: Tensor, some: slice) -> Tensor:
            ends = ends_video[some].to(rows.device)
            frames = rows.unflatten(0, (len(ends), -1))
            if frames.shape[1] == pooled:  # in older Transformers the model adds the newline
                newline = base.image_newline.to(rows).expand(len(ends), 1, -1)
                frames = torch.cat([frames, newline], 1)
            kept = torch.ones(frames.shape[:2], dtype=torch.bool, device=rows.device)
            kept[:, -1] = ends
            return frames[kept]

        return Pieces(
            torch.ones(len(pixels)),
            rows=tuple((pooled + ends_video.int()).tolist()),
            take=lambda some: (pixels[some], {}),
            trim=trim,
        )

    def blank(self, base: Any) -> tuple[Tensor, dict[str, Any]]:
        shape = _image_shape(base)
        sizes = torch.tensor([shape[1:]] * 2)
        return torch.zeros(2, 1, *shape), {"image_sizes": sizes, "batch_num_images": [2]}


# By model_type.
FAMILIES: dict[str, Family] = {
    "llava": Images(),
    "internvl": Images(),
    "gemma3": Images(),
    "qwen2_vl": Grids(),
    "qwen2_5_vl": Grids(),
    "qwen3_vl": Grids(),
    "qwen3_vl_moe": Grids(),
    "llava_onevision": Crops(),
}


def feature_rows(features: Any) -> Tensor:
    """Rows [n, C] of features [..., C], or of one such tensor for each image."""
    return features.flatten(0, -2) if isinstance(features, Tensor) else torch.cat(list(features))


def _units(images: int) -> list[int]:
    """The images of one sample in twos, the last ones in two or three; one by itself."""
    return [2] * (images // 2 - 1) + [2 + images % 2] if images > 1 else [1] * images


def _image_shape(base: Any) -> tuple[int, int, int]:
    config = base.config.vision_config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.num_channels, height, width


def _side(base: Any) -> int:
    """Patches along a crop."""
    return base.config.vision_config.image_size // base.config.vision_config.patch_size


def _linear_cost(visual: Any) -> float:
    """The patches whose attention costs a patch as much as its linear layers."""
    width = getattr(visual.config, "embed_dim", visual.config.hidden_size)
    return 2 * width + 1.5 * getattr(visual.config, "intermediate_size", 4 * width)
