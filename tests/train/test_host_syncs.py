"""A training step never makes the host wait for the device: its numbers are read when the next one is on its way."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

from longtake.comm.mesh import Mesh
from longtake.train.trainer import StepInFlight, Trainer

from tests.host_syncs import HostSyncs
from tests.ranks import run_ranks
from tests.training_files import run_config


def waits_of_a_step(rank: int, start: Path, rows: Path, folder: Path) -> dict[str, list[str]]:
    """What a step of two sequences with frames would wait for on a GPU, and what if its log were read in it."""
    found = {}
    for name, fields in {"layer": {"recompute": True}, "model": {"shard": "model", "route": "relay"}}.items():
        settings = run_config(start, rows, folder, batch_size=2, accumulation=2, ring=2, ulysses=2, **fields)
        trainer = Trainer(settings, Mesh(ring=2, ulysses=2))
        trainer.step()
        data = trainer.loader.load(trainer.progress.consumed)  # index work, and a wait for the other hosts
        assert data.num_frames
        for batch, _ in data.batches:
            _ = [visibility.tiles for visibility in batch.attention.visibility]  # the CPU backend's own plan
        with patch.object(trainer.loader, "load", return_value=data), HostSyncs("cpu") as syncs:
            in_flight = trainer.step()
        found[name] = list(syncs.found)
        with syncs:
            float(in_flight.numbers[0])
        found[f"{name}, read"] = syncs.found
        trainer.loader.close()
    return found


def test_a_step_waits_for_nothing(start: Path, conversations: Path, tmp_path: Path) -> None:
    for found in run_ranks(waits_of_a_step, 4, start, conversations, tmp_path):
        assert found["layer"] == found["model"] == []
        assert [entry.split(":")[0] for entry in found["layer, read"]] == ["aten._local_scalar_dense.default"]


class Watched(Trainer):
    """Notes when a step is given to the device, when its numbers are waited for, and when all is saved."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.notes: list[str] = []

    def step(self) -> StepInFlight:
        in_flight = super().step()
        self.notes.append(f"give {(step := self.progress.step)}")
        log = in_flight.log
        in_flight.log = lambda began: (self.notes.append(f"wait {step}"), log(began))[1]
        return in_flight

    def save(self, *, optimizer: bool = True) -> None:
        self.notes.append("save")


def run_ahead(rank: int, start: Path, rows: Path, folder: Path) -> list[tuple[list[str], list[tuple[float, ...]]]]:
    runs = []
    for ahead in (0, 1):
        trainer = Watched(run_config(start, rows, folder, steps=5, save_every=3), Mesh())
        trainer.ahead = ahead
        logs = trainer.run()
        assert all(entry.tokens_per_second > 0 for entry in logs)
        runs.append((trainer.notes, [(entry.step, entry.loss, entry.grad_norm) for entry in logs]))
    return runs


def test_one_step_is_ahead_of_the_log_but_not_of_a_checkpoint(start: Path, conversations: Path, tmp_path: Path) -> None:
    [(at_once, late)] = run_ranks(run_ahead, 1, start, conversations, tmp_path)
    each = [f"{what} {i}" for i in (1, 2, 3) for what in ("give", "wait")]
    assert at_once[0] == [*each, "save", "give 4", "wait 4", "give 5", "wait 5", "save"]
    assert late[0] == [
        *("give 1", "give 2", "wait 1", "give 3", "wait 2", "wait 3", "save"),
        *("give 4", "give 5", "wait 4", "wait 5", "save"),
    ]
    assert at_once[1] == late[1]
