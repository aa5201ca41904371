"""What the picture of a needle grid shows."""

from pathlib import Path

import numpy as np
import pytest
from longtake.infer.heatmap import draw_grid, plot_grid
from longtake.infer.needle import NeedleGrid
from matplotlib.figure import Figure
from PIL import Image

ACCURACY = [[1.0, 0.5], [0.25, 0.0], [0.75, 0.125]]


def test_frames_run_across_and_depth_down_with_every_value_in_its_cell() -> None:
    ax = Figure().subplots()
    draw_grid(ax, [8, 16, 32], [0, 0.5], ACCURACY, title="grid")
    cells = {text.get_position(): text.get_text() for text in ax.texts}
    assert cells == {(0, 0): "100", (0, 1): "50", (1, 0): "25", (1, 1): "0", (2, 0): "75", (2, 1): "12"}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["8", "16", "32"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "0.5"]
    assert "43.8 %" in ax.get_title()


@pytest.mark.parametrize(("trained", "edge"), [(16, 1.5), (8, 0.5), (32, None), (None, None)])
def test_the_longest_trained_video_is_marked_where_the_grid_goes_beyond_it(
    trained: int | None, edge: float | None
) -> None:
    ax = Figure().subplots()
    draw_grid(ax, [8, 16, 32], [0, 0.5], ACCURACY, title="grid", trained=trained)
    assert [np.ravel(line.get_xdata())[0] for line in ax.lines] == ([] if edge is None else [edge])


def test_a_control_stands_beside_its_grid(tmp_path: Path) -> None:
    sizes = []
    for control in (None, ACCURACY):
        grid = NeedleGrid([8, 16, 32], [0, 0.5], ACCURACY, control)
        plot_grid(grid, tmp_path / "new" / "grid.png")
        with Image.open(tmp_path / "new" / "grid.png") as picture:
            sizes.append(picture.size)
    assert sizes[1] == (2 * sizes[0][0], sizes[0][1])
