"""The JSON file of a table: written after each row anew, so that what breaks off later loses nothing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_rows(file: Path | None, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the file whole, if one was asked for."""
    if file is not None:
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
        partial.replace(file)
