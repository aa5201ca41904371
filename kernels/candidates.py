"""The candidates that ship: for each architecture, direction, kind of number and head dim, kernels and their tiles."""

from collections.abc import Iterator
from dataclasses import dataclass

LISTED_HEAD_DIMS = (64, 72, 80, 96, 128, 256)
ONLY_MEASURED = ("hopper_forward", "hopper_backward")  # serve where `longtake tune` found them right and ahead
DIRECTIONS = ("forward", "decode", "dkdv", "dq", "backward")
HALF, FLOAT = ("bfloat16", "float16"), ("float32",)


@dataclass(frozen=True)
class Config:
    """A kernel and its tiles.

    kernel: "flash_forward", "flash_dkdv", "flash_dq" (plain Triton), "decode", "hopper_forward", "hopper_backward"
    (Gluon, sm_90); rows, keys: query and key rows of a tile; warps, stages: of a program, and of its load pipeline.
    """

    kernel: str
    rows: int
    keys: int
    warps: int
    stages: int


ALL = LISTED_HEAD_DIMS
SPLIT = (72, 80, 96)

# (architecture, direction, dtypes): rows of (head dims, Config, cost). A cost is the length of the full loop in
# instructions, times warps, over the pairs of a tile; costs compare within one head dim.
_ROWS: dict[tuple[str, str, tuple[str, ...]], list[tuple[tuple[int, ...], Config, float]]] = {
    ("hopper", "forward", HALF): [
        ((64,), Config("flash_forward", 128, 128, 8, 2), 0.224),
        ((64,), Config("flash_forward", 128, 64, 8, 3), 0.300),
        (SPLIT, Config("flash_forward", 128, 128, 8, 2), 0.267),
        (SPLIT, Config("flash_forward", 128, 64, 8, 3), 0.375),
        ((128,), Config("flash_forward", 128, 128, 8, 2), 0.239),
        ((256,), Config("flash_forward", 128, 64, 8, 2), 0.350),
    ],
    ("hopper", "dkdv", HALF): [
        ((64, *SPLIT, 128), Config("flash_dkdv", 64, 128, 8, 2), 0.375),
        ((256,), Config("flash_dkdv", 64, 64, 8, 2), 0.700),
    ],
    ("hopper", "dq", HALF): [
        ((64, *SPLIT, 128), Config("flash_dq", 128, 64, 8, 2), 0.300),
        ((256,), Config("flash_dq", 64, 64, 8, 2), 0.600),
    ],
    ("interpreter", "forward", (*HALF, *FLOAT)): [(ALL, Config("flash_forward", 64, 64, 4, 2), 1.0)],
    ("interpreter", "decode", (*HALF, *FLOAT)): [(ALL, Config("decode", 1, 64, 4, 2), 1.0)],
    ("interpreter", "dkdv", (*HALF, *FLOAT)): [(ALL, Config("flash_dkdv", 64, 64, 4, 2), 1.0)],
    ("interpreter", "dq", (*HALF, *FLOAT)): [(ALL, Config("flash_dq", 64, 64, 4, 2), 1.0)],
}


def candidates(arch: str) -> Iterator[tuple[str, int, str, Config, float]]:
    """(direction, head_dim, dtype, config, cost) of all that may run on an architecture of `device.architecture`."""
    for (row_arch, direction, dtypes), rows in _ROWS.items():
        if row_arch == arch:
            for head_dims, config, cost in rows:
                for head_dim in head_dims:
                    for dtype in dtypes:
                        yield direction, head_dim, dtype, config, cost
