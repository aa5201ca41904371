"""Rates follow the schedule, decay is for matrices, and the norm that clips is that of all ranks together."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.comm.mesh import Mesh
from longtake.train.optimizer import build_optimizer, clip_gradients, learning_rate_factor, set_learning_rate
from longtake.train.stages import STAGES
from longtake.train.trainer import shard_parameters
from torch.distributed.tensor import DTensor

from tests.ranks import run_ranks
from tests.tiny import random_model, tiny_config
from tests.training_files import run_config


def config(**fields: Any) -> Any:
    return run_config(Path(), Path(), Path(), **fields)


def test_warm_up_is_linear_then_the_cosine_falls_to_its_floor() -> None:
    factors = [learning_rate_factor(step, steps=12, warmup=4, schedule="cosine", floor=0.1) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.55)  # half way
    assert factors[12] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(factors[4:]))
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert factors[6] == pytest.approx(quarter)


def test_a_constant_rate_stays_after_its_warm_up() -> None:
    factors = [learning_rate_factor(step, steps=6, warmup=2, schedule="constant") for step in range(6)]
    assert factors == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_matrices_decay_and_the_tower_has_its_own_rate() -> None:
    model = random_model(tiny_config(), seed=0)
    model.mm_projector.requires_grad_(False)
    settings = config(learning_rate=0.01, tower_learning_rate=0.1, weight_decay=0.5, steps=10, warmup=2)
    optimizer = build_optimizer(model, settings)
    set_learning_rate(optimizer, 0, settings)
    found = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if name.startswith("mm_projector"):
            assert parameter not in found
        else:
            rate = 0.0005 if name.startswith("vision_tower") else 0.005
            assert found[parameter] == pytest.approx((rate, 0.5 * (parameter.dim() > 1))), name


@pytest.mark.parametrize("stage", STAGES)
def test_the_stage_has_a_rate_and_a_schedule_of_its_own(stage: int) -> None:
    settings = config(stage=stage, learning_rate=None, steps=10)
    optimizer = build_optimizer(random_model(tiny_config(), seed=0), settings)
    set_learning_rate(optimizer, 5, settings)
    half_way = {"cosine": 0.5, "constant": 1.0}[STAGES[stage].schedule]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(STAGES[stage].learning_rate * half_way)


def clip(rank: int) -> list[tuple[float, float, float]]:
    """Norm of given gradients, what clip_gradients says it is, and the norm afterwards; clipped, then not."""
    mesh, results = Mesh(ring=2, ulysses=2), []
    model = random_model(tiny_config(), seed=0)
    shard_parameters(model, mesh, config(shard="layer"))
    for limit in (0.5, 1e6):
        total = 0.0
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.cos(parameter.detach() * (i + 1)) if i % 3 else None
            if isinstance(parameter.grad, DTensor):
                total += float((parameter.grad.full_tensor().double() ** 2).sum())
        said = float(clip_gradients(model, limit))
        grads = [p.grad.full_tensor() for p in model.parameters() if isinstance(p.grad, DTensor)]
        results.append((total**0.5, said, float(torch.cat([g.flatten() for g in grads]).double().norm())))
    return results


def test_gradients_are_clipped_by_the_norm_over_all_ranks() -> None:
    for clipped, kept in run_ranks(clip, 4):
        assert clipped[:2] == kept[:2]
        assert clipped[1] == pytest.approx(clipped[0], rel=1e-5)  # float32 sums
        assert (clipped[2], kept[2]) == pytest.approx((0.5, kept[0]), rel=1e-5)


def test_without_gradients_the_norm_is_zero() -> None:
    assert clip_gradients(random_model(tiny_config(), seed=0), 1.0) == 0.0
