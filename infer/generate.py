"""`longtake generate`: answer a question about a video, on all ranks together, as the words come."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..comm.launch import launch
from ..comm.mesh import Mesh
from ..model.chat import Kind, encode_prompt
from ..model.checkpoint import latest, load_model, open_checkpoint
from ..model.media import probe, read_frames, sample_frames
from ..model.official_config import is_official
from ..model.precision import DTYPES, usual_dtype
from ..model.vlm import VisionLanguageModel, no_pixels
from .engine import Engine


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    checkpoint: Path
    dtype: str | None
    video: Path | None
    prompt: str
    frames: int
    max_new_tokens: int
    temperature: float
    seed: int
    ring: int
    ulysses: int


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="longtake generate", description=__doc__)
    add_model(parser)
    parser.add_argument("--video", type=Path, help="video file to ask about; without it the prompt is text only")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--frames", type=int, default=64, help="most frames taken, spread over the video (64)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="most tokens generated (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (0)")
    parser.add_argument("--seed", type=seed, default=0, help="of the sampling (0)")
    add_grid(parser)
    request = Request(**vars(parser.parse_args(argv)))
    check_files(request.checkpoint, request.video)
    launch(run, request, world_size=request.ring * request.ulysses)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model answers, and in which dtype."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of parameters, cache and computation (bfloat16; on a CPU float32)"
    )


def seed(text: str) -> int:
    """What --seed may be: NumPy takes none below 0, torch none of more than 64 bits."""
    if not 0 <= (value := int(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"must be at least 0 and less than 2**63, got {value}")
    return value


def add_grid(parser: argparse.ArgumentParser) -> None:
    """The flags that say on how many ranks a command runs."""
    parser.add_argument("--ring", type=int, default=1, help="ranks of the key ring (1)")
    parser.add_argument("--ulysses", type=int, default=1, help="ranks of the all-to-all over heads (1)")


def check_files(checkpoint: Path, video: Path | None) -> None:
    """Raises ValueError, before any rank starts, for what is no checkpoint and a video that cannot be read."""
    if not is_official(checkpoint):
        latest(checkpoint)
    if video is not None:
        probe(video)


def load_engine(checkpoint: Path, mesh: Mesh, *, dtype: str | None = None) -> tuple[Engine, PreTrainedTokenizerBase]:
    """Model and tokenizer of a checkpoint folder, read straight onto this rank's device.

    dtype: a key of DTYPES, however the parameters are stored; None: the device's usual one.
    """
    config, tokenizer = open_checkpoint(checkpoint)
    with torch.device("meta"):
        model = VisionLanguageModel(config).to(DTYPES[dtype or usual_dtype(mesh.device.type)])
    load_model(checkpoint, model.to_empty(device=mesh.device))
    return Engine(model, mesh), tokenizer


def run(request: Request) -> None:
    """One rank's part; the first prints."""
    mesh = Mesh(ring=request.ring, ulysses=request.ulysses)
    engine, tokenizer = load_engine(request.checkpoint, mesh, dtype=request.dtype)
    for text in stream(engine, tokenizer, request):
        if mesh.rank == 0:
            print(text, end="", flush=True)
    if mesh.rank == 0:
        print()


def stream(engine: Engine, tokenizer: PreTrainedTokenizerBase, request: Request) -> Iterator[str]:
    """The answer in pieces of text. Collective."""
    config, video = engine.model.config, request.video
    indices = [] if video is None else sample_frames(probe(video).num_frames, request.frames)
    media: list[tuple[Kind, int]] = [] if video is None else [("video", len(indices))]
    turns = [{"from": "human", "value": "<video>\n" * len(media) + request.prompt}]
    prompt = encode_prompt(
        tokenizer,
        turns,
        media,
        tokens_per_frame=config.tokens_per_frame,
        newline_token_id=config.newline_token_id,
    )

    def frames(first: int, last: int) -> Tensor:
        if video is None or first == last:
            return no_pixels(config)
        return read_frames(video, indices[first:last], size=config.vision.image_size)

    stop = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    steps = engine.generate(
        [prompt],
        frames,
        max_new_tokens=request.max_new_tokens,
        stop=stop,
        temperature=request.temperature,
        seed=request.seed,
    )
    yield from decode_pieces(tokenizer, (token for (token,) in steps if token is not None and token != stop))


def decode_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """Text as its tokens come; a character that has not all its bytes yet is held back, at most to the end."""
    ids, text, shown = [], "", 0
    for token in tokens:
        ids.append(token)
        text = str(tokenizer.decode(ids))
        if len(text) > shown and not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
    if len(text) > shown:
        yield text[shown:]
