from typing import Any

import pytest
import torch
from longtake.model import vision
from longtake.model.config import VisionConfig
from longtake.model.init import init
from longtake.model.vision import VisionTower, normalise
from safetensors.torch import load_file
from torch import Tensor
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

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


def hidden_states(model: Any, pixels: Tensor) -> list[Tensor]:
    """The input of the first layer and the output of each: Transformers 5.5 does not return them here."""
    states = []
    for module in (model.embeddings, *model.encoder.layers):
        module.register_forward_hook(lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out))
    model(pixels)
    return states


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
    hidden = hidden_states(theirs, pixels)[select_layer]
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


def test_decoded_pixels_are_normalised_as_transformers_does() -> None:
    frames = torch.randint(256, (2, 3, 23, 23), dtype=torch.uint8)
    processor = SiglipImageProcessor(do_resize=False)
    normalised = processor(list(frames), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalise(frames), normalised, rtol=0, atol=1e-6)
    assert normalise(normalised) is normalised
    assert torch.equal(tower()(frames), tower()(normalise(frames)))


def gradients(pixels: Tensor, *, recompute: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features, and all gradients end to end, of a loss that weighs every feature at random."""
    model = tower().to(dtype)
    model.recompute = recompute
    features = model(pixels)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    features.backward(weight.to(dtype))
    return features.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("num_frames", [0, 2, 3, 7])
def test_passes_change_neither_features_nor_gradients(num_frames, monkeypatch):
    monkeypatch.setattr(vision, "FRAMES_PER_PASS", 3)
    pixels = torch.randn(num_frames, 3, 23, 23)
    plain = gradients(pixels, recompute=False, dtype=torch.float32)
    in_passes = gradients(pixels, recompute=True, dtype=torch.float32)
    assert plain[1].numel() == sum(p.numel() for p in tower().parameters())
    tolerance = 1e-5 if num_frames > 3 else 0  # float32 sums in another order; a single pass is the same arithmetic
    for ours, theirs in zip(in_passes, plain, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_many_passes_lose_no_more_to_bfloat16_than_one(monkeypatch):
    torch.manual_seed(0)
    pixels = torch.randn(64, 3, 23, 23)
    exact = gradients(pixels, recompute=False, dtype=torch.float32)[1]
    errors = []
    for frames in (64, 1):
        monkeypatch.setattr(vision, "FRAMES_PER_PASS", frames)
        found = gradients(pixels, recompute=True, dtype=torch.bfloat16)[1]
        errors.append(relative_error(found.float(), exact, scale=exact))
    assert errors[1] < 1.2 * errors[0]  # 1.0 seen; sums in bfloat16 lose more


def kept_bytes(num_frames: int) -> int:
    """What the tower keeps for backward, parameters aside."""
    model, kept = tower(), {}
    model.recompute = True
    parameters = {p.data_ptr() for p in model.parameters()}

    def note(x: Tensor) -> Tensor:
        if (storage := x.untyped_storage()).data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        features = model(torch.randn(num_frames, 3, 23, 23))
    assert features.requires_grad  # and so what is kept is still there
    return sum(kept.values())


def test_the_pixels_alone_are_kept(monkeypatch):
    monkeypatch.setattr(vision, "FRAMES_PER_PASS", 2)
    assert [kept_bytes(n) for n in (0, 1, 7)] == [4 * 3 * 23 * 23 * n for n in (0, 1, 7)]


def test_a_layer_runs_twice_on_every_pass(monkeypatch):
    monkeypatch.setattr(vision, "FRAMES_PER_PASS", 2)
    model, frames = tower(), []
    model.recompute = True
    for layer in model.vision_model.encoder.layers:
        layer.register_forward_hook(lambda layer, inputs, output: frames.append(len(output)))
    model(torch.randn(5, 3, 23, 23)).sum().backward()
    assert frames == 2 * [*[2] * 2, *[2] * 2, *[1] * 2]  # two layers


@pytest.mark.parametrize("frozen", ["", "vision_model.embeddings."])
def test_what_is_frozen_gets_no_gradient(frozen):
    model = tower()
    model.recompute = True
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    features = model(torch.randn(2, 3, 23, 23))
    assert features.requires_grad == bool(frozen)
    if frozen:
        features.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name


def test_frames_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[N, 3, 23, 23\], got \[2, 3, 24, 23\]"):
        tower()(torch.zeros(2, 3, 24, 23))


def test_passes_refuse_gradients_of_gradients() -> None:
    model = tower().train()
    model.recompute = True
    weight = model.vision_model.embeddings.position_embedding.weight
    total = model(torch.randn(2, 3, 23, 23)).square().sum()
    [grad] = torch.autograd.grad(total, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (total + grad.square().sum()).backward()
