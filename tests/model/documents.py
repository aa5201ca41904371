"""Tokenised samples with random frames, as a model is trained on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS_PER_FRAME, IMAGE_SIZE = 4, 16
IMAGE_TOKEN = 4


@dataclass(frozen=True, eq=False)
class Document:
    """input_ids int64 [T], loss_weight float32 [T], frame_starts int64 [n], pixels float32 [n, 3, size, size]."""

    input_ids: Tensor
    loss_weight: Tensor
    frame_starts: Tensor
    pixels: Tensor


def make_document(videos: Sequence[int], *, seed: int, num_answer: int = 4) -> Document:
    """Videos of so many frames each, text before and after each, and an answer, whose tokens weigh 0.5 to 1.5."""
    generator = torch.Generator().manual_seed(seed)
    pieces, starts = [], []

    def text() -> None:
        length = int(torch.randint(1, 9, (), generator=generator))
        pieces.append(torch.randint(8, 64, (length,), generator=generator))

    text()
    for num_frames in videos:
        begin = sum(map(len, pieces))
        starts += range(begin, begin + num_frames * TOKENS_PER_FRAME, TOKENS_PER_FRAME)
        pieces.append(torch.full((num_frames * TOKENS_PER_FRAME,), IMAGE_TOKEN))
        text()
    pieces.append(torch.randint(8, 64, (num_answer,), generator=generator))
    input_ids = torch.cat(pieces)
    weight = torch.zeros(len(input_ids))
    weight[len(input_ids) - num_answer :] = 0.5 + torch.rand(num_answer, generator=generator)
    pixels = torch.randn(len(starts), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return Document(input_ids, weight, torch.tensor(starts, dtype=torch.int64), pixels)
