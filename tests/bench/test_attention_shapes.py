"""What is measured: pairs and operations by hand, and that all that was promised is there."""

import pytest
import torch
from longtake.bench.attention_shapes import (
    QUICK,
    Shape,
    all_shapes,
    documents,
    grouped,
    mixed_documents,
    operations,
    packed,
    plain,
    quick_shapes,
    ring_step,
    tiny,
    twin,
    visibility,
    visible_pairs,
)

CPU = torch.device("cpu")


def test_operations_of_real_head_dims_and_visible_pairs() -> None:
    full, causal = plain(72, "full", 4096), plain(72, "causal", 4096)
    assert (full.batch, full.heads) == (4, 16)
    assert operations(full, "forward") == 4 * 4 * 16 * 4096**2 * 72
    assert operations(full, "backward") == 10 * 4 * 16 * 4096**2 * 72
    assert operations(causal, "forward") == 4 * 4 * 16 * (4096 * 4097 // 2) * 72
    assert operations(grouped(64, 8, "causal", 8192), "forward") == 4 * 2 * 64 * (8192 * 8193 // 2) * 128


def test_operations_of_documents_are_summed() -> None:
    lengths = [3, 1, 4]
    causal, whole = (packed("p", lengths, 64, 2, 1, mask) for mask in ("packed", "packed-full"))
    assert operations(causal, "forward") == 4 * 2 * 64 * (6 + 1 + 10)
    assert operations(whole, "forward") == 4 * 2 * 64 * (9 + 1 + 16)


@pytest.mark.parametrize("shape", all_shapes(), ids=lambda shape: shape.name)
def test_pairs_are_those_of_the_mask_that_kernels_get(shape: Shape) -> None:
    small = tiny(shape)
    assert visible_pairs(small) == small.batch * visibility(small, CPU).area
    if shape.queries <= 32768:
        assert visible_pairs(shape) == shape.batch * visibility(shape, CPU).area


@pytest.mark.parametrize("ranks", [(2, 5), (5, 2), (3, 3)])
def test_a_plain_call_has_the_area_of_a_ring_step(ranks: tuple[int, int]) -> None:
    step = ring_step("ring", ranks)
    assert step.queries == step.keys == 131072 and step.heads == 8
    assert visible_pairs(step) == visible_pairs(twin(step))
    if ranks[0] != ranks[1]:
        assert visible_pairs(step) == step.queries * step.keys // 2
    assert visible_pairs(tiny(step)) == visible_pairs(twin(tiny(step)))


def test_documents_have_their_mean() -> None:
    for mean in (300, 2000):
        lengths = documents(mean, 2**20)
        assert sum(lengths) == 2**20 and min(lengths) > 0
        assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.1)
    mixed = mixed_documents()
    assert sum(mixed) == 32768 and max(mixed) == 16384


def test_all_that_was_promised_is_measured() -> None:
    shapes = all_shapes()
    names = {shape.name for shape in shapes}
    assert len(names) == len(shapes)
    assert {shape.head_dim for shape in shapes} == {64, 72, 80, 96, 128, 256}
    plain_lengths = {shape.queries for shape in shapes if shape.name.startswith("d128")}
    assert plain_lengths == {1024 * length for length in (1, 2, 4, 8, 16, 32, 128)}
    for head_dim in (64, 72, 80, 96, 128, 256):
        assert {shape.mask for shape in shapes if shape.head_dim == head_dim} >= {"full", "causal"}
    assert {(shape.heads, shape.kv_heads) for shape in shapes} >= {(64, 8), (28, 4), (12, 2)}
    assert names >= {"packed-300", "packed-2000", "packed-mix", "ring-late-queries", "ring-early-keys", "ring-itself"}
    short = [shape for shape in shapes if shape.queries < 16384 and not shape.documents]
    assert all(shape.batch * shape.queries == 16384 for shape in short)
    assert sorted(shape.name for shape in quick_shapes()) == sorted(QUICK)
