"""Sequence-parallel inference says what re-running the whole prefix on one rank says, on every grid of ranks.

What is not initialised is NaN in these tests, so that nothing is read before it is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from longtake.comm.mesh import Mesh
from longtake.infer.engine import Engine, Slots
from longtake.kernels.attention import attention
from longtake.model.vlm import VisionLanguageModel
from torch import Tensor

from tests.host_syncs import HostSyncs
from tests.model.stand_ins import META, meta_mesh, stand_in_for_kernels
from tests.ranks import run_ranks
from tests.tiny import VIDEO_TOKEN, random_model, tiny_config

TOKENS_PER_FRAME = 4
NEVER = -1  # a stop token that no model says
TOLERANCE = 1e-5  # float32 sums in another order; errors seen are below 3e-6 of the largest value
MARGIN = 1e-3  # between the two best logits, far above that: no token here is a matter of rounding
GRIDS = {  # ring, ulysses: q heads, k and v heads
    (1, 1): (4, 2),
    (1, 2): (9, 3),  # a rank's q heads share its k, v heads unevenly
    (2, 2): (7, 1),
    (4, 1): (4, 2),
    (1, 4): (7, 1),
}
SHAPES: dict[str, list[tuple[int, ...]]] = {  # of prompts: runs of text, and a frame between each two
    "text": [(5,), (1,), (41,), (23,)],
    "one token": [(1,)],
    "one frame": [(2, 3)],
    "video": [(3, *[0] * 12, 6), (17,), (1, 1), (2, 0, 0, 5, 0, 0, 4)],
    "long": [(9, *[0] * 60, 11)],
}
WHOLE = 65_536  # a chunk that takes all
CASES = [*((name, WHOLE) for name in SHAPES), ("text", 7), ("video", 16), ("video", 3), ("long", 50)]  # with chunk


@dataclass(frozen=True, eq=False)
class Prompt:
    """A Document with the `pixels` of its frames, float32 [num_frames, 3, 16, 16]."""

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


def make_model(num_heads: int, num_kv_heads: int) -> VisionLanguageModel:
    return random_model(tiny_config(num_heads=num_heads, num_kv_heads=num_kv_heads), seed=3)


@dataclass(frozen=True, eq=False)
class Said:
    """tokens: of each prompt; hidden: the states that they were chosen from, [num_tokens, C] of each prompt."""

    tokens: list[list[int]]
    hidden: list[Tensor]


def say(engine: Engine, name: str, *, max_new_tokens: int = 4, stop: int = NEVER, **options: Any) -> Said:
    prompts, llm = make_prompts(name), engine.model.llm
    pixels = torch.cat([prompt.pixels for prompt in prompts])
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


def test_what_is_beyond_the_models_context_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(4, 2)
    for context, warnings in ((45, 0), (44, 1)):  # the longest prompt is of 41 tokens, and 4 more
        language = replace(model.config.language, max_position_embeddings=context)
        model.config = replace(model.config, language=language)
        engine = Engine(model, Mesh(alone=True))
        for name in ("text", "text", "one token"):
            say(engine, name)
        assert len(caplog.messages) == warnings
    assert "45 tokens" in caplog.text and "the model's context of 44" in caplog.text


def run_again(model: VisionLanguageModel, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
    """The states [num_tokens, C] that tokens follow from, each by the whole prefix in plain attention."""
    embeds = model.llm.embed(torch.cat([prompt.input_ids, torch.tensor(tokens[:-1], dtype=torch.int64)]))
    if len(prompt.frame_starts):
        features = model.mm_projector(model.vision_tower(prompt.pixels)).flatten(0, 1)
        embeds[: len(prompt.input_ids)][prompt.input_ids == VIDEO_TOKEN] = features
    lengths = range(len(prompt.input_ids), len(embeds) + 1)
    return torch.stack([model.llm(embeds[:n], torch.arange(n), causal)[-1] for n in lengths])


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q[None], k[None], v[None], causal=True, backend="reference")[0]


@dataclass(frozen=True, eq=False)
class Results:
    """Of one rank. cases: as CASES; stopped: at the second token of the first prompt; cache: elements kept, of all."""

    cases: list[Said]
    stopped: Said
    single: Said
    sampled: Said
    cache: tuple[int, int]


def everything(rank: int, ring: int, ulysses: int) -> Results:
    torch.set_deterministic_debug_mode("warn")  # fills what is not initialised with NaN
    mesh = Mesh(ring=ring, ulysses=ulysses)
    model = make_model(*GRIDS[ring, ulysses])
    cases = [say(Engine(model, mesh, chunk=chunk), name) for name, chunk in CASES]
    engine = Engine(model, mesh)
    return Results(
        cases,
        stopped=say(engine, "text", stop=cases[0].tokens[0][1]),
        single=say(engine, "video", max_new_tokens=1),
        sampled=say(engine, "text", temperature=1.0, seed=5),
        cache=cache_elements(mesh),
    )


def cache_elements(mesh: Mesh) -> tuple[int, int]:
    """Elements that this rank keeps for the long prompt, with 8 q heads and 4 k, v heads, and those of all ranks."""
    prompts, engine = make_prompts("long"), Engine(make_model(8, 4), mesh, chunk=100)
    with torch.no_grad():
        kept, _ = engine._prefill(Slots.of(prompts, 4), lambda first, last: prompts[0].pixels[first:last])
    return kept.keys.numel() + kept.values.numel(), 2 * 2 * (len(prompts[0].input_ids) + 4) * 4 * 8


@cache
def on_ranks(ring: int, ulysses: int) -> list[Results]:
    return run_ranks(everything, ring * ulysses, ring, ulysses)


over_grids = pytest.mark.parametrize(("ring", "ulysses"), GRIDS)


@over_grids
@torch.no_grad()
def test_generation_equals_running_the_prefix_again(ring: int, ulysses: int) -> None:
    model = make_model(*GRIDS[ring, ulysses])
    for case, said in zip(CASES, on_ranks(ring, ulysses)[0].cases, strict=True):
        for i, prompt in enumerate(make_prompts(case[0])):
            expected = run_again(model, prompt, said.tokens[i])
            error = float((said.hidden[i] - expected).abs().max() / expected.abs().max())
            assert error < TOLERANCE, (case, i, error)
            best = model.llm.logits(expected).topk(2)
            assert (best.values[:, 0] - best.values[:, 1]).min() > MARGIN, (case, i)
            assert said.tokens[i] == best.indices[:, 0].tolist(), (case, i)
            assert len(said.tokens[i]) == 4


@over_grids
def test_all_ranks_get_the_same_tokens(ring: int, ulysses: int) -> None:
    first, *others = on_ranks(ring, ulysses)
    for other in others:
        for mine, said in zip(
            [*first.cases, first.stopped, first.single, first.sampled],
            [*other.cases, other.stopped, other.single, other.sampled],
            strict=True,
        ):
            assert said.tokens == mine.tokens
    assert len({tuple(tokens) for said in first.cases for tokens in said.tokens}) > 5  # they vary


@over_grids
def test_a_prompt_that_stops_early_leaves_the_others_as_they_were(ring: int, ulysses: int) -> None:
    results = on_ranks(ring, ulysses)[0]
    whole, stopped = results.cases[0], results.stopped
    stop = whole.tokens[0][1]
    for i, tokens in enumerate(whole.tokens):
        length = tokens.index(stop) + 1 if stop in tokens else len(tokens)
        assert stopped.tokens[i] == tokens[:length]
        torch.testing.assert_close(stopped.hidden[i], whole.hidden[i][:length], rtol=0, atol=1e-4)  # of about 3
    lengths = sorted(map(len, stopped.tokens))
    assert lengths[0] <= 2 and lengths[-1] == 4


@over_grids
def test_a_single_token_needs_no_decoding(ring: int, ulysses: int) -> None:
    results = on_ranks(ring, ulysses)[0]
    whole = results.cases[CASES.index(("video", WHOLE))]
    assert results.single.tokens == [tokens[:1] for tokens in whole.tokens]


@over_grids
def test_sampled_tokens_follow_from_the_seed_and_not_from_the_ranks(ring: int, ulysses: int) -> None:
    alone = Engine(make_model(*GRIDS[ring, ulysses]), Mesh(alone=True))
    sampled = on_ranks(ring, ulysses)[0].sampled.tokens
    assert sampled == say(alone, "text", temperature=1.0, seed=5).tokens
    assert sampled != say(alone, "text", temperature=1.0, seed=6).tokens
    assert sampled != say(alone, "text").tokens


@over_grids
def test_each_rank_keeps_its_share_of_the_cache(ring: int, ulysses: int) -> None:
    kept = [results.cache[0] for results in on_ranks(ring, ulysses)]
    total = on_ranks(ring, ulysses)[0].cache[1]
    assert sum(kept) == total
    assert max(kept) <= 1.15 * total / len(kept)  # three chunks of 100 slots, uneven by a block of 4 each


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1000, [0, 22]),
        (6, [0, 3, 7, 13, 19, 22]),
        (1, [0, 1, 2, 3, 7, 11, 12, 13, 17, 18, 19, 20, 21, 22]),  # a frame is never cut, however small the chunk
        (7, [0, 7, 13, 20, 22]),
    ],
)
def test_chunks_are_cut_beside_frames(size: int, expected: list[int]) -> None:
    prompt = Prompt(torch.zeros(20, dtype=torch.int64), torch.tensor([3, 7, 13]), torch.empty(0))
    assert Slots.of([prompt], 2).chunk_edges(size, TOKENS_PER_FRAME) == expected


def test_what_cannot_be_generated_is_named() -> None:
    model, mesh = make_model(4, 2), Mesh(alone=True)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        Engine(model, mesh, chunk=0)
    engine = Engine(model, mesh)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        say(engine, "text", max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature must be at least 0, got -1"):
        say(engine, "text", temperature=-1.0)
    nothing = Prompt(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0))
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        next(
            engine.generate(
                [*make_prompts("one token"), nothing], lambda a, b: nothing.pixels, max_new_tokens=1, stop=0
            )
        )


@over_grids
def test_on_a_gpu_the_tokens_are_all_that_is_waited_for(
    ring: int, ulysses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On META, which stands for it and holds nothing: what the model says is made up when it is read."""
    prompts, (num_heads, num_kv_heads) = make_prompts("video"), GRIDS[ring, ulysses]
    stand_in_for_kernels(monkeypatch)
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
    read, tolist = [], Tensor.tolist

    def made_up(x: Tensor) -> list[int]:
        if x.device != META:
            return tolist(x)
        read.append(len(x))
        return [int(len(read) == 2 and i == 1) for i in range(len(x))]  # the second prompt stops

    monkeypatch.setattr(Tensor, "tolist", made_up)
    for rank in range(ring * ulysses):
        with META:
            model = VisionLanguageModel(tiny_config(num_heads=num_heads, num_kv_heads=num_kv_heads))
        engine = Engine(model, meta_mesh(rank, ring=ring, ulysses=ulysses), chunk=16)
        read.clear()
        with HostSyncs("meta") as syncs:
            said = list(
                engine.generate(
                    prompts,
                    lambda first, last: torch.empty(last - first, 3, 16, 16),
                    max_new_tokens=4,
                    stop=1,
                    temperature=0.7,
                    top_p=0.9,
                )
            )
        assert not syncs.found
        assert read == [4, 4, 3, 3] and said == [[0] * 4, [0, 1, 0, 0], [0, None, 0, 0], [0, None, 0, 0]]
