"""What `longtake bench attention` prints and writes of a GPU: table, goals, JSON and a plot."""

import json
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .attention_gpu import CANARY, Group, Row
from .attention_peers import OTHERS
from .attention_shapes import DIRECTIONS, Shape

LINE = "{:<26} {:<9} {:<20} {:>9} {:>6} {:>8} {:>8} {:>7} {:>8}  {}"
HEADER = LINE.format("shape", "direction", "who", "ms", "+-%", "TFLOP/s", "% cuBLAS", "x peer", "host ms", "").rstrip()
LEGEND = (
    "ms: median of the GPU's time, outputs and gradients allocated by the call; +-%: half the spread, less the fifths\n"
    "at both ends. TFLOP/s: of visible pairs and real head dims. x peer: the best peer's time over this one's.\n"
    "host ms: to launch it. triton: the same bits from the same input; gluon: a backward may sum in an order of chance."
)
COLORS = {
    "triton": "#0b6a62",
    "gluon": "#c2452d",
    "SDPA flash": "#7b8794",
    "SDPA cuDNN": "#22303c",
    "FlexAttention": "#b48a1d",
    "FlashAttention-3": "#6b4fa0",
    "FlashAttention-4": "#2f6fb0",
}


def group_lines(group: Group) -> Iterator[str]:
    """Of the table, the canary's last."""
    for row in group.rows:
        yield row_line(group, row)
    clock, power, heat = group.reading.clock_mhz, group.reading.power_w, group.reading.temperature_c
    known = [(clock, "MHz"), (power, "W"), (heat, "C")]
    note = ", ".join(f"{value:.0f} {unit}" for value, unit in known if value is not None)
    cells = [group.shape.name, group.direction, CANARY, "", "", f"{group.cublas_tflops:.1f}", "", "", "", note]
    yield LINE.format(*cells).rstrip()


def row_line(group: Group, row: Row) -> str:
    cells = [group.shape.name, group.direction, row.contender]
    if row.timing is None or row.tflops is None or row.of_cublas is None:
        return LINE.format(*cells, *"------", row.note).rstrip()
    timing = row.timing
    cells += [f"{timing.ms:.4g}", f"{50 * (timing.high - timing.low) / timing.ms:.1f}", f"{row.tflops:.1f}"]
    cells += [f"{100 * row.of_cublas:.1f}", "-" if row.over_peer is None else f"{row.over_peer:.2f}"]
    note = "" if row.over_plain is None else f"{row.over_plain:.3f} of its plain call"
    return LINE.format(*cells, f"{timing.host_ms:.3f}", note).rstrip()


# Goals


def goals(groups: Sequence[Group]) -> list[str]:
    """What was aimed at, on one H100, and what was reached: medians over the shapes that were measured."""
    lines = []
    for direction in DIRECTIONS:
        for name, least, fits in (
            ("head dim 128", 1.0, lambda shape: shape.head_dim == 128),
            ("head dims 72 and 80", 1.3, lambda shape: shape.head_dim in (72, 80)),
        ):
            ratios = speed_over(groups, direction, "SDPA cuDNN", fits)
            if ratios:
                worst, at = min((ratio, shape) for shape, ratio in ratios.items())
                text = f"{median(ratios.values()):.2f} x cuDNN, least {worst:.2f} at {at}"
                verdict = "reached" if median(ratios.values()) >= least else "missed"
                lines.append(f"{direction}, {name}: {text}; goal {least:.2f}: {verdict}")
        rows = [row for group in groups if group.direction == direction for row in group.rows]
        for backend in ("triton", "gluon"):
            shares = [row.over_plain for row in rows if row.contender == backend and row.over_plain is not None]
            if shares:
                verdict = "reached" if max(shares) <= 1.03 else "missed"
                text = f"up to {max(shares):.3f} of a plain call of the same area"
                lines.append(f"{direction}, zigzag shard, {backend}: {text}; goal 1.03: {verdict}")
    return lines


def speed_over(groups: Sequence[Group], direction: str, peer: str, fits: Callable[[Shape], bool]) -> dict[str, float]:
    """By shape: the peer's time over that of the best of ours, where both were timed."""
    found = {}
    for group in groups:
        times = {row.contender: row.timing.ms for row in group.rows if row.timing is not None}
        ours = [times[row.contender] for row in group.rows if row.kind == "ours" and row.timing is not None]
        if group.direction == direction and fits(group.shape) and ours and peer in times:
            found[group.shape.name] = times[peer] / min(ours)
    return found


# Files


def environment(device: torch.device) -> dict[str, Any]:
    """What was measured on, and with which versions."""
    on_gpu = device.type == "cuda"
    facts = {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else f"none ({platform.machine()})",
        "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "python": platform.python_version(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "longtake commit": commit(Path(__file__).parents[1]),
    }
    peers = ("torch", "triton", "longtake", "flash-attn", "flash-attn-3", "flash-attn-4")
    return facts | {name: _version(name) for name in peers}


def commit(folder: Path) -> str | None:
    """Of the checkout, "-dirty" where something was changed; None where it is none."""
    if not (folder / ".git").exists():
        return None
    return _said_by("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _said_by(*command: str) -> str | None:
    """The first line that a command prints; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def file_for(folder: Path, facts: Mapping[str, Any]) -> Path:
    """<gpu>-<date>.json"""
    name = f"{facts['gpu']}-{facts['date'][:16]}".replace(":", "")
    return folder / f"{re.sub(r'[^0-9A-Za-z.-]+', '-', name).strip('-')}.json"


def write_json(file: Path, facts: Mapping[str, Any], groups: Sequence[Group], **more: Any) -> None:
    """Everything that is known, after each group anew: what breaks off later loses nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    report = dict(facts) | more | {"peers not installed": [name for name in OTHERS if not _seen(name, groups)]}
    report["groups"] = [{"name": group.name} | asdict(group) for group in groups]
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(file)


def _seen(contender: str, groups: Sequence[Group]) -> bool:
    return any(row.contender == contender for group in groups for row in group.rows)


def plot(groups: Sequence[Group], facts: Mapping[str, Any], file: Path) -> None:
    """TFLOP/s of everyone, by shape: forward above backward."""
    names = sorted({group.shape.name for group in groups}, key=_natural)
    figure = Figure(figsize=(max(6.0, 2.5 + 0.3 * len(names)), 9), facecolor="white", layout="constrained")
    kind = "A rehearsal, all made up: " if facts["rehearsal"] else ""
    figure.suptitle(f"{kind}{facts['gpu']}, PyTorch {facts['torch']}, Triton {facts['triton']}, {facts['date'][:10]}")
    for axes, direction in zip(figure.subplots(2, 1, sharex=True), DIRECTIONS, strict=True):
        _draw(axes, [group for group in groups if group.direction == direction], names)
        axes.set_ylabel(f"{direction}, TFLOP/s")
    axes = figure.axes[0]
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(file, format="png", dpi=120)


def _natural(name: str) -> list[str]:
    """To sort by: numbers by their value."""
    return [part.zfill(8) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _draw(axes: Axes, groups: Sequence[Group], names: Sequence[str]) -> None:
    place = {name: i for i, name in enumerate(names)}
    for contender, color in COLORS.items():
        points = [
            (place[group.shape.name], row.tflops)
            for group in groups
            for row in group.rows
            if row.contender == contender and row.tflops is not None
        ]
        if points:
            ours = contender in ("triton", "gluon")
            axes.plot(
                *zip(*points, strict=True),
                "D" if ours else "o",
                color=color,
                label=contender,
                markersize=6 if ours else 5,
            )
    if groups:
        axes.plot(
            [place[group.shape.name] for group in groups],
            [group.cublas_tflops for group in groups],
            "_",
            color="#9aa5b1",
            label=CANARY,
        )
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e4e8eb")
    axes.spines[["top", "right"]].set_visible(False)
