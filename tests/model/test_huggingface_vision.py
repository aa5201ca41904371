"""Vision-language models of Transformers on ranks equal Transformers on one, vision tower included."""

import inspect
from typing import Any, cast

import pytest
import torch
from longtake.comm.mesh import Mesh
from longtake.kernels.attention import attention
from longtake.model.huggingface import disable, enable
from longtake.model.huggingface_vision import ROW_FOR_TOKEN, ImageShare
from transformers import Gemma3ForConditionalGeneration

from tests.model.test_huggingface import GRIDS, TOLERANCE, generate, loss_and_gradients, worst_error
from tests.model.tiny_transformers import END, IMAGE, NUM_WORDS, START, VIDEO, VISION, gemma3, llava, qwen2_5_vl
from tests.ranks import run_ranks

Grid = tuple[int, int, int]  # frames, height and width in patches; 4 patches a token
SMALL, WIDE, CLIP = (1, 4, 4), (1, 4, 8), (3, 4, 4)
# Older ones have Gemma 3 take its loss past loss_function.
OWN_LOSS = "CrossEntropyLoss" in inspect.getsource(Gemma3ForConditionalGeneration.forward)


def batch(rows: list[list[Grid]], *, family: str, left: bool = False) -> dict[str, Any]:
    """Rows of words with images (one frame) and videos between; padded to the longest."""
    patches = family.startswith("qwen")
    generator = torch.Generator().manual_seed(len(rows) + sum(map(len, rows)))
    sequences, grids = [], {IMAGE: [], VIDEO: []}
    for row in rows:
        parts = [torch.randint(0, NUM_WORDS, (5,), generator=generator)]
        for grid in row:
            token = IMAGE if grid[0] == 1 else VIDEO
            grids[token].append(grid)
            spans = grid[0] if family == "qwen3_vl" else 1  # it puts its video tokens frame by frame
            for _ in range(spans):
                marks = torch.tensor([START, *[token] * (num_tokens(grid, family) // spans), END])
                parts += [marks, torch.randint(0, NUM_WORDS, (4,), generator=generator)]
        sequences.append(torch.cat(parts))
    longest = max(map(len, sequences))
    sides = [(longest - len(s), 0) if left else (0, longest - len(s)) for s in sequences]
    ids = torch.stack([torch.nn.functional.pad(s, side) for s, side in zip(sequences, sides, strict=True)])
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones_like(s), side) for s, side in zip(sequences, sides, strict=True)]
    )
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0))
    labels = ids.masked_fill((mask & before) == 0, -100).masked_fill(ids >= NUM_WORDS, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if not patches and grids[IMAGE]:
        crops = (3,) if family == "llava_onevision" else ()
        inputs["pixel_values"] = torch.randn(len(grids[IMAGE]), *crops, 3, 8, 8, generator=generator)
        if crops:
            inputs["image_sizes"] = torch.tensor([[2 * h, 2 * w] for _, h, w in grids[IMAGE]])
    if not patches:
        return inputs
    inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    names = {IMAGE: ("pixel_values", "image_grid_thw"), VIDEO: ("pixel_values_videos", "video_grid_thw")}
    for token, (pixels, grid) in names.items():
        if grids[token]:
            thw = torch.tensor(grids[token])
            inputs |= {grid: thw, pixels: torch.randn(int(thw.prod(1).sum()), 24, generator=generator)}
    return inputs


def num_tokens(grid: Grid, family: str) -> int:
    """Image tokens: 4 patches each; LLaVA-OneVision has a thumbnail and newlines besides."""
    tokens = grid[0] * grid[1] * grid[2] // 4
    return tokens + 4 + 2 if family == "llava_onevision" else tokens


def batches(family: str) -> dict[str, dict[str, Any]]:
    """By number of images: none, fewer than ranks, more."""
    wide = SMALL if family in ("llava", "internvl") else WIDE
    cases = {"none": [[], []], "one": [[], [SMALL]], "three": [[wide, SMALL], [SMALL]], "five": [[SMALL] * 4, [wide]]}
    if family.startswith("qwen"):
        cases["clips"] = [[CLIP, SMALL], [CLIP]]
    return {name: batch(rows, family=family) for name, rows in cases.items()}


def train_on_ranks(rank: int, ring: int, ulysses: int) -> dict[str, float]:
    mesh, errors = Mesh(ring=ring, ulysses=ulysses), {}
    for family, build in VISION.items():
        model = build()
        model.set_attn_implementation("eager")
        expected = {name: loss_and_gradients(model, inputs) for name, inputs in batches(family).items()}
        enable(model, mesh, layout="zigzag" if ulysses == 1 else "balanced")
        for name, inputs in batches(family).items():
            found = loss_and_gradients(model, inputs, mesh)
            errors[f"{family}, {name}"] = worst_error(found, expected[name])
    return errors


@pytest.mark.parametrize(("ring", "ulysses"), GRIDS)
def test_training_equals_one_rank(ring: int, ulysses: int) -> None:
    for errors in run_ranks(train_on_ranks, ring * ulysses, ring, ulysses):
        assert not {case: error for case, error in errors.items() if not error < TOLERANCE}
        assert len(errors) == 3 * 4 + 3 * 5


def generate_on_ranks(rank: int, ring: int, ulysses: int) -> dict[str, bool]:
    mesh, same = Mesh(ring=ring, ulysses=ulysses), {}
    for family, build in VISION.items():
        model = build()
        clip = [CLIP] if family.startswith("qwen") else [SMALL]
        prompts = {
            "one": batch([[SMALL]], family=family),
            "left": batch([[SMALL, *clip, SMALL], []], family=family, left=True),
        }
        model.set_attn_implementation("eager")
        expected = {name: generate(model, prompt) for name, prompt in prompts.items()}
        enable(model, mesh)
        for name, prompt in prompts.items():
            same[f"{family}, {name}"] = torch.equal(generate(model, prompt), expected[name])
    return same


@pytest.mark.parametrize(("ring", "ulysses"), GRIDS)
def test_greedy_tokens_equal_one_rank(ring: int, ulysses: int) -> None:
    for same in run_ranks(generate_on_ranks, ring * ulysses, ring, ulysses):
        assert [case for case, equal in same.items() if not equal] == []
        assert len(same) == 12


def packed_videos() -> dict[str, Any]:
    """Two documents in one row of Qwen2.5-VL, by text's positions in the first of four rows."""
    inputs = batch([[SMALL, CLIP, WIDE]], family="qwen2_5_vl")
    del inputs["attention_mask"]
    length = inputs["input_ids"].shape[1]
    text = torch.cat([torch.arange(19), torch.arange(length - 19)])
    grid = torch.randint(0, 30, (3, length), generator=torch.Generator().manual_seed(3))
    return inputs | {"position_ids": torch.cat([text[None], grid])[:, None], "use_cache": False}


def odds_on_ranks(rank: int) -> tuple[float, dict[str, int]]:
    """The error of packed documents under M-RoPE; patches of one clip that this rank encodes; bytes sent for images
    with features straight and to all."""
    mesh, model = Mesh(ring=2, ulysses=2), qwen2_5_vl()
    model.set_attn_implementation("eager")
    expected = loss_and_gradients(model, packed_videos())
    enable(model, mesh)
    error = worst_error(loss_and_gradients(model, packed_videos(), mesh), expected)

    seen: list[int] = []
    model.model.visual.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model(**batch([[CLIP]], family="qwen2_5_vl"))

    model, sent = llava(), {"patches": seen[0]}
    enable(model, mesh)
    for name, families in (("straight", ROW_FOR_TOKEN), ("to all", set())):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("longtake.model.huggingface_vision.ROW_FOR_TOKEN", families)
            before = mesh.transport.bytes_sent["sp"]
            model(**batch([[SMALL] * 24], family="llava"))
            sent[name] = mesh.transport.bytes_sent["sp"] - before
    return error, sent


def test_packed_documents_and_straight_features() -> None:
    results = run_ranks(odds_on_ranks, 4)
    assert max(error for error, _ in results) < TOLERANCE
    assert max(sent["patches"] for _, sent in results) == 16  # of 48: a frame each, on three of four ranks
    straight, to_all = (sum(sent[name] for _, sent in results) for name in ("straight", "to all"))
    assert 0 < straight < to_all / 2.9  # a feature goes to one rank, not to three


def blocks(rows: list[list[Grid]], left: bool = False) -> dict[str, Any]:
    """A batch of Gemma 3, whose images are told by token_type_ids. Longer than its window of 6."""
    inputs = batch(rows, family="gemma3", left=left)
    return inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def packed_blocks() -> dict[str, Any]:
    inputs = blocks([[SMALL, SMALL, SMALL]])
    del inputs["attention_mask"]
    length = inputs["input_ids"].shape[1]
    return inputs | {"position_ids": torch.cat([torch.arange(17), torch.arange(length - 17)])[None], "use_cache": False}


def test_blocks_that_look_both_ways_are_intervals() -> None:
    model, inputs = gemma3(), blocks([[SMALL, SMALL], [SMALL]], left=True)
    model.set_attn_implementation("eager")
    expected = loss_and_gradients(model, inputs)
    model.set_attn_implementation("longtake")
    assert worst_error(loss_and_gradients(model, inputs), expected) < TOLERANCE


def blocks_on_ranks(rank: int, ring: int, ulysses: int) -> tuple[dict[str, float], dict[str, bool]]:
    """Errors of training, and whether greedy tokens are the same, with images cut by the ranks' bounds.

    Gemma's norms multiply by 1 + weight, here 2: scores are sharper, and so are rounding errors.
    """
    mesh, model, errors, same = Mesh(ring=ring, ulysses=ulysses), gemma3(), {}, {}
    packed = packed_blocks()
    cases = {
        "one row": blocks([[SMALL, SMALL, SMALL]]),
        "left": blocks([[SMALL, SMALL], [SMALL]], left=True),
        "right": blocks([[SMALL, SMALL], [SMALL], []]),
        "no image": blocks([[]]),
        "packed": packed,
        "restarts in one document": packed | {"attention_mask": torch.ones_like(packed["input_ids"])},
        "no types": {name: x for name, x in packed.items() if name != "token_type_ids"},
    }
    prompts = {"one row": cases["one row"], "left": cases["left"]}
    model.set_attn_implementation("eager")
    trained = {} if OWN_LOSS else cases
    expected = {name: loss_and_gradients(model, inputs) for name, inputs in trained.items()}
    tokens = {name: generate(model, inputs) for name, inputs in prompts.items()}
    for layout, route in (("contiguous", "direct"), ("zigzag", "relay"))[: 2 if ring > 1 else 1]:
        enable(model, mesh, layout=layout, route=cast(Any, route))
        for name, inputs in trained.items():
            found = loss_and_gradients(model, inputs, mesh)
            errors[f"{layout}, {name}"] = worst_error(found, expected[name])
        for name, inputs in prompts.items():
            same[f"{layout}, {name}"] = torch.equal(generate(model, inputs), tokens[name])
        disable(model)
    return errors, same


def test_masks_that_a_decoder_makes_of_its_own_are_refused() -> None:
    model = gemma3().get_decoder()
    enable(model, Mesh(alone=True))
    model.config.use_bidirectional_attention = True
    with pytest.raises(ValueError, match="masks have a part of its own"):
        model(torch.arange(20)[None])


@pytest.mark.parametrize(("ring", "ulysses"), GRIDS)
def test_blocks_that_look_both_ways_go_over_ranks(ring: int, ulysses: int) -> None:
    for errors, same in run_ranks(blocks_on_ranks, ring * ulysses, ring, ulysses):
        assert not {case: error for case, error in errors.items() if not error < 3 * TOLERANCE}
        assert [case for case, equal in same.items() if not equal] == []
        num_layouts = 2 if ring > 1 else 1
        assert (len(errors), len(same)) == (0 if OWN_LOSS else 7 * num_layouts, 2 * num_layouts)


def test_all_windows_of_all_frames_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = qwen2_5_vl(), []
    enable(model, Mesh(alone=True))
    record = lambda q, k, v, **options: calls.append(options) or attention(q, k, v, **options)  # noqa: E731
    monkeypatch.setattr("longtake.model.huggingface_attention.attention", record)
    model(**batch([[SMALL, WIDE, CLIP]], family="qwen2_5_vl"))
    visual = [call["cu_seqlens"].diff().tolist() for call in calls if "cu_seqlens" in call]
    assert visual == [[16] * 3, [16, 32], [16] * 3] + [[16] * 3] * 3  # images: windows, whole, windows; then the clip


def test_features_that_do_not_fit_are_counted() -> None:
    model, inputs = llava(), batch([[SMALL, SMALL]], family="llava")
    enable(model, Mesh(alone=True))
    with pytest.raises(ValueError, match="the images have 4 features, the batch has 8 image tokens for them"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:1]})


def test_images_go_to_ranks_by_cost() -> None:
    mesh = Mesh(alone=True)
    mesh.sp_size = 3
    shares = {costs: ImageShare.by_cost(mesh, torch.tensor(costs), (1,) * len(costs)).bounds for costs in COSTS}
    assert shares == COSTS


COSTS = {
    (5.0,): (0, 0, 1, 1),
    (1.0, 1.0): (0, 1, 1, 2),
    (1.0,) * 6: (0, 2, 4, 6),
    (4.0, 1.0, 1.0, 1.0, 1.0, 4.0): (0, 1, 5, 6),
}
