"""Training runs: what interrupts, splits or shards them does not change what they compute."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.comm.mesh import Mesh
from longtake.infer.convert import from_official
from longtake.model.checkpoint import Progress, complete_steps, load_model, save
from longtake.model.config import ModelConfig
from longtake.model.low_rank import add_low_rank
from longtake.model.vlm import VisionLanguageModel
from longtake.train.budget import shaped_model, state_bytes
from longtake.train.sample import SampleError
from longtake.train.trainer import StepLog, Trainer, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.model.official_files import write_official
from tests.ranks import run_ranks
from tests.tiny import random_model
from tests.training_files import conversation, run_config, write_rows

Numbers = list[tuple[float, float]]
GRID = {"ring": 2, "ulysses": 2}


def numbers(logs: list[StepLog]) -> Numbers:
    """Loss and gradient norm of each step."""
    return [(entry.loss, entry.grad_norm) for entry in logs]


def parameters(folder: Path) -> dict[str, Tensor]:
    model = VisionLanguageModel(ModelConfig.load(folder))
    load_model(folder, model)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


# ------------------------------------------------------------------------------------- interrupted runs


def interrupt(rank: int, start: Path, rows: Path, folder: Path) -> tuple[Numbers, Numbers]:
    """A run that goes through, and one that is lost after step 3, with a checkpoint of step 2, and continued."""
    settings = run_config(start, rows, folder / "through", batch_size=1, accumulation=2, warmup=1, save_every=3, **GRID)
    through = train(settings)
    settings = replace(settings, out=folder / "killed")
    killed = Trainer(settings, mesh := Mesh(ring=2, ulysses=2))
    for _ in range(2):
        killed.step()
    killed.save()
    killed.step()
    killed.loader.close()
    if rank == 0:
        (settings.out / "step-000003.part").mkdir()
        shutil.copytree(settings.out, folder / "elsewhere")
    mesh.barrier()
    return numbers(through), numbers(train(settings, continue_run=True))


def continue_elsewhere(rank: int, start: Path, rows: Path, folder: Path) -> Numbers:
    """The run that was lost, on another number of ranks."""
    settings = run_config(start, rows, folder / "elsewhere", batch_size=1, accumulation=2, warmup=1, ring=2)
    return numbers(train(settings, continue_run=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def interrupted(start: Path, conversations: Path, folder: Path) -> list[tuple[Numbers, Numbers]]:
    return run_ranks(interrupt, 4, start, conversations, folder)


def test_a_killed_run_continues_bit_for_bit(interrupted: list[tuple[Numbers, Numbers]], folder: Path) -> None:
    for through, continued in interrupted:
        assert len(through) == 4 and continued == through[2:]
        assert through == interrupted[0][0]  # every rank says the same
    expected, found = parameters(folder / "through"), parameters(folder / "killed")
    assert not [name for name in expected if not found[name].equal(expected[name])]
    assert [path.name for path in complete_steps(folder / "through")] == ["step-000003", "step-000004"]


def test_a_killed_run_continues_on_another_world_size(
    interrupted: list[tuple[Numbers, Numbers]], start: Path, conversations: Path, folder: Path
) -> None:
    for continued in run_ranks(continue_elsewhere, 2, start, conversations, folder):
        # float32 sums in another order, and after them a step of AdamW, which divides small gradients by themselves
        assert torch.tensor(continued).allclose(torch.tensor(interrupted[0][0][2:]), rtol=1e-4)


def test_tensorboard_has_the_values_of_each_step(interrupted: list[tuple[Numbers, Numbers]], folder: Path) -> None:
    board = EventAccumulator(str(folder / "through")).Reload()
    for i, name in enumerate(("loss", "grad_norm")):
        events = board.Scalars(name)
        assert [event.step for event in events] == [1, 2, 3, 4]
        values = [step[i] for step in interrupted[0][0]]
        assert [event.value for event in events] == pytest.approx(values, rel=1e-6)  # stored as float32
    for name in ("tokens_per_second", "frames_per_second", "memory_gib"):
        assert all(event.value > 0 for event in board.Scalars(name))


# ------------------------------------------------------------------------------------- continued with other settings

# on so many ranks, until so many steps, then on so many; of 6 rows
MOVED: dict[str, tuple[int, int, int, dict[str, int]]] = {
    "epochs 1 to 2": (1, 5, 2, {"epochs": 2, "steps": 0}),
    "epochs 2 to 1": (2, 3, 1, {"epochs": 2, "steps": 0}),
    "steps 2 to 1": (2, 2, 1, {"steps": 4}),
}


def begin(rank: int, start: Path, rows: Path, folder: Path, ranks: int) -> None:
    """The first part of those of MOVED that begin on so many ranks."""
    for name, (before, stop, _, fields) in MOVED.items():
        if before == ranks:
            settings = run_config(start, rows, folder / name, batch_size=1, **fields)
            trainer = Trainer(settings, Mesh(data=ranks))
            for _ in range(stop):
                trainer.step()
            trainer.save()
            trainer.loader.close()


def move(rank: int, start: Path, rows: Path, folder: Path, ranks: int) -> dict[str, tuple[float, ...]]:
    """The others: rate and steps read ahead at their first step, then the steps and samples at their end."""
    found = {}
    for name, (_, _, after, fields) in MOVED.items():
        if after == ranks:
            settings = run_config(start, rows, folder / name, batch_size=1, prefetch=2, **fields)
            trainer = Trainer(settings, Mesh(data=ranks), continue_run=True)
            trainer.step()
            rate, num_ahead = trainer.optimizer.param_groups[0]["lr"], len(trainer.loader.ahead)
            step = trainer.run()[-1].step
            assert step == trainer.progress.step
            found[name] = (rate, num_ahead, step, trainer.progress.consumed)
    return found


def test_on_other_ranks_a_run_ends_where_it_would_and_its_rate_goes_on(
    start: Path, conversations: Path, tmp_path: Path
) -> None:
    for ranks in (1, 2):
        run_ranks(begin, ranks, start, conversations, tmp_path, ranks)
    found: dict[str, tuple[float, ...]] = {}
    for ranks in (1, 2):
        found |= run_ranks(move, ranks, start, conversations, tmp_path, ranks)[0]
    assert found["epochs 1 to 2"] == pytest.approx((0.0075, 2, 9, 13))  # 2 of 6 steps done: 4 were, of 12 samples
    assert found["epochs 2 to 1"] == pytest.approx((0.005, 2, 9, 12))  # half of 12 samples done
    assert found["steps 2 to 1"] == pytest.approx((0.005, 1, 4, 6))  # half of 4 steps done


def change(rank: int, start: Path, rows: Path, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The groups of a continued run with hyperparameters of its own, and what is said of another order of samples."""
    settings, mesh = run_config(start, rows, folder / "changed", schedule="constant"), Mesh()
    trainer = Trainer(settings, mesh)
    trainer.step()
    trainer.save()
    trainer.loader.close()
    own = {"learning_rate": 1e-3, "tower_learning_rate": 0.5, "weight_decay": 0.25, "betas": (0.5, 0.75)}
    trainer = Trainer(replace(settings, **own), mesh, continue_run=True)
    trainer.step()
    trainer.loader.close()
    groups = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
    fewer, errors = write_rows(rows.with_name("fewer.jsonl"), [conversation(0, [])]), []
    for fields in ({"seed": 7}, {"data": fewer}):
        try:
            Trainer(replace(settings, **fields), mesh, continue_run=True)
        except ValueError as error:
            errors.append(str(error))
    return groups, errors


def test_a_continued_run_has_the_settings_given_now_but_for_the_order_of_its_samples(
    start: Path, conversations: Path, tmp_path: Path
) -> None:
    groups, errors = run_ranks(change, 1, start, conversations, tmp_path)[0]
    found = {(group["lr"], group["peak"], group["weight_decay"], group["betas"]) for group in groups}
    assert found == {(rate, rate, decay, (0.5, 0.75)) for rate in (1e-3, 5e-4) for decay in (0.0, 0.25)}
    assert len(errors) == 2 and "with seed 0, this run has 7" in errors[0]
    assert "with numbers of samples in data (6,), this run has (1,)" in errors[1]


def take_steps(rank: int, start: Path, rows: Path, folder: Path) -> tuple[list[tuple[int, int]], ...]:
    """Tokens and frames of each step of an epoch and a half, and those of the samples that belong in it."""
    trainer = Trainer(run_config(start, rows, folder), Mesh(data=2))
    dataset, seed = trainer.loader.dataset, trainer.config.seed
    taken = [trainer.step() for _ in range(3)]
    trainer.loader.close()
    samples = [[dataset[index] for index in dataset.order(seed, 4 * step, 4)] for step in range(3)]
    expected = [(sum(len(s.input_ids) for s in step), sum(len(s.frame_starts) for s in step)) for step in samples]
    return [(step.num_tokens, step.num_frames) for step in taken], expected


def test_each_step_takes_the_next_samples(start: Path, conversations: Path, tmp_path: Path) -> None:
    for taken, expected in run_ranks(take_steps, 2, start, conversations, tmp_path):
        assert taken == expected and len(set(expected)) == 3


# ------------------------------------------------------------------------------------- the same run, split otherwise

SAME = {
    "accumulation 2": {"batch_size": 1, "accumulation": 2},
    "model": {"shard": "model"},
    "recompute": {"recompute": True},
    "recompute, model": {"recompute": True, "shard": "model"},
    "zigzag": {"layout": "zigzag"},
    "contiguous relay": {"layout": "contiguous", "route": "relay"},
    "ulysses": {"ring": 1, "ulysses": 2},
    "data 2": {"ring": 1, "batch_size": 1},
}


def split(rank: int, start: Path, rows: Path, folder: Path) -> dict[str, Numbers]:
    base = run_config(start, rows, folder, steps=2, ring=2)
    model, found = Trainer(replace(base, recompute=True), Mesh(ring=2)).model, {}
    assert model.llm.recompute and model.vision_tower.recompute
    for name, fields in {"base": {}, **SAME}.items():
        found[name] = numbers(train(replace(base, out=folder / name, **fields)))
    return found


def test_a_run_is_the_same_however_it_is_split(start: Path, conversations: Path, tmp_path: Path) -> None:
    for found in run_ranks(split, 2, start, conversations, tmp_path):
        base = found.pop("base")
        assert found.keys() == SAME.keys() and base[0] != base[1]
        assert found["recompute"] == base and found["recompute, model"] == found["model"]
        for name, values in found.items():
            difference = (torch.tensor(values) / torch.tensor(base) - 1).abs().amax(1)
            assert difference[0] < 1e-5, name  # float32 sums in another order
            assert difference[1] < 1e-4, name  # after a step of AdamW, which divides small gradients by themselves


# ------------------------------------------------------------------------------------- from a checkpoint into shards


def write_larger(start: Path, folder: Path) -> Path:
    """A checkpoint of 5 MB in matrices of 256 KiB: much more than what ranks tell each other while they read."""
    config = ModelConfig.load(start)
    config = replace(config, language=replace(config.language, intermediate_size=2048, num_hidden_layers=6))
    shutil.copytree(start, folder, ignore=shutil.ignore_patterns("step-*"))
    config.save(folder)
    save(folder, model=random_model(config, seed=1), optimizer=None, progress=Progress(), mesh=Mesh(alone=True))
    return folder


def peak_bytes(trace: Path) -> int:
    """Most bytes of tensors that lived at once in a trace of this process's allocations."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    allocated = torch.tensor([event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])])
    return int(allocated.cumsum(0).max())


def build(rank: int, start: Path, packed: Path, folder: Path, ring: int) -> tuple[int, int, dict[str, Tensor]]:
    """Bytes at the peak of building a trainer, those that are left, and the whole parameters of the model."""
    settings = run_config(start, packed, folder / "out", stage=4, low_rank=3, context=100, seed=7, ring=ring)
    mesh = Mesh(ring=ring)
    assert mesh.device_mesh  # and the first tensors of torch.distributed
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = Trainer(settings, mesh).model
    profiler.export_chrome_trace(str(trace := folder / f"trace-{ring}-{rank}.json"))
    sharded: dict[str, Any] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    held = sum(parameter.to_local().nbytes for parameter in sharded.values())
    return peak_bytes(trace), held, {name: parameter.full_tensor() for name, parameter in sharded.items()}


@pytest.mark.parametrize("ring", [1, 2])
def test_a_rank_holds_its_shards_and_two_tensors_on_their_way(
    start: Path, packed: Path, tmp_path: Path, ring: int
) -> None:
    """And they are those of a model that was built whole, the low-rank ones as well, whatever the world size."""
    larger = write_larger(start, tmp_path / "larger")
    expected = VisionLanguageModel(ModelConfig.load(larger))
    load_model(larger, expected)
    add_low_rank(expected.llm, rank=3, alpha=6, seed=7)
    largest = max(parameter.nbytes for parameter in expected.parameters())
    settings = run_config(larger, packed, tmp_path, stage=4, low_rank=3)
    share = state_bytes(shaped_model(settings, expected.config), ring)["parameters"]
    for peak, held, whole in run_ranks(build, ring, larger, packed, tmp_path, ring):
        assert held <= share and peak < share + 2 * largest + 2**17, (peak, share)  # 128 KiB: plans they exchange
        assert whole.keys() == dict(expected.named_parameters()).keys()
        assert not [name for name, parameter in expected.named_parameters() if not torch.equal(parameter, whole[name])]


def train_from(rank: int, folders: list[Path], rows: Path, packed: Path) -> list[Numbers]:
    """Stage 3, and stage 4 with its low-rank update, from each folder."""
    stages: list[dict[str, Any]] = [{"data": rows, "stage": 3}, {"data": packed, "stage": 4, "context": 100}]
    return [
        numbers(train(run_config(folder, out=folder / f"stage{fields['stage']}", steps=2, ring=2, **fields)))
        for fields in stages
        for folder in folders
    ]


def test_a_run_starts_from_an_official_folder_as_from_a_converted_one(
    conversations: Path, packed: Path, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    official, converted = tmp_path / "official", tmp_path / "converted"
    write_official(official, dtype=torch.bfloat16)
    from_official(official, converted, dtype=None)
    for straight, expected, straight_4, expected_4 in run_ranks(
        train_from, 2, [official, converted], conversations, packed
    ):
        assert straight == expected and straight_4 == expected_4 and straight[0] != straight[1]


# ------------------------------------------------------------------------------------- stages on four ranks


def all_stages(rank: int, start: Path, rows: Path, packed: Path, folder: Path) -> list[StepLog]:
    logs, model = [], start
    for name in ("1", "2", "3", "4", "4 whole", "5"):
        stage = int(name[0])
        data, low_rank = (packed, 0 if name == "4 whole" else None) if stage == 4 else (rows, None)
        run = run_config(model, data, folder / name, stage=stage, steps=1, low_rank=low_rank, context=100, **GRID)
        logs += train(run)
        model = folder / ("3" if name == "4" else name)
    return logs


def test_five_stages_run_one_after_the_other_on_four_ranks(
    start: Path, conversations: Path, packed: Path, tmp_path: Path
) -> None:
    logs = run_ranks(all_stages, 4, start, conversations, packed, tmp_path)[0]
    assert len(logs) == 6 and all(0 < entry.loss < 20 and 0 < entry.grad_norm < 1e4 for entry in logs)
    assert logs[3].loss == logs[4].loss  # the low-rank update is nothing at first
    assert logs[3].max_tokens == 40 and logs[3].frames_per_second == 0


# ------------------------------------------------------------------------------------- bad samples


def train_on_bad_rows(rank: int, start: Path, rows: Path, folder: Path) -> dict[str, Any]:
    """One of two rows is bad, a step has one: so every second step is empty."""
    settings = run_config(start, rows, folder / "skip", batch_size=1, on_bad_sample="skip", ring=2)
    logs = train(settings)
    train(replace(settings, out=folder / "half", steps=2))
    continued = train(replace(settings, out=folder / "half"), continue_run=True)
    try:
        train(replace(settings, out=folder / "stop", on_bad_sample="stop"))
        error = ""
    except SampleError as caught:
        error = str(caught)
    return {
        "numbers": numbers(logs),
        "skipped": [entry.skipped for entry in logs],
        "continued": [entry.skipped for entry in continued],
        "error": error,
    }


def test_bad_samples_are_skipped_and_counted_or_stop_every_rank(
    start: Path, conversations: Path, tmp_path: Path
) -> None:
    rows = write_rows(conversations.with_name("one_bad.jsonl"), [conversation(0, [3]), {"conversations": "none"}])
    for found in run_ranks(train_on_bad_rows, 2, start, rows, tmp_path):
        assert sorted(found["numbers"])[:2] == [(0.0, 0.0)] * 2  # no sample, no loss, no step
        assert all(loss > 0 and norm > 0 for loss, norm in sorted(found["numbers"])[2:])
        assert found["skipped"] == sorted(found["skipped"]) and found["skipped"][1::2] == [1, 2]
        assert found["continued"] == found["skipped"][2:]
        assert "one_bad.jsonl: row 2: no list in field 'conversations'" in found["error"]


# ------------------------------------------------------------------------------------- what a run refuses


def test_a_run_refuses_what_it_cannot_start_from(start: Path, conversations: Path, tmp_path: Path) -> None:
    settings = run_config(start, conversations, tmp_path / "out")
    with pytest.raises(ValueError, match="ring 2 x ulysses 3 = 6 ranks do not divide a world of 1"):
        train(replace(settings, ring=2, ulysses=3))
    with pytest.raises(ValueError, match="nowhere is not a checkpoint"):
        train(replace(settings, model=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"nothing\.jsonl: no such file"):
        train(replace(settings, data=tmp_path / "nothing.jsonl"))
    with pytest.raises(ValueError, match="has a checkpoint already: continue it with --resume, or take another folder"):
        train(replace(settings, out=start))
