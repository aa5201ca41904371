import pytest
import torch
import torch.nn.functional as F
from longtake.model.config import ModelConfig
from longtake.model.init import init
from longtake.model.projector import Projector, SpaceToDepth


def projector() -> Projector:
    config = ModelConfig.from_dict(
        {
            "vision": {"hidden_size": 8, "num_attention_heads": 2, "image_size": 20, "patch_size": 4},
            "language": {"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1},
            "image_token_id": 0,
            "video_token_id": 1,
        }
    )
    model = Projector(config)
    init(model, 0)
    return model


@pytest.mark.parametrize("grid", [1, 4, 5, 27])
def test_tokens_come_column_by_column_and_channels_row_by_row(grid):
    torch.manual_seed(0)
    features = torch.randn(2, grid * grid, 3)
    padded = torch.zeros(2, grid + grid % 2, grid + grid % 2, 3)
    padded[:, :grid, :grid] = features.view(2, grid, grid, 3)
    half = padded.shape[1] // 2
    tokens = SpaceToDepth()(features)
    assert tokens.shape == (2, half * half, 12)
    for column in range(half):
        for row in range(half):
            square = padded[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(tokens[:, column * half + row], square.flatten(1))


def test_projector_is_norm_linear_gelu_linear_under_the_published_names():
    torch.manual_seed(0)
    model = projector()
    weights = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    model.load_state_dict(weights)
    names = [f"layers.{i}.{kind}" for i in (1, 2, 4) for kind in ("weight", "bias")]
    assert list(weights) == names
    features = torch.randn(3, 25, 8)
    x = F.layer_norm(SpaceToDepth()(features), (32,), weights[names[0]], weights[names[1]])
    x = F.gelu(x @ weights[names[2]].T + weights[names[3]])
    expected = x @ weights[names[4]].T + weights[names[5]]
    # the same float32 products in another order
    torch.testing.assert_close(model(features), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_no_frames_give_zero_gradients():
    model = projector()
    out = model(torch.empty(0, 25, 8))
    assert out.shape == (0, 9, 12)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
