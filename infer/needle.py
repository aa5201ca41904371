"""The video needle in a haystack: one frame of a long video holds the answer, and the engine must say it.

As LongVILA's evaluation (arXiv 2408.10188, section 5.2), but end to end: the videos are files, vision and language
run on one group of ranks, and answers are generated, not scored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..comm.mesh import Mesh
from ..model.chat import Encoded, encode_prompt
from ..model.config import ModelConfig
from ..model.media import read_frames
from ..model.vlm import no_pixels
from .engine import Engine
from .haystack import Clip, Source, plan_trials, write_clips
from .needle_images import CHANCE


@dataclass(frozen=True)
class NeedleGrid:
    """accuracy, control: [frames][depths], the share of questions answered right; control: without the needle."""

    frames: list[int]
    depths: list[float]
    accuracy: list[list[float]]
    control: list[list[float]] | None
    chance: float = CHANCE


@dataclass(frozen=True)
class Question:
    cell: tuple[int, int]
    path: Path
    prompt: Encoded
    answer: str


@dataclass(frozen=True)
class Trials:
    """A grid's clips, and the folder that their files are in."""

    frames: list[int]
    depths: list[float]
    clips: list[Clip]
    folder: Path


def write_trials(
    folder: Path,
    source: Source,
    mesh: Mesh,
    *,
    frames: Sequence[int],
    depths: Sequence[float],
    needles: int,
    seed: int,
    control: bool = False,
) -> Trials:
    """Write the videos of a grid, each rank its share. Collective. Raises ValueError for a depth outside 0..1."""
    clips = plan_trials(frames, depths, needles=needles, seed=seed)
    write_clips(folder, clips[mesh.rank :: mesh.world_size], source=source, control=control)
    mesh.barrier()
    return Trials(list(frames), list(depths), clips, folder)


def evaluate(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    trials: Trials,
    *,
    title: str = "needle",
    tokens_at_once: int = 16_384,
) -> list[list[float]]:
    """The share of questions answered right, [frames][depths]. Collective.

    Right is the answer and the end token, nothing else, by greedy decoding. Questions are packed into prompts of
    tokens_at_once together, or of one question where that is longer.
    """
    right = torch.zeros(len(trials.frames), len(trials.depths))
    asked = torch.zeros_like(right)
    questions = list(_questions(trials, tokenizer, engine.model.config))
    with tqdm(total=len(questions), desc=title, unit="answer", disable=engine.mesh.rank != 0) as bar:
        for batch in _batches(questions, tokens_at_once):
            for question, answer in zip(batch, _answers(engine, tokenizer, batch), strict=True):
                asked[question.cell] += 1
                right[question.cell] += answer == question.answer
            bar.update(len(batch))
    return (right / asked).tolist()


def _questions(trials: Trials, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> Iterator[Question]:
    per_cell = len(trials.clips) // (len(trials.frames) * len(trials.depths))
    for i, clip in enumerate(trials.clips):
        assert clip.needle is not None
        for question, answer in clip.needle.questions:
            turns = [{"from": "human", "value": f"<video>\n{question}"}]
            prompt = encode_prompt(
                tokenizer,
                turns,
                [("video", clip.num_frames)],
                tokens_per_frame=config.tokens_per_frame,
                newline_token_id=config.newline_token_id,
            )
            cell = divmod(i // per_cell, len(trials.depths))
            yield Question(cell, trials.folder / clip.name, prompt, answer)


def _batches(questions: Sequence[Question], tokens_at_once: int) -> Iterator[list[Question]]:
    batch, tokens = [], 0
    for question in questions:
        length = len(question.prompt.input_ids)
        if batch and tokens + length > tokens_at_once:
            yield batch
            batch, tokens = [], 0
        batch.append(question)
        tokens += length
    if batch:
        yield batch


def _answers(engine: Engine, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Question]) -> list[str | None]:
    """What the model says to each question; None where it does not stop in time."""
    config, stop = engine.model.config, int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    counts = [len(q.prompt.frame_starts) for q in batch]

    def read(first: int, last: int) -> Tensor:
        parts, begin = [no_pixels(config)], 0
        for question, count in zip(batch, counts, strict=True):
            inside = range(max(first, begin) - begin, min(last, begin + count) - begin)
            if inside:
                parts.append(read_frames(question.path, inside, size=config.vision.image_size))
            begin += count
        return torch.cat(parts)

    limit = max(len(tokenizer.encode(q.answer)) for q in batch) + 1
    said: list[list[int]] = [[] for _ in batch]
    for step in engine.generate([q.prompt for q in batch], read, max_new_tokens=limit, stop=stop):
        for ids, token in zip(said, step, strict=True):
            if token is not None:
                ids.append(token)
    return [str(tokenizer.decode(ids[:-1])).strip() if ids[-1] == stop else None for ids in said]
