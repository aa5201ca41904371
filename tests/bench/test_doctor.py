"""What `longtake doctor` finds, on made-up machines, and what it says of this one."""

import tomllib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.bench.doctor import Finding, described, findings, verdict
from longtake.bench.machine import Gpu, Machine, Nccl, Torch
from packaging.requirements import Requirement

from tests.bench.test_machine import doctor

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
CORE = tuple(text.split(";")[0] for text in PROJECT["dependencies"])
VERSIONS = {
    "torch": "2.13.0",
    "triton": "3.7.1",
    "numpy": "2.3.5",
    "transformers": "5.24.0",
    "cupy-cuda13x": "14.2.0",
    "nvidia-nccl-cu13": "2.29.7",
}
H100 = Gpu("NVIDIA H100 80GB HBM3", 85_000_000_000, (9, 0))
LIBRARY = "/venv/nvidia/nccl/lib/libnccl.so.2"
TORCH = Torch("13.0", ("gloo", "nccl"), (H100, H100))
NCCL = Nccl(22907, 22707, (LIBRARY,), "13.2")
HOST = Machine(
    python="3.12.3",
    installed={Requirement(text).name: "99" for text in CORE} | VERSIONS,
    asked={"longtake": CORE, "torch": ("triton==3.7.1", "nvidia-nccl-cu13==2.29.7")},
    broken={},
    wheels={"nvidia-nccl-cu13": LIBRARY},
    torch=TORCH,
    nccl=NCCL,
    driver="580.65.06",
    driver_cuda="13.0",
    ffmpeg="8.1",
    compiler="/usr/bin/gcc",
    headers=True,
)
NO_GPU = {"driver": None, "driver_cuda": None}


def with_packages(**versions: str | None) -> dict[str, Any]:
    """Change of the installed packages, by names with _ for -; None takes one away."""
    changed = {name.replace("_", "-"): version for name, version in versions.items()}
    return {"installed": {name: text for name, text in (dict(HOST.installed) | changed).items() if text is not None}}


BOTH_WHEELS = with_packages(nvidia_nccl_cu12="2.27.5") | {
    "wheels": {"nvidia-nccl-cu12": LIBRARY, "nvidia-nccl-cu13": LIBRARY}
}
BACK = 'pip uninstall -y nvidia-nccl-cu12 nvidia-nccl-cu13 && pip install "nvidia-nccl-cu13==2.29.7"'
TORCH_13, TORCH_12 = (f'pip uninstall -y torch && pip install "torch>={text}"' for text in ("2.11", "2.10,<2.11"))

ERRORS = {
    "old transformers": (
        with_packages(transformers="5.4.0"),
        "transformers 5.4.0 is installed, longtake asks for transformers>=5.5",
        'pip install "transformers>=5.5"',
    ),
    "no transformers": (
        with_packages(transformers=None),
        "transformers is not installed, longtake asks for transformers>=5.5",
        'pip install "transformers>=5.5"',
    ),
    "broken PyAV": (
        {"broken": {"av": "ImportError: libx264.so: no such file"}},
        "av does not import: ImportError: libx264.so: no such file",
        'pip install --force-reinstall --no-deps "av==99"',
    ),
    "no gloo": (
        {"torch": replace(TORCH, backends=("nccl",))},
        "PyTorch has no gloo, over which ranks talk",
        TORCH_13,
    ),
}
GPU_ERRORS = {
    "old Triton": (
        with_packages(triton="3.5.1") | {"asked": {"longtake": CORE}},
        "triton 3.5.1 is installed, longtake asks for triton>=3.6",
        'pip install "triton>=3.6"',
    ),
    "no Triton": (
        with_packages(triton=None) | {"asked": {"longtake": CORE}},
        "triton is not installed, longtake asks for triton>=3.6",
        'pip install "triton>=3.6"',
    ),
    "broken CuPy": (
        {"broken": {"cupy": "ImportError: libnvrtc"}, "nccl": None},
        "cupy does not import: ImportError: libnvrtc",
        'pip install --force-reinstall --no-deps "cupy-cuda13x==14.2.0"',
    ),
    "CuPy of another CUDA": (
        with_packages(cupy_cuda12x="14.2.0", cupy_cuda13x=None),
        "cupy-cuda12x is built for CUDA 12, PyTorch for 13.0",
        'pip uninstall -y cupy-cuda12x && pip install "cupy-cuda13x>=14"',
    ),
    "two CuPys": (
        with_packages(cupy_cuda12x="14.2.0"),
        "cupy-cuda12x and cupy-cuda13x overwrite each other",
        'pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install "cupy-cuda13x>=14"',
    ),
    "CuPy without NCCL": (
        {"nccl": None, "wheels": {}},
        "CuPy finds no libnccl.so.2",
        'pip install "nvidia-nccl-cu13==2.29.7"',
    ),
    "both NCCL wheels, the wrong one written last": (
        BOTH_WHEELS | {"nccl": replace(NCCL, version=22705, built_for=22501, cuda="12.9")},
        "nvidia-nccl-cu12 and nvidia-nccl-cu13 install the same libnccl.so.2, and removing one breaks the other",
        BACK,
    ),
    "NCCL of another CUDA": (
        {"wheels": {"nvidia-nccl-cu12": LIBRARY}, "nccl": replace(NCCL, cuda="12.9")},
        f"{LIBRARY} is built for CUDA 12.9, PyTorch for 13.0",
        'pip uninstall -y nvidia-nccl-cu12 && pip install "nvidia-nccl-cu13==2.29.7"',
    ),
    "the system's NCCL, of another CUDA": (
        {"nccl": replace(NCCL, files=("/usr/lib/libnccl.so.2",), cuda="12.4")},
        "/usr/lib/libnccl.so.2 is built for CUDA 12.4, PyTorch for 13.0",
        "unset LD_LIBRARY_PATH LD_PRELOAD",
    ),
}
ONLY_WITH_GPU = {
    "no CuPy": (
        with_packages(cupy_cuda13x=None) | {"broken": {"cupy": "ModuleNotFoundError: cupy"}, "nccl": None},
        "CuPy is not installed: ranks reach NCCL through it",
        'pip install "cupy-cuda13x>=14"',
    ),
    "PyTorch without CUDA": (
        with_packages(torch="2.13.0+cpu") | {"torch": Torch(None, ("gloo",), no_gpu="not compiled with CUDA")},
        "PyTorch 2.13.0+cpu is built without CUDA; the driver (580.65.06) serves CUDA 13.0",
        TORCH_13,
    ),
    "PyTorch without CUDA, driver for CUDA 12": (
        {"torch": Torch(None, ("gloo",)), "driver": "550.54", "driver_cuda": "12.4"},
        "PyTorch 2.13.0 is built without CUDA; the driver (550.54) serves CUDA 12.4",
        TORCH_12,
    ),
    "old driver": (
        {"driver": "550.54", "driver_cuda": "12.4", "torch": replace(TORCH, gpus=(), no_gpu="driver too old")},
        "the driver (550.54) serves CUDA 12.4, but PyTorch is built for 13.0",
        f"install a driver for CUDA 13: 580 or later, or {TORCH_12}",
    ),
    "driver older than all": (
        {"driver": "470.1", "driver_cuda": "11.4", "torch": replace(TORCH, gpus=())},
        "the driver (470.1) serves CUDA 11.4, but PyTorch is built for 13.0",
        "install a driver for CUDA 13: 580 or later",
    ),
    "hidden GPUs": (
        {"torch": replace(TORCH, gpus=(), no_gpu="RuntimeError: No CUDA GPUs are available")},
        "PyTorch sees no GPU: RuntimeError: No CUDA GPUs are available",
        "look at nvidia-smi -L and at CUDA_VISIBLE_DEVICES",
    ),
    "old GPU": (
        {"torch": replace(TORCH, gpus=(H100, Gpu("Tesla T4", 16 << 30, (7, 5))))},
        "GPU 1, Tesla T4, is sm_75: the kernels need sm_80 or later",
        "leave it out of CUDA_VISIBLE_DEVICES",
    ),
    "PyTorch without NCCL": (
        {"torch": replace(TORCH, backends=("gloo",))},
        "PyTorch has no NCCL: cpu:gloo,cuda:nccl does not start",
        TORCH_13,
    ),
    "no compiler": (
        {"compiler": None},
        "no C compiler (CC, gcc, clang), with which Triton builds what starts its kernels",
        "apt-get install gcc",
    ),
    "no headers": (
        {"headers": False},
        "no Python.h, which Triton compiles against",
        "apt-get install python3.12-dev",
    ),
}
WARNINGS = {
    "NumPy too new": (
        with_packages(numpy="2.4.1"),
        "numpy 2.4.1 is installed, longtake asks for numpy<2.4",
        'pip install "numpy<2.4"',
    ),
    "Triton of another PyTorch": (
        with_packages(triton="3.6.0"),
        "triton 3.6.0 is installed, torch asks for triton==3.7.1",
        'pip install "triton==3.7.1"',
    ),
    "both NCCL wheels, the right one written last": (
        BOTH_WHEELS,
        "nvidia-nccl-cu12 and nvidia-nccl-cu13 install the same libnccl.so.2, and removing one breaks the other",
        BACK,
    ),
    "the system's NCCL": (
        {"nccl": replace(NCCL, files=("/usr/lib/libnccl.so.2",))},
        "/usr/lib/libnccl.so.2 is loaded, not the library of nvidia-nccl-cu13",
        "unset LD_LIBRARY_PATH LD_PRELOAD",
    ),
    "two NCCLs": (
        {"nccl": replace(NCCL, files=(LIBRARY, "/usr/lib/libnccl.so.2"))},
        f"PyTorch and CuPy load an NCCL each: {LIBRARY}, /usr/lib/libnccl.so.2",
        "unset LD_LIBRARY_PATH LD_PRELOAD",
    ),
    "NCCL older than CuPy's": (
        {"nccl": replace(NCCL, version=22605)},
        "NCCL 2.26.5 is older than 2.27.7, which CuPy is built for",
        'pip install "nvidia-nccl-cu13>=2.27.7"',
    ),
    "a container without GPUs": (
        {"driver_cuda": None, "torch": replace(TORCH, gpus=(), no_gpu="no driver")},
        "driver 580.65.06 is loaded, but libcuda.so.1 is not here: a container without GPUs?",
        "docker run --gpus all ...",
    ),
    "a bare checkout": (
        {"asked": {"torch": ()}},
        "longtake is not installed: its requirements were not checked",
        "pip install -e .",
    ),
}


def beyond_notes(machine: Machine) -> list[Finding]:
    return [one for one in findings(machine) if one.level != "note"]


def cases(*tables: dict[str, Any]) -> pytest.MarkDecorator:
    rows = {name: row for table in tables for name, row in table.items()}
    return pytest.mark.parametrize(("change", "what", "cure"), rows.values(), ids=rows)


def test_nothing_is_wrong_with_a_sound_machine() -> None:
    assert beyond_notes(HOST) == []
    assert verdict(HOST, findings(HOST)) == "training runs on the GPUs"


def test_an_nccl_inside_another_library_is_no_conflict() -> None:
    assert beyond_notes(replace(HOST, nccl=replace(NCCL, files=(), cuda=None))) == []


def test_nothing_is_wrong_with_a_sound_machine_of_cuda_12() -> None:
    packages = with_packages(
        torch="2.10.0+cu128", triton="3.6.0", cupy_cuda12x="14.2.0", cupy_cuda13x=None, nvidia_nccl_cu13=None
    )
    installed = packages["installed"] | {"nvidia-nccl-cu12": "2.27.5"}
    asked = {"longtake": CORE, "torch": ("triton==3.6.0", "nvidia-nccl-cu12==2.27.5")}
    nccl = Nccl(22705, 22501, (LIBRARY,), "12.9")
    machine = replace(HOST, torch=replace(TORCH, cuda="12.8"), nccl=nccl, wheels={"nvidia-nccl-cu12": LIBRARY})
    for driver_cuda in ("12.4", "12.8", "13.0"):  # minor versions need no newer driver, and drivers serve older ones
        assert beyond_notes(replace(machine, installed=installed, asked=asked, driver_cuda=driver_cuda)) == []


@cases(ERRORS, GPU_ERRORS, ONLY_WITH_GPU)
def test_errors_where_there_are_gpus(change: dict[str, Any], what: str, cure: str) -> None:
    machine = replace(HOST, **change)
    found = beyond_notes(machine)
    assert Finding("error", what, cure) in found
    assert verdict(machine, found).startswith("training would fail: ")


@cases(ERRORS)
def test_errors_where_there_are_none(change: dict[str, Any], what: str, cure: str) -> None:
    machine = replace(HOST, **NO_GPU | change)
    assert findings(machine)[0] == Finding("error", what, cure)


@cases(GPU_ERRORS)
def test_without_gpus_training_does_not_fail_of_what_only_they_need(
    change: dict[str, Any], what: str, cure: str
) -> None:
    machine = replace(HOST, torch=replace(TORCH, gpus=(), no_gpu="no driver"), **NO_GPU | change)
    found = findings(machine)
    assert Finding("warning", what, cure) in found
    assert not [one for one in found if one.level == "error"]
    assert verdict(machine, found) == "no GPU: training runs on the CPU"


@cases(ONLY_WITH_GPU)
def test_without_gpus_nothing_is_said_of_what_only_they_need(change: dict[str, Any], what: str, cure: str) -> None:
    assert beyond_notes(replace(HOST, **{"torch": replace(TORCH, gpus=())} | change | NO_GPU)) == []


@cases(WARNINGS)
def test_warnings(change: dict[str, Any], what: str, cure: str) -> None:
    assert beyond_notes(replace(HOST, **change)) == [Finding("warning", what, cure)]


@pytest.mark.parametrize(("version", "words"), [(22907, "NCCL_HOSTID"), (23000, "NCCL_MULTI_RANK_GPU_ENABLE=1")])
def test_how_ranks_share_a_gpu(version: int, words: str) -> None:
    [note] = findings(replace(HOST, nccl=replace(NCCL, version=version)))
    assert note.level == "note" and words in note.cure


def test_the_worst_comes_first() -> None:
    machine = replace(HOST, compiler=None, **BOTH_WHEELS)
    assert [one.level for one in findings(machine)] == ["error", "warning", "note"]
    assert verdict(machine, findings(machine)) == "training would fail: 1 error"


def test_a_pytorch_for_a_cuda_still_to_come_is_only_named() -> None:
    found = findings(replace(HOST, torch=replace(TORCH, cuda="14.1", backends=())))
    assert "serves CUDA 13.0, but PyTorch is built for 14.1" in " ".join(one.what for one in found)
    assert 'pip uninstall -y cupy-cuda13x && pip install "cupy-cuda14x>=14"' in [one.cure for one in found]


def test_lines_of_a_machine_with_gpus() -> None:
    lines = list(described(HOST))
    assert ("GPU 1", "NVIDIA H100 80GB HBM3, 79.2 GiB, sm_90") in lines
    assert ("backends", "cpu:gloo,cuda:nccl") in lines
    assert ("NCCL", "2.29.7, for CUDA 13.2") in lines
    assert ("", f"{LIBRARY} (nvidia-nccl-cu13 2.29.7)") in lines


def test_lines_of_a_machine_where_nothing_loads() -> None:
    bare = replace(HOST, installed={"av": "18.1.0"}, broken={"av": "ImportError: x"}, torch=None, nccl=None, wheels={})
    lines = dict(described(replace(bare, ffmpeg=None, compiler=None, **NO_GPU)))
    assert lines["PyTorch"] == lines["CuPy"] == lines["NCCL"] == lines["driver"] == lines["compiler"] == "none"
    assert lines["PyAV"] == "18.1.0 (does not import), FFmpeg ?"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_this_machine_trains_on_its_cpu() -> None:
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "no GPU: training runs on the CPU"
    assert f"{'PyTorch':<14}{version('torch')}" in lines
