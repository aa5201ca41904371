"""What FSDP2 gathers, and when: a unit's parameters are on their way before the one before it talks to other ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from longtake.comm.mesh import Mesh
from longtake.model.precision import DTYPES
from longtake.model.vlm import VisionLanguageModel
from longtake.train.budget import gathered_bytes, shaped_model
from longtake.train.config import TrainConfig
from longtake.train.stages import freeze_for
from longtake.train.trainer import compute_gradients, shard_parameters
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.documents import make_document
from tests.model.test_vlm import step_data
from tests.ranks import run_ranks
from tests.tiny import random_model, tiny_config
from tests.training_files import run_config

NUM_LAYERS = 4
MODEL = replace(tiny_config(), language=replace(tiny_config().language, num_hidden_layers=NUM_LAYERS))


class Gathers(TorchDispatchMode):
    """Notes each gather, and at the modules that are watched how many there were, and the bytes that are whole.

    notes: (module, gathers so far, bytes of gathered parameters and of what gathers filled and is still there)
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.model = model
        self.filled: list[tuple[int, StorageWeakRef]] = []
        self.notes: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.c10d._allgather_base_.default:
            storage = args[0].untyped_storage()
            self.filled.append((storage.nbytes(), StorageWeakRef(storage)))
        return result

    def watch(self, name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: self.notes.append((name, len(self.filled), self.whole_bytes())))

    def whole_bytes(self) -> int:
        arrived = sum(size for size, storage in self.filled if not storage.expired())
        return arrived + sum(p.numel() * 2 for p in self.model.parameters() if not isinstance(p, DTensor))


def watch_a_step(rank: int, config: TrainConfig) -> tuple[list[tuple[str, int, int]], int, bool]:
    """What is noted in a step in bfloat16, forward first, the number of gathers, and whether a gradient is missing."""
    mesh, model = Mesh(ring=2), random_model(MODEL, seed=0).train()
    freeze_for(config.plan, model)
    model.llm.recompute = model.vision_tower.recompute = config.recompute
    shard_parameters(model, mesh, config)
    gathers = Gathers(model)
    gathers.watch("tower", model.vision_tower.vision_model)
    for i in range(NUM_LAYERS):
        gathers.watch(f"attention {i}", model.llm.model.layers[i].self_attn)
    with gathers:
        compute_gradients(model, step_data([make_document((2,), seed=0)], mesh), mesh)
    missing = any((p.grad is not None) != p.requires_grad for p in model.parameters())
    return gathers.notes, len(gathers.filled), missing


@pytest.mark.parametrize(
    "fields",
    [{}, {"recompute": True}, {"stage": 1}, {"stage": 1, "recompute": True}, {"stage": 2}, {"stage": 4, "low_rank": 0}],
    ids=str,
)
def test_the_next_unit_is_on_its_way_before_a_unit_talks(fields: dict[str, Any]) -> None:
    config = run_config(Path(), Path(), Path(), dtype="bfloat16", **{"stage": 5} | fields)
    said = gathered_bytes(shaped_model(config, MODEL), config)["gathered parameters"]
    for notes, total, missing in run_ranks(watch_a_step, 2, config):
        forward = {name: so_far for name, so_far, _ in notes[: NUM_LAYERS + 1]}
        order = ["tower", *(f"attention {i}" for i in range(NUM_LAYERS))]
        assert forward == {name: min(i + 3, NUM_LAYERS + 2) for i, name in enumerate(order)}  # root, up to it, the next
        assert total == 1 + 2 * (NUM_LAYERS + 1)  # the root once, a unit once in forward and once in backward
        assert max(whole for _, _, whole in notes) == said
        assert not missing


def test_a_model_that_is_one_unit_is_gathered_once() -> None:
    config = run_config(Path(), Path(), Path(), dtype="bfloat16", stage=5, shard="model")
    for notes, total, missing in run_ranks(watch_a_step, 2, config):
        assert total == 1 and len(notes) == NUM_LAYERS + 1 and not missing


def dtypes_met(module: nn.Module) -> set[torch.dtype]:
    """Of its weights and of what it returns, as it runs."""
    met: set[torch.dtype] = set()

    def note(module: nn.Module, args: Any, out: Tensor) -> None:
        met.update(x.dtype for x in (*module.parameters(), out))

    module.register_forward_hook(note)
    return met


def dtypes_of_a_step(rank: int) -> dict[str, tuple[set[torch.dtype], set[torch.dtype]]]:
    """Of the computation and of the parameters, by the dtype that is the device's usual one."""
    found = {}
    for dtype in ("bfloat16", "float32"):
        model, mesh = random_model(MODEL, seed=0).train(), Mesh()
        with patch("longtake.train.trainer.usual_dtype", side_effect={"cpu": dtype}.__getitem__):
            shard_parameters(model, mesh, run_config(Path(), Path(), Path()))
        computed = dtypes_met(model.get_submodule("llm.model.layers.1.self_attn.q_proj"))
        compute_gradients(model, step_data([make_document((2,), seed=0)], mesh), mesh)
        found[dtype] = computed, {x.dtype for p in model.parameters() for x in (p, p.grad) if x is not None}
    return found


def test_without_a_dtype_the_device_says_it_and_parameters_stay_float32() -> None:
    [found] = run_ranks(dtypes_of_a_step, 1)
    for dtype, (computed, kept) in found.items():
        assert computed == {DTYPES[dtype]} and kept == {torch.float32}
