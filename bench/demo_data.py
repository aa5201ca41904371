"""What the demo trains on: a tiny model's config, text, and for each stage files as production has them.

Everything is planned first, as small values, and drawn from keys of its own; ranks then write shares of the plan.
"""

import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..infer.haystack import Clip
from ..infer.needle_images import (
    COLOUR_QUESTION,
    COLOURS,
    SHAPE_QUESTION,
    SHAPES,
    Needle,
    training_needle,
)
from ..model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig

CAPTION_QUESTION = "what is this ?"
TASK_TEXT = f"user assistant {COLOUR_QUESTION} {SHAPE_QUESTION} {CAPTION_QUESTION} a photo ."
WORDS = sorted({*COLOURS, *SHAPES, *TASK_TEXT.split()})  # one token each


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A stage's clips.

    lengths: frames -> share of the clips, where 1 frame is an image. blank: share without a needle.
    """

    num_clips: int
    lengths: dict[int, float]
    captions: bool = False
    blank: float = 0.0


MIXES = {
    1: Mix(num_clips=2560, lengths={1: 1.0}, captions=True, blank=0.15),
    2: Mix(num_clips=2560, lengths={1: 1.0}),
    3: Mix(num_clips=2400, lengths={1: 0.25, 2: 0.19, 4: 0.19, 8: 0.37}),
    5: Mix(num_clips=1200, lengths={16: 0.34, 32: 0.26, 64: 0.18, 128: 0.13, 256: 0.09}),
}


def demo_config(*, vocab_size: int, image_token_id: int, video_token_id: int) -> ModelConfig:
    """1.1 M parameters in the shape of the real model: 4 tokens a frame of 32 x 32."""
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        ),
        projector=ProjectorConfig(kind="mlp_downsample_columns"),  # with which the recipe was found
        language=LanguageConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_theta=1e4,
            max_position_embeddings=4096,
        ),
        image_token_id=image_token_id,
        video_token_id=video_token_id,
    )


def library_texts(*, max_chars: int = 1_000_000) -> list[str]:
    """Sources of Python's standard library, by name, the first `max_chars` characters."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        max_chars -= len(texts[-1])
        if max_chars <= 0:
            break
    return texts


def plan_clips(stage: int, mix: Mix, *, seed: int) -> list[Clip]:
    """The training clips of a stage; none shows a held-out combination."""
    lengths, shares = list(mix.lengths), np.array(list(mix.lengths.values()))
    clips = []
    for index in range(mix.num_clips):
        key = (seed, stage, index)
        rng = np.random.default_rng(key)
        num_frames = int(rng.choice(lengths, p=shares / shares.sum()))
        needle = None if rng.random() < mix.blank else training_needle(rng)
        name = f"{index:05d}.png" if num_frames == 1 else f"{index:05d}.mp4"
        clips.append(Clip(name, num_frames, int(rng.integers(num_frames)), needle, "train", (*key, 1)))
    return clips


def write_rows(path: Path, clips: Iterable[Clip], *, media: str, captions: bool = False) -> int:
    """Writes LLaVA rows, one for each question of each clip, and returns their number.

    media: the clips' folder relative to the file's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for clip in clips for row in _rows(clip, media, captions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def _rows(clip: Clip, media: str, captions: bool) -> Iterator[dict[str, Any]]:
    kind = "image" if clip.name.endswith(".png") else "video"
    if captions:
        pairs = [(CAPTION_QUESTION, caption) for caption in captions_of(clip.needle)]
    else:
        pairs = clip.needle.questions if clip.needle else []
    for number, (question, answer) in enumerate(pairs):
        yield {
            "id": f"{clip.name}-{number}",
            kind: f"{media}/{clip.name}",
            "conversations": [
                {"from": "human", "value": f"<{kind}>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }


def captions_of(needle: Needle | None) -> list[str]:
    """All true captions that use named colours and shapes only."""
    if needle is None:
        return ["a photo ."]
    colour = [needle.colour] if needle.colour in COLOURS else []
    shape = [needle.shape] if needle.shape in SHAPES else []
    captions = [f"a {name} shape ." for name in colour] + [f"a {name} ." for name in shape]
    return captions + [f"a {first} {second} ." for first in colour for second in shape]
