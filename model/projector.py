"""The projector: squares of patches become visual tokens (VILA's `mlp_downsample` and its kin).

Parameter names are the published ones, `layers.{1,2,4}`, and `layers.{1,2,4,5,7}` of the 3 x 3 kind.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


class SpaceToDepth(nn.Module):
    """Joins the channels of `side` x `side` patches, row by row within the square.

    The tokens come row by row, or `by_columns`: published weights know them in one order alone.
    """

    def __init__(self, side: int, *, by_columns: bool) -> None:
        super().__init__()
        self.side = side
        self.order = (0, 3, 1, 2, 4, 5) if by_columns else (0, 1, 3, 2, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, grid ** 2, C] -> [N, ceil(grid / side) ** 2, side ** 2 C]; zeros fill up the squares, 27 to 28."""
        grid = round(x.shape[1] ** 0.5)
        missing = -grid % self.side
        x = x.unflatten(1, (grid, grid))
        x = F.pad(x, (0, 0, 0, missing, 0, missing))
        x = x.unflatten(2, (-1, self.side)).unflatten(1, (-1, self.side))  # [N, rows, side, columns, side, C]
        return x.permute(self.order).flatten(3).flatten(1, 2)


class Projector(nn.Module):
    """Patch features to the language model's embedding space."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        side, vision, hidden = config.projector.side, config.vision.hidden_size, config.language.hidden_size
        merged = side**2 * vision
        layers = [
            SpaceToDepth(side, by_columns=config.projector.by_columns),
            nn.LayerNorm(merged),
        ]
        if side == 3:  # 9 C channels come down by way of 3 C
            layers += [nn.Linear(merged, side * vision), nn.GELU(), nn.LayerNorm(side * vision)]
            merged = side * vision
        layers += [nn.Linear(merged, hidden), nn.GELU(), nn.Linear(hidden, hidden)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """[N, patches, C] -> [N, tokens_per_frame, C of the language model]; N may be 0."""
        return self.layers(features)
