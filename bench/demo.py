"""`longtake demo`: the whole system on one machine, from raw frames to a found needle.

Stage 0 stands for pretrained weights; then LongVILA's five stages run one after the other, each from the
checkpoint of the one before, on files as in production; then needles are looked for before and after stage 5.
"""

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..comm.launch import launch
from ..comm.mesh import Mesh
from ..infer.generate import add_grid, load_engine
from ..infer.haystack import UNSEEN_PHOTOGRAPHS, Photographs, Source, VideoFile
from ..infer.needle import NeedleGrid, Trials, evaluate, write_trials
from ..model.chat import build_tokenizer, load_tokenizer, media_token_id
from ..model.checkpoint import Progress, save
from ..model.init import init
from ..model.media import probe
from ..model.vlm import VisionLanguageModel
from ..train.config import TrainConfig
from ..train.stages import STAGES
from ..train.trainer import peak_memory_gib, train
from .demo_data import WORDS, demo_config, library_texts
from .demo_files import write_data
from .parity import parity
from .pretrain import pretrain_text, pretrain_vision
from .report import write_report
from .text_needles import TextNeedles

VOCABULARY = 1024
COMMON: dict[str, Any] = {
    "dtype": "float32",  # everywhere: the recipe was found in it
    "betas": (0.9, 0.98),
    "weight_decay": 0.01,
    "schedule": "cosine",
    "min_learning_rate": 0.1,
    "context": 4096,
}
RECIPE: dict[int, dict[str, Any]] = {
    1: {"steps": 60, "batch_size": 64, "learning_rate": 5e-3, "warmup": 6},
    2: {"steps": 60, "batch_size": 64, "learning_rate": 1e-3, "warmup": 6},
    3: {"steps": 120, "batch_size": 48, "learning_rate": 1e-3, "tower_learning_rate": 0.1, "warmup": 12},
    4: {
        "steps": 24,
        "batch_size": 8,
        "context": 512,
        "learning_rate": 5e-4,
        "warmup": 3,
        "rope_theta": 5e5,
        "low_rank": 0,
    },
    5: {"steps": 200, "batch_size": 16, "learning_rate": 1e-3, "tower_learning_rate": 0.1, "warmup": 14}
    | {"num_frames": 256},
}
FRAMES = (8, 16, 32, 64, 128, 256, 512)
UNSEEN_FRAMES = (8, 32, 128)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEEDLES = 8  # videos a cell, two questions each


@dataclass(frozen=True)
class Demo:
    """What the command line asks for."""

    out: Path
    seed: int
    video: Path | None
    ring: int
    ulysses: int


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="longtake demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the report (runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (0)")
    parser.add_argument("--video", type=Path, help="your own video as the haystack")
    add_grid(parser)
    demo = Demo(**vars(parser.parse_args(argv)))
    check(demo)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the recipe was found on CPUs: the same demo on every machine
    report = launch(run, demo, world_size=demo.ring * demo.ulysses)
    if report is not None:
        print(f"report: {demo.out / 'report.html'}")


def check(demo: Demo) -> None:
    """Raises ValueError, before anything is removed, for a folder of something else or a video that cannot be read."""
    if demo.video is not None:
        probe(demo.video)
    if demo.out.exists() and any(demo.out.iterdir()) and not (demo.out / "stage0").is_dir():
        raise ValueError(f"{demo.out} is not empty and holds no earlier demo: take another folder with --out")


def run(demo: Demo) -> dict[str, Any] | None:
    """One rank's part. The first returns what report.json holds."""
    begin = time.perf_counter()
    mesh = Mesh(ring=demo.ring, ulysses=demo.ulysses)
    if mesh.rank == 0:
        shutil.rmtree(demo.out, ignore_errors=True)
        demo.out.mkdir(parents=True)
    mesh.barrier()
    stages = {"0": start(demo, mesh)}
    for stage in STAGES:
        stages[str(stage)] = run_stage(stage, demo, mesh)
    report = {
        "needle": look_for_needles(demo, mesh),
        "stages": stages,
        "parity": parity(train_config(5, demo), mesh),
        "peak_rss_gib": sum(mesh.gather_objects(peak_memory_gib(mesh.device))),
        "seconds": time.perf_counter() - begin,
        "versions": {name: version(name) for name in ("torch", "transformers", "av", "numpy")}
        | {"python": platform.python_version()},
    }
    if mesh.rank:
        return None
    (demo.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    write_report(report, demo.out)
    show(report)
    return report


# ------------------------------------------------------------------------------------------------ training


def start(demo: Demo, mesh: Mesh) -> dict[str, Any]:
    """Stage 0 and the files of all stages: one rank learns to see, one to read, the others write files."""
    begin = time.perf_counter()
    folder = demo.out / "stage0"
    texts = library_texts()
    if mesh.rank == 0:
        build_tokenizer(texts, WORDS, VOCABULARY).save_pretrained(folder)
    mesh.barrier()
    tokenizer = load_tokenizer(folder)
    config = demo_config(
        vocab_size=len(tokenizer),
        image_token_id=media_token_id(tokenizer, "image"),
        video_token_id=media_token_id(tokenizer, "video"),
    )
    model = VisionLanguageModel(config)
    init(model, demo.seed)
    source, needles = training_source(demo), TextNeedles(tokenizer, texts)
    seer, reader, *writers = (0, min(1, mesh.world_size - 1), *range(2, mesh.world_size))
    learned: dict[str, Any] = {}
    losses: dict[str, list[float]] = {}
    if mesh.rank == seer:
        losses["vision"], _ = pretrain_vision(model.vision_tower, source, seed=demo.seed)
        learned |= {f"vision_tower.{k}": v for k, v in model.vision_tower.state_dict().items()}
    if mesh.rank == reader:
        losses["text"] = pretrain_text(model.llm, needles, seed=demo.seed)
        learned |= {f"llm.{k}": v for k, v in model.llm.state_dict().items()}
    share = writers or range(mesh.world_size)
    if mesh.rank in share:
        write_data(
            demo.out / "data", source, needles, seed=demo.seed, part=share.index(mesh.rank), num_parts=len(share)
        )
    for part in mesh.gather_objects(learned):
        model.load_state_dict(part, strict=False)
    for part in mesh.gather_objects(losses):
        losses |= part
    if mesh.rank == 0:
        config.save(folder)
    save(folder, model=model, optimizer=None, progress=Progress(), mesh=mesh)
    return {
        "steps": sum(map(len, losses.values())),
        "seconds": time.perf_counter() - begin,
        "max_frames": 1,
        "max_tokens": 192,
        "losses": losses,
    }


def training_source(demo: Demo) -> Source:
    """Haystacks to train on: the photographs, much varied, or the user's own video."""
    return VideoFile(demo.video) if demo.video else Photographs(augment=0.7)


def train_config(stage: int, demo: Demo) -> TrainConfig:
    """The demo's settings of a stage."""
    data = "stage4.safetensors" if stage == 4 else f"stage{stage}.jsonl"
    return TrainConfig(
        stage=stage,
        model=demo.out / f"stage{stage - 1}",
        data=demo.out / "data" / data,
        out=demo.out / f"stage{stage}",
        seed=demo.seed,
        ring=demo.ring,
        ulysses=demo.ulysses,
        shard="model",
        **COMMON | RECIPE[stage],
    )


def run_stage(stage: int, demo: Demo, mesh: Mesh) -> dict[str, Any]:
    """Train a stage; what the report says of it."""
    begin = time.perf_counter()
    logs = train(train_config(stage, demo))
    return {
        "steps": len(logs),
        "seconds": time.perf_counter() - begin,
        "max_frames": max(entry.max_frames for entry in logs),
        "max_tokens": max(entry.max_tokens for entry in logs),
        "losses": [entry.loss for entry in logs],
    }


# ---------------------------------------------------------------------------------------------- evaluation


def look_for_needles(demo: Demo, mesh: Mesh) -> dict[str, Any]:
    """The grids: short and long model, each with its control, and photographs that no training video showed."""
    folder, seed = demo.out / "needles", demo.seed + 1_000_000
    source = VideoFile(demo.video) if demo.video else Photographs()
    grid: dict[str, Any] = {"depths": DEPTHS, "needles": NEEDLES, "seed": seed}
    plain = write_trials(folder / "needle", source, mesh, frames=FRAMES, **grid)
    control = write_trials(folder / "control", source, mesh, frames=FRAMES, control=True, **grid)
    unseen_source = Photographs(names=UNSEEN_PHOTOGRAPHS)
    unseen = write_trials(folder / "unseen", unseen_source, mesh, frames=UNSEEN_FRAMES, **grid)
    results = {}
    for name, stage in (("short", 3), ("long", 5)):
        engine, tokenizer = load_engine(demo.out / f"stage{stage}", mesh, dtype=COMMON["dtype"])

        def grid_of(trials: Trials, title: str) -> list[list[float]]:
            return evaluate(engine, tokenizer, trials, title=f"{name} model, {title}")  # noqa: B023

        accuracy, controlled = grid_of(plain, "needle"), grid_of(control, "control")
        results[name] = asdict(NeedleGrid(list(FRAMES), list(DEPTHS), accuracy, controlled))
        if name == "long":
            found = grid_of(unseen, "unseen photographs")
            results["unseen"] = asdict(NeedleGrid(list(UNSEEN_FRAMES), list(DEPTHS), found, None))
    return results


def show(report: dict[str, Any]) -> None:
    """The lines at the end of the demo."""
    print()
    for name in ("short", "long", "unseen"):
        grid = report["needle"][name]
        rows = [sum(row) / len(row) for row in grid["accuracy"]]
        cells = "  ".join(f"{count}: {row:.2f}" for count, row in zip(grid["frames"], rows, strict=True))
        print(f"needle, {name:6}  {cells}")
    alone = report["parity"]["1"]
    for ranks, many in report["parity"].items():
        off = {key: abs(many[key] - alone[key]) / abs(alone[key]) for key in alone}
        print(
            f"{ranks} rank(s): loss {many['loss']:.7f}, gradient norm {many['grad_norm']:.7f}; relative "
            f"difference from one rank {off['loss']:.1e}, {off['grad_norm']:.1e}"
        )
    print(f"{report['seconds']:.0f} s, {report['peak_rss_gib']:.1f} GiB")
