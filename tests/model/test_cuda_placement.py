"""All that a step works with is on the device when it starts, and nothing of it is waited for: without a GPU.

The tensors of one rank are on "meta", which stands for its GPU; layouts, plans and masks are real, made on the CPU.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, cast

import pytest
import torch
from longtake.comm.layout import zigzag
from longtake.kernels.device import to_device
from longtake.kernels.operator import visibility_of
from longtake.model import sequence_parallel, ulysses
from longtake.model.batch import ShardedBatch, shard_documents
from longtake.model.vlm import VisionLanguageModel
from torch import Tensor

from tests.host_syncs import HostSyncs
from tests.kernels.masks import shard_visibility
from tests.model.documents import IMAGE_SIZE, TOKENS_PER_FRAME, make_document
from tests.model.stand_ins import META, meta_mesh, stand_in_for_kernels
from tests.tiny import tiny_config

GRIDS = [(2, 2), (4, 1), (1, 4), (1, 1)]
VIDEOS: dict[str, list[tuple[int, ...]]] = {
    "no frame": [(), ()],
    "a frame": [(), (1,)],
    "nine": [(1,), (), (4, 2), (2,)],
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_kernels(monkeypatch)


def make_model(**switches: bool) -> VisionLanguageModel:
    """Of 6 q heads and 3 k, v heads: two ranks, or four, cut their groups unevenly."""
    with META:
        model = VisionLanguageModel(tiny_config(num_heads=6, num_kv_heads=3)).train()
    model.llm.recompute = model.vision_tower.recompute = switches.get("recompute", False)
    return model


def step_inputs(rank: int, grid: tuple[int, int], videos: Sequence[tuple[int, ...]], **how: Any) -> tuple[Any, Tensor]:
    documents = [make_document(frames, seed=i) for i, frames in enumerate(videos)]
    mesh = meta_mesh(rank, ring=grid[0], ulysses=grid[1])
    batch = shard_documents(documents, mesh=mesh, tokens_per_frame=TOKENS_PER_FRAME, **how)
    num_frames = batch.frames.last - batch.frames.first
    return batch, torch.empty(num_frames, 3, IMAGE_SIZE, IMAGE_SIZE, device=META)


def waits(model: VisionLanguageModel, batch: ShardedBatch, pixels: Tensor) -> list[str]:
    """What a step's forward and backward would wait for."""
    with HostSyncs("meta") as syncs:
        loss = model(batch, pixels) / batch.total_weight
        loss.backward()
    assert loss.device == META and batch.attention.mesh.transport.num_calls  # type: ignore[attr-defined]
    return syncs.found


@pytest.mark.parametrize("videos", VIDEOS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_step_waits_for_nothing(grid: tuple[int, int], videos: str) -> None:
    for rank, (layout, route) in product(range(grid[0] * grid[1]), (("balanced", "direct"), ("zigzag", "relay"))):
        model = make_model(recompute=route == "relay")
        found = waits(model, *step_inputs(rank, grid, VIDEOS[videos], layout=layout, route=route))
        assert not found, (rank, layout, route)
        assert all(p.grad is not None and p.grad.device == META for p in model.parameters())


def test_what_is_not_on_the_device_or_read_from_it_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: by an index that is a list, rows left on the CPU, and a loss that is read."""
    batch, pixels = step_inputs(0, (2, 2), VIDEOS["nine"])
    assert not waits(make_model(), batch, pixels)
    left = replace(batch, loss_rows=torch.arange(len(batch.loss_rows)))
    assert any("aten.index.Tensor: between cpu and meta" in found for found in waits(make_model(), left, pixels))
    with HostSyncs("meta") as syncs, pytest.raises(RuntimeError):
        float(make_model()(batch, pixels).detach())
    assert [found.split(":")[0] for found in syncs.found] == ["aten._local_scalar_dense.default"]
    monkeypatch.setattr(ulysses, "pick_heads", lambda x, index: x[:, index])
    assert "an index that is a list" in waits(make_model(), batch, pixels)


def test_plans_keep_indices_and_masks_on_the_device() -> None:
    seen = 0
    for rank in range(4):
        plan = step_inputs(rank, (2, 2), VIDEOS["nine"])[0].attention
        for step, visibility in zip(plan.steps, plan.visibility, strict=True):
            seen += isinstance(step.send_rows, Tensor)
            assert not isinstance(step.send_rows, Tensor) or step.send_rows.device == META
            assert visibility.start.device == visibility.end.device == META
    assert seen


def test_parallel_attention_waits_for_nothing() -> None:
    """Its plan, which it makes anew in each call, included."""
    for rank in range(4):
        mesh, layout = meta_mesh(rank, ring=2, ulysses=2), zigzag(300, ring=2, ulysses=2)
        shapes = [(2, layout.counts[rank], heads, 16) for heads in (6, 3, 3)]
        q, k, v = (torch.empty(shape, device=META, requires_grad=True) for shape in shapes)
        with HostSyncs("meta") as syncs:
            out = sequence_parallel.parallel_attention(q, k, v, mesh=mesh, layout=layout, causal=True)
            out.sum().backward()
        assert not syncs.found and out.shape == q.shape


def test_masks_count_on_the_cpu_what_they_hold_on_the_device() -> None:
    whole = shard_visibility(200, lengths=[30, 100, 70])
    moved = whole.to(META)
    assert moved.area == whole.area and moved.visited(16, 32) == whole.visited(16, 32)
    assert moved.transposed.visited(32, 16) == whole.transposed.visited(32, 16)
    for mask in (moved, moved.transposed):
        assert {x.device for x in (mask.start, mask.end, mask.kstart, mask.kend, mask.longest_first(16))} == {META}
    assert whole.to(torch.device("cpu")) is whole


def test_the_masks_of_plain_attention_are_made_on_the_cpu() -> None:
    q = torch.empty(3, 37, 2, 16, device=META)
    with HostSyncs("meta") as syncs:
        visibility = visibility_of(q, q, None, True, None)
        assert visibility.visited(16, 16) > 0
    assert visibility.start.device == META and not syncs.found


class Travelling:
    """A tensor on the CPU that notes how it travels."""

    is_cpu = True

    def __init__(self) -> None:
        self.notes: list[Any] = []

    def pin_memory(self) -> "Travelling":
        self.notes.append("pinned")
        return self

    def to(self, device: torch.device, *, non_blocking: bool) -> list[Any]:
        return [*self.notes, device.type, non_blocking]


def test_copies_to_a_gpu_start_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("longtake.kernels.device.is_capturing", lambda device: False)
    assert to_device(cast(Tensor, Travelling()), gpu) == ["pinned", "cuda", True]
    x = torch.arange(3)
    assert to_device(x, torch.device("cpu")) is x
    monkeypatch.setattr("longtake.kernels.device.is_capturing", lambda device: True)
    with pytest.raises(ValueError, match="a graph cannot record a copy to cuda:0: make this call once before"):
        to_device(x, gpu)
