"""Random weights for a model that starts from nothing."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

RESIDUAL_OUTPUTS = ("out_proj", "fc2", "o_proj", "down_proj")


@torch.no_grad()
def init(model: nn.Module, seed: int) -> None:
    """Fills every parameter: normal values of std 0.7 / sqrt(fan_in) for linears and convolutions, 0.02 for
    embeddings and the linears that end a residual branch; biases 0, norms 1.

    The values depend on the seed and the model alone: a sharded (DTensor) parameter gets its part of the same
    values, without communication. Raises ValueError for a kind of module that has no rule.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            _fill(module.weight, 0.02, generator)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight.shape[1:].numel()
            ends_residual = name.rpartition(".")[2] in RESIDUAL_OUTPUTS
            _fill(module.weight, 0.02 if ends_residual else 0.7 / fan_in**0.5, generator)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif next(module.parameters(recurse=False), None) is not None:
            raise ValueError(f"no rule to initialise {name}, a {type(module).__name__}")
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _fill(weight: Tensor, std: float, generator: torch.Generator) -> None:
    copy_whole(weight, torch.empty(weight.shape, dtype=torch.float32).normal_(0, std, generator=generator))


@torch.no_grad()
def copy_whole(parameter: Tensor, values: Tensor) -> None:
    """Copy the values of a whole tensor, which every rank has, into a parameter, or into this rank's shard of one."""
    if isinstance(parameter, DTensor):  # src_data_rank None cuts without a scatter
        values = values.to(parameter.device)
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(values)
