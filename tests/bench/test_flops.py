"""FLOPs of a step: against a count by hand, and against what PyTorch counts while a tiny model trains."""

import pytest
import torch
from longtake.bench.flops import step_flops
from longtake.bench.step import Setting, synthetic_step
from longtake.comm.mesh import Mesh
from longtake.model.shapes import published_shape
from longtake.train.config import TrainConfig
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import random_model, tiny_config


def test_by_hand() -> None:
    """The tiny model: 2 decoder layers, 32 channels, 4 query and 2 key heads of 8; 1 tower layer used, 16 channels."""
    found = step_flops(tiny_config(), [3, 2], num_frames=1, num_targets=2)
    decoder_layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48  # q, k and v, o, MLP
    tower_layers = tiny_config().vision.num_selected_layers
    assert found == {
        "language": 6 * 5 * 2 * decoder_layer,
        "head": 6 * 2 * 32 * 64,
        "attention": 12 * (6 + 3) * 2 * 32,
        "tower": 16 * (6 * tower_layers * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 3 * 4 * 4 * 16),
        "tower attention": 12 * 16 * 16 * tower_layers * 16,
        "projector": 6 * 4 * (64 * 32 + 32 * 32),
    }


def test_parameters_of_qwen2() -> None:
    """1.31 billion in the decoder of Qwen2-1.5B: 6 operations a token for each."""
    found = step_flops(published_shape("qwen2-1.5b"), [1], num_frames=0, num_targets=0)
    assert found["language"] / 6 == pytest.approx(1.31e9, rel=0.01)
    assert found["tower"] == found["projector"] == found["head"] == 0


@pytest.mark.parametrize("num_tokens", [4, 100])
def test_matrix_products_are_those_that_pytorch_counts(num_tokens: int) -> None:
    """But for the head's logits, computed twice. Attention is no matrix product to it."""
    config = tiny_config()
    train = TrainConfig(stage=5, model=(), data=(), out=(), steps=1)
    mesh = Mesh(device="cpu", alone=True)
    data = synthetic_step(Setting(config, train), mesh, num_tokens)
    [(batch, pixels)] = data.batches
    model = random_model(config, seed=0).train()
    with FlopCounterMode(display=False) as counter:
        model(batch, pixels).backward()
    counted = sum(counter.get_flop_counts()["Global"].get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    num_targets = int(data.total_weight)
    parts = step_flops(config, [num_tokens], num_frames=data.num_frames, num_targets=num_targets)
    again = parts["head"] // 3
    assert counted == sum(value for name, value in parts.items() if "attention" not in name) + again
    assert parts["head"] > 0 and (parts["tower"] > 0) == (num_tokens > 4)
