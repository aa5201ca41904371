"""Sequence-parallel inference says what re-running the whole prefix on one rank says, on every grid of ranks.

What is not initialised is NaN in these tests, so that nothing is read before it is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from longtake.comm.mesh import Mesh
from longtake.infer.engine import Engine, Slots
from longtake.kernels.attention import attention
from longtake.model.vlm import VisionLanguageModel
from tests.ranks import run_ranks
from tests.tiny import VIDEO_TOKEN, random_model, tiny_config

TOKENS_PER_FRAME = 4
NEVER = -1  # a stop token that no model says
TOLERANCE = 1e-5  # float32 sums in another order; errors seen are below 2e-6 of the largest value
MARGIN = 1e-3  # of the two best logits, far above that: no token here is a matter of rounding
HEADS = {(1, 1): (4, 2), (2, 2): (7, 1), (4, 1): (4, 2), (1, 4): (7, 1), (1, 2): (7, 7)}  # ring, ulysses: q, k and v
SHAPES: dict[str, list[tuple[int, ...]]] = {  # of prompts: runs of text, and a frame between each two
    "text": [(5,), (1,), (41,), (23,)],
    "one token": [(1,)],
    "one frame": [(2, 3)],
    "video": [(3, *[0] * 12, 6), (17,), (1, 1), (2, 0, 0, 5, 0, 0, 4)],
    "long": [(9, *[0] * 60, 11)],
}
CASES = [(name, 65_536) for name in SHAPES] + [("text", 7), ("video", 16), ("video", 3), ("long", 50)]  # with chunk


@dataclass(frozen=True, eq=False)
class Prompt:
    """A Document with its frames' `pixels`, float32 [num_frames, 3, 16, 16]."""

    input_ids: Tensor
    frame_starts: Tensor
    pixels: Tensor
    loss_weight: Tensor = field(default_factory=lambda: torch.empty(0))


def make_prompts(name: str) -> list[Prompt]:
    generator = torch.Generator().manual_seed(len(name))
    prompts = []
    for runs in SHAPES[name]:
        ids, starts = [], []
        for i, length in enumerate(runs):
            if i:
                starts.append(sum(map(len, ids)))
                ids.append(torch.full((TOKENS_PER_FRAME,), VIDEO_TOKEN))
            ids.append(torch.randint(8, 64, (length,), generator=generator))
        pixels = torch.randn(len(starts), 3, 16, 16, generator=generator)
        prompts.append(Prompt(torch.cat(ids), torch.tensor(starts, dtype=torch.int64), pixels))
    return prompts


def make_model(heads: tuple[int, int]) -> VisionLanguageModel:
    return random_model(tiny_config(num_heads=heads[0], num_kv_heads=heads[1]), seed=3)


@dataclass(frozen=True, eq=False)
class Said:
    """tokens: of each prompt; hidden: the states that they were chosen from, [num_tokens, C] of each prompt."""

    tokens: list[list[int]]
    hidden: list[Tensor]


def say(engine: Engine, prompts: Sequence[Prompt], *, max_new_tokens: int = 4, stop: int = NEVER, **options: Any) -> Said:
    pixels, llm = torch.cat([p.pixels for p in prompts]), engine.model.llm
    tokens: list[list[int]] = [[] for _ in prompts]
    hidden: list[list[Tensor]] = [[] for _ in prompts]
    with patch.object(llm, "logits", wraps=llm.logits) as logits:
        for step in engine.generate(
            prompts, lambda first, last: pixels[first:last], max_new_tokens=max_new_tokens, stop=stop, **options
        ):
            going = [(i, token) for i, token in enumerate(step) if token is not None]
            for (i, token), state in zip(going, logits.call_args.args[0], strict=True):
                tokens[i].append(token)
                hidden[i].append(state)
    return Said(tokens, [torch.stack(states) for states in hidden])


def run_again(model: VisionLanguageModel, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
    """States [num_tokens, C] that each token follows from: the whole prefix once more, in plain attention."""
    embeds = model.llm.embed(torch.cat([prompt.input_ids, torch.tensor(tokens[:-1], dtype=torch.int64)]))
    if len(prompt.frame_starts):
        embeds[: len(prompt.input_ids)][prompt.input_ids == VIDEO_TOKEN] = model.mm_projector(
            model.vision_tower(prompt.pixels)
        ).flatten(0, 1)
    lengths = range(len(prompt.input_ids), len(embeds) + 1)
    return torch.stack([model.llm(embeds[:n], torch.arange(n), causal)[-1] for n in lengths])


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q[None], k[None], v[None], causal=True, backend="reference")[0]


def all_cases(rank: int, ring: int, ulysses: int) -> list[Said]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is not initialised with NaN
    mesh, model = Mesh(ring=ring, ulysses=ulysses), make_model(HEADS[ring, ulysses])
    return [say(Engine(model, mesh, chunk=chunk), make_prompts(name)) for name, chunk in CASES]


@pytest.mark.parametrize(("ring", "ulysses"), HEADS)
@torch.no_grad()
def test_generation_equals_running_the_prefix_again(ring: int, ulysses: int) -> None:
    model = make_model(HEADS[ring, ulysses])
    ranks = run_ranks(all_cases, ring * ulysses, ring, ulysses)
    for number, (name, chunk) in enumerate(CASES):
        for i, prompt in enumerate(make_prompts(name)):
            tokens, hidden = ranks[0][number].tokens[i], ranks[0][number].hidden[i]
            expected = run_again(model, prompt, tokens)
            error = float((hidden - expected).abs().max() / expected.abs().max())
            assert error < TOLERANCE, (name, chunk, i, error)
            best = model.llm.logits(expected).topk(2)
            assert (best.values[:, 0] - best.values[:, 1]).min() > MARGIN, (name, chunk, i)
            assert tokens == best.indices[:, 0].tolist() and len(tokens) == 4, (name, chunk, i)
            assert all(said[number].tokens[i] == tokens for said in ranks)
