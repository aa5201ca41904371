"""Low-rank training of linear layers (LoRA, arXiv 2106.09685) and merging the result back into plain ones.

Embeddings and norms are trained whole, as in LongLoRA (arXiv 2309.12307).
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from .init import copy_whole

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class LowRankLinear(nn.Linear):
    """y = x W^T + b + (alpha / rank) x A^T B^T, with A [rank, in] and B [out, rank], for `init_low_rank` to fill.

    It takes over the parameters of `linear`, under the same names.
    """

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(self.weight.new_empty(self.out_features, rank))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.scale * F.linear(F.linear(input, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer of the same function. It takes the parameters back, sharded (DTensor) or not."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        a = self.lora_a
        if isinstance(a, DTensor):  # small: with all of it, B A is made in shards, not whole on each rank and summed
            a = a.redistribute(placements=[Replicate()])
        linear.weight += self.scale * (self.lora_b @ a)
        return linear


def add_low_rank(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: Collection[str] = ATTENTION,
    seed: int = 0,
) -> None:
    """Makes the linear layers whose last name is in `targets` low-rank, before the model is sharded.

    What trains from then on: their A and B, embeddings and norms; everything else in the model is frozen.
    On the meta device they have no values: call `init_low_rank` with the seed when the model has memory.
    Raises ValueError where a target names no linear layer or the rank is not positive.
    """
    if rank < 1:
        raise ValueError(f"rank must be positive, got {rank}")
    found = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in targets}
    if missing := set(targets) - {n.rpartition(".")[2] for n, m in found.items() if isinstance(m, nn.Linear)}:
        raise ValueError(f"no linear layer is called {', '.join(sorted(missing))}")
    for module in model.modules():
        whole = isinstance(module, nn.Embedding | nn.LayerNorm | nn.RMSNorm)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(whole)
    for name, module in found.items():
        if isinstance(module, nn.Linear):
            model.set_submodule(name, LowRankLinear(module, rank=rank, alpha=alpha))
    init_low_rank(model, seed)


@torch.no_grad()
def init_low_rank(model: nn.Module, seed: int) -> None:
    """Fills each A from N(0, 1 / in) and each B with zeros: the model is the same function as without them.

    The values depend on the seed and the model alone: a shard (DTensor) gets its part of them, without communication.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            a = torch.randn(module.lora_a.shape, generator=generator) / module.in_features**0.5
            copy_whole(module.lora_a, a)
            nn.init.zeros_(module.lora_b)


def low_rank_names(model: nn.Module) -> set[str]:
    """Names of the parameters that `add_low_rank` added."""
    layers = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    return {f"{layer}.{name}" for layer in layers for name in ("lora_a", "lora_b")}


def merge_low_rank(model: nn.Module) -> None:
    """Turns every low-rank layer back into an nn.Linear with the same output; who trains is left as it is.

    Every rank calls it. A model under FSDP2 can be saved afterwards, but not run: FSDP2 still gathers for the
    layers that were replaced.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRankLinear):
            model.set_submodule(name, module.merged())
