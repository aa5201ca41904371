"""The least that a training run starts from: a checkpoint, conversations about videos, packed text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from longtake.comm.mesh import Mesh
from longtake.model.chat import build_tokenizer, media_token_id
from longtake.model.checkpoint import Progress, save
from longtake.train.config import TrainConfig
from longtake.train.packed import write_packed

from tests.media_files import moving_square, write_video
from tests.tiny import random_model, tiny_config

TOKENS_PER_FRAME, IMAGE_SIZE = 4, 16
VIDEOS = [(1,), (), (3,), (4, 2), (9,), ()]  # frames of each row's videos

Row = dict[str, Any]


def write_start(folder: Path) -> Path:
    """A checkpoint of a tiny model with random weights, to start a run from."""
    tokenizer = build_tokenizer(["what is red and what is blue ?"], ["red", "blue"], 300)
    image, video = media_token_id(tokenizer, "image"), media_token_id(tokenizer, "video")
    config = tiny_config(vocab_size=len(tokenizer), image_token_id=image, video_token_id=video)
    tokenizer.save_pretrained(folder)
    config.save(folder)
    mesh = Mesh(alone=True)
    save(folder, model=random_model(config, seed=0), optimizer=None, progress=Progress(), mesh=mesh)
    return folder


def conversation(index: int, num_frames: Sequence[int]) -> Row:
    """A row about videos of so many frames; each row has a text of its own."""
    question = "<video>" * len(num_frames) + "what is red " * (index + 1) + "?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "blue " * (index % 3) + "red"}]
    return {"conversations": turns, "video": [f"{n}.mp4" for n in num_frames]}


def write_rows(path: Path, rows: Sequence[Row | str]) -> Path:
    """JSONL; a string stands in it as it is."""
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def write_conversations(folder: Path, videos: Sequence[Sequence[int]] = VIDEOS) -> Path:
    """Conversations, some of text alone, and their videos beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in {n for row in videos for n in row}:
        write_video(folder / f"{n}.mp4", moving_square(n, seed=n))
    return write_rows(folder / "rows.jsonl", [conversation(i, row) for i, row in enumerate(videos)])


def write_text(path: Path) -> Path:
    """Packed documents of 1 to 40 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = (7, 40, 1, 23, 30, 19)
    write_packed(path, [torch.randint(8, 200, (length,), generator=generator) for length in lengths])
    return path


def run_config(start: Path, data: Path, out: Path, **fields: Any) -> TrainConfig:
    """Stage 3 for 4 steps of 2 samples, unless `fields` say otherwise."""
    settings = {"stage": 3, "steps": 4, "batch_size": 2, "num_frames": 16, "context": 256, "learning_rate": 1e-2}
    return TrainConfig(model=start, data=data, out=out, **settings | fields)
