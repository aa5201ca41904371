"""The facts of this machine, beside what other sources say of it."""

import json
import os
import platform
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.bench.machine import dotted, kernel_module

ROOT = Path(__file__).parents[2]


def doctor(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: what it finds loaded, it has loaded."""
    command = [sys.executable, "-m", "longtake.bench.cli", "doctor", *args]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return json.loads(doctor("--json").stdout)["machine"]


def test_versions(facts: dict[str, Any]) -> None:
    assert facts["python"] == platform.python_version()
    for name in ("torch", "transformers", "av", "safetensors", "triton", "cupy-cuda13x", "nvidia-nccl-cu13"):
        assert facts["installed"][name] == version(name)
    assert facts["broken"] == {}
    assert "torch>=2.10" in facts["asked"]["longtake"]
    assert not [text for text in facts["asked"]["longtake"] if text.startswith("pytest")]  # of an extra


def test_pytorch(facts: dict[str, Any]) -> None:
    found = facts["torch"]
    assert found["cuda"] == torch.version.cuda and "gloo" in found["backends"]
    assert ("nccl" in found["backends"]) == torch.distributed.is_nccl_available()
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert bool(found["no_gpu"]) == (not torch.cuda.is_available())


def test_the_nccl_that_is_loaded(facts: dict[str, Any]) -> None:
    found = facts["nccl"]
    nccl = import_module("cupy.cuda.nccl")
    assert found["version"] == nccl.get_version() and found["built_for"] == nccl.get_build_version()
    [file] = found["files"]
    assert file.endswith("/libnccl.so.2") and Path(file).is_file()
    assert facts["wheels"] == {"nvidia-nccl-cu13": file}
    assert found["cuda"].startswith("13.")
    assert version("nvidia-nccl-cu13") == dotted(found["version"])


def test_a_module_that_does_not_import_is_a_fact_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "av.py").write_text(
        "raise ImportError('a page of advice') from OSError('libavcodec.so.99: none\\n2')\n"
    )
    (tmp_path / "cupy.py").write_text("raise SystemError('no CUDA\\nand a page of advice')\n")
    done = doctor("--json", PYTHONPATH=str(tmp_path))
    found = json.loads(done.stdout)
    assert found["machine"]["nccl"] is None
    assert found["machine"]["broken"]["cupy"] == "SystemError: no CUDA"
    assert done.returncode == 1
    [error] = [one for one in found["findings"] if one["level"] == "error"]
    assert error["what"] == "av does not import: OSError: libavcodec.so.99: none"
    assert error["cure"] == f'pip install --force-reinstall --no-deps "av=={version("av")}"'


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC ...",
            "535.129.03",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x)\n", "580.65.06"),
        ("something else", None),
    ],
)
def test_the_driver_that_the_kernel_names(text: str, driver: str | None) -> None:
    assert kernel_module(text) == driver


@pytest.mark.parametrize(("number", "text"), [(22907, "2.29.7"), (23000, "2.30.0"), (21005, "2.10.5")])
def test_versions_of_nccl(number: int, text: str) -> None:
    assert dotted(number) == text
