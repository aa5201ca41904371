"""The vision-language model: tower, projector and language model over one rank's share of a sequence."""

import torch
from torch import Tensor, nn

from .batch import ShardedBatch
from .config import ModelConfig
from .features import FrameRoute, to_owners
from .language import LanguageModel
from .loss import weighted_loss
from .projector import Projector
from .sequence_parallel import planned_attention
from .vision import VisionTower


class VisionLanguageModel(nn.Module):
    """Parameter names are those of the published checkpoint's folders: llm, vision_tower, mm_projector."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision)
        self.mm_projector = Projector(config)
        self.llm = LanguageModel(config.language)

    @property
    def units(self) -> list[nn.Module]:
        """What sharding gathers at a time, in forward's order: the tower, whose passes each rank numbers by itself, and
        a decoder layer.
        """
        return [self.vision_tower, *self.llm.model.layers]

    def embed(self, input_ids: Tensor, pixels: Tensor, frames: FrameRoute) -> Tensor:
        """Embeddings [S_local, C] of this rank's tokens, from its tokens' ids and the frames that it encodes.

        input_ids int64 [S_local]; pixels [frames.last - frames.first, 3, H, W] as the tower takes them, possibly none.
        """
        visual = to_owners(self.mm_projector(self.vision_tower(pixels)), frames)
        text = self.llm.embed(input_ids)
        return text.index_copy(0, frames.slots, visual.to(text.dtype))

    def forward(self, batch: ShardedBatch, pixels: Tensor) -> Tensor:
        """The sum of this rank's weighted token losses, float32 []. Divide by the global weight yourself."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return planned_attention(q, k, v, batch.attention)

        embedded = self.embed(batch.input_ids, pixels, batch.frames)
        hidden = self.llm(embedded, batch.positions, attend)
        return weighted_loss(hidden, batch.targets, batch.weights, self.llm.logits, rows=batch.loss_rows)


def no_pixels(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """The pixels of a rank that encodes no frame."""
    size = config.vision.image_size
    return torch.empty(0, 3, size, size, dtype=torch.uint8, device=device)
