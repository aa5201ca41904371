"""`longtake bench step`: one training step of a small vision-language model on long documents: time and memory.

    python -m longtake.bench.step [--ring 2 --ulysses 2] [--lengths 1024,4096,16384] [--json FILE]

Forward, backward, clipping and AdamW through the code that trains, on one document of random frames and text.
ms: of the slowest rank, median of the steps. peak: of a rank, the largest, in processes that did this length alone.
growth: GiB that 16,384 more tokens add to it, by the length before; where memory is linear, it stays the same.
"""

import argparse
import json
import multiprocessing
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..comm.launch import launch
from ..comm.mesh import Mesh
from ..infer.generate import add_grid
from ..model.batch import shard_documents
from ..model.config import ModelConfig
from ..model.init import init
from ..model.vlm import VisionLanguageModel
from ..train.config import TrainConfig
from ..train.data import Sample
from ..train.loader import StepData
from ..train.optimizer import build_optimizer, clip_gradients
from ..train.trainer import compute_gradients, peak_memory_gib, shard_parameters
from .demo import VOCABULARY
from .demo_data import demo_config

LINE = "{:>8} {:>7} {:>10} {:>10} {:>9} {:>15}"
HEADER = LINE.format("tokens", "frames", "ms", "tokens/s", "peak GiB", "GiB/16k tokens")
WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Setting:
    """What is measured. train.steps: timed steps of each length."""

    model: ModelConfig
    train: TrainConfig


def synthetic_document(config: ModelConfig, num_tokens: int) -> Sample:
    """Video in seven eighths of the tokens, then random text, on which the loss is."""
    num_frames = num_tokens * 7 // 8 // config.tokens_per_frame
    num_visual = num_frames * config.tokens_per_frame
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(config.language.vocab_size, (num_tokens,), generator=generator)
    input_ids[:num_visual] = config.video_token_id
    loss_weight = torch.ones(num_tokens)
    loss_weight[:num_visual] = 0
    frame_starts = torch.arange(num_frames) * config.tokens_per_frame
    return Sample(input_ids, loss_weight, frame_starts, cu_seqlens=torch.tensor([0, num_tokens]), source="random")


def synthetic_step(setting: Setting, mesh: Mesh, num_tokens: int) -> StepData:
    """This rank's share of a step of one document, with random pixels for the frames that it encodes."""
    config = setting.model
    batch = shard_documents(
        [synthetic_document(config, num_tokens)],
        mesh=mesh,
        tokens_per_frame=config.tokens_per_frame,
        layout=setting.train.layout,
        route=setting.train.route,
    )
    size = config.vision.image_size
    pixels = torch.randn(batch.frames.last - batch.frames.first, 3, size, size)
    return StepData(
        batches=[(batch, pixels.to(mesh.device))],
        total_weight=batch.total_weight,
        num_tokens=num_tokens,
        num_frames=batch.num_frames,
        max_tokens=num_tokens,
        max_frames=batch.num_frames,
        num_skipped=0,
    )


def measure(setting: Setting, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """One rank's part: a row for each length, from the first rank. A peak is the process's so far: lengths rise."""
    mesh = Mesh(ring=setting.train.ring, ulysses=setting.train.ulysses)
    model = VisionLanguageModel(setting.model)
    init(model, seed=0)
    model.llm.recompute = model.vision_tower.recompute = setting.train.recompute
    model.to(mesh.device)
    shard_parameters(model, mesh, setting.train)
    optimizer = build_optimizer(model, setting.train)
    step(model, optimizer, synthetic_step(setting, mesh, WARM_UP_TOKENS), mesh, setting.train.clip)
    rows = []
    for num_tokens in lengths:
        data = synthetic_step(setting, mesh, num_tokens)
        times = [step(model, optimizer, data, mesh, setting.train.clip) for _ in range(setting.train.steps)]
        ms = 1e3 * float(np.median(np.max(mesh.gather_objects(times), axis=0)))
        row = {"tokens": num_tokens, "frames": data.num_frames, "ms": ms, "tokens_per_second": 1e3 * num_tokens / ms}
        rows.append(row | {"peak_gib": mesh.gather_objects(peak_memory_gib(mesh.device))})
    return rows if mesh.rank == 0 else []


def step(
    model: VisionLanguageModel, optimizer: torch.optim.Optimizer, data: StepData, mesh: Mesh, clip: float
) -> float:
    """One training step; returns its seconds on this rank, all ranks starting together."""
    mesh.barrier()
    began = time.perf_counter()
    optimizer.zero_grad()
    compute_gradients(model, data, mesh)
    clip_gradients(model, clip)
    optimizer.step()
    return time.perf_counter() - began


def run(setting: Setting, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each length, as it comes: each in fresh processes, unless torchrun started this one."""
    world_size = setting.train.ring * setting.train.ulysses
    if torch.distributed.is_torchelastic_launched():
        yield from launch(measure, setting, lengths, world_size=world_size)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as fresh:
        for num_tokens in lengths:
            yield from fresh.submit(launch, measure, setting, [num_tokens], world_size=world_size).result()


def growth(before: dict[str, Any], row: dict[str, Any]) -> float:
    """GiB that 16,384 more tokens add to a rank's peak, by two rows."""
    gib = max(row["peak_gib"]) - max(before["peak_gib"])
    return 16384 * gib / (row["tokens"] - before["tokens"])


def format_row(row: dict[str, Any]) -> str:
    numbers = [(row["ms"], 0), (row["tokens_per_second"], 0), (max(row["peak_gib"]), 2), (row["growth"], 2)]
    cells = ["-" if value is None else f"{value:.{digits}f}" for value, digits in numbers]
    return LINE.format(row["tokens"], row["frames"], *cells)


def parse(argv: Sequence[str] | None) -> tuple[Setting, list[int], Path | None]:
    """What to measure, at which lengths, rising, and where to write it. Raises ValueError for what cannot be."""
    parser = argparse.ArgumentParser(prog="longtake bench step", description=__doc__)
    parser.add_argument("--lengths", default="1024,4096,16384", help="comma-separated tokens (1024,4096,16384)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each length (3)")
    parser.add_argument("--model", type=Path, help="folder of another model's config.json (the demo's)")
    parser.add_argument("--recompute", action="store_true", help="recompute each layer's activations")
    parser.add_argument("--json", type=Path, help="also write the table here")
    add_grid(parser)
    args = parser.parse_args(argv)
    lengths = sorted({int(length) for length in args.lengths.split(",")})
    if lengths[0] < 1 or args.steps < 1:
        raise ValueError(f"lengths and steps must be at least 1, got {args.lengths} and {args.steps}")
    unused = Path()
    train = TrainConfig(
        stage=5,
        model=unused,
        data=unused,
        out=unused,
        steps=args.steps,
        ring=args.ring,
        ulysses=args.ulysses,
        recompute=args.recompute,
    )
    demo = demo_config(vocab_size=VOCABULARY, image_token_id=0, video_token_id=1)
    model = ModelConfig.load(args.model) if args.model else demo
    return Setting(model, train), lengths, args.json


def main(argv: Sequence[str] | None = None) -> None:
    setting, lengths, file = parse(argv)
    rows: list[dict[str, Any]] = []
    for row in run(setting, lengths):
        row["growth"] = growth(rows[-1], row) if rows else None
        print(format_row(row) if rows else f"{HEADER}\n{format_row(row)}", flush=True)
        rows.append(row)
    ratios = [later["growth"] / earlier["growth"] for earlier, later in pairwise(rows[1:])]
    if ratios:
        print(f"growth, each length's / the one's before: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    if file and rows:
        grid = {"ring": setting.train.ring, "ulysses": setting.train.ulysses}
        report = {"torch": torch.__version__, "machine": platform.machine(), **grid, "growth_ratios": ratios}
        file.write_text(json.dumps(report | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
