"""The wheel holds the modules of the tree, each under its import name, and nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

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
