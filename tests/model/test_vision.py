from typing import Any

import pytest
import torch
from longtake.model.config import VisionConfig
from longtake.model.init import init
from longtake.model.vision import VisionTower
from safetensors.torch import load_file
from torch import Tensor
from transformers import SiglipConfig, SiglipModel

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 23,  # 5 patches a side and 3 pixels left over
    "patch_size": 4,
}


def relative_error(ours: Tensor | None, theirs: Tensor | None, *, scale: Tensor | None) -> float:
    assert ours is not None and theirs is not None and scale is not None
    return float(((ours - theirs).norm() / scale.norm()).detach())


def tower(**changes: int) -> VisionTower:
    model = VisionTower(VisionConfig(**SIZES, **changes))
    init(model, 0)
    return model


@pytest.mark.parametrize("select_layer", [-1, -2, -3])
def test_features_and_gradients_are_those_of_transformers(tmp_path, select_layer):
    torch.manual_seed(select_layer)
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 4}
    model = SiglipModel(SiglipConfig(vision_config=SIZES, text_config=text))
    theirs = model.vision_model
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    ours = tower(select_layer=select_layer)
    ours.load_state_dict({name: published[name] for name in ours.state_dict()})

    pixels = torch.randn(3, 3, 23, 23)
    features = ours(pixels)
    hidden = theirs(pixels, output_hidden_states=True).hidden_states[select_layer]
    assert relative_error(features, hidden, scale=hidden) < 1e-5

    weight = torch.randn_like(hidden)
    (features * weight).sum().backward()
    (hidden * weight).sum().backward()
    gradients = {f"vision_model.{name}": p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        # k_proj.bias shifts all scores of a row alike: its true gradient is zero, and the rounding in it is small
        # beside the gradient of q_proj.bias
        scale = gradients[name.replace("k_proj.bias", "q_proj.bias")]
        assert relative_error(parameter.grad, gradients[name], scale=scale) < 1e-5, name


def test_no_frames_give_zero_gradients():
    model = tower()
    features = model(torch.empty(0, 3, 23, 23))
    assert features.shape == (0, 25, 32)
    features.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_recomputing_changes_no_gradient():
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 23, 23)
    gradients = []
    for recompute in (False, True):
        model = tower()
        model.recompute = recompute
        model(pixels).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_frames_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[N, 3, 23, 23\], got \[2, 3, 24, 23\]"):
        tower()(torch.zeros(2, 3, 24, 23))
