from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from longtake.model.config import LanguageConfig
from longtake.model.init import init
from longtake.model.language import LanguageModel, apply_rotary, rotary_angles
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def relative_error(ours: Tensor | None, theirs: Tensor | None) -> float:
    assert ours is not None and theirs is not None
    return float(((ours - theirs).norm() / theirs.norm()).detach())


def packed_attend(lengths: list[int]) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """Causal attention within documents."""
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


def language_model(**changes: object) -> LanguageModel:
    model = LanguageModel(LanguageConfig(**SIZES | changes))
    init(model, 0)
    return model


@pytest.mark.parametrize(
    ("tied", "heads", "theta"), [(True, (6, 2), 1e4), (False, (6, 1), 1e6), (False, (3, 3), 3580165449.0)]
)
def test_packed_logits_and_gradients_are_those_of_transformers_alone(tmp_path, tied, heads, theta):
    torch.manual_seed(heads[0])
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "tie_word_embeddings": tied}
    theirs = Qwen2ForCausalLM(
        Qwen2Config(**SIZES | shape, rope_parameters={"rope_theta": theta, "rope_type": "default"})
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = language_model(**shape, rope_theta=theta)
    ours.load_state_dict(load_file(tmp_path / "model.safetensors"))

    lengths = [7, 1, 12]
    ids = torch.randint(61, (20,))
    positions = torch.cat([torch.arange(n) for n in lengths])
    logits = ours.logits(ours(ours.embed(ids), positions, packed_attend(lengths)))
    expected = torch.cat([theirs(document[None]).logits[0] for document in ids.split(lengths)])
    assert relative_error(logits, expected) < 1e-5

    weight = torch.randn_like(expected)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, gradients[name]) < 1e-5, name


def test_rotation_depends_on_the_distance_alone_even_at_a_million_tokens():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 64, dtype=torch.float64)
    scores = []
    for start in (0, 2**20):
        cos, sin = rotary_angles(torch.tensor([start, start + 37]), head_dim=64, theta=1e4)
        scores.append(apply_rotary(q, cos[1:], sin[1:]).flatten() @ apply_rotary(k, cos[:1], sin[:1]).flatten())
    # cos and sin are rounded to float32; float32 angles would be off by 0.03 here
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-5)


def test_rotary_keeps_the_dtype_and_turns_in_float32():
    torch.manual_seed(1)
    x = torch.randn(5, 2, 8).bfloat16()
    cos, sin = rotary_angles(torch.arange(5), head_dim=8, theta=1e4)
    turned = apply_rotary(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned, apply_rotary(x.float(), cos, sin).bfloat16(), rtol=0, atol=0)


def test_no_tokens_give_zero_gradients():
    model = language_model(tie_word_embeddings=False)
    none = torch.empty(0, dtype=torch.int64)
    hidden = model(model.embed(none), none, lambda layer, q, k, v: q + 0 * (k.sum() + v.sum()))
    model.logits(hidden).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_recomputing_changes_no_gradient_and_calls_attention_twice():
    torch.manual_seed(0)
    ids = torch.randint(61, (9,))
    gradients, calls = [], []
    for recompute in (False, True):
        model = language_model()
        model.recompute = recompute
        layers: list[int] = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, layers: list[int] = layers) -> Tensor:
            layers.append(layer)
            return packed_attend([4, 5])(layer, q, k, v)

        model(model.embed(ids), torch.arange(9), attend).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        calls.append(layers)
    assert calls == [[0, 1], [0, 1, 1, 0]]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)
