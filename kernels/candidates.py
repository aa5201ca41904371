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
# instructions, times warps, over the pairs of a tile; costs compare within one head dim. Those of decode are guesses:
# it is bound by memory, and rows of a tile share what is read.
_ROWS: dict[tuple[str, str, tuple[str, ...]], list[tuple[tuple[int, ...], Config, float]]] = {
    ("hopper", "forward", HALF): [
        ((64,), Config("flash_forward", 128, 128, 8, 2), 0.224),
        ((64,), Config("flash_forward", 64, 64, 4, 2), 0.290),
        (SPLIT, Config("flash_forward", 128, 128, 8, 2), 0.264),
        (SPLIT, Config("flash_forward", 64, 64, 4, 2), 0.361),
        ((128,), Config("flash_forward", 128, 128, 8, 2), 0.239),
        ((128,), Config("flash_forward", 64, 64, 4, 2), 0.329),
        ((256,), Config("flash_forward", 64, 64, 8, 2), 0.961),
        ((64, *SPLIT, 128), Config("hopper_forward", 128, 128, 4, 2), 0.230),
        ((64, 72, 80), Config("hopper_forward", 128, 128, 4, 3), 0.230),
        ((64, *SPLIT, 128), Config("hopper_forward", 128, 64, 4, 4), 0.310),
        ((256,), Config("hopper_forward", 128, 32, 4, 4), 0.691),
    ],
    ("hopper", "backward", HALF): [
        ((64, *SPLIT, 128), Config("hopper_backward", 64, 128, 4, 2), 0.420),
        ((64, 72, 80), Config("hopper_backward", 64, 128, 4, 3), 0.420),
    ],
    ("hopper", "decode", HALF): [
        ((64, *SPLIT, 128), Config("decode", 1, 64, 4, 4), 1.0),
        ((64, *SPLIT, 128), Config("decode", 16, 64, 4, 4), 0.08),
        ((256,), Config("decode", 1, 32, 4, 4), 1.0),
        ((256,), Config("decode", 16, 32, 4, 3), 0.08),
    ],
    ("hopper", "dkdv", HALF): [
        ((64,), Config("flash_dkdv", 64, 128, 8, 2), 0.344),
        ((64,), Config("flash_dkdv", 64, 64, 4, 2), 0.350),
        (SPLIT, Config("flash_dkdv", 64, 128, 8, 2), 0.429),
        (SPLIT, Config("flash_dkdv", 64, 64, 4, 2), 0.440),
        ((128,), Config("flash_dkdv", 64, 128, 8, 2), 0.381),
        ((128,), Config("flash_dkdv", 64, 64, 4, 2), 0.395),
        ((256,), Config("flash_dkdv", 32, 128, 8, 2), 1.123),
    ],
    ("hopper", "dq", HALF): [
        ((64,), Config("flash_dq", 128, 64, 8, 2), 0.263),
        ((64,), Config("flash_dq", 64, 64, 4, 2), 0.270),
        (SPLIT, Config("flash_dq", 128, 64, 8, 2), 0.340),
        (SPLIT, Config("flash_dq", 64, 64, 4, 2), 0.350),
        ((128,), Config("flash_dq", 128, 64, 8, 2), 0.300),
        ((128,), Config("flash_dq", 64, 64, 4, 2), 0.310),
        ((256,), Config("flash_dq", 64, 64, 8, 2), 1.135),
    ],
    ("ampere", "forward", HALF): [
        ((64,), Config("flash_forward", 128, 64, 8, 3), 0.351),
        ((64,), Config("flash_forward", 64, 64, 4, 2), 0.346),
        ((96,), Config("flash_forward", 128, 64, 8, 3), 0.438),
        (SPLIT, Config("flash_forward", 128, 32, 8, 2), 0.492),
        ((72, 96), Config("flash_forward", 64, 32, 4, 2), 0.496),
        ((80,), Config("flash_forward", 64, 16, 4, 2), 0.700),
        ((128,), Config("flash_forward", 128, 32, 8, 3), 0.650),
        ((256,), Config("flash_forward", 32, 64, 8, 2), 1.496),
    ],
    ("ampere", "decode", HALF): [
        ((64,), Config("decode", 1, 64, 4, 4), 1.0),
        ((64,), Config("decode", 16, 64, 4, 4), 0.08),
        ((*SPLIT, 128), Config("decode", 1, 64, 4, 3), 1.0),
        ((*SPLIT, 128), Config("decode", 16, 64, 4, 3), 0.08),
        ((256,), Config("decode", 1, 32, 4, 3), 1.0),
        ((256,), Config("decode", 16, 32, 4, 2), 0.08),
    ],
    ("ampere", "dkdv", HALF): [
        ((64,), Config("flash_dkdv", 64, 128, 8, 2), 0.474),
        ((64,), Config("flash_dkdv", 32, 64, 4, 2), 0.541),
        (SPLIT, Config("flash_dkdv", 32, 128, 8, 2), 0.621),
        ((72, 80), Config("flash_dkdv", 32, 64, 4, 2), 0.645),
        ((128,), Config("flash_dkdv", 64, 64, 8, 2), 0.869),
        ((256,), Config("flash_dkdv", 32, 32, 4, 2), 2.508),
    ],
    ("ampere", "dq", HALF): [
        ((64,), Config("flash_dq", 128, 64, 8, 2), 0.336),
        ((64,), Config("flash_dq", 128, 32, 8, 2), 0.357),
        (SPLIT, Config("flash_dq", 128, 32, 8, 2), 0.422),
        ((80,), Config("flash_dq", 64, 16, 4, 2), 0.531),
        ((96,), Config("flash_dq", 64, 32, 4, 2), 0.494),
        ((128,), Config("flash_dq", 128, 32, 8, 2), 0.553),
        ((128,), Config("flash_dq", 64, 32, 4, 2), 0.627),
        ((256,), Config("flash_dq", 32, 32, 4, 1), 1.309),
    ],
    # float32 runs without tensor cores: a fallback, with tiles whose operands fit the registers
    **{
        (arch, direction, FLOAT): rows
        for arch in ("hopper", "ampere")
        for direction, rows in {
            "forward": [
                ((64, *SPLIT, 128), Config("flash_forward", 32, 16, 4, 1), 10.5),
                ((256,), Config("flash_forward", 32, 16, 8, 1), 22.2),
            ],
            "decode": [(ALL, Config("decode", 1, 16, 8, 1), 1.0)],
            "dkdv": [
                ((64, *SPLIT, 128), Config("flash_dkdv", 16, 32, 4, 1), 19.7),
                ((256,), Config("flash_dkdv", 16, 16, 8, 1), 62.3),
            ],
            "dq": [
                ((64, 72, 80), Config("flash_dq", 32, 16, 4, 1), 10.0),
                ((96, 128), Config("flash_dq", 16, 16, 8, 1), 19.7),
                ((256,), Config("flash_dq", 16, 16, 8, 1), 36.1),
            ],
        }.items()
    },
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
