"""`longtake bench step`: one training step of a vision-language model on long documents: time, FLOP/s and memory.

    longtake bench step                                    on a GPU: Qwen2-1.5B with SigLIP so400m, bfloat16, recompute
    longtake bench step [--ring 2 --ulysses 2] [--lengths 1024,4096,16384] [--shape demo] [--json FILE]

Forward, backward, clipping and AdamW through the code that trains, on one document of random frames and text.
ms: of the slowest rank, median of the steps but for the first, which compiles. TFLOP/s: of a rank, counting what the
model needs (bench/flops.py) and no recomputation. MFU: that over --peak-tflops, by default the GPU's in dense bfloat16.
peak: of a rank, the largest; on a CPU in processes that did this length alone. growth: GiB that 16,384 more tokens add
to it, by the length before; where memory is linear, it stays the same. Attention's time grows with the square
of the length: of six minutes or so, estimated for an H100, most are the longest's.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from ..comm.launch import launch
from ..comm.mesh import Mesh, default_device
from ..infer.generate import add_grid
from ..model.batch import shard_documents
from ..model.config import ModelConfig
from ..model.init import init
from ..model.shapes import ShapeName, published_shape
from ..model.vlm import VisionLanguageModel
from ..train.config import TrainConfig
from ..train.loader import StepData
from ..train.optimizer import build_optimizer, clip_gradients
from ..train.sample import Sample
from ..train.trainer import compute_gradients, peak_memory_gib, shard_parameters
from .demo import VOCABULARY
from .demo_data import demo_config
from .flops import step_flops
from .peaks import TFLOPS, device_name, peak
from .rows import write_rows

LINE = "{:>8} {:>7} {:>10} {:>10} {:>8} {:>7} {:>9} {:>15}"
HEADER = LINE.format("tokens", "frames", "ms", "tokens/s", "TFLOP/s", "MFU", "peak GiB", "GiB/16k tokens")
Row = dict[str, Any]
Keep = Callable[[Sequence[Row]], None]
DEMO = "demo"  # the shape of the model that the demo trains
ON_GPU = {"lengths": "65536,131072,262144", "steps": 1, "shape": "qwen2-1.5b", "dtype": "bfloat16", "recompute": True}
ON_CPU = {"lengths": "1024,4096,16384", "steps": 2, "shape": DEMO, "dtype": "float32", "recompute": False}


@dataclass(frozen=True)
class Setting:
    """What is measured. train.steps: timed ones of each length; peak_tflops: of a rank, None: by the GPU's name."""

    model: ModelConfig
    train: TrainConfig
    peak_tflops: float | None = None


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
    num_frames = batch.frames.last - batch.frames.first
    pixels = torch.randint(256, (num_frames, 3, size, size), dtype=torch.uint8, device=mesh.device)
    return StepData(
        batches=[(batch, pixels)],
        total_weight=batch.total_weight,
        num_tokens=num_tokens,
        num_frames=batch.num_frames,
        max_tokens=num_tokens,
        max_frames=batch.num_frames,
        num_skipped=0,
    )


def measure(setting: Setting, lengths: Sequence[int], keep: Keep, rows: Sequence[Row] = ()) -> list[Row]:
    """One rank's part: a row for each length behind `rows`, which come before. The first rank prints them as they come,
    has `keep` write them, and returns all.

    On a CPU a peak is the process's so far: lengths rise. A GPU that runs out of memory ends the table with a note.
    """
    mesh = Mesh(ring=setting.train.ring, ulysses=setting.train.ulysses)
    model = build_model(setting, mesh)
    optimizer = build_optimizer(model, setting.train)
    rows = list(rows)
    for num_tokens in lengths:
        try:
            row = measure_length(setting, model, optimizer, mesh, num_tokens)
        except torch.OutOfMemoryError:
            if mesh.world_size > 1:
                raise  # the others wait for this rank
            print(f"{num_tokens:>8} tokens: out of GPU memory", flush=True)
            break
        rows.append(row | {"growth": growth(rows[-1], row) if rows else None})
        if mesh.rank == 0:
            print(format_row(rows[-1]), flush=True)
            keep(rows)
    return rows if mesh.rank == 0 else []


def build_model(setting: Setting, mesh: Mesh) -> VisionLanguageModel:
    with mesh.device:
        model = VisionLanguageModel(setting.model)
    init(model, seed=0)
    model.llm.recompute = model.vision_tower.recompute = setting.train.recompute
    shard_parameters(model, mesh, setting.train)
    return model


def measure_length(
    setting: Setting, model: VisionLanguageModel, optimizer: torch.optim.Optimizer, mesh: Mesh, num_tokens: int
) -> dict[str, Any]:
    """Collective."""
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(mesh.device)
    data = synthetic_step(setting, mesh, num_tokens)
    _, *times = (step(model, optimizer, data, mesh, setting.train.clip) for _ in range(setting.train.steps + 1))
    seconds = float(np.median(np.max(mesh.gather_objects(times), axis=0)))
    flops = step_flops(setting.model, [num_tokens], num_frames=data.num_frames, num_targets=int(data.total_weight))
    tflops = sum(flops.values()) / seconds / mesh.world_size / 1e12
    limit = setting.peak_tflops or peak(TFLOPS, device_name(mesh.device))
    return {
        "tokens": num_tokens,
        "frames": data.num_frames,
        "ms": 1e3 * seconds,
        "tokens_per_second": num_tokens / seconds,
        "flops": flops,
        "tflops": tflops,
        "mfu": tflops / limit if limit else None,
        "peak_gib": mesh.gather_objects(peak_memory_gib(mesh.device)),
    }


def step(
    model: VisionLanguageModel, optimizer: torch.optim.Optimizer, data: StepData, mesh: Mesh, clip: float
) -> float:
    """One training step; returns its seconds on this rank, all ranks starting together."""
    device = torch.get_device_module(mesh.device)
    device.synchronize()
    mesh.barrier()
    began = time.perf_counter()
    optimizer.zero_grad()
    compute_gradients(model, data, mesh)
    clip_gradients(model, clip)
    optimizer.step()
    device.synchronize()
    return time.perf_counter() - began


def run(setting: Setting, lengths: Sequence[int], keep: Keep) -> list[Row]:
    """Rows of the table, printed as they come: on a CPU, whose peaks cannot be reset, each in fresh processes.

    Unless torchrun started this one.
    """
    world_size = setting.train.ring * setting.train.ulysses
    if torch.cuda.is_available() or torch.distributed.is_torchelastic_launched():
        return launch(measure, setting, lengths, keep, world_size=world_size)
    rows: list[Row] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as fresh:
        for num_tokens in lengths:
            rows = fresh.submit(launch, measure, setting, [num_tokens], keep, rows, world_size=world_size).result()
    return rows


def growth(before: Row, row: Row) -> float:
    """GiB that 16,384 more tokens add to a rank's peak, by two rows."""
    gib = max(row["peak_gib"]) - max(before["peak_gib"])
    return 16384 * gib / (row["tokens"] - before["tokens"])


def format_row(row: Row) -> str:
    numbers = [(row["ms"], 0), (row["tokens_per_second"], 0), (row["tflops"], 3 if row["tflops"] < 10 else 0)]
    percent = None if row["mfu"] is None else 100 * row["mfu"]
    numbers += [(percent, 1), (max(row["peak_gib"]), 2), (row["growth"], 2)]
    cells = ["-" if value is None else f"{value:.{digits}f}" for value, digits in numbers]
    return LINE.format(row["tokens"], row["frames"], *cells)


def parse(argv: Sequence[str] | None) -> tuple[Setting, list[int], Path | None]:
    """What to measure, at which lengths, rising, and where to write it. Raises ValueError for what cannot be."""
    parser = argparse.ArgumentParser(
        prog="longtake bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", help="comma-separated tokens (65536,131072,262144; on a CPU 1024,4096,16384)")
    parser.add_argument("--steps", type=int, help="timed steps of each length, after one that is not (1; on a CPU 2)")
    parser.add_argument(
        "--shape", choices=(DEMO, *get_args(ShapeName)), help="of the model (qwen2-1.5b; on a CPU demo)"
    )
    parser.add_argument("--model", type=Path, help="folder of another model's config.json")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="(bfloat16; on a CPU float32)")
    parser.add_argument(
        "--recompute", action=argparse.BooleanOptionalAction, help="each layer's activations (yes; on a CPU no)"
    )
    parser.add_argument("--peak-tflops", type=float, help="of a rank, for MFU (by the GPU's name)")
    parser.add_argument("--json", type=Path, help="also write the table here")
    add_grid(parser)
    parser.set_defaults(**(ON_GPU if torch.cuda.is_available() else ON_CPU))
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
        dtype=args.dtype,
    )
    return Setting(find_model(args), train, args.peak_tflops), lengths, args.json


def find_model(args: argparse.Namespace) -> ModelConfig:
    """Of the folder, if one was given, else of the shape."""
    if args.model:
        return ModelConfig.load(args.model)
    if args.shape == DEMO:
        return demo_config(vocab_size=VOCABULARY, image_token_id=0, video_token_id=1)
    return published_shape(args.shape)


def main(argv: Sequence[str] | None = None) -> None:
    setting, lengths, file = parse(argv)
    if int(os.environ.get("RANK", "0")) == 0:
        print(HEADER, flush=True)
    facts = {"torch": torch.__version__, "device": device_name(default_device())}
    facts |= {"ring": setting.train.ring, "ulysses": setting.train.ulysses, "model": setting.model.to_dict()}
    facts |= {"dtype": setting.train.dtype, "recompute": setting.train.recompute}
    rows = run(setting, lengths, partial(write_rows, file, facts))
    ratios = [later["growth"] / earlier["growth"] for earlier, later in pairwise(rows[1:])]
    if ratios:
        print(f"growth, each length's / the one's before: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    if rows:
        write_rows(file, facts | {"growth_ratios": ratios}, rows)


if __name__ == "__main__":
    main()
