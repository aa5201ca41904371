"""The folder list is the architecture: imports point one way, and files stay small enough to be read."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A folder imports from those with a lower number alone.
ABOVE = {"kernels": 0, "comm": 0, "model": 1, "train": 2, "infer": 2, "bench": 3}
MODULES = sorted(path for folder in ABOVE for path in (ROOT / folder).rglob("*.py"))
MAX_LINES = 400


def imported_folders(path: Path) -> Iterator[str]:
    """Folders of the package that a module imports from, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            yield from [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]
        absolute = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        absolute += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.partition(".")[0] == "longtake" for name in absolute), "inside the package: relative"


def test_imports_point_one_way() -> None:
    found = {(path.parent.name, folder, path.name) for path in MODULES for folder in imported_folders(path)}
    wrong = {edge for edge in found if ABOVE[edge[1]] >= ABOVE[edge[0]]}
    assert not wrong
    assert {edge[:2] for edge in found} >= {("model", "kernels"), ("infer", "model"), ("bench", "train")}


def test_folders_are_flat_and_have_no_init() -> None:
    assert not [path for path in MODULES if path.name == "__init__.py" or path.parent.parent != ROOT]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_module_says_what_it_is_for_and_fits_in_a_head(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= MAX_LINES
