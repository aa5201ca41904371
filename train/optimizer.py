"""AdamW, its schedule, and gradients clipped over all ranks."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW on what trains: weight decay on matrices only, the vision tower at its own rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.dim() > 1 else 0.0
            scale = config.tower_learning_rate if name.startswith("vision_tower.") else 1.0
            groups.setdefault((decay, scale), []).append(parameter)
    rate = config.plan.learning_rate if config.learning_rate is None else config.learning_rate
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "peak": rate * scale, "lr": rate * scale}
            for (decay, scale), parameters in groups.items()
        ],
        betas=config.betas,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> None:
    """The rate of step `step` (from 0): a pure function of it, so that a resumed run has the same.

    A run of epochs resumed on other ranks is at the step where it would be, had it always run on them.
    """
    factor = learning_rate_factor(
        step,
        steps=config.steps,
        warmup=config.warmup,
        schedule=config.schedule or config.plan.schedule,
        floor=config.min_learning_rate,
    )
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def learning_rate_factor(
    step: int, *, steps: int, warmup: int, schedule: Literal["cosine", "constant"], floor: float = 0.0
) -> float:
    """Linear warm-up to 1, then constant, or a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their norm over all ranks is at most max_norm. Returns the norm before.

    The norm is a scalar on the gradients' device (the CPU without a gradient), which nothing here waits for.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    return _whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm))


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x
