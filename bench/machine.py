"""What a machine has to train with: packages, PyTorch, driver, GPUs, and the NCCL library that is really loaded.

Nothing here raises: what is missing or does not import is a fact as well, with its reason.
"""

import ctypes
import importlib
import mmap
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions, requires
from pathlib import Path
from typing import TypeVar

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# In this order: PyTorch and CuPy look for the same libnccl.so.2, and training loads PyTorch's first.
MODULES = ("torch", "cupy", "triton", "numpy", "transformers", "safetensors", "av")
OWNERS = ("longtake", "torch")  # whose requirements count
LIBRARY = "libnccl.so.2"
SECONDS = 60.0  # for nvidia-smi, which can hang where a GPU does

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """memory: bytes."""

    name: str
    memory: int
    capability: tuple[int, int]

    @property
    def architecture(self) -> str:
        """As compilers name it: sm_90."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Torch:
    """cuda: that it is built for, None without. no_gpu: its own word on why it sees none."""

    cuda: str | None
    backends: tuple[str, ...]
    gpus: tuple[Gpu, ...] = ()
    no_gpu: str = ""


@dataclass(frozen=True)
class Nccl:
    """As CuPy has it, in a process that has loaded PyTorch.

    version, built_for: as NCCL counts, 22907 is 2.29.7. files: every libnccl.so.2 of the process.
    cuda: that the first file is built for, None where it does not say.
    """

    version: int
    built_for: int
    files: tuple[str, ...]
    cuda: str | None


@dataclass(frozen=True)
class Machine:
    """installed: versions by package. asked: by package of OWNERS that is installed, the requirements that apply here.
    broken: by module of MODULES that does not import, the reason. wheels: by NCCL package, the library that it claims.
    driver: of the kernel, which a container sees whether or not it has GPUs. driver_cuda: the newest CUDA that
    libcuda.so.1 serves, None where there is none. headers: whether Python.h is there.
    torch, nccl: None where they do not load.
    """

    python: str
    installed: Mapping[str, str]
    asked: Mapping[str, tuple[str, ...]]
    broken: Mapping[str, str]
    wheels: Mapping[str, str]
    torch: Torch | None
    nccl: Nccl | None
    driver: str | None
    driver_cuda: str | None
    ffmpeg: str | None
    compiler: str | None
    headers: bool


def collect() -> Machine:
    """The facts of this machine, seen from this process, into which it imports MODULES."""
    tried = {name: _tried(lambda name=name: importlib.import_module(name)) for name in MODULES}
    installed = _installed()
    return Machine(
        python=platform.python_version(),
        installed=installed,
        asked={owner: _asked(owner) for owner in OWNERS if owner in installed},
        broken={name: why for name, (module, why) in tried.items() if module is None},
        wheels=_wheels(),
        torch=_tried(_torch)[0],
        nccl=_tried(_nccl)[0],
        driver=_tried(_driver)[0],
        driver_cuda=_tried(_driver_cuda)[0],
        ffmpeg=getattr(tried["av"][0], "ffmpeg_version_info", None),
        compiler=os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),  # as Triton looks for it
        headers=Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    )


def dotted(version: int) -> str:
    """22907 as 2.29.7."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _tried(probe: Callable[[], T]) -> tuple[T | None, str]:
    """What it returns, or None and why it failed: a broken library may raise anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of is a finding
            return probe(), ""
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__:  # CuPy wraps the reason in a page of advice
            cause = cause.__cause__
        first = (str(cause).strip() or "no reason given").splitlines()[0]
        return None, f"{type(cause).__name__}: {first}"


def _installed() -> dict[str, str]:
    found = [(canonicalize_name(dist.name), dist.version) for dist in distributions() if dist.name]
    return dict(reversed(found))  # the first on the path wins


def _asked(owner: str) -> tuple[str, ...]:
    """As pip would be told it: without markers."""
    parsed = [Requirement(text) for text in requires(owner) or ()]
    kept = [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in kept:
        one.marker = None
    return tuple(map(str, kept))


def _wheels() -> dict[str, str]:
    ours = [dist for dist in distributions() if canonicalize_name(dist.name or "").startswith("nvidia-nccl-")]
    claimed = [(dist, file) for dist in ours for file in dist.files or () if file.name == LIBRARY]
    return {canonicalize_name(dist.name): str(Path(str(file.locate())).resolve()) for dist, file in claimed}


def _torch() -> Torch:
    import torch
    from torch import distributed as dist

    backends = tuple(name for name in ("gloo", "nccl") if dist.is_available() and dist.is_backend_available(name))
    _, no_gpu = _tried(torch.cuda.init)
    if no_gpu:
        return Torch(torch.version.cuda, backends, no_gpu=no_gpu)
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    gpus = tuple(Gpu(one.name, one.total_memory, (one.major, one.minor)) for one in properties)
    return Torch(torch.version.cuda, backends, gpus)


def _nccl() -> Nccl | None:
    nccl = importlib.import_module("cupy.cuda.nccl")
    if not nccl.available:
        return None
    mapped = (line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    files = tuple(dict.fromkeys(path for path in mapped if Path(path).name.startswith(LIBRARY)))
    return Nccl(nccl.get_version(), nccl.get_build_version(), files, _cuda_of(files[0]) if files else None)


def _cuda_of(library: str) -> str | None:
    """The CUDA version that an NCCL library names in its greeting."""
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        greeting = re.search(rb"NCCL version [\d.]+\+cuda(\d+\.\d+)", text)
        return greeting[1].decode() if greeting else None


def _driver() -> str | None:
    """Its version, from the kernel or, where that hides it, from nvidia-smi."""
    module = Path("/proc/driver/nvidia/version")
    if module.exists():
        return kernel_module(module.read_text())
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True, timeout=SECONDS).stdout.split()[0]


def kernel_module(text: str) -> str | None:
    """The driver's version in /proc/driver/nvidia/version, which names it in two ways."""
    found = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", text)
    return found[1] if found else None


def _driver_cuda() -> str:
    version = ctypes.c_int()
    status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    if status:
        raise OSError(f"cuDriverGetVersion: {status}")
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
