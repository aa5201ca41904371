"""The wheel holds the modules of the tree, each under its import name, and nothing else; extras for one CUDA each."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "comm", "model", "train", "infer", "bench")


def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a copy: a build leaves files beside its sources
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "longtake.py"):
        shutil.copy(ROOT / name, tree)
    command = ["wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path), str(tree)]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    [wheel] = tmp_path.glob("longtake-*.whl")
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        [entry_points] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "longtake = longtake.bench.cli:main" in archive.read(entry_points).decode()
    modules = {f"longtake/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert packed == modules


def requirements() -> dict[str, list[Requirement]]:
    """By extra; the core is ""."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: list(map(Requirement, lines)) for extra, lines in texts.items()}


def test_each_cuda_extra_holds_cupy_and_nothing_of_another_cuda() -> None:
    asked = requirements()
    for major in ("12", "13"):
        names = [one.name for one in asked[f"cuda{major}"]]
        assert f"cupy-cuda{major}x" in names
        built_for = [re.search(r"-cu(?:da)?(\d+)x?$", name) for name in names]
        assert [found and found[1] for found in built_for] == [major] * len(names)  # so PyTorch is in neither
    assert all("12" not in one.name for one in asked["dev"] + asked[""])  # tests run with one NCCL as well


def test_the_tests_run_on_pinned_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {one.name.lower(): one.specifier for one in map(Requirement, lines)}
    (triton,) = re.findall(r"^TRITON \?= ([\d.]+)#", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pins["triton"] = SpecifierSet(f"=={triton}")  # not in the list, since the PyTorch on PyPI has a pin of its own
    for one in requirements()[""] + requirements()["dev"]:
        [pin] = pins[one.name.lower()]
        assert pin.operator == "==" and one.specifier.contains(pin.version), str(one)


def test_a_package_named_tests_elsewhere_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    program = f"import sys; sys.path.append({str(tmp_path)!r}); import tests.ranks"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
