"""`longtake train`, as a user starts it: on one rank and on two, killed and resumed, and with what can be wrong."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.bench.cli import main
from longtake.model.checkpoint import complete_steps, load_model
from longtake.model.config import ModelConfig
from longtake.model.vlm import VisionLanguageModel
from longtake.train.config import TrainConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.media_files import moving_square, truncate, write_video
from tests.training_files import conversation, write_rows

COMMAND = [sys.executable, "-m", "longtake.bench.cli", "train"]
PATIENCE = 120  # seconds, for a machine that others use too; a hang would last ten minutes

WriteConfig = Callable[..., Path]


@pytest.fixture
def write_config(start: Path, conversations: Path, tmp_path: Path) -> WriteConfig:
    """Writes run.toml, with other fields than the usual ones."""

    def write(**fields: Any) -> Path:
        usual = {"stage": 3, "model": start, "data": conversations, "out": tmp_path / "out", "steps": 2}
        lines = [
            f"{key} = {value}" if isinstance(value, int | float) else f'{key} = "{value}"'
            for key, value in (usual | {"context": 256, "num_frames": 16, "learning_rate": 0.01} | fields).items()
        ]
        path = tmp_path / "run.toml"
        path.write_text("\n".join(lines))
        return path

    return write


def start_command(*args: str | Path, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [*COMMAND, *map(str, args)]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def step_lines(text: str) -> list[int]:
    """The steps that the log has a line of."""
    lines = [line.rpartition("\r")[2] for line in text.split("\n")]
    return [int(line.split()[1]) for line in lines if line.startswith("step ") and "tokens/s" in line]


def weights(folder: Path) -> torch.Tensor:
    model = VisionLanguageModel(ModelConfig.load(folder))
    load_model(folder, model)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_run_killed_by_the_system_is_resumed_to_the_same_weights(
    write_config: WriteConfig, conversations: Path, tmp_path: Path
) -> None:
    """In the middle of an epoch of a mixture, with workers that decode."""
    source = f'[[source]]\ndata = "{conversations}"\nweight = '
    (tmp_path / "mix.toml").write_text(f"{source} 2\n{source} 1\n")
    config = write_config(steps=30, save_every=2, data=tmp_path / "mix.toml", workers=1)
    main(["train", "--config", str(config), "--out", str(tmp_path / "through"), "--save-every=0"])
    process = start_command("--config", config)
    deadline = time.monotonic() + PATIENCE
    while not complete_steps(tmp_path / "out") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    saved = int(complete_steps(tmp_path / "out")[-1].name.removeprefix("step-"))
    resumed = start_command("--config", config, "--save-every=0", "--resume")
    _, log = resumed.communicate(timeout=PATIENCE)
    assert resumed.returncode == 0 and step_lines(log) == list(range(saved + 1, 31))
    assert weights(tmp_path / "out").equal(weights(tmp_path / "through"))
    losses = [EventAccumulator(str(tmp_path / out)).Reload().Scalars("loss") for out in ("out", "through")]
    assert [event.step for event in losses[0]] == list(range(1, 31))
    assert [event.value for event in losses[0]] == [event.value for event in losses[1]]


def test_workers_of_two_ranks_decode_what_their_threads_would(write_config: WriteConfig, tmp_path: Path) -> None:
    for workers in ("0", "2"):
        flags = ("--ring", "2", "--workers", workers, "--out", tmp_path / workers)
        process = start_command("--config", write_config(), *flags)
        _, log = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, log
        assert "Warning" not in log
    assert weights(tmp_path / "0").equal(weights(tmp_path / "2"))


def test_two_ranks_train_and_the_first_alone_speaks(write_config: WriteConfig, tmp_path: Path) -> None:
    process = start_command("--config", write_config(), "--ring", "2", "--steps", "3")
    output, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, log
    assert step_lines(log) == [1, 2, 3] and not output
    assert "Warning" not in log
    assert weights(tmp_path / "out").isfinite().all()


def test_a_run_said_relative_to_the_data_is_the_one_in_plain_numbers(write_config: WriteConfig, tmp_path: Path) -> None:
    """Two passes over 6 rows, 4 a step."""
    config, usual = write_config(steps=0, batch_size=2), ["train", "--config", str(tmp_path / "run.toml")]
    assert config == tmp_path / "run.toml"
    relative = ["--epochs", "2", "--global-batch", "4", "--warmup-ratio", "0.5", "--out", str(tmp_path / "relative")]
    plain = ["--steps", "3", "--accumulation", "2", "--warmup", "2", "--out", str(tmp_path / "plain")]
    for flags in (relative, plain):
        main([*usual, *flags])
    assert complete_steps(tmp_path / "relative")[-1].name == "step-000003"
    assert weights(tmp_path / "relative").equal(weights(tmp_path / "plain"))


# ------------------------------------------------------------------------------------- dry runs


def page(capsys: pytest.CaptureFixture[str], *args: str | Path) -> dict[str, str]:
    """What a dry run prints, by the first words of its lines."""
    main(["train", "--dry-run", *map(str, args)])
    lines = [re.split("  +", line.strip(), maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return {line[0]: line[-1] for line in lines}


def test_a_dry_run_of_a_config_needs_nothing_that_it_names(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = {"model": "no model", "data": "no data", "out": tmp_path / "no out"}
    config = write_config(**nothing, steps=0, epochs=2, global_batch=8, ulysses=2, context=2048, num_frames=7)
    said = page(capsys, "--config", config, "--gpus", "8", "--shape", "qwen2-1.5b", "--image-size", "384")
    assert {f.name for f in fields(TrainConfig)} <= said.keys()
    assert (said["model"], said["ulysses"], said["global_batch"]) == ("no model", "2", "8")
    assert said["steps"] == "by the size of the data" and said["accumulation"] == "2"
    assert said["grid"] == "data 4 x ring 1 x ulysses 2"
    assert said["step"] == "8 samples = batch_size 1 x data 4 x accumulation 2"
    assert said["sequence, at most"] == "2,048 tokens, 7 frames of 196 tokens"
    assert said["rank, at most"] == "1,024 tokens, 4 frames"
    assert not (tmp_path / "no out").exists()


def test_a_dry_run_takes_the_shape_and_the_size_from_what_is_there(
    write_config: WriteConfig, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(steps=0, epochs=2, batch_size=4, warmup_ratio=0.5)
    said = page(capsys, "--config", config)
    assert (said["steps"], said["warmup"]) == ("3", "2")  # 6 rows
    num_parameters = f"{weights(start).numel():,}"
    assert said["shape"] == f"{start}: {num_parameters} parameters, {num_parameters} of them train"


def test_what_no_run_could_do_is_said_before_a_model_is_asked_for(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(model=tmp_path / "nowhere", global_batch=8)
    dry = ["--dry-run", "--config", config]
    assert "ring 1 x ulysses 3 = 3 ranks do not divide a world of 8" in failure(
        capsys, *dry, "--gpus", "8", "--ulysses", "3"
    )
    assert "global_batch 8 is no multiple of batch_size 3 x 2" in failure(
        capsys, *dry, "--gpus", "2", "--batch-size", "3"
    )
    said = failure(capsys, *dry, "--gpus", "2")
    assert said.startswith(f"longtake train: {tmp_path / 'nowhere'} has no config.json: name a checkpoint")
    assert "num_frames 1 x 256 tokens leave no room" in failure(
        capsys, *dry, "--shape", "qwen2-7b", "--num-frames", "1"
    )
    assert "--shape: invalid choice: 'qwen3'" in failure(capsys, *dry, "--shape", "qwen3")
    assert "--gpus and --shape are for --dry-run" in failure(capsys, "--config", config, "--gpus", "2")


def cut_video(conversations: Path) -> Path:
    """Two rows, the second about a video that lacks its end."""
    folder = conversations.parent
    truncate(write_video(folder / "77.mp4", moving_square(40)), keep=0.6)
    return write_rows(folder / "cut.jsonl", [conversation(0, [3]), conversation(1, [77])])


def test_a_truncated_video_ends_two_ranks_at_once(write_config: WriteConfig, conversations: Path) -> None:
    config = write_config(data=cut_video(conversations), ring=2)
    process = start_command("--config", config)
    _, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "Traceback" not in log and log.count("cut.jsonl: row 2: ") == 1
    assert "77.mp4: truncated" in log or "77.mp4: not a media file, or truncated" in log


def test_a_grid_that_torchruns_world_does_not_hold_is_named(write_config: WriteConfig) -> None:
    world = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    process = start_command("--config", write_config(ring=2, ulysses=2), **world)
    _, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "Traceback" not in log
    assert log.strip().endswith(
        "longtake train: ring 2 x ulysses 2 = 4 ranks do not divide a world of 1: set --ring and --ulysses"
    )


def failure(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """What the command says on stderr before it ends with exit code 1."""
    with pytest.raises(SystemExit) as ended:
        main(["train", *map(str, args)])
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_bad_usage_is_named(write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = tmp_path / "nowhere.toml"
    for args in (["--config", nowhere], [f"--config={nowhere}"]):
        assert failure(capsys, *args) == f"longtake train: {nowhere}: no such config file\n"
    config = write_config(frames=3)
    said = f"longtake train: --config {config}: "
    assert failure(capsys, "--config", config) == f"{said}Option 'frames' is not accepted\n"
    write_config(steps="many")
    assert failure(capsys, "--config", config).startswith(f'{said}Parser key "steps": ')
    write_config()
    assert '--layout ring: Parser key "layout"' in failure(capsys, "--config", config, "--layout", "ring")
    assert "warmup must be at least 0, got -1" in failure(capsys, "--config", config, "--warmup=-1")
    config.write_text("steps = ")
    assert failure(capsys, "--config", config).startswith(f"{said}Problems parsing config")


def test_bad_files_are_named(
    write_config: WriteConfig, conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.jsonl"
    assert failure(capsys, "--config", write_config(data=missing)) == f"longtake train: {missing}: no such file\n"
    said = failure(capsys, "--config", write_config(model=tmp_path))
    assert said == f"longtake train: {tmp_path} is not a checkpoint: expected config.json and a step-N folder in it\n"
    no_json = write_rows(conversations.with_name("no_json.jsonl"), ['{"conversations": ['])
    said = failure(capsys, "--config", write_config(data=no_json))
    assert f"{no_json}: row 1: not JSON" in said and '{"conversations": [' in said
    cut = cut_video(conversations)
    assert f"{cut}: row 2: " in failure(capsys, "--config", write_config(data=cut))
