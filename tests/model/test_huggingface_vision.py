"""Vision-language models of Transformers on ranks equal Transformers on one, vision tower included."""

from functools import partial
from typing import Any, cast

import pytest
import torch
from longtake.comm.mesh import Mesh
from longtake.kernels.attention import attention
from longtake.model.huggingface import disable, enable
from longtake.model.huggingface_vision import ImageShare, VisionShare
from transformers import GenerationMixin

from tests.model.test_huggingface import GRIDS, TOLERANCE, generate, loss_and_gradients, worst_error
from tests.model.tiny_transformers import (
    END,
    IMAGE,
    NUM_WORDS,
    START,
    VIDEO,
    VISION,
    gemma3,
    llava,
    qwen2_5_vl,
    qwen3_vl,
)
from tests.ranks import run_ranks

Grid = tuple[int, int, int]  # frames, height and width in patches; 4 patches a token
SMALL, WIDE, CLIP = (1, 4, 4), (1, 4, 8), (3, 4, 4)
ENCODES_FIRST = hasattr(GenerationMixin, "_supports_mm_encoder_outputs")  # in newer ones, generate() before its prefill


def batch(rows: list[list[Grid]], *, family: str, left: bool = False, uncropped: bool = False) -> dict[str, Any]:
    """Rows of words with images (one frame) and videos between; padded to the longest.

    uncropped: LLaVA-OneVision is told which images are of one row, and does not crop those of rows with several.
    """
    patches = family.startswith("qwen")
    generator = torch.Generator().manual_seed(len(rows) + sum(map(len, rows)))
    sequences, grids = [], {IMAGE: [], VIDEO: []}
    for row in rows:
        parts = [torch.randint(0, NUM_WORDS, (5,), generator=generator)]
        for grid in row:
            token = IMAGE if grid[0] == 1 else VIDEO
            grids[token].append(grid)
            spans = grid[0] if family.startswith("qwen3") else 1  # it puts its video tokens frame by frame
            tokens = 9 + 1 if uncropped and len(row) > 1 else num_tokens(grid, family)
            for _ in range(spans):
                marks = torch.tensor([START, *[token] * (tokens // spans), END])
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
    if family == "llava_onevision":
        return inputs | crops_and_frames(grids, [len(row) for row in rows] if uncropped else None, generator)
    if not patches and grids[IMAGE]:
        inputs["pixel_values"] = torch.randn(len(grids[IMAGE]), 3, 8, 8, generator=generator)
    if not patches:
        return inputs
    inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    names = {IMAGE: ("pixel_values", "image_grid_thw"), VIDEO: ("pixel_values_videos", "video_grid_thw")}
    for token, (pixels, grid) in names.items():
        if grids[token]:
            thw = torch.tensor(grids[token])
            inputs |= {grid: thw, pixels: torch.randn(int(thw.prod(1).sum()), 24, generator=generator)}
    return inputs


def crops_and_frames(
    grids: dict[int, list[Grid]], per_row: list[int] | None, generator: torch.Generator
) -> dict[str, Any]:
    """Images in three crops at most, a thumbnail among them, and videos of three frames."""
    inputs: dict[str, Any] = {}
    if grids[IMAGE]:
        inputs["pixel_values"] = torch.randn(len(grids[IMAGE]), 3, 3, 12, 12, generator=generator)
        inputs["image_sizes"] = torch.tensor([[2 * h, 2 * w] for _, h, w in grids[IMAGE]])
    if grids[VIDEO]:
        inputs["pixel_values_videos"] = torch.randn(len(grids[VIDEO]), 3, 3, 12, 12, generator=generator)
    return inputs if per_row is None else inputs | {"batch_num_images": torch.tensor(per_row)}


def num_tokens(grid: Grid, family: str) -> int:
    """4 patches each; LLaVA-OneVision has a thumbnail of 9 and a newline for each row of crops of 3 x 3, and one for a
    video, of 4 tokens a frame."""
    frames, height, width = grid
    if family != "llava_onevision":
        return frames * height * width // 4
    return 4 * frames + 1 if frames > 1 else 9 + 9 * (height // 4) * (width // 4) + 3 * (height // 4)


def batches(family: str) -> dict[str, dict[str, Any]]:
    """By number of images: none, fewer than ranks, more."""
    wide = SMALL if family in ("llava", "internvl") else WIDE
    cases = {"none": [[], []], "one": [[], [SMALL]], "three": [[wide, SMALL], [SMALL]], "five": [[SMALL] * 4, [wide]]}
    if has_videos(family):
        cases["clips"] = [[CLIP, SMALL], [CLIP]]
    made = {name: batch(rows, family=family) for name, rows in cases.items()}
    if family == "llava_onevision":
        made["uncropped"] = batch([[SMALL] * 5, [WIDE], [SMALL] * 2], family=family, uncropped=True)
    return made


def has_videos(family: str) -> bool:
    return family.startswith("qwen") or family == "llava_onevision"


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
        assert len(errors) == 2 * 4 + 4 * 5 + 6


def generate_on_ranks(rank: int, ring: int, ulysses: int) -> dict[str, bool]:
    mesh, same = Mesh(ring=ring, ulysses=ulysses), {}
    for family, build in VISION.items():
        model = build()
        clip = [CLIP] if has_videos(family) else [SMALL]
        prompts = {
            "one": batch([[SMALL]], family=family),
            "left": batch([[SMALL, *clip, SMALL], []], family=family, left=True),
        }
        model.set_attn_implementation("eager")
        expected = {name: generate(model, prompt) for name, prompt in prompts.items()}
        enable(model, mesh)
        for name, prompt in prompts.items():
            same[f"{family}, {name}"] = torch.equal(generate(model, prompt), expected[name])
        if family == "qwen3_vl" and ENCODES_FIRST:  # in chunks of a prompt whose images are encoded before
            same["chunks"] = torch.equal(generate(model, prompts["left"], prefill_chunk_size=8), expected["left"])
    return same


@pytest.mark.parametrize(("ring", "ulysses"), GRIDS)
def test_greedy_tokens_equal_one_rank(ring: int, ulysses: int) -> None:
    for same in run_ranks(generate_on_ranks, ring * ulysses, ring, ulysses):
        assert [case for case, equal in same.items() if not equal] == []
        assert len(same) == 14 + ENCODES_FIRST


def packed(family: str) -> dict[str, Any]:
    """Two documents in one row, by positions that restart: text's, the first of four rows under M-RoPE."""
    inputs = batch([[SMALL, CLIP, WIDE] if has_videos(family) else [SMALL] * 3], family=family)
    del inputs["attention_mask"]
    length = inputs["input_ids"].shape[1]
    positions = torch.cat([torch.arange(19), torch.arange(length - 19)])[None]
    if family.startswith("qwen"):
        grid = torch.randint(0, 30, (3, length), generator=torch.Generator().manual_seed(3))
        positions = torch.cat([positions, grid])[:, None]
    return inputs | {"position_ids": positions, "use_cache": False}


def odds_on_ranks(rank: int) -> tuple[dict[str, float], int]:
    """Errors of packed documents, and of an encoder that is not known; and the patches of one clip that this rank
    encodes."""
    mesh, errors = Mesh(ring=2, ulysses=2), {}
    for family, build in VISION.items():
        model = build()
        model.set_attn_implementation("eager")
        expected = loss_and_gradients(model, packed(family))
        enable(model, mesh)
        errors[f"{family}, packed"] = worst_error(loss_and_gradients(model, packed(family), mesh), expected)
    model = qwen2_5_vl()
    enable(model, mesh)
    seen: list[int] = []
    model.model.visual.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model(**batch([[CLIP]], family="qwen2_5_vl"))

    model, inputs = qwen3_vl(), batch([[CLIP, SMALL], [SMALL]], family="qwen3_vl")
    model.set_attn_implementation("eager")
    expected = loss_and_gradients(model, inputs)
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="runs whole on every rank"):
        patch.setattr("longtake.model.huggingface_vision.FAMILIES", {})
        enable(model, mesh)
    errors["not known"] = worst_error(loss_and_gradients(model, inputs, mesh), expected)
    return errors, seen[0]


def test_packed_documents_one_clip_and_an_encoder_that_is_not_known() -> None:
    for errors, _ in (ranks := run_ranks(odds_on_ranks, 4)):
        assert max(errors.values()) < TOLERANCE
    assert max(patches for _, patches in ranks) == 16  # of 48: a frame each, on three of four ranks


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
    """What eager attention loses against float64, and float32's sums in another order."""
    model, inputs = gemma3(), blocks([[SMALL, SMALL], [SMALL]], left=True)
    exact = gemma3().double()
    exact.set_attn_implementation("sdpa")
    expected = loss_and_gradients(exact, inputs | {"pixel_values": inputs["pixel_values"].double()})
    errors = {}
    for implementation in ("eager", "longtake"):
        model.set_attn_implementation(implementation)
        errors[implementation] = worst_error(loss_and_gradients(model, inputs), expected)
    assert errors["longtake"] < errors["eager"] + TOLERANCE


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
    expected = {name: loss_and_gradients(model, inputs) for name, inputs in cases.items()}
    tokens = {name: generate(model, inputs) for name, inputs in prompts.items()}
    for layout, route in (("contiguous", "direct"), ("zigzag", "relay"))[: 2 if ring > 1 else 1]:
        enable(model, mesh, layout=layout, route=cast(Any, route))
        for name, inputs in cases.items():
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
        assert (len(errors), len(same)) == (7 * num_layouts, 2 * num_layouts)


def test_all_windows_of_all_frames_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = qwen2_5_vl(), []
    enable(model, Mesh(alone=True))
    record = lambda q, k, v, **options: calls.append(options) or attention(q, k, v, **options)  # noqa: E731
    monkeypatch.setattr("longtake.model.huggingface_attention.attention", record)
    model(**batch([[SMALL, WIDE, CLIP]], family="qwen2_5_vl"))
    visual = [call["cu_seqlens"].diff().tolist() for call in calls if "cu_seqlens" in call]
    assert visual == [[16] * 3, [16, 32], [16] * 3] + [[16] * 3] * 3  # images: windows, whole, windows; then the clip


@pytest.mark.parametrize("family", [*VISION, "gemma3"])
def test_a_blank_goes_where_images_go_and_changes_nothing(family: str) -> None:
    model = VISION.get(family, gemma3)()
    make = blocks if family == "gemma3" else partial(batch, family=family)
    with_image, without = (loss_and_gradients(model, make(rows)).keys() for rows in ([[SMALL]], [[]]))
    vision = VisionShare(model, Mesh(alone=True))
    model.zero_grad()
    zero = vision.blanks({})
    assert isinstance(zero, torch.Tensor) and zero.detach() == 0
    zero.backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert gradients.keys() == with_image - without
    assert not any(float(grad.abs().max()) for grad in gradients.values())


def test_features_of_padding_are_dropped() -> None:
    model, inputs = llava(), batch([[SMALL, SMALL]], family="llava")
    assert inputs["input_ids"][0, 9] == IMAGE
    inputs["attention_mask"][0, :9] = 0  # the first image's tokens but one
    inputs["labels"][0, :11] = -100
    model.set_attn_implementation("eager")
    expected = loss_and_gradients(model, inputs)
    enable(model, Mesh(alone=True))
    assert worst_error(loss_and_gradients(model, inputs, Mesh(alone=True)), expected) < TOLERANCE


def test_features_that_do_not_fit_are_counted() -> None:
    model, inputs = llava(), batch([[SMALL, SMALL]], family="llava")
    enable(model, Mesh(alone=True))
    with pytest.raises(ValueError, match="the images have 4 features, the batch has 8 image tokens for them"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:1]})


def test_images_go_to_ranks_by_cost() -> None:
    mesh = Mesh(alone=True)
    mesh.sp_size = 3
    shares = {costs: ImageShare.by_cost(mesh, torch.tensor(costs)).bounds for costs in COSTS}
    assert shares == COSTS


COSTS = {
    (5.0,): (0, 0, 1, 1),
    (1.0, 1.0): (0, 1, 1, 2),
    (1.0,) * 6: (0, 2, 4, 6),
    (4.0, 1.0, 1.0, 1.0, 1.0, 4.0): (0, 1, 5, 6),
}
