"""`longtake doctor`: whether training would run on this machine; if not, why not, and the command that cures it.

    longtake doctor [--json]

Prints what training needs with its version, the NCCL library that is really loaded, and then what is wrong. An error
is what training would fail of, and the exit code is 1; a warning is not. Without a GPU training runs on the CPU.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .machine import Machine, Torch, collect, dotted

TORCH = {12: "torch>=2.10,<2.11", 13: "torch>=2.11"}  # which PyPI has for that CUDA
DRIVERS = {12: "525 or later", 13: "580 or later"}  # the first that serves it
OLDEST_GPU = (8, 0)
UNSET = "unset LD_LIBRARY_PATH LD_PRELOAD"
ONLY_GPUS_NEED = ("triton", "cupy")
LEVELS = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """error: training would fail. warning: not as it should be. note: to be known."""

    level: Literal["error", "warning", "note"]
    what: str
    cure: str


def findings(machine: Machine) -> list[Finding]:
    """All that is wrong, the worst first. Where there are no GPUs, nothing that only they need is an error."""
    of_gpus = [*_gpus(machine), *_cupy(machine), *_nccl(machine)]
    if machine.driver_cuda is None:
        of_gpus = [replace(one, level="warning") if one.level == "error" else one for one in of_gpus]
    found = [*_requirements(machine), *_imports(machine), *_gloo(machine), *of_gpus]
    return sorted(found, key=lambda one: LEVELS.index(one.level))


def _requirements(machine: Machine) -> Iterator[Finding]:
    """What longtake and PyTorch ask of pip. What we miss or find too old is an error; too new is only untried."""
    if "longtake" not in machine.asked:
        yield Finding("warning", "longtake is not installed: its requirements were not checked", "pip install -e .")
    for owner, texts in machine.asked.items():
        for text in texts:
            wanted = Requirement(text)
            name = canonicalize_name(wanted.name)
            version = machine.installed.get(name)
            failed = [one for one in wanted.specifier if version and not one.contains(version, prereleases=True)]
            if version and not failed:
                continue
            newer = bool(failed) and all(one.operator.startswith("<") for one in failed)
            level = "warning" if newer or owner != "longtake" or _only_for_gpus(name, machine) else "error"
            what = f"{name} {version} is installed" if version else f"{name} is not installed"
            yield Finding(level, f"{what}, {owner} asks for {text}", f'pip install "{text}"')


def _imports(machine: Machine) -> Iterator[Finding]:
    for module, why in machine.broken.items():
        for package in _cupy_packages(machine) if module == "cupy" else [module]:
            if package in machine.installed:
                level = "warning" if _only_for_gpus(module, machine) else "error"
                cure = f'pip install --force-reinstall --no-deps "{package}=={machine.installed[package]}"'
                yield Finding(level, f"{module} does not import: {why}", cure)


def _gloo(machine: Machine) -> Iterator[Finding]:
    if machine.torch and "gloo" not in machine.torch.backends:
        cure = _replace("torch", by=TORCH.get(_cuda_wanted(machine), "torch"))
        yield Finding("error", "PyTorch has no gloo, over which ranks talk", cure)


def _only_for_gpus(name: str, machine: Machine) -> bool:
    return name in ONLY_GPUS_NEED and machine.driver_cuda is None


def _gpus(machine: Machine) -> Iterator[Finding]:
    if machine.driver_cuda is None:
        if machine.driver:
            what = f"driver {machine.driver} is loaded, but libcuda.so.1 is not here: a container without GPUs?"
            yield Finding("warning", what, "docker run --gpus all ...")
    elif machine.torch:
        yield from _of_torch(machine, machine.torch, machine.driver_cuda)
        yield from _for_triton(machine)


def _of_torch(machine: Machine, torch: Torch, driver_cuda: str) -> Iterator[Finding]:
    driver = f"the driver ({machine.driver or 'version unknown'}) serves CUDA {driver_cuda}"
    served = [major for major in TORCH if major <= _major(driver_cuda)]
    wanted = _cuda_wanted(machine)
    newer_driver = f"install a driver for CUDA {wanted}: {DRIVERS.get(wanted, 'the newest')}"
    other_torch = _replace("torch", by=TORCH[max(served)]) if served else newer_driver
    if torch.cuda is None:
        yield Finding("error", f"PyTorch {machine.installed.get('torch')} is built without CUDA; {driver}", other_torch)
        return
    if _major(torch.cuda) > _major(driver_cuda):
        cure = f"{newer_driver}, or {other_torch}" if served else newer_driver
        yield Finding("error", f"{driver}, but PyTorch is built for {torch.cuda}", cure)
    elif not torch.gpus:
        cure = "look at nvidia-smi -L and at CUDA_VISIBLE_DEVICES"
        yield Finding("error", f"PyTorch sees no GPU: {torch.no_gpu}", cure)
    for index, gpu in enumerate(torch.gpus):
        if gpu.capability < OLDEST_GPU:
            what = f"GPU {index}, {gpu.name}, is {gpu.architecture}: the kernels need sm_80 or later"
            yield Finding("error", what, "leave it out of CUDA_VISIBLE_DEVICES")
    if "nccl" not in torch.backends:
        yield Finding("error", "PyTorch has no NCCL: cpu:gloo,cuda:nccl does not start", other_torch)


def _for_triton(machine: Machine) -> Iterator[Finding]:
    if machine.compiler is None:
        what = "no C compiler (CC, gcc, clang), with which Triton builds what starts its kernels"
        yield Finding("error", what, "apt-get install gcc")
    if not machine.headers:
        version = ".".join(machine.python.split(".")[:2])
        yield Finding("error", "no Python.h, which Triton compiles against", f"apt-get install python{version}-dev")


def _cupy(machine: Machine) -> Iterator[Finding]:
    packages = _cupy_packages(machine)
    right = f"cupy-cuda{_cuda_wanted(machine)}x"
    cure = _replace(*packages, by=f"{right}>=14")
    if len(packages) > 1:
        yield Finding("error", f"{' and '.join(packages)} overwrite each other", cure)
    elif not packages and machine.driver_cuda:
        yield Finding("error", "CuPy is not installed: ranks reach NCCL through it", cure)
    elif packages and packages != [right] and machine.torch and machine.torch.cuda:
        built_for = re.fullmatch(r"cupy-cuda(\d+)x", packages[0])
        if built_for:
            what = f"{packages[0]} is built for CUDA {built_for[1]}, PyTorch for {machine.torch.cuda}"
            yield Finding("error", what, cure)
    if packages and "cupy" not in machine.broken and machine.nccl is None:
        yield Finding("error", "CuPy finds no libnccl.so.2", f'pip install "{_nccl_wanted(machine)}"')


def _nccl(machine: Machine) -> Iterator[Finding]:
    nccl, cuda = machine.nccl, machine.torch.cuda if machine.torch else None
    misfit = bool(nccl and nccl.cuda and cuda and _major(nccl.cuda) != _major(cuda))
    cure = _replace(*machine.wheels, by=_nccl_wanted(machine))
    if len(machine.wheels) > 1:
        what = f"{' and '.join(machine.wheels)} install the same libnccl.so.2, and removing one breaks the other"
        yield Finding("error" if misfit or nccl is None else "warning", what, cure)
    if nccl is None:
        return
    files = ", ".join(nccl.files)
    foreign = bool(files and machine.wheels) and not set(nccl.files) & set(machine.wheels.values())
    if misfit:
        what = f"{files} is built for CUDA {nccl.cuda}, PyTorch for {cuda}"
        yield Finding("error", what, UNSET if foreign else cure)
    elif foreign:
        what = f"{files} is loaded, not the library of {', '.join(machine.wheels)}"
        yield Finding("warning", what, UNSET)
    if len(nccl.files) > 1:
        yield Finding("warning", f"PyTorch and CuPy load an NCCL each: {files}", UNSET)
    if nccl.version < nccl.built_for:
        what = f"NCCL {dotted(nccl.version)} is older than {dotted(nccl.built_for)}, which CuPy is built for"
        package = Requirement(_nccl_wanted(machine)).name
        yield Finding("warning", what, f'pip install "{package}>={dotted(nccl.built_for)}"')
    if machine.torch and machine.torch.gpus:
        one_gpu = "NCCL_HOSTID, another for each rank" if nccl.version < 23000 else "NCCL_MULTI_RANK_GPU_ENABLE=1"
        what = f"NCCL {dotted(nccl.version)} refuses several ranks on one GPU"
        yield Finding("note", what, f"to test so, set {one_gpu}")


def _major(cuda: str) -> int:
    return int(cuda.split(".", maxsplit=1)[0])


def _cuda_wanted(machine: Machine) -> int:
    """The CUDA that packages should be for: PyTorch's, else the newest."""
    return _major(machine.torch.cuda) if machine.torch and machine.torch.cuda else max(TORCH)


def _cupy_packages(machine: Machine) -> list[str]:
    return sorted(name for name in machine.installed if re.fullmatch(r"cupy(-(cuda|rocm).*)?", name))


def _nccl_wanted(machine: Machine) -> str:
    """The NCCL package that fits, in the version that PyTorch asks for where it does."""
    name = f"nvidia-nccl-cu{_cuda_wanted(machine)}"
    return next((text for text in machine.asked.get("torch", ()) if Requirement(text).name == name), name)


def _replace(*packages: str, by: str) -> str:
    gone = f"pip uninstall -y {' '.join(packages)} && " if packages else ""
    return f'{gone}pip install "{by}"'


def verdict(machine: Machine, found: Sequence[Finding]) -> str:
    """The last line."""
    errors = sum(one.level == "error" for one in found)
    if errors:
        return f"training would fail: {errors} error{'s' if errors > 1 else ''}"
    if machine.torch and machine.torch.gpus:
        return f"training runs on the GPU{'s' if len(machine.torch.gpus) > 1 else ''}"
    return "no GPU: training runs on the CPU"


def described(machine: Machine) -> Iterator[tuple[str, str]]:
    """What is there, in lines of (name, text)."""
    torch, nccl = machine.torch, machine.nccl
    yield "Python", machine.python
    yield "PyTorch", _version(machine, "torch")
    if torch:
        yield "CUDA", torch.cuda or "none in this PyTorch"
        yield "backends", "cpu:gloo,cuda:nccl" if len(torch.backends) == 2 else ", ".join(torch.backends) or "none"
    yield "driver", machine.driver or "none"
    if machine.driver_cuda:
        yield "", f"serves CUDA {machine.driver_cuda}"
    for index, gpu in enumerate(torch.gpus if torch else ()):
        yield f"GPU {index}", f"{gpu.name}, {gpu.memory / 2**30:.1f} GiB, {gpu.architecture}"
    yield "Triton", _version(machine, "triton")
    yield "CuPy", ", ".join(f"{machine.installed[name]} ({name})" for name in _cupy_packages(machine)) or "none"
    yield "NCCL", f"{dotted(nccl.version)}, for CUDA {nccl.cuda or '?'}" if nccl else "none"
    for file in nccl.files if nccl else ():
        owners = [f"{name} {machine.installed[name]}" for name, claimed in machine.wheels.items() if claimed == file]
        yield "", f"{file} ({', '.join(owners) or 'of no package'})"
    yield "PyAV", f"{_version(machine, 'av')}, FFmpeg {machine.ffmpeg or '?'}"
    for name in ("transformers", "safetensors", "numpy"):
        yield name, _version(machine, name)
    yield "compiler", machine.compiler or "none"


def _version(machine: Machine, name: str) -> str:
    return machine.installed.get(name, "none") + (" (does not import)" if name in machine.broken else "")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="longtake doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    args = parser.parse_args(argv)
    machine = collect()
    found = findings(machine)
    if args.json:
        whole = {"machine": asdict(machine), "findings": list(map(asdict, found)), "verdict": verdict(machine, found)}
        print(json.dumps(whole, indent=2))
    else:
        for name, text in described(machine):
            print(f"{name:<14}{text}")
        for one in found:
            print(f"{one.level}: {one.what}\n{'':<14}{one.cure}")
        print(verdict(machine, found))
    if any(one.level == "error" for one in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
