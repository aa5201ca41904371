import pytest
import torch
from longtake.model.config import LanguageConfig, VisionConfig
from longtake.model.init import init
from longtake.model.language import LanguageModel
from longtake.model.vision import VisionTower
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.ranks import run_ranks


def language_model() -> LanguageModel:
    return LanguageModel(
        LanguageConfig(
            vocab_size=301,
            hidden_size=96,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )


def test_every_parameter_has_its_scale():
    tower = VisionTower(
        VisionConfig(
            hidden_size=96,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
        )
    )
    model = nn.ModuleDict({"vision": tower, "language": language_model()})
    init(model, 5)
    small = ("embed_tokens.weight", "position_embedding.weight", "out_proj.weight", "fc2.weight")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            ends_residual = name.endswith((*small, "o_proj.weight", "down_proj.weight"))
            expected = 0.02 if ends_residual else 0.7 / parameter[0].numel() ** 0.5
            # the deviation of n >= 6,144 samples has a relative error of 1 / sqrt(2 n) < 1 %, five times over
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.05), name


def test_the_seed_decides():
    first, again, other = (language_model() for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        init(model, seed)
    assert torch.equal(first.model.embed_tokens.weight, again.model.embed_tokens.weight)
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def init_sharded(rank: int, world_size: int) -> dict[str, Tensor]:
    model = language_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    init(model, 3)
    parameters = dict(model.named_parameters())
    assert all(isinstance(p, DTensor) for p in parameters.values())
    return {name: p.full_tensor().detach() for name, p in parameters.items() if isinstance(p, DTensor)}


def test_a_sharded_model_gets_the_same_values():
    model = language_model()
    init(model, 3)
    for parameters in run_ranks(init_sharded, 2, 2):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameters[name], parameter), name


def test_an_unknown_module_is_named():
    with pytest.raises(ValueError, match="no rule to initialise 0, a PReLU"):
        init(nn.Sequential(nn.PReLU()), 0)
