"""Which parameters move in each stage: a step is trained, and the checkpoints before and after compared."""

from dataclasses import replace
from pathlib import Path

import pytest
from longtake.model.checkpoint import load_model
from longtake.model.config import ModelConfig
from longtake.model.low_rank import ATTENTION
from longtake.model.vlm import VisionLanguageModel
from longtake.train.stages import ALL, STAGES, freeze_for
from longtake.train.trainer import train
from torch import Tensor

from tests.ranks import run_ranks
from tests.tiny import random_model, tiny_config
from tests.training_files import run_config

RUNS = {"1": "start", "2": "1", "3": "2", "4": "3", "4 whole": "3", "5": "4"}  # each from the one before


def train_a_step_of_each(rank: int, start: Path, conversations: Path, packed: Path, folder: Path) -> None:
    for name, before in RUNS.items():
        stage = int(name[0])
        model = start if before == "start" else folder / before
        data = packed if stage == 4 else conversations
        settings = run_config(model, data, folder / name, stage=stage, steps=1, batch_size=6)
        train(replace(settings, low_rank=0 if name == "4 whole" else None, rope_theta=5e5 if stage == 4 else None))


def parameters(folder: Path) -> dict[str, Tensor]:
    model = VisionLanguageModel(ModelConfig.load(folder))
    load_model(folder, model)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def folder(start: Path, conversations: Path, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    run_ranks(train_a_step_of_each, 1, start, conversations, packed, folder)
    return folder


def trains(run: str, parameter: str) -> bool:
    module, _, rest = parameter.partition(".")
    if run == "4":
        attention = rest.endswith(tuple(f"{name}.weight" for name in ATTENTION))
        return module == "llm" and (attention or "norm" in rest or "embed_tokens" in rest)
    modules = {"1": {"mm_projector"}, "2": {"mm_projector", "llm"}, "4 whole": {"llm"}}
    return module in modules.get(run, set(ALL))


@pytest.mark.parametrize("run", RUNS)
def test_what_the_stage_trains_moves_and_nothing_else(folder: Path, start: Path, run: str) -> None:
    before = parameters(start if RUNS[run] == "start" else folder / RUNS[run])
    after = parameters(folder / run)
    moved = {name for name in before if not after[name].equal(before[name])}
    assert moved == {name for name in before if trains(run, name)}
    assert all(after[name].isfinite().all() for name in after)


def test_the_rotary_base_of_stage_4_stays_in_stage_5(folder: Path) -> None:
    bases = [ModelConfig.load(folder / run).language.rope_theta for run in ("3", "4", "4 whole", "5")]
    assert bases == [1e4, 5e5, 5e5, 5e5]


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_of_other_modules_are_frozen(stage: int) -> None:
    model = random_model(tiny_config(), seed=0).requires_grad_(False)
    freeze_for(STAGES[stage], model)
    training = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name.partition(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert training == set(STAGES[stage].trains) and frozen == set(ALL) - training
