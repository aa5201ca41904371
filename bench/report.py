"""The demo's report: one picture, and one self-contained page with every number and what it stands for."""

import base64
from collections.abc import Iterator, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.transforms import Bbox

from ..infer.heatmap import INK, draw_grid

STAGE_NAMES = {
    "0": "stand-in for pretrained weights",
    "1": "alignment",
    "2": "pre-training",
    "3": "short fine-tuning",
    "4": "context extension",
    "5": "long fine-tuning",
}
FAINT, LINE = "#7b8794", "#0b6a62"


def write_report(report: dict[str, Any], out_dir: str | Path) -> None:
    """Writes report.png and report.html into `out_dir` from what report.json holds.

    needle: "short", "long" and perhaps "unseen", each a grid; stages: by number, "0" with losses of "vision" and
    "text"; parity: by number of ranks; seconds, peak_rss_gib, versions.
    """
    folder = Path(out_dir)
    picture = BytesIO()
    draw_report(report).savefig(picture, format="png", dpi=140)
    (folder / "report.png").write_bytes(picture.getvalue())
    (folder / "report.html").write_text(_page(report, picture.getvalue()), encoding="utf-8")


def draw_report(report: dict[str, Any]) -> Figure:
    """Both grids side by side; below them the controls, the unseen photographs, parity and the loss curves."""
    figure = Figure(figsize=(12, 9.2), facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)  # type: ignore[union-attr]
    rows = GridSpec(3, 1, figure, height_ratios=[4.2, 2.7, 2.3])
    top, middle, bottom = (figure.add_subfigure(rows[index]) for index in range(3))
    needle, stages = report["needle"], report["stages"]

    axes = top.subplots(1, 2)
    titles = ("short model, after stage 3", "long model, after stage 5")
    for ax, name, title, stage in zip(axes, ("short", "long"), titles, ("3", "5"), strict=True):
        _draw(ax, needle[name], title=title, trained=stages.get(stage, {}).get("max_frames"))
    bar = top.colorbar(axes[0].images[0], ax=axes, fraction=0.025, pad=0.01, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.set_yticklabels(["0 %", "25", "50", "75", "100"])
    bar.ax.axhline(needle["long"]["chance"], color=INK, linewidth=1.5)
    bar.ax.set_title("line: chance", fontsize=8, color=INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    top.suptitle("Needle in a video: right answers, in %", fontsize=14, color=INK, fontweight="bold")

    axes = middle.subplots(1, 4, gridspec_kw={"width_ratios": [1, 1, 1, 0.9]})
    for ax, name in zip(axes, ("short", "long"), strict=False):
        title = f"control, {name} model:\nthe needle's frame left out"
        _draw(ax, needle[name], "control", title=title, small=True)
    if "unseen" in needle:
        title = "long model, photographs\nnever seen in training"
        _draw(axes[2], needle["unseen"], title=title, small=True)
    else:
        axes[2].axis("off")
    _draw_parity(axes[3], report["parity"])

    curves = list(loss_curves(stages))
    for ax, (title, losses) in zip(bottom.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        _draw_losses(ax, title, losses)
    return figure


def _draw(ax: Axes, grid: dict[str, Any], key: str = "accuracy", **style: Any) -> None:
    draw_grid(ax, grid["frames"], grid["depths"], grid[key], **style)


def loss_curves(stages: dict[str, Any]) -> Iterator[tuple[str, Sequence[float]]]:
    """(title, losses) of every stage, in order; stage 0 has one for each of its parts."""
    for number in sorted(stages):
        losses = stages[number]["losses"]
        if isinstance(losses, dict):
            yield from ((f"stage {number}\n{part}", values) for part, values in losses.items())
        else:
            yield f"stage {number}\n{STAGE_NAMES[number]}", losses


def _draw_losses(ax: Axes, title: str, losses: Sequence[float]) -> None:
    steps, width = np.arange(1, len(losses) + 1), max(1, len(losses) // 20)
    ax.plot(steps, losses, color=LINE, alpha=0.3, linewidth=0.8)
    if len(losses) > 2 * width:
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        ax.plot(steps[width - 1 :], smooth, color=LINE, linewidth=1.6)
    ax.set_ylim(0, 1.1 * float(np.max(losses)) if len(losses) else 1)
    ax.set_title(title, fontsize=9, color=INK)
    ax.set_xlabel("step", fontsize=8, color=INK)
    ax.tick_params(labelsize=8, labelcolor=INK, color=FAINT)
    ax.locator_params(nbins=3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)


def _draw_parity(ax: Axes, parity: dict[str, dict[str, float]]) -> None:
    rows = _parity_rows(parity)
    ax.axis("off")
    ax.set_title("the same batch on\n1 rank and on more", fontsize=9, color=INK)
    table = ax.table(rows[1:], colLabels=rows[0], bbox=Bbox.from_bounds(-0.02, 0.3, 1.04, 0.62), cellLoc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    for cell in table.get_celld().values():
        cell.set_edgecolor("#d5dbe0")
        cell.get_text().set_color(INK)


def _parity_rows(parity: dict[str, dict[str, float]]) -> list[list[str]]:
    """A table: ranks, loss and gradient norm, and their relative difference to one rank."""
    one = parity["1"]
    rows = [["ranks", "loss", "grad norm"]]
    for ranks in sorted(parity, key=int):
        rows.append([ranks, f"{parity[ranks]['loss']:.6f}", f"{parity[ranks]['grad_norm']:.6f}"])
    for ranks in sorted(parity.keys() - {"1"}, key=int):
        gaps = [abs(parity[ranks][key] / one[key] - 1) for key in ("loss", "grad_norm")]
        rows.append(["relative\ndifference", *(f"{gap:.1e}" for gap in gaps)])
    return rows


PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>longtake demo</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #22303c; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2em; border-bottom: 1px solid #d5dbe0 }
img { width: 100% } table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding-bottom: .3em }
th, td { padding: .25em .8em; border: 1px solid #d5dbe0; text-align: right } th { background: #f4f6f7 }
</style>
<h1>longtake demo</h1>
<p>$summary</p>
<img alt="needle grids, controls, parity and loss curves" src="data:image/png;base64,$picture">
<h2>What is measured</h2>
$notes
<h2>Needle grids</h2>
$grids
<h2>Training</h2>
$training
<h2>One rank against several</h2>
$parity
<h2>Where it ran</h2>
$versions
</html>
""")

NOTES = """<ul>
<li>A needle is a coloured shape (8 colours, 6 shapes) in a single frame of an H.264 video, at
int(depth x frames). Two questions are put, each on its own: <q>what colour is the shape ?</q> and <q>which shape
is it ?</q> A hit is the right answer, generated greedily, and the end token after it. Guessing reaches $chance %.</li>
<li>All evaluation videos and all renderings of their needles (radius, offset, rotation) are new. Half of the needles
are among 8 combinations of colour and shape that no image or video of stages 1 to 5 shows; stage 0, which stands for
pretraining, and the text documents know them.</li>
<li>Training and evaluation film the same photographs, on other paths of the camera (with --video: they take frames
of the same video). The grid of unseen photographs uses ones that no training picture shows.</li>
<li>In the control the needle's frame is left out, the questions stay: what is right there is luck.</li>
<li>The model is tiny and made here: stage 0 stands for the pretrained vision tower and language model that LongVILA
starts from. Stages 1 to 5 are LongVILA's, each loading the checkpoint of the one before.</li>
<li>Stage 4 trains on packed text alone. Its documents hold a sentence that questions at their end ask for.</li>
</ul>"""


def _page(report: dict[str, Any], picture: bytes) -> str:
    needle = report["needle"]
    mean = {name: f"{100 * np.mean(needle[name]['accuracy']):.1f} %" for name in ("short", "long")}
    grids = [
        _grid_table(name, needle[name], key)
        for name in needle
        for key in ("accuracy", "control")
        if needle[name].get(key)
    ]
    return PAGE.substitute(
        summary=f"Right answers: short model {mean['short']}, long model {mean['long']}. The run took "
        f"{report['seconds']:.0f} seconds; all ranks together used at most {report['peak_rss_gib']:.1f} GiB.",
        picture=base64.b64encode(picture).decode(),
        notes=Template(NOTES).substitute(chance=f"{100 * needle['long']['chance']:.1f}"),
        grids="\n".join(grids),
        training=_table(_stage_rows(report["stages"]), "losses are means of five steps"),
        parity=_table(_parity_rows(report["parity"]), "the same batch"),
        versions=_table([["", "version"], *report["versions"].items()], ""),
    )


def _stage_rows(stages: dict[str, Any]) -> list[list[object]]:
    rows: list[list[object]] = [
        ["stage", "", "steps", "seconds", "longest video, frames", "longest sample, tokens", "loss: first", "last"]
    ]
    for number, stage in sorted(stages.items()):
        losses = stage["losses"]
        parts = losses if isinstance(losses, dict) else {STAGE_NAMES[number]: losses}
        for name, values in parts.items():
            facts = [len(values), f"{stage['seconds']:.1f}", stage["max_frames"], stage["max_tokens"]]
            rows.append([number, name, *facts, *(f"{np.mean(end):.3f}" for end in (values[:5], values[-5:]))])
    return rows


def _grid_table(name: str, grid: dict[str, Any], key: str) -> str:
    head = ["frames", *(f"depth {depth:g}" for depth in grid["depths"]), "mean"]
    rows = [
        [count, *(f"{value:.3f}" for value in row), f"{np.mean(row):.3f}"]
        for count, row in zip(grid["frames"], grid[key], strict=True)
    ]
    return _table([head, *rows], f"{name}: {key}")


def _table(rows: Sequence[Sequence[object]], caption: str) -> str:
    """An HTML table, whose first row is its head."""
    lines = []
    for index, row in enumerate(rows):
        tag = "td" if index else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row) + "</tr>")
    return f"<table><caption>{escape(caption)}</caption>\n" + "\n".join(lines) + "\n</table>"
