"""The demo's training files: each rank writes its share of a plan that does not depend on the number of ranks."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..infer.haystack import Source, write_clips
from ..train.packed import write_packed
from .demo_data import MIXES, Mix, plan_clips, write_rows
from .text_needles import TextNeedles

NUM_TEXTS, TEXT_LENGTH = 24 * 8, 512


def write_data(
    folder: Path,
    source: Source,
    needles: TextNeedles,
    *,
    seed: int,
    part: int,
    num_parts: int,
    mixes: Mapping[int, Mix] = MIXES,
) -> None:
    """Write share `part` of `num_parts` of each stage's clips; the first part also writes the rows and the text."""
    for stage, mix in mixes.items():
        clips = plan_clips(stage, mix, seed=seed)
        mine = clips[part::num_parts]
        write_clips(
            folder / f"stage{stage}", tqdm(mine, desc=f"files of stage {stage}", disable=part > 0), source=source
        )
        if part == 0:
            write_rows(folder / f"stage{stage}.jsonl", clips, media=f"stage{stage}", captions=mix.captions)
    if part == 0:
        rng = np.random.default_rng([seed, 4])
        documents = [needles.document(TEXT_LENGTH, rng) for _ in range(NUM_TEXTS)]
        write_packed(folder / "stage4.safetensors", [ids for ids, _ in documents], [w for _, w in documents])
