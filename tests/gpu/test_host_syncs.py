"""CUDA itself says where the host waits for it: nowhere in a training step, once for a token that is generated."""

import warnings
from pathlib import Path

import pytest
import torch
from longtake.comm.launch import launch
from longtake.comm.mesh import Mesh
from longtake.infer.engine import Engine
from longtake.train.trainer import Trainer

from tests.model.documents import make_document
from tests.tiny import random_model, tiny_config
from tests.training_files import run_config


def train_steps(start: Path, rows: Path, folder: Path, ring: int, ulysses: int) -> None:
    """Raises where the host waits in a step, once two steps have set all up."""
    settings = run_config(start, rows, folder, dtype="bfloat16", recompute=True, ring=ring, ulysses=ulysses)
    trainer = Trainer(settings, Mesh(ring=ring, ulysses=ulysses))
    for _ in range(2):
        trainer.step()
    torch.cuda.set_sync_debug_mode("error")
    in_flight = [trainer.step() for _ in range(2)]
    torch.cuda.set_sync_debug_mode("default")
    trainer.loader.close()
    assert all(entry.log(began=0.0).loss > 0 for entry in in_flight)


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (2, 2)])
def test_a_training_step_waits_for_nothing(
    ring: int, ulysses: int, start: Path, conversations: Path, tmp_path: Path
) -> None:
    launch(train_steps, start, conversations, tmp_path, ring, ulysses, world_size=ring * ulysses, share_gpu=True)


def test_generation_waits_once_for_each_token() -> None:
    mesh = Mesh(alone=True)
    engine = Engine(random_model(tiny_config(), seed=3).to(mesh.device), mesh)
    documents = [make_document((3,), seed=1), make_document((), seed=2)]

    def generate() -> int:
        pixels = torch.cat([document.pixels for document in documents])
        steps = engine.generate(
            documents, lambda first, last: pixels[first:last], max_new_tokens=5, stop=-1, temperature=0.7
        )
        return len(list(steps))

    generate()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        num_tokens = generate()
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    assert len(waits) == num_tokens == 5, [str(warning) for warning in waits]


@pytest.fixture(autouse=True, scope="module")
def a_gpu() -> None:
    assert torch.cuda.is_available(), "these tests are for a machine with a GPU: make gpu"
