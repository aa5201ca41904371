"""`longtake bench loader`: how long a training step waits for its frames, by worker processes and steps read ahead.

    longtake bench loader [--workers 0,1,2] [--prefetch 1,2] [--step-seconds 0.6] [--json FILE]
    longtake bench loader --data FILE --frames 2048 --size 448 --ranks 8 --workers 2,4,8     videos of your own

Without --data, H.264 videos are written first, of --lengths frames each. The loader is training's, the ranks share each
sample as one sequence-parallel group, and sleep for --step-seconds in the place of the step's compute.

frames/s: taken of the videos by all ranks together, where nothing is computed. read, longest: seconds that the frames
of a step take by themselves, mean and most. waited: seconds of a step, mean, for which the slowest rank waited. share:
of the step's time. shortest: the compute in seconds from which on less than 5 % is waiting, reckoned from the times of
the steps by themselves, and so on the safe side where workers have several steps at once.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import av
import numpy as np
import torch

from ..comm.launch import launch
from ..comm.mesh import Mesh
from ..infer.haystack import Photographs, write_video
from ..model.chat import build_tokenizer
from ..model.shapes import published_shape
from ..train.config import TrainConfig
from ..train.data import open_data
from ..train.loader import StepLoader
from ..train.mixture import Mixture
from ..train.sample import Sample

LIMIT = 0.05
WARM_UP = 3  # steps in which the workers start
LINE = "{:>7} {:>8} {:>9} {:>7} {:>8} {:>7} {:>7} {:>9}"
HEADER = LINE.format("workers", "prefetch", "frames/s", "read", "longest", "waited", "share", "shortest")


@dataclass(frozen=True)
class Setting:
    """What is measured. config: of the run, whose workers and prefetch are those tried. size: pixels of a frame."""

    config: TrainConfig
    workers: tuple[int, ...]
    prefetch: tuple[int, ...]
    size: int
    step_seconds: float

    def __post_init__(self) -> None:
        for workers in self.workers:
            for prefetch in self.prefetch:
                replace(self.config, workers=workers, prefetch=prefetch)  # raises what is wrong with them
        if self.size < 1 or self.step_seconds < 0:
            raise ValueError(f"size {self.size} must be at least 1, step_seconds {self.step_seconds} at least 0")


class Step(NamedTuple):
    """waited, seconds: for its frames, and in all."""

    waited: float
    seconds: float
    num_frames: int


def write_data(folder: Path, lengths: Sequence[int], size: int) -> Path:
    """A row for each video, of so many frames, size x size."""
    source, rows = Photographs(size=size), []
    for number, length in enumerate(lengths):
        write_video(folder / f"{number}.mp4", source.frames(length, np.random.default_rng(number)))
        turns = [{"from": "human", "value": "<video>\nwhat is this ?"}, {"from": "gpt", "value": "a film ."}]
        rows.append({"video": f"{number}.mp4", "conversations": turns})
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def run(
    config: TrainConfig, dataset: Mixture[Sample], mesh: Mesh, *, size: int, step_seconds: float = 0.0
) -> list[Step]:
    """The run's steps after the warm-up. Collective."""
    tokens_per_frame = published_shape("qwen2-1.5b", size).tokens_per_frame
    steps, began = [], time.perf_counter()
    with closing(StepLoader(dataset, config, mesh, tokens_per_frame=tokens_per_frame, image_size=size)) as loader:
        for number in range(config.steps):
            data = loader.load(number * loader.samples_per_step)
            time.sleep(step_seconds)
            ended = time.perf_counter()
            steps.append(Step(data.waited, ended - began, data.num_frames))
            began = ended
    return steps[WARM_UP:]


def waits(reading: Sequence[float], step_seconds: float, prefetch: int) -> list[float]:
    """Seconds that each step waits for its frames, which take reading[step], one step after the other.

    A step's are begun when the step `prefetch` before it has its own.
    """
    ready, now, had, waited = 0.0, 0.0, list[float](), list[float]()
    for step, seconds in enumerate(reading):
        begun = had[max(step - prefetch, 0)] if step and prefetch else now
        ready = max(ready, begun) + seconds
        waited.append(max(ready - now, 0.0))
        had.append(now + waited[-1])
        now = had[-1] + step_seconds
    return waited


def share(waited: Sequence[float], step_seconds: float) -> float:
    """Of the time of the steps but the first, which has nobody to read ahead of it."""
    total = sum(waited[1:])
    return total / (total + step_seconds * len(waited[1:]))


def shortest_step(reading: Sequence[float], prefetch: int) -> float:
    """The least seconds of compute that leave less than LIMIT to waiting."""
    low, high = 0.0, max(reading) / LIMIT  # nothing read ahead would be enough there
    for _ in range(40):
        middle = (low + high) / 2
        if share(waits(reading, middle, prefetch), middle) < LIMIT:
            high = middle
        else:
            low = middle
    return high


def benchmark(setting: Setting) -> list[dict[str, Any]]:
    """One rank's part. The first prints the table as it comes, and returns its rows."""
    mesh = Mesh(ulysses=setting.config.ulysses, transport="torch")
    tokenizer = build_tokenizer(["what is this ? a film ."], vocab_size=300)
    dataset = open_data(setting.config, tokenizer, published_shape("qwen2-1.5b", setting.size))
    if mesh.rank == 0:
        print(f"rows: {1e3 * time_rows(setting.config, dataset):.1f} ms a step, read and tokenised in one thread")
        print(HEADER, flush=True)
    table: list[dict[str, Any]] = []
    for workers in setting.workers:
        config = replace(setting.config, workers=workers, prefetch=0)
        reading = [step.waited for step in run(config, dataset, mesh, size=setting.size)]
        alone = {"workers": workers, "read": mean(reading), "longest": max(reading), "reading": reading}
        for prefetch in setting.prefetch:
            config = replace(config, prefetch=prefetch)
            fast = run(config, dataset, mesh, size=setting.size)
            steps = run(config, dataset, mesh, size=setting.size, step_seconds=setting.step_seconds)
            waited = sum(step.waited for step in steps)
            row = alone | {"prefetch": prefetch, "shortest": shortest_step(reading, prefetch)}
            row["frames_per_second"] = sum(step.num_frames for step in fast) / sum(step.seconds for step in fast)
            row |= {"waited": waited / len(steps), "share": waited / sum(step.seconds for step in steps)}
            table.append(row)
            if mesh.rank == 0:
                print(format_row(row), flush=True)
    return table


def time_rows(config: TrainConfig, dataset: Mixture[Sample]) -> float:
    """Seconds that a step's rows take without their frames."""
    indices = dataset.order(config.seed, 0, config.steps * config.batch_size)
    began = time.perf_counter()
    for index in indices:
        dataset[index]
    return (time.perf_counter() - began) / config.steps


def format_row(row: dict[str, Any]) -> str:
    seconds = [f"{row[name]:.3f}" for name in ("read", "longest", "waited")]
    rate, part = f"{row['frames_per_second']:.0f}", f"{100 * row['share']:.1f} %"
    return LINE.format(row["workers"], row["prefetch"], rate, *seconds, part, f"{row['shortest']:.3f}")


def verdict(rows: Sequence[dict[str, Any]], step_seconds: float) -> str:
    """What to set for steps of that length; or, where nothing tried is enough, for which steps it would be."""
    for row in rows:
        if row["share"] < LIMIT:
            said = f"workers = {row['workers']}, prefetch = {row['prefetch']}"
            return f"{said}: a step of {step_seconds:g} s waits {100 * row['share']:.1f} % of its time"
    best = min(rows, key=lambda row: row["shortest"])
    return (
        f"a step of {step_seconds:g} s waits 5 % of its time or more with all of these; the best, workers = "
        f"{best['workers']} and prefetch = {best['prefetch']}, is enough for steps of {best['shortest']:.2f} s"
    )


def processor() -> str:
    """Its name, and the cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unnamed processor")
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="longtake bench loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="what training takes; default: videos that are written for it")
    parser.add_argument("--lengths", type=numbers, default=(600, 20, 20, 20), help="frames of each video written")
    parser.add_argument("--video-size", type=int, default=512, help="their pixels, a side (512)")
    parser.add_argument("--frames", type=int, default=64, help="most frames taken of a video (64)")
    parser.add_argument("--max-fps", type=float, help="most frames taken of a second of it")
    parser.add_argument("--size", type=int, default=384, help="pixels, a side, that the vision tower takes (384)")
    parser.add_argument("--batch-size", type=int, default=1, help="samples of a step (1)")
    parser.add_argument("--ranks", type=int, default=1, help="that share a sample, each with workers of its own (1)")
    parser.add_argument("--workers", type=numbers, default=(0, 1, 2), help="of a rank, to try (0,1,2)")
    parser.add_argument("--prefetch", type=numbers, default=(1, 2), help="steps read ahead, to try (1,2)")
    parser.add_argument(
        "--steps", type=int, default=16, help=f"timed ones, after {WARM_UP} in which workers start (16)"
    )
    parser.add_argument("--step-seconds", type=float, default=0.6, help="of the step's compute (0.6)")
    parser.add_argument("--json", type=Path, help="also write the table here")
    args = parser.parse_args(argv)
    if args.steps < 2 or args.video_size < 16 or min(args.lengths) < 1:
        raise ValueError(
            f"steps must be at least 2, got {args.steps}; video-size at least 16, got {args.video_size}; "
            f"lengths at least 1, got {min(args.lengths)}"
        )
    config = TrainConfig(
        stage=3,
        model=Path(),
        data=args.data or Path(),
        out=Path(),
        steps=WARM_UP + args.steps,
        batch_size=args.batch_size,
        num_frames=args.frames,
        max_fps=args.max_fps,
        context=2**40,
        ulysses=args.ranks,
    )
    setting = Setting(config, args.workers, args.prefetch, args.size, args.step_seconds)
    print(f"{processor()}, ranks: {args.ranks}")
    with TemporaryDirectory() as folder:
        if args.data is None:
            config = replace(config, data=write_data(Path(folder), args.lengths, args.video_size))
            setting = replace(setting, config=config)
        rows = launch(benchmark, setting, world_size=args.ranks)
    print(verdict(rows, args.step_seconds))
    if args.json:
        said = {name: value for name, value in vars(args).items() if name != "json"}
        report = {"processor": processor(), "date": str(date.today()), "torch": torch.__version__, "av": av.__version__}
        args.json.write_text(json.dumps(report | {"setting": said, "rows": rows}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
