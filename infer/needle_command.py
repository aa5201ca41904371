"""`longtake needle`: how well a checkpoint finds needles, frames x depths, as text, JSON and a heatmap."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ..comm.launch import launch
from ..comm.mesh import Mesh
from .generate import add_grid, add_model, check_files, load_engine, seed
from .haystack import Photographs, VideoFile
from .heatmap import plot_grid
from .needle import NeedleGrid, evaluate, write_trials


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    checkpoint: Path
    dtype: str | None
    frames: list[int]
    depths: list[float]
    needles: int
    seed: int
    video: Path | None
    control: bool
    json: Path | None
    plot: Path | None
    ring: int
    ulysses: int


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="longtake needle", description=__doc__)
    add_model(parser)
    parser.add_argument("--frames", type=_list_of(int), default=[8, 64], help="video lengths (8,64)")
    parser.add_argument("--depths", type=_list_of(float), default=[0.0, 0.5, 1.0], help="places from 0 to 1 (0,0.5,1)")
    parser.add_argument("--needles", type=int, default=8, help="videos a cell; each has two questions (8)")
    parser.add_argument("--seed", type=seed, default=0, help="draws haystacks and needles (0)")
    parser.add_argument("--video", type=Path, help="your own video as the haystack")
    parser.add_argument("--control", action="store_true", help="also ask with the needle's frame left out")
    parser.add_argument("--json", type=Path, help="write the grid here")
    parser.add_argument("--plot", type=Path, help="draw the heatmap here (PNG)")
    add_grid(parser)
    request = Request(**vars(parser.parse_args(argv)))
    check_files(request.checkpoint, request.video)
    launch(run, request, world_size=request.ring * request.ulysses)


def _list_of(kind: type[int] | type[float]) -> Callable[[str], list[int] | list[float]]:
    def parse(text: str) -> list[int] | list[float]:
        try:
            return [kind(item) for item in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {kind.__name__} between commas") from None

    return parse


def run(request: Request) -> None:
    """One rank's part; the first prints and writes."""
    mesh = Mesh(ring=request.ring, ulysses=request.ulysses)
    engine, tokenizer = load_engine(request.checkpoint, mesh, dtype=request.dtype)
    size = engine.model.config.vision.image_size
    source = VideoFile(request.video, size=size) if request.video else Photographs(size=size)

    def grid_of(title: str, *, control: bool) -> list[list[float]]:
        with TemporaryDirectory() as folder:
            trials = write_trials(
                Path(mesh.gather_objects(folder)[0]),  # the first rank's, for all
                source,
                mesh,
                frames=request.frames,
                depths=request.depths,
                needles=request.needles,
                seed=request.seed,
                control=control,
            )
            accuracy = evaluate(engine, tokenizer, trials, title=title)
            mesh.barrier()
        return accuracy

    accuracy = grid_of("needle", control=False)
    control = grid_of("control", control=True) if request.control else None
    if mesh.rank == 0:
        _show(NeedleGrid(request.frames, request.depths, accuracy, control), request)


def _show(grid: NeedleGrid, request: Request) -> None:
    for title, rows in (("right answers", grid.accuracy), ("control, without the needle", grid.control)):
        if rows is not None:
            print(f"{title} (chance {grid.chance:.3f})")
            print("frames   " + "".join(f"{depth:>8g}" for depth in grid.depths) + "   depth")
            for count, row in zip(grid.frames, rows, strict=True):
                print(f"{count:>6}   " + "".join(f"{cell:>8.2f}" for cell in row))
    if request.json:
        request.json.parent.mkdir(parents=True, exist_ok=True)
        request.json.write_text(json.dumps(asdict(grid), indent=2) + "\n")
    if request.plot:
        plot_grid(grid, request.plot)
