"""The video needle in a haystack: one frame of a long video holds the answer, and the engine must say it.

As LongVILA's evaluation (arXiv 2408.10188, section 5.2), but end to end: the videos are files, vision and language
run on one group of ranks, and answers are generated, not scored.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..comm.launch import launch
from ..comm.mesh import Mesh
from ..model.chat import Encoded, encode_prompt
from ..model.media import read_frames
from ..model.vlm import no_pixels
from .engine import Engine
from .generate import add_grid, load_engine
from .haystack import Clip, Photographs, Source, VideoFile, plan_trials, write_clips
from .needle_images import CHANCE

TOKENS_AT_ONCE = 16_384  # prompts packed into one prefill


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


def write_trials(  # noqa: PLR0913
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
    engine: Engine, tokenizer: PreTrainedTokenizerBase, trials: Trials, *, title: str = "needle"
) -> list[list[float]]:
    """The share of questions answered right, [frames][depths]. Collective.

    Right is the answer and the end token, nothing else, by greedy decoding.
    """
    right = torch.zeros(len(trials.frames), len(trials.depths))
    asked = torch.zeros_like(right)
    questions = list(_questions(trials, tokenizer, engine.model.config.tokens_per_frame))
    with tqdm(total=len(questions), desc=title, unit="answer", disable=engine.mesh.rank != 0) as bar:
        for batch in _batches(questions):
            for question, answer in zip(batch, _answers(engine, tokenizer, batch), strict=True):
                asked[question.cell] += 1
                right[question.cell] += answer == question.answer
            bar.update(len(batch))
    return (right / asked).tolist()


def _questions(trials: Trials, tokenizer: PreTrainedTokenizerBase, tokens_per_frame: int) -> Iterator[Question]:
    per_cell = len(trials.clips) // (len(trials.frames) * len(trials.depths))
    for i, clip in enumerate(trials.clips):
        assert clip.needle is not None
        for question, answer in clip.needle.questions:
            turns = [{"from": "human", "value": f"<video>\n{question}"}]
            prompt = encode_prompt(tokenizer, turns, [("video", clip.num_frames)], tokens_per_frame=tokens_per_frame)
            cell = divmod(i // per_cell, len(trials.depths))
            yield Question(cell, trials.folder / clip.name, prompt, answer)


def _batches(questions: Sequence[Question]) -> Iterator[list[Question]]:
    batch, tokens = [], 0
    for question in questions:
        if batch and tokens + len(question.prompt.input_ids) > TOKENS_AT_ONCE:
            yield batch
            batch, tokens = [], 0
        batch.append(question)
        tokens += len(question.prompt.input_ids)
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
            if len(inside):
                parts.append(read_frames(question.path, inside, size=config.vision.image_size))
            begin += count
        return torch.cat(parts)

    limit = max(len(tokenizer.encode(q.answer)) for q in batch) + 1
    said: list[list[int]] = [[] for _ in batch]
    for step in engine.generate([q.prompt for q in batch], read, max_new_tokens=limit, stop=stop):
        for tokens, token in zip(said, step, strict=True):
            tokens += [] if token is None else [token]
    return [tokenizer.decode(t[:-1]).strip() if t[-1] == stop else None for t in said]


# ------------------------------------------------------------------------------------------------- command


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    checkpoint: Path
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
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--frames", type=_list_of(int), default=[8, 64], help="video lengths, e.g. 8,64")
    parser.add_argument("--depths", type=_list_of(float), default=[0, 0.5, 1], help="places from 0 to 1, e.g. 0,0.5,1")
    parser.add_argument("--needles", type=int, default=8, help="videos a cell; each has two questions (8)")
    parser.add_argument("--seed", type=int, default=0, help="draws haystacks and needles (0)")
    parser.add_argument("--video", type=Path, help="your own video as the haystack")
    parser.add_argument("--control", action="store_true", help="also ask with the needle's frame left out")
    parser.add_argument("--json", type=Path, help="write the grid here")
    parser.add_argument("--plot", type=Path, help="draw the heatmap here (PNG)")
    add_grid(parser)
    request = Request(**vars(parser.parse_args(argv)))
    launch(run, request, world_size=request.ring * request.ulysses)


def _list_of(kind: type):
    def parse(text: str) -> list:
        return [kind(item) for item in text.split(",")]

    return parse


def run(request: Request) -> None:
    """One rank's part; the first prints and writes."""
    mesh = Mesh(ring=request.ring, ulysses=request.ulysses)
    engine, tokenizer = load_engine(request.checkpoint, mesh)
    size = engine.model.config.vision.image_size
    source = VideoFile(request.video, size=size) if request.video else Photographs(size=size)
    results = []
    for control in [False, True][: 1 + request.control]:
        folder = TemporaryDirectory()
        shared = Path(mesh.gather_objects(folder.name)[0])
        trials = write_trials(
            shared,
            source,
            mesh,
            frames=request.frames,
            depths=request.depths,
            needles=request.needles,
            seed=request.seed,
            control=control,
        )
        results.append(evaluate(engine, tokenizer, trials, title="control" if control else "needle"))
        mesh.barrier()
        folder.cleanup()
    if mesh.rank == 0:
        grid = NeedleGrid(request.frames, request.depths, results[0], results[1] if request.control else None)
        _show(grid, request)


def _show(grid: NeedleGrid, request: Request) -> None:
    print("frames   " + "".join(f"{depth:>8g}" for depth in grid.depths) + "   (depth)")
    for count, row in zip(grid.frames, grid.accuracy, strict=True):
        print(f"{count:>6}   " + "".join(f"{cell:>8.2f}" for cell in row))
    print(f"chance {grid.chance:.3f}")
    if request.json:
        request.json.parent.mkdir(parents=True, exist_ok=True)
        request.json.write_text(json.dumps(asdict(grid), indent=2) + "\n")
    if request.plot:
        from .heatmap import plot_grid

        plot_grid(grid, request.plot)
