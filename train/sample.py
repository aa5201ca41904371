"""A tokenised sample: its tokens, and where its pixels are to be read from."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..model.chat import Kind
from ..model.media import Medium


class SampleError(ValueError):
    """A sample that cannot be trained on; the message names file, row and what is wrong. source: file and row."""

    def __init__(self, message: str, *, source: str = "") -> None:
        super().__init__(message)
        self.source = source


@dataclass(frozen=True)
class MediaItem:
    """An image, or the frames to take of a video. indices: of the frames in the file; (0,) for an image."""

    path: Medium
    kind: Kind
    indices: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens of one row, without pixels.

    input_ids: int64 [T]. loss_weight: float32 [T], weight of predicting each token. source: file and row.
    frame_starts: int64 [num_frames], index of each frame's first visual token, in the order of `media`.
    cu_seqlens: int64 [num_documents + 1]; tokens of different documents do not see each other.
    """

    input_ids: Tensor
    loss_weight: Tensor
    frame_starts: Tensor
    cu_seqlens: Tensor
    source: str
    media: tuple[MediaItem, ...] = ()

    def documents(self) -> list["Sample"]:
        """The documents of a pack, each a sample of its own; a conversation is one."""
        if len(self.cu_seqlens) == 2:
            return [self]
        assert not self.media, "packs are of text"
        return [
            Sample(
                self.input_ids[start:end],
                self.loss_weight[start:end],
                self.frame_starts,
                cu_seqlens=torch.tensor([0, end - start]),
                source=self.source,
            )
            for start, end in pairwise(self.cu_seqlens.tolist())
        ]
