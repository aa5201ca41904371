"""What a rank is said to hold of a run is what the code that trains has there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.comm.mesh import Mesh
from longtake.model.batch import ShardedBatch, shard_documents
from longtake.model.config import LanguageConfig, ModelConfig, VisionConfig
from longtake.model.low_rank import add_low_rank
from longtake.model.shapes import published_shape
from longtake.model.vision import VisionTower
from longtake.model.vlm import VisionLanguageModel
from longtake.train.budget import Activations, estimate, gathered_bytes, shaped_model, share_out, state_bytes
from longtake.train.config import TrainConfig
from longtake.train.optimizer import build_optimizer
from longtake.train.sample import Sample
from longtake.train.stages import freeze_for
from longtake.train.trainer import shard_parameters
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.ranks import run_ranks
from tests.tiny import random_model, tiny_config

SMALL = ModelConfig(  # the published models' proportions
    vision=VisionConfig(
        hidden_size=64, intermediate_size=224, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=14
    ),
    language=LanguageConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    ),
    image_token_id=4,
    video_token_id=5,
)
KEPT = ("visual features", "tower activations", "decoder activations")  # the pixels too, where the tower runs again


def make_config(**fields: Any) -> TrainConfig:
    usual = {"stage": 5, "steps": 1, "context": 2048, "num_frames": 100, "dtype": "bfloat16"}
    return TrainConfig(model=Path(), data=Path(), out=Path(), **usual | fields)


# ------------------------------------------------------------------------------------- tokens and frames


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (3, 1), (1, 4), (2, 3), (7, 2)])
@pytest.mark.parametrize("layout", ["balanced", "zigzag", "contiguous"])
def test_tokens_and_frames_of_the_ranks_add_up(ring: int, ulysses: int, layout: str) -> None:
    config = make_config(ring=ring, ulysses=ulysses, layout=layout, batch_size=3, context=5003, num_frames=101)
    shares = share_out(config, SMALL, world_size=2 * ring * ulysses)
    assert (shares.data, shares.samples) == (2, 6)
    assert len(shares.tokens) == len(shares.frames) == ring * ulysses
    assert (sum(shares.tokens), sum(shares.frames)) == (3 * 5003, 3 * 101)
    assert max(shares.frames) - min(shares.frames) <= 1


def test_text_alone_has_no_frames() -> None:
    config = make_config(stage=4, ulysses=2, num_frames=10_000)
    assert share_out(config, SMALL, world_size=2).frames == (0, 0)
    assert estimate(config, SMALL, world_size=2)["pixels"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ring": 3}, "ring 3 x ulysses 1 = 3 ranks do not divide a world of 8"),
        ({"ring": 16}, "ring 16 x ulysses 1 = 16 ranks do not divide a world of 8"),
        ({"global_batch": 12}, "global_batch 12 is no multiple of batch_size 1 x 8 .* take larger groups"),
        ({"num_frames": 512}, r"num_frames 512 x 4 tokens leave no room for text in a context of 2048"),
    ],
)
def test_what_cannot_run_is_refused(fields: dict[str, Any], message: str) -> None:
    for ask in (share_out, estimate):
        with pytest.raises(ValueError, match=message):
            ask(make_config(**fields), SMALL, 8)


# ------------------------------------------------------------------------------------- what forward keeps


class FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps what it keeps on CUDA, its input and a float32 a row; on the CPU it keeps more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).to(x.dtype) * weight


def longest_sequence(config: TrainConfig, model: ModelConfig, mesh: Mesh) -> ShardedBatch:
    """All the frames and tokens that the config allows."""
    generator = torch.Generator().manual_seed(0)
    documents = [
        Sample(
            torch.randint(8, 200, (config.context,), generator=generator),
            torch.ones(config.context),
            torch.arange(config.num_frames) * model.tokens_per_frame,
            cu_seqlens=torch.tensor([0, config.context]),
            source="random",
        )
        for _ in range(config.batch_size)
    ]
    return shard_documents(documents, mesh=mesh, tokens_per_frame=model.tokens_per_frame, layout=config.layout)


def kept_bytes(config: TrainConfig, model: ModelConfig, mesh: Mesh) -> int:
    """Bytes that forward keeps for backward on this rank, parameters aside. Collective."""
    network = VisionLanguageModel(model).to(getattr(torch, config.dtype))
    freeze_for(config.plan, network)
    network.llm.recompute = network.vision_tower.recompute = config.recompute
    batch, size = longest_sequence(config, model, mesh), model.vision.image_size
    parameters = {x.untyped_storage().data_ptr() for x in network.parameters()}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        if (storage := x.untyped_storage()).data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        num_frames = batch.frames.last - batch.frames.first
        loss = network(batch, torch.randint(256, (num_frames, 3, size, size), dtype=torch.uint8))
    assert loss.requires_grad  # and so what is kept is still there
    return sum(kept.values())


def norms_as_on_cuda(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nn.RMSNorm, "forward", lambda norm, x: FusedNorm.apply(x, norm.weight, norm.eps))


def is_near(config: TrainConfig, kept: int, world_size: int) -> bool:
    said = Activations(config, SMALL, share_out(config, SMALL, world_size)).bytes_by_purpose()
    purposes = [*KEPT, *(["pixels"] if config.recompute and "vision_tower" in config.plan.trains else [])]
    return 0.97 * kept < sum(said[purpose] for purpose in purposes) < 1.06 * kept


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"recompute": True},
        {"dtype": "float32"},
        {"recompute": True, "dtype": "float32", "batch_size": 2},
        {"num_frames": 500},
        {"recompute": True, "num_frames": 500},
        {"stage": 2},
        {"stage": 2, "recompute": True, "num_frames": 1},
    ],
    ids=str,
)
def test_forward_keeps_what_is_said(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    norms_as_on_cuda(monkeypatch)
    config = make_config(**fields)
    assert is_near(config, kept_bytes(config, SMALL, Mesh(alone=True)), world_size=1)


@pytest.mark.parametrize("num_frames", [3, 20])
def test_a_pass_at_work_has_the_values_that_are_said(num_frames: int) -> None:
    config, size = make_config(recompute=True, num_frames=num_frames), SMALL.vision.image_size
    tower = VisionTower(SMALL.vision).to(torch.bfloat16)
    tower.recompute = True
    features = tower(torch.randn(num_frames, 3, size, size))
    parameters = {x.untyped_storage().data_ptr() for x in tower.parameters()}
    passes: list[dict[int, int]] = []
    tower.vision_model.register_forward_pre_hook(lambda *_: passes.append({}))

    def note(x: Tensor) -> Tensor:
        if (storage := x.untyped_storage()).data_ptr() not in parameters:
            passes[-1][storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        features.sum().backward()
    kept = max(sum(values.values()) for values in passes)
    said = Activations(config, SMALL, share_out(config, SMALL, 1)).tower_values()
    assert 0.97 * kept < said < 1.06 * kept


def keep_on_ranks(rank: int, config: TrainConfig) -> int:
    with pytest.MonkeyPatch.context() as patch:
        norms_as_on_cuda(patch)
        return kept_bytes(config, SMALL, Mesh(ring=config.ring, ulysses=config.ulysses))


def test_the_busiest_of_four_ranks_keeps_what_is_said() -> None:
    config = make_config(ring=2, ulysses=2, num_frames=30)
    assert is_near(config, max(run_ranks(keep_on_ranks, 4, config)), world_size=4)


# ------------------------------------------------------------------------------------- parameters


def bytes_of(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def state_on_rank(rank: int, config: TrainConfig) -> dict[str, int]:
    """What FSDP2 and AdamW leave on this rank."""
    network, mesh = random_model(tiny_config(), seed=0), Mesh(ring=config.ring)
    freeze_for(config.plan, network)
    if config.rank_of_update:
        add_low_rank(network.llm, rank=config.rank_of_update)
    shard_parameters(network, mesh, config)
    optimizer = build_optimizer(network, config)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    return {
        "parameters": bytes_of(map(local, network.parameters())),
        "gradients": bytes_of(local(parameter.grad) for parameter in trained if parameter.grad is not None),
        "AdamW": bytes_of(map(local, moments)),
    }


@pytest.mark.parametrize("fields", [{}, {"stage": 1, "shard": "model"}, {"stage": 4, "low_rank": 3}], ids=str)
def test_the_first_rank_has_the_parameters_gradients_and_moments_that_are_said(fields: dict[str, Any]) -> None:
    config = make_config(ring=3, **fields)
    said = state_bytes(shaped_model(config, tiny_config()), world_size=3)
    assert run_ranks(state_on_rank, 3, config)[0] == said


def test_gathered_are_the_root_and_three_units_or_all() -> None:
    config = make_config()
    shaped = shaped_model(config, published_shape("qwen2-7b"))
    sizes = {name: parameter.numel() for name, parameter in shaped.named_parameters()}
    layer = sum(size for name, size in sizes.items() if name.startswith("llm.model.layers.0."))
    tower = sum(size for name, size in sizes.items() if name.startswith("vision_tower."))
    root = sum(size for name, size in sizes.items() if not name.startswith(("llm.model.layers.", "vision_tower.")))
    assert gathered_bytes(shaped, config) == {
        "gathered parameters": 2 * (root + 2 * tower + layer),
        "whole gradients": 2 * root + 4 * root,  # the head's and embedding's copy is larger than the tower's
    }
    whole = gathered_bytes(shaped, replace(config, shard="model"))
    assert whole["gathered parameters"] == 2 * sum(sizes.values())


def test_more_ranks_hold_less() -> None:
    model = published_shape("qwen2-1.5b")
    config = make_config(context=131_072, num_frames=256, recompute=True)
    sums = [sum(estimate(replace(config, ulysses=n), model, n).values()) for n in (1, 2, 4, 8)]
    assert sums == sorted(sums, reverse=True) and sums[0] > 3 * sums[-1]
