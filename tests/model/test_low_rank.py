from typing import Any

import pytest
import torch
from longtake.model.config import LanguageConfig
from longtake.model.init import init
from longtake.model.language import LanguageModel
from longtake.model.low_rank import LowRankLinear, add_low_rank, init_low_rank, low_rank_names, merge_low_rank
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.ranks import run_ranks


def language_model() -> LanguageModel:
    config = LanguageConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = LanguageModel(config)
    init(model, 0)
    return model


def run(model: LanguageModel, ids: Tensor) -> Tensor:
    positions = torch.arange(len(ids))
    return model(model.embed(ids), positions, lambda layer, q, k, v: (q * k).cumsum(0) * v)


def train_low_rank(model: nn.Module) -> None:
    """B away from zero, as after some steps; the same values on every rank."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.copy_(torch.randn(parameter.shape))


def test_it_starts_as_the_same_function_under_the_same_names():
    torch.manual_seed(0)
    model, ids = language_model(), torch.randint(40, (10,))
    before, names = run(model, ids), set(model.state_dict())
    add_low_rank(model, rank=4, alpha=8)
    assert torch.equal(run(model, ids), before)
    added = {name.rpartition(".")[2] for name in set(model.state_dict()) - names}
    assert names < set(model.state_dict()) and added == {"lora_a", "lora_b"}


def test_low_rank_output_is_the_formula():
    torch.manual_seed(1)
    linear = nn.Linear(16, 12)
    layer = LowRankLinear(linear, rank=4, alpha=10)
    nn.init.normal_(layer.lora_a)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(7, 16)
    weight = linear.weight.double() + 10 / 4 * layer.lora_b.double() @ layer.lora_a.double()
    expected = x.double() @ weight.T + linear.bias.double()
    # float32 products of 16 terms
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_low_rank_parts_embeddings_and_norms_train_and_nothing_else():
    model = language_model()
    add_low_rank(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    whole = {n for n, _ in model.named_parameters() if "embed_tokens" in n or "norm" in n}
    low_rank = {f"model.layers.{i}.self_attn.{p}_proj.lora_{ab}" for i in range(2) for p in "qkvo" for ab in "ab"}
    assert trained == whole | low_rank


def test_merging_leaves_plain_layers_of_the_same_output():
    torch.manual_seed(0)
    model, ids = language_model(), torch.randint(40, (10,))
    names = list(model.state_dict())
    add_low_rank(model)
    train_low_rank(model)
    before = run(model, ids)
    merge_low_rank(model)
    assert list(model.state_dict()) == names
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    # float32: one product with W + BA in place of two
    torch.testing.assert_close(run(model, ids), before, rtol=1e-4, atol=1e-4 * float(before.detach().abs().max()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"targets": ("q_proj", "query")}, "no linear layer is called query"), ({"rank": 0}, "rank must be")],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        add_low_rank(language_model(), **arguments)


def fill_shards(rank: int, world_size: int) -> dict[str, Tensor]:
    """The low-rank parts of a model that has no memory before it is sharded."""
    with torch.device("meta"):
        model = language_model()
    add_low_rank(model, rank=3)  # does not divide by the ranks
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    model.to_empty(device="cpu")
    init_low_rank(model, 5)
    parameters: dict[str, Any] = dict(model.named_parameters())
    return {name: parameters[name].detach().full_tensor() for name in low_rank_names(model)}


@pytest.mark.parametrize("world_size", [1, 2])
def test_shards_are_filled_with_the_values_of_the_whole_layers(world_size):
    model = language_model()
    before = set(model.state_dict())
    add_low_rank(model, rank=3, seed=5)
    expected = {name: value for name, value in model.state_dict().items() if name not in before}
    assert all(value.any() == name.endswith("lora_a") for name, value in expected.items())
    for filled in run_ranks(fill_shards, world_size, world_size):
        assert filled.keys() == expected.keys()
        assert all(filled[name].equal(value) for name, value in expected.items())


def merge_sharded(rank: int, world_size: int) -> dict[str, Tensor]:
    model = language_model()
    add_low_rank(model, rank=3)  # does not divide by the ranks
    train_low_rank(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    with CommDebugMode() as sent:
        merge_low_rank(model)
    assert sent.get_comm_counts().keys() <= {torch.ops.c10d_functional.all_gather_into_tensor}  # of A, and no product
    state = model.state_dict()
    assert all(isinstance(value, DTensor) for value in state.values())
    return {name: value.full_tensor() for name, value in state.items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_merging_works_on_sharded_parameters(world_size):
    model = language_model()
    add_low_rank(model, rank=3)
    train_low_rank(model)
    merge_low_rank(model)
    for state in run_ranks(merge_sharded, world_size, world_size):
        assert state.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value)  # sums of 3 terms, at most in another order
