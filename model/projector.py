"""The projector: 2 x 2 patches become one visual token (VILA's `mlp_downsample`).

Parameter names are the published ones, `layers.{1,2,4}`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


class SpaceToDepth(nn.Module):
    """Joins the channels of 2 x 2 patches.

    Channels come row by row within the square, but tokens come column by column: so the published weights and
    language models have it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, grid * grid, C] -> [N, ceil(grid / 2) ** 2, 4 C]; zeros make an odd grid even, 27 to 28."""
        grid = round(x.shape[1] ** 0.5)
        x = x.unflatten(1, (grid, grid))
        x = F.pad(x, (0, 0, 0, grid % 2, 0, grid % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [N, rows, 2, columns, 2, C]
        return x.permute(0, 3, 1, 2, 4, 5).flatten(3).flatten(1, 2)


class Projector(nn.Module):
    """Patch features to the language model's embedding space."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        merged, hidden = 4 * config.vision.hidden_size, config.language.hidden_size
        self.layers = nn.Sequential(
            SpaceToDepth(),
            nn.LayerNorm(merged),
            nn.Linear(merged, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
        )

    def forward(self, features: Tensor) -> Tensor:
        """[N, patches, C] -> [N, tokens_per_frame, C of the language model]; N may be 0."""
        return self.layers(features)
