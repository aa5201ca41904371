import pytest
import torch
import torch.nn.functional as F
from longtake.model.config import PROJECTOR_SIDES, ModelConfig, ProjectorConfig
from longtake.model.init import init
from longtake.model.projector import Projector, SpaceToDepth
from torch import Tensor, nn

KINDS = list(PROJECTOR_SIDES)


def projector(kind: str = "mlp_downsample") -> Projector:
    config = ModelConfig.from_dict(
        {
            "vision": {"hidden_size": 8, "num_attention_heads": 2, "image_size": 20, "patch_size": 4},
            "language": {"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1},
            "projector": {"kind": kind},
            "image_token_id": 0,
            "video_token_id": 1,
        }
    )
    model = Projector(config)
    init(model, 0)
    return model


def official_order(x: Tensor, kind: str) -> Tensor:
    """The reshapes of the official code, step by step: its `w` is our rows, its `h` our columns."""
    side = 3 if "3x3" in kind else 2
    grid = round(x.shape[1] ** 0.5)
    x = x.reshape(len(x), grid, grid, -1)
    if grid % side:
        x = torch.cat([x, x.new_zeros(len(x), side - grid % side, grid, x.shape[-1])], dim=1)
        x = torch.cat([x, x.new_zeros(len(x), x.shape[1], side - grid % side, x.shape[-1])], dim=2)
    n, w, h, c = x.shape
    x = x.reshape(n, w, h // side, c * side).permute(0, 2, 1, 3)
    x = x.reshape(n, h // side, w // side, c * side * side)
    if kind != "mlp_downsample_columns":  # what VILA 1.5 does not do
        x = x.permute(0, 2, 1, 3)
    return x.reshape(n, -1, c * side * side)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [1, 4, 5, 6, 27])
def test_the_order_of_tokens_and_channels_is_the_official_one(grid: int, kind: str) -> None:
    torch.manual_seed(0)
    features, config = torch.randn(2, grid * grid, 3), ProjectorConfig(kind=kind)
    tokens = SpaceToDepth(config.side, by_columns=config.by_columns)(features)
    assert torch.equal(tokens, official_order(features, kind))


def test_the_first_tokens_of_a_grid_of_four() -> None:
    """Patches are numbered row by row; each token names its four."""
    patches = torch.arange(16.0)[None, :, None]
    by_rows, by_columns = (SpaceToDepth(2, by_columns=order)(patches)[0].tolist() for order in (False, True))
    assert by_rows == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert by_columns == [by_rows[0], by_rows[2], by_rows[1], by_rows[3]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_mlp_has_the_published_names_and_shapes(kind: str) -> None:
    torch.manual_seed(0)
    model = projector(kind)
    weights = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    model.load_state_dict(weights)
    norms, linears = ((1, 4), (2, 5, 7)) if "3x3" in kind else ((1,), (2, 4))
    places = sorted(norms + linears)
    assert list(weights) == [f"layers.{i}.{what}" for i in places for what in ("weight", "bias")]
    features = torch.randn(3, 25, 8)
    x = official_order(features, kind)
    for i in places:
        weight, bias = weights[f"layers.{i}.weight"], weights[f"layers.{i}.bias"]
        x = F.layer_norm(x, bias.shape, weight, bias) if i in norms else x @ weight.T + bias
        if i in linears[:-1]:
            x = F.gelu(x)
    # the same float32 products in another order
    torch.testing.assert_close(model(features), x, rtol=1e-5, atol=1e-5 * float(x.abs().max()))
    assert x.shape[-1] == 12 and all(isinstance(model.layers[i], nn.Linear) for i in linears)


@pytest.mark.parametrize(("kind", "tokens"), [("mlp_downsample", 9), ("mlp_downsample_3x3_fix", 4)])
def test_no_frames_give_zero_gradients(kind: str, tokens: int) -> None:
    model = projector(kind)
    out = model(torch.empty(0, 25, 8))
    assert out.shape == (0, tokens, 12)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
