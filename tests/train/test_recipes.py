"""The recipes hold what was published, and run on as many GPUs as their README says, with the flags that it names."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from longtake.bench.cli import main
from longtake.model.shapes import published_shape
from longtake.train.budget import share_out
from longtake.train.command import parse
from longtake.train.config import TrainConfig
from torch.distributed.run import get_args_parser

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))
GPUS = (1, 2, 8, 64, 256)
EVERYWHERE = {"weight_decay": 0.0, "betas": (0.9, 0.999), "dtype": "bfloat16", "recompute": True}
COSINE = {"schedule": "cosine", "warmup": 0, "warmup_ratio": 0.03, "steps": 0} | EVERYWHERE
EXTENSION = {"stage": 4, "learning_rate": 2e-5, "schedule": "constant", "warmup": 2, "epochs": 0, "batch_size": 1}
EXTENSION |= {"low_rank": 8} | EVERYWHERE
LONG = {"stage": 5, "epochs": 6, "max_fps": 2.0} | COSINE
PUBLISHED: dict[str, dict[str, Any]] = {
    "stage1": COSINE | {"stage": 1, "epochs": 1, "learning_rate": 1e-3, "context": 2048, "batch_size": 32},
    "stage2": COSINE | {"stage": 2, "epochs": 1, "learning_rate": 5e-5, "context": 4096, "global_batch": 1024},
    "stage3": COSINE | {"stage": 3, "epochs": 1, "learning_rate": 2e-5, "context": 4096, "num_frames": 8},
    "stage4-64k": EXTENSION | {"context": 131_072, "rope_theta": 15_300_000, "steps": 40},
    "stage4-256k": EXTENSION | {"context": 262_144, "rope_theta": 207_112_184, "steps": 80},
    "stage4-512k": EXTENSION | {"context": 524_288, "rope_theta": 1_062_356_830, "steps": 80},
    "stage4-1m": EXTENSION | {"context": 1_048_576, "rope_theta": 3_580_165_449, "steps": 50},
    "stage5-256f": LONG | {"num_frames": 256, "context": 131_072, "learning_rate": 2e-5, "batch_size": 2},
    "stage5-512f": LONG | {"num_frames": 512, "context": 262_144, "learning_rate": 5e-5, "batch_size": 1},
    "stage5-1024f": LONG | {"num_frames": 1024, "context": 262_144, "learning_rate": 5e-5, "batch_size": 1},
    "stage5-2048f": LONG | {"num_frames": 2048, "context": 524_288, "learning_rate": 5e-5, "batch_size": 1},
}
STEP_4 = {"64k": (8, 4), "256k": (16, 16), "512k": (16, 16), "1m": (16, 4)}  # GPUs of one sequence each, accumulation
STEP_5 = {"256f": (14, 2), "512f": (14, 1), "1024f": (28, 1), "2048f": (28, 1)}  # sequence-parallel, samples a group


def recipe(name: str, flags: str = "") -> TrainConfig:
    return parse(["--dry-run", "--config", str(RECIPES / f"{name}.toml"), *flags.split()])[0]


def frame_size(name: str) -> int:
    """Pixels of the published tower: 256 tokens a frame leave no room for text with 1,024 frames or more."""
    return 448 if name == "stage5-256f" else 384


def grid_table() -> dict[str, list[str]]:
    """The cells of the README's table behind each file: grid, published nodes, and the flags for 1 ... 256 GPUs."""
    rows = [[cell.strip(" `") for cell in line.split("|")[2:-1]] for line in _grid_lines()]
    return {file.removesuffix(".toml"): cells for file, *cells in rows}


def _grid_lines() -> list[str]:
    section = (RECIPES / "README.md").read_text().split("## Grids")[1].split("## ")[0]
    return [line for line in section.splitlines() if ".toml`" in line]


def test_every_step_has_a_recipe_and_a_row() -> None:
    assert set(NAMES) == PUBLISHED.keys() == grid_table().keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_holds_what_was_published(name: str) -> None:
    config = recipe(name)
    assert {key: getattr(config, key) for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_leaves_checkpoint_output_and_data_to_its_user(name: str) -> None:
    fields = re.findall(r"^(\w+) = ", (RECIPES / f"{name}.toml").read_text(), re.MULTILINE)
    assert "stage" in fields and not {"model", "data", "out"} & set(fields)


@pytest.mark.parametrize("step", STEP_4)
def test_context_extension_has_the_published_global_batch(step: str) -> None:
    num_gpus, accumulation = STEP_4[step]
    assert recipe(f"stage4-{step}").global_batch == num_gpus * accumulation


@pytest.mark.parametrize("step", STEP_5)
def test_long_fine_tuning_has_the_global_batch_of_the_published_scripts(step: str) -> None:
    """On 28 nodes, the most up to 32 whose GPUs the published degrees divide, and as accumulation 128 / 32 here."""
    degree, samples = STEP_5[step]
    config = recipe(f"stage5-{step}")
    assert config.global_batch == samples * (28 * 8 // degree) * (128 // 28)
    assert config.resolve(data=config.num_groups(256), num_samples=None).accumulation == 128 // 32


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_on_any_number_of_gpus_with_its_global_batch(name: str) -> None:
    _, nodes, *flags = grid_table()[name]
    runs = list(zip(GPUS, flags, strict=True))
    if nodes.isdecimal():
        runs.append((8 * int(nodes), ""))
    for num_gpus, extra in runs:
        config = recipe(name, extra)
        shares = share_out(config, published_shape("qwen2-7b", frame_size(name)), num_gpus)
        assert shares.samples == recipe(name).global_batch
        assert len(shares.tokens) * shares.data == num_gpus
        assert config.ulysses <= 8


@pytest.mark.parametrize("name", NAMES)
def test_the_table_names_the_grid(name: str) -> None:
    config = recipe(name)
    assert grid_table()[name][0] == f"{config.ring} x {config.ulysses}"


@pytest.mark.parametrize("num_gpus", GPUS)
@pytest.mark.parametrize("name", NAMES)
def test_the_dry_run_prints_every_recipe(name: str, num_gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    flags = dict(zip(GPUS, grid_table()[name][2:], strict=True))[num_gpus].split()
    model = ["--shape", "qwen2-1.5b", "--image-size", str(frame_size(name))]
    main(["train", "--dry-run", "--config", str(RECIPES / f"{name}.toml"), "--gpus", str(num_gpus), *model, *flags])
    page = capsys.readouterr().out
    assert f"on {num_gpus} GPUs" in page and f"{recipe(name).global_batch} samples = " in page
    assert re.search(r"in 80 +(fits|DOES NOT FIT) +(fits|DOES NOT FIT)$", page.strip())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_begins_with_its_launch_lines(name: str) -> None:
    lines = [line.removeprefix("#").strip() for line in (RECIPES / f"{name}.toml").read_text().splitlines()]
    [sbatch] = [line.split() for line in lines if line.startswith("sbatch")]
    assert sbatch == [
        "sbatch",
        "--nodes",
        sbatch[2],
        "recipes/train.slurm",
        f"recipes/{name}.toml",
        "IN",
        "OUT",
        "DATA",
    ]
    recipe(name).resolve(data=recipe(name).num_groups(8 * int(sbatch[2])), num_samples=None)
    [first] = [i for i, line in enumerate(lines) if line.startswith("torchrun")]
    torchrun = shlex.split(lines[first].removesuffix("\\") + lines[first + 1])[1:]
    launch = get_args_parser().parse_args(torchrun)
    assert (launch.nproc_per_node, launch.module, launch.training_script) == ("8", True, "longtake.bench.cli")
    command, *args = launch.training_script_args
    assert command == "train" and args[:2] == ["--config", f"recipes/{name}.toml"]
    config = parse(["--config", str(RECIPES / f"{name}.toml"), *args[2:]])[0]
    assert (config.model, config.data, config.out) == (Path("IN"), Path("DATA"), Path("OUT"))
    config.resolve(data=config.num_groups(8), num_samples=None)


# ------------------------------------------------------------------------------------- Slurm


def executable(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def run_slurm(
    folder: Path, *args: str, scontrol: str = "printf '%s\\n' node07 node08 node09"
) -> tuple[int, str, list[str]]:
    """What train.slurm does on three nodes: its exit code, what it says on stderr, and what it gives to srun."""
    given = folder / "given"
    executable(folder / "srun", f"printf '%s\\n' \"$@\" > {given}")
    executable(folder / "scontrol", f'[ "$*" = "show hostnames node[07-09]" ] || exit 3\n{scontrol}')
    slurm = {"SLURM_JOB_ID": "4123457", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "node[07-09]"}
    env = {**os.environ, **slurm, "SLURM_CPUS_ON_NODE": "96", "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", RECIPES / "train.slurm", *args], env=env, text=True, capture_output=True, check=False, timeout=60
    )
    return done.returncode, done.stderr, given.read_text().splitlines() if given.exists() else []


def test_the_slurm_file_starts_torchrun_once_a_node(tmp_path: Path) -> None:
    flags = ["--ring", "2", "--out", "runs/a b"]
    code, said, given = run_slurm(tmp_path, "recipes/stage5-256f.toml", "in", "runs/out", "my data.jsonl", *flags)
    assert (code, said) == (0, "")
    first = given.index("torchrun")
    assert given[:first] == ["--cpus-per-task", "96", "--kill-on-bad-exit=1"]
    launch = get_args_parser().parse_args(given[first + 1 :])
    assert (launch.nnodes, launch.nproc_per_node, launch.max_restarts) == ("3", "gpu", 0)
    assert (launch.rdzv_backend, launch.rdzv_endpoint, launch.rdzv_id) == ("c10d", "node07:23457", "4123457")
    assert (launch.module, launch.training_script) == (True, "longtake.bench.cli")
    expected = ["train", "--config", "recipes/stage5-256f.toml", "--model", "in", "--out", "runs/out"]
    assert launch.training_script_args == [*expected, "--data", "my data.jsonl", *flags]


def test_the_slurm_file_asks_for_all_of_its_arguments(tmp_path: Path) -> None:
    code, said, given = run_slurm(tmp_path, "recipes/stage5-256f.toml", "in", "out")
    assert code == 2 and said.startswith("usage: sbatch") and not given


def test_the_slurm_file_starts_nothing_without_its_hosts(tmp_path: Path) -> None:
    code, _, given = run_slurm(tmp_path, "recipes/stage5-256f.toml", "in", "out", "data", scontrol="exit 1")
    assert code == 1 and not given
