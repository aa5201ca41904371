"""A checkpoint written on 4 ranks is the same model, optimizer and place in the data on 2 ranks and on 1."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from longtake.comm.mesh import Mesh
from longtake.model.checkpoint import Progress, complete_steps, latest, load_model, read_progress, resume, save
from longtake.model.low_rank import add_low_rank, low_rank_names
from longtake.model.vlm import VisionLanguageModel
from longtake.train.trainer import shard_parameters
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.ranks import run_ranks
from tests.tiny import random_model, tiny_config
from tests.training_files import run_config

PROGRESS = Progress(step=7, consumed=30, skipped=2, seed=5, sizes=(8, 6), counts=(8, 3))
BEGIN = replace(PROGRESS, step=0, consumed=0, skipped=0)


def whole(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x.clone()


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and their moments by name; copies, that travel by value."""
    state = {}
    for name, parameter in model.named_parameters():
        state[name] = whole(parameter.detach())
        state |= {f"{name}.{key}": whole(value) for key, value in optimizer.state[parameter].items()}
    return state


def sharded(mesh: Mesh, *, seed: int, **fields: Any) -> tuple[VisionLanguageModel, torch.optim.AdamW]:
    model = random_model(tiny_config(), seed=seed)
    if mesh.world_size > 1:
        shard_parameters(model, mesh, run_config(Path(), Path(), Path(), **fields))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1 * seed)


def write(rank: int, folder: Path) -> dict[str, Tensor]:
    """A model after two steps of its optimizer, saved."""
    mesh = Mesh(ring=2, ulysses=2)
    model, optimizer = sharded(mesh, seed=1, shard="layer")
    for step in range(2):
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.sin(parameter.detach() + i + step)
        optimizer.step()
    model.config.save(folder)
    torch.manual_seed(rank)
    save(folder, model=model, optimizer=optimizer, progress=PROGRESS, mesh=mesh)
    return whole_state(model, optimizer)


def read(rank: int, folder: Path, ring: int) -> tuple[Progress, float, dict[str, Tensor], dict[str, Tensor]]:
    """Progress, learning rate and state of a run that continues, and the parameters of one that starts from it."""
    mesh = Mesh(ring=ring)
    model, optimizer = sharded(mesh, seed=2, shard="model")
    progress = read_progress(folder, BEGIN, mesh)
    resume(folder, model=model, optimizer=optimizer, mesh=mesh)
    fresh = random_model(tiny_config(), seed=3)
    load_model(folder, fresh, mesh if ring > 1 else None)
    rate = optimizer.param_groups[0]["lr"]
    return progress, rate, whole_state(model, optimizer), {n: p.detach() for n, p in fresh.named_parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[str, Tensor]:
    return run_ranks(write, 4, folder)[0]


@pytest.mark.parametrize("ranks", [2, 1])
def test_what_4_ranks_wrote_fewer_read(folder: Path, written: dict[str, Tensor], ranks: int) -> None:
    results = run_ranks(read, 2, folder, 2) if ranks == 2 else [read(0, folder, 1)]
    for progress, rate, state, parameters in results:
        assert (progress, rate) == (PROGRESS, 0.2)  # the rate of the run that continues
        assert state.keys() == written.keys()
        assert not [name for name in written if not torch.equal(state[name], written[name])]
        assert parameters and not [name for name, p in parameters.items() if not torch.equal(p, written[name])]


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def test_a_folder_that_was_not_written_to_its_end_is_ignored(
    folder: Path, written: dict[str, Tensor], tmp_path: Path
) -> None:
    copy = copy_of(folder, tmp_path)
    part = copy / "step-000009.part"
    part.mkdir()
    (part / "__0_0.distcp").write_bytes(b"half a sh")
    assert latest(copy).name == "step-000007"
    model, mesh = random_model(tiny_config(), seed=3), Mesh(alone=True)
    load_model(copy, model)
    assert torch.equal(model.llm.model.norm.weight, written["llm.model.norm.weight"])
    save(copy, model=model, optimizer=None, progress=Progress(step=9), mesh=mesh)
    assert [path.name for path in complete_steps(copy)] == ["step-000007", "step-000009"]
    assert not part.exists()
    load_model(copy, model)


def test_a_folder_that_is_no_checkpoint_is_named(folder: Path, written: dict[str, Tensor], tmp_path: Path) -> None:
    model = random_model(tiny_config(), seed=3)
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match=f"{path} is not a checkpoint: expected config.json and a step-N folder"):
            load_model(path, model)
    (copy := copy_of(folder, tmp_path)).joinpath("config.json").unlink()
    with pytest.raises(ValueError, match="copy is not a checkpoint"):
        latest(copy)
    (tmp_path / "step-000003.part").mkdir()
    tiny_config().save(tmp_path)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        latest(tmp_path)


def test_another_models_checkpoint_is_refused(folder: Path, written: dict[str, Tensor]) -> None:
    model = random_model(tiny_config(), seed=3)
    add_low_rank(model.llm, rank=2, alpha=4)
    with pytest.raises(ValueError, match=r"of another model, or of an unfinished low-rank stage: .*lora_a"):
        load_model(folder, model)


def test_new_parameters_stay_and_all_others_are_read(folder: Path, written: dict[str, Tensor]) -> None:
    model = random_model(tiny_config(), seed=3)
    add_low_rank(model.llm, rank=2, alpha=4, seed=1)
    added = {name: model.get_parameter(name).detach().clone() for name in low_rank_names(model)}
    load_model(folder, model, new=added)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, added[name] if name in added else written[name]), name
    with pytest.raises(ValueError, match=r"of another model, .*lora_a"):
        load_model(folder, model, new=sorted(added)[1:])


def test_a_checkpoint_without_an_optimizer_cannot_be_continued(tmp_path: Path) -> None:
    mesh = Mesh(alone=True)
    model = random_model(tiny_config(), seed=1)
    model.config.save(tmp_path)
    save(tmp_path, model=model, optimizer=None, progress=PROGRESS, mesh=mesh)
    with pytest.raises(ValueError, match=r"step-000007 has no optimizer state .* start a new run from it"):
        read_progress(tmp_path, BEGIN, mesh)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 6}, "seed 5, this run has 6"),
        ({"sizes": (8, 7)}, r"numbers of samples in data \(8, 6\), this run has \(8, 7\)"),
        ({"sizes": (8,), "counts": (8,)}, r"numbers of samples in data \(8, 6\), this run has \(8,\)"),
        ({"counts": (8, 2)}, r"numbers of samples in an epoch \(8, 3\), this run has \(8, 2\)"),
    ],
)
def test_samples_in_another_order_are_refused(
    folder: Path, written: dict[str, Tensor], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"step-000007 was written with {message}: .* set it back, or start a new run"):
        read_progress(folder, replace(BEGIN, **changed), Mesh(alone=True))


def test_a_checkpoint_that_does_not_know_its_order_is_refused(tmp_path: Path) -> None:
    model, optimizer = sharded(mesh := Mesh(alone=True), seed=1)
    model.config.save(tmp_path)
    old: Any = SimpleNamespace(step=7, consumed=30, skipped=2)
    save(tmp_path, model=model, optimizer=optimizer, progress=old, mesh=mesh)
    with pytest.raises(ValueError, match="step-000007 does not say in what order its samples come"):
        read_progress(tmp_path, BEGIN, mesh)


def test_hyperparameters_are_those_of_the_run_that_continues(folder: Path, written: dict[str, Tensor]) -> None:
    """Also where they group the parameters in another way."""
    model = random_model(tiny_config(), seed=2)
    decay, rest = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.5, "peak": 3.0}, {"params": rest, "peak": 4.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.3, betas=(0.5, 0.75), weight_decay=0.0)
    resume(folder, model=model, optimizer=optimizer, mesh=Mesh(alone=True))
    found = [(len(g["params"]), g["weight_decay"], g["peak"], g["lr"], g["betas"]) for g in optimizer.param_groups]
    assert found == [(len(decay), 0.5, 3.0, 0.3, (0.5, 0.75)), (len(rest), 0.0, 4.0, 0.3, (0.5, 0.75))]
    state = whole_state(model, optimizer)
    assert state.keys() == written.keys() and not [name for name in written if not state[name].equal(written[name])]


def random_numbers(rank: int, folder: Path) -> tuple[Tensor, Tensor]:
    """What each rank drew next when it saved, and what it draws after it came back."""
    mesh = Mesh(ring=2)
    model, optimizer = sharded(mesh, seed=1)
    torch.manual_seed(100 + rank)
    torch.rand(3)
    if rank == 0:
        model.config.save(folder)
    save(folder, model=model, optimizer=optimizer, progress=PROGRESS, mesh=mesh)
    expected = torch.rand(5)
    torch.manual_seed(0)
    resume(folder, model=model, optimizer=optimizer, mesh=mesh)
    return expected, torch.rand(5)


def test_each_rank_has_its_random_state_back(tmp_path: Path) -> None:
    results = run_ranks(random_numbers, 2, tmp_path)
    for expected, drawn in results:
        assert torch.equal(expected, drawn)
    assert not torch.equal(results[0][0], results[1][0])
