"""`longtake generate`: answer a question about a video, on all ranks together, as the words come."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..comm.launch import launch
from ..comm.mesh import Mesh
from ..model.chat import encode_prompt, load_tokenizer
from ..model.checkpoint import load_model
from ..model.config import ModelConfig
from ..model.media import probe, read_frames, sample_frames
from ..model.vlm import VisionLanguageModel, no_pixels
from .engine import Engine


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    checkpoint: Path
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
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--video", type=Path, help="video file to ask about; without it the prompt is text only")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--frames", type=int, default=64, help="most frames taken, spread over the video (64)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="most tokens generated (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    add_grid(parser)
    request = Request(**vars(parser.parse_args(argv)))
    launch(run, request, world_size=request.ring * request.ulysses)


def add_grid(parser: argparse.ArgumentParser) -> None:
    """The flags that say on how many ranks a command runs."""
    parser.add_argument("--ring", type=int, default=1, help="ranks of the key ring (1)")
    parser.add_argument("--ulysses", type=int, default=1, help="ranks of the all-to-all over heads (1)")


def load_engine(checkpoint: Path, mesh: Mesh) -> tuple[Engine, PreTrainedTokenizerBase]:
    """Model and tokenizer of a checkpoint folder, ready on this rank's device."""
    model = VisionLanguageModel(ModelConfig.load(checkpoint))
    load_model(checkpoint, model)
    return Engine(model.to(mesh.device), mesh), load_tokenizer(checkpoint)


def run(request: Request) -> None:
    """One rank's part; the first prints."""
    mesh = Mesh(ring=request.ring, ulysses=request.ulysses)
    engine, tokenizer = load_engine(request.checkpoint, mesh)
    for text in stream(engine, tokenizer, request):
        if mesh.rank == 0:
            print(text, end="", flush=True)
    if mesh.rank == 0:
        print()


def stream(engine: Engine, tokenizer: PreTrainedTokenizerBase, request: Request) -> Iterator[str]:
    """The answer in pieces of text. Raises MediaError, before any collective, for a video that cannot be read."""
    config = engine.model.config
    value, media, indices = request.prompt, [], []
    if request.video is not None:
        info = probe(request.video)
        indices = sample_frames(info.num_frames, request.frames)
        value, media = f"<video>\n{value}", [("video", len(indices))]
    prompt = encode_prompt(
        tokenizer, [{"from": "human", "value": value}], media, tokens_per_frame=config.tokens_per_frame
    )
    size = config.vision.image_size

    def frames(first: int, last: int):
        if request.video is None or first == last:
            return no_pixels(config)
        return read_frames(request.video, indices[first:last], size=size)

    stop = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    shown, produced = "", []
    steps = engine.generate(
        [prompt],
        frames,
        max_new_tokens=request.max_new_tokens,
        stop=stop,
        temperature=request.temperature,
        seed=request.seed,
    )
    for (token,) in steps:
        produced += [token] if token not in (None, stop) else []
        text = tokenizer.decode(produced)
        if not text.endswith("\ufffd"):  # in the middle of a character
            yield text[len(shown) :]
            shown = text
