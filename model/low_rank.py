"""Low-rank training of linear layers (LoRA, arXiv 2106.09685) and merging the result back into plain ones.

Embeddings and norms are trained whole, as in LongLoRA (arXiv 2309.12307).
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class LowRankLinear(nn.Linear):
    """y = x W^T + b + (alpha / rank) x A^T B^T, the same function as `linear` at first, since B is zero.

    It takes over the parameters of `linear`, under the same names; A [rank, in] is drawn from N(0, 1 / in).
    """

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        a = torch.randn(rank, self.in_features, generator=generator) / self.in_features**0.5
        self.lora_a = nn.Parameter(a.to(self.weight))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.scale * F.linear(F.linear(input, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer of the same function. It takes the parameters back, sharded (DTensor) or not."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        linear.weight += self.scale * (self.lora_b @ self.lora_a)
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
    Raises ValueError where a target names no linear layer or the rank is not positive.
    """
    if rank < 1:
        raise ValueError(f"rank must be positive, got {rank}")
    found = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in targets}
    if missing := set(targets) - {n.rpartition(".")[2] for n, m in found.items() if isinstance(m, nn.Linear)}:
        raise ValueError(f"no linear layer is called {', '.join(sorted(missing))}")
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        whole = isinstance(module, nn.Embedding | nn.LayerNorm | nn.RMSNorm)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(whole)
    for name, module in found.items():
        if isinstance(module, nn.Linear):
            model.set_submodule(name, LowRankLinear(module, rank=rank, alpha=alpha, generator=generator))


def merge_low_rank(model: nn.Module) -> None:
    """Turns every low-rank layer back into an nn.Linear with the same output; who trains is left as it is.

    Every rank calls it. A model under FSDP2 can be saved afterwards, but not run: FSDP2 still gathers for the
    layers that were replaced.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRankLinear):
            model.set_submodule(name, module.merged())
