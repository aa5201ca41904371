"""The picture of a needle grid: frames across, depth down, every cell's value in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

COLOURS = LinearSegmentedColormap.from_list("needle", ["#7f3b08", "#d98b3a", "#f6efdc", "#69b8ad", "#0b6a62"])
INK = "#22303c"


class Grid(Protocol):
    """accuracy, control: [frames][depths] in 0..1."""

    @property
    def frames(self) -> Sequence[int]: ...
    @property
    def depths(self) -> Sequence[float]: ...
    @property
    def accuracy(self) -> Sequence[Sequence[float]]: ...
    @property
    def control(self) -> Sequence[Sequence[float]] | None: ...
    @property
    def chance(self) -> float: ...


def plot_grid(grid: Grid, path: str | Path) -> None:
    """Draws a grid, and beside it its control where it has one, into a PNG."""
    parts = {"right answers": grid.accuracy}
    if grid.control is not None:
        parts["the needle's frame left out"] = grid.control
    figure = Figure(figsize=(7 * len(parts), 4.2), facecolor="white", layout="constrained")
    for ax, (title, accuracy) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True):
        draw_grid(ax, grid.frames, grid.depths, accuracy, title=title)
        ax.set_xlabel(f"frames (chance: {100 * grid.chance:.1f} %)", color=INK)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def draw_grid(
    ax: Axes,
    frames: Sequence[int],
    depths: Sequence[float],
    accuracy: Sequence[Sequence[float]],
    *,
    title: str,
    trained: int | None = None,
    small: bool = False,
) -> None:
    """One heatmap. trained: the longest video of the training, marked where the grid goes beyond it."""
    cells = np.array(accuracy, dtype=float).T  # [depths, frames]
    ax.imshow(cells, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(cells):
        ink = "white" if value < 0.25 or value > 0.8 else INK
        ax.text(
            column,
            row,
            f"{100 * value:.0f}",
            ha="center",
            va="center",
            color=ink,
            fontsize=8 if small else 11,
        )
    ax.set_xticks(range(len(frames)), [str(count) for count in frames])
    ax.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    ax.set_xticks(np.arange(len(frames) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(depths) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="both", length=0, labelsize=8 if small else 10, labelcolor=INK)
    ax.spines[:].set_visible(False)
    ax.set_title(f"{title}: mean {100 * cells.mean():.1f} %", fontsize=9 if small else 11, color=INK)
    ax.set_xlabel("frames", fontsize=8 if small else 10, color=INK)
    ax.set_ylabel("depth of the needle", fontsize=8 if small else 10, color=INK)
    edge = sum(count <= (trained or 0) for count in frames) - 0.5
    if trained and edge < len(frames) - 1:
        ax.axvline(edge, color=INK, linewidth=2, linestyle=(0, (2, 1.5)))
        ax.set_xlabel(f"frames (right of the dashes: longer than any in training, {trained})", fontsize=10)
