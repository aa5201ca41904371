"""Fails where the demo's accuracy, control or parity fall short of what the README promises."""

import json
import sys
from pathlib import Path

TRAINED = 256  # frames of the longest training video


def failures(report: dict) -> list[str]:
    """One line for each promise that does not hold."""
    grid, bad = report["needle"]["long"], []
    rows = dict(zip(grid["frames"], grid["accuracy"], strict=True))
    trained = {frames: sum(row) / len(row) for frames, row in rows.items() if frames <= TRAINED}
    mean = sum(trained.values()) / len(trained)
    if max(trained) != TRAINED or min(trained) != 8:
        bad.append(f"the grid covers {sorted(trained)} frames, not 8 to {TRAINED}")
    if mean < 0.95:
        bad.append(f"long model finds {mean:.3f} of the needles from 8 to {TRAINED} frames, must be 0.95")
    bad += [
        f"long model finds {row:.3f} at {frames} frames, must be 0.90" for frames, row in trained.items() if row < 0.9
    ]
    for name in ("short", "long"):
        control = [cell for row in report["needle"][name]["control"] for cell in row]
        found = sum(control) / len(control)
        if found > 1.5 * grid["chance"]:
            bad.append(f"control of the {name} model is {found:.3f}, chance is {grid['chance']:.3f}")
    one, many = report["parity"]["1"], report["parity"]["4"]
    for key in ("loss", "grad_norm"):
        off = abs(many[key] - one[key]) / abs(one[key])
        if off > 1e-4:
            bad.append(f"{key} on 4 ranks is off by {off:.1e}, must be 1e-4")
    return bad


problems = failures(json.loads(Path(sys.argv[1]).read_text()))
print("\n".join(problems) or "demo: accuracy, control and parity as promised")
sys.exit(bool(problems))
