"""The gates on compiled kernels: what ships passes them, and each planted fault turns them red and is named."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from longtake.bench.compiled import Row, changes, limits, line, main, read, table_file
from longtake.bench.recorder import Facts
from longtake.bench.shipped import TARGETS, cases

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
TRITON = version("triton")
pytestmark = pytest.mark.skipif(
    not table_file("sm_90a").is_file(), reason=f"no table is checked in for Triton {TRITON}: make test TRITON=3.6.0"
)

# Compiles a plain forward whose tile has 32 rows, too few for wgmma; one with too few warps to hold its tile in
# registers; and one whose tile is no power of two. float16: one variant of each.
PLANTED = """
from longtake.bench import compiled, shipped
from longtake.kernels.candidates import Config
tiles = [(32, 64, 4, 2), (128, 128, 4, 2), (100, 64, 4, 2)]
shipped.candidates = lambda _: [("forward", 128, "float16", Config("flash_forward", *tile), 1.0) for tile in tiles]
compiled.main({argv})
"""


def run(*command: str) -> tuple[int, str]:
    """Exit code and output of a Python that compiles kernels, and does not interpret them."""
    done = subprocess.run(
        [sys.executable, *command], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def gate(*argv: str) -> tuple[int, str]:
    return run("-m", "longtake.bench.cli", "bench", "compiled", "--check", *argv)


@pytest.mark.parametrize(("head_dim", "dtype"), [("128", "bf16"), ("80", "fp16")])
def test_kernels_of_a_head_dim_pass(head_dim: str, dtype: str) -> None:
    code, output = gate("--head-dim", head_dim, "--dtype", dtype)
    assert code == 0, output
    assert f" {head_dim} " in output and "\n0 facts of" in output


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_all_kernels_pass(target: str) -> None:
    code, output = gate("--target", target)
    assert code == 0, output


@pytest.mark.parametrize("target", TARGETS)
def test_the_table_that_is_checked_in_is_of_what_ships(target: str) -> None:
    rows = read(table_file(target).read_text())
    recorded = {(row.kernel, row.head_dim, row.dtype, row.tile, row.variant) for row in rows}
    assert recorded == {
        (case.config.kernel, case.head_dim, case.dtype, case.tile, str(case.variant)) for case in cases(target)
    }
    assert not [problem for row in rows for problem in limits(row, target)]


def test_planted_kernels_turn_the_gate_red(tmp_path: Path) -> None:
    table = tmp_path / "empty.txt"
    table.write_text(table_file("sm_90a").read_text().splitlines()[1] + "\n")
    code, output = run("-c", PLANTED.format(argv=["--check", "--table", str(table)]))
    name = "flash_forward forward_kernel D128 fp16"
    assert code == 1, output
    assert f"{name} 32x64w4s2 middle x7: HMMA must be 0, got " in output
    assert f"{name} 32x64w4s2 middle x7: HGMMA must be at least 1, got 0" in output
    assert f"{name} 128x128w4s2 middle x7: spilled bytes must be 0, got " in output
    assert f"{name} 128x128w4s2 middle x7: is not in the table that is checked in" in output
    assert "flash_forward D128 fp16 100x64w4s2 middle x7: must compile, got " in output


def test_a_kernel_that_is_not_as_checked_in_turns_the_gate_red(tmp_path: Path) -> None:
    header, *rest = table_file("sm_90a").read_text().splitlines(keepends=True)[1:]
    chosen = [
        row
        for row in read(header + "".join(rest))
        if (row.kernel, row.head_dim, row.dtype) == ("flash_forward", 128, "fp16")
    ]
    recorded = chosen[0]
    loop = recorded.facts.loop * 10 // 11  # what is compiled is a tenth longer
    other = replace(recorded, facts=replace(recorded.facts, loop=loop, order="H8 H8 W1 E66"))
    table = tmp_path / "doctored.txt"
    doctored = [other, replace(other, variant="never"), *chosen[1:]]
    table.write_text(header + "".join(line(row.cells) for row in doctored))
    code, output = gate("--kernel", "flash_forward", "--head-dim", "128", "--dtype", "fp16", "--table", str(table))
    assert code == 1, output
    assert f"{recorded.name}: order must be 'H8 H8 W1 E66', got '{recorded.facts.order}'" in output
    assert f"{recorded.name}: loop must be within 5% of {loop} instructions, got {recorded.facts.loop}" in output
    assert "never: is checked in, but was not compiled" in output
    assert f"\n3 facts of {len(chosen)} kernels must be otherwise" in output


FACTS = Facts(
    registers=168,
    spilled=0,
    local=0,
    shared=198128,
    programs=1,
    hgmma=64,
    hmma=0,
    tma_loads=10,
    tma_adds=2,
    groups="240,24",
    notes="-",
    boxes="ok",
    loop=443,
    loops="443,435",
    order="H8 H8 W1 E32 H4 W1 b b W0",
)
FUSED = Row("hopper_backward", "backward_kernel", 128, "bf16", "64x128w4s2", "middle x7", FACTS)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"local": 9}, "local accesses in a loop must be at most 8, got 9"),
        ({"notes": "C7515"}, "ptxas' notes must be none of C75xx, which serialise wgmma, got C7515"),
        ({"shared": 232449}, "shared bytes must be at most 232448, got 232449"),
        ({"programs": 0}, "programs on an SM must be at least 1, got 0"),
        ({"hgmma": 0}, "HGMMA must be at least 1, got 0"),
        ({"hmma": 16}, "HMMA must be 0, got 16"),
        ({"tma_loads": 0}, "UTMALDG must be at least 1, got 0"),
        ({"tma_adds": 0}, "UTMAREDG must be at least 1, got 0"),
        ({"groups": "-"}, "register groups must be present, got -"),
        ({"order": "H8 B W0"}, "order must be without B, a barrier of all partitions, got H8 B W0"),
        (
            {"boxes": "box [128, 64] for 64x128xbf16"},
            "TMA boxes must be as their buffers, got box [128, 64] for 64x128xbf16",
        ),
    ],
)
def test_each_limit_is_held(fault: dict[str, object], message: str) -> None:
    assert list(limits(FUSED, "sm_90a")) == []
    faulty = replace(FUSED, facts=replace(FACTS, **fault))
    assert list(limits(faulty, "sm_90a")) == [f"{FUSED.name}: {message}"]


def test_only_the_fused_backward_of_head_dim_128_may_spill() -> None:
    spilling = replace(FUSED, facts=replace(FACTS, spilled=84, local=8))
    assert list(limits(spilling, "sm_90a")) == []
    for other in ({"head_dim": 80}, {"kernel": "hopper_forward"}, {"kernel": "flash_dkdv", "dtype": "fp32"}):
        row = replace(spilling, **other)
        assert list(limits(row, "sm_90a")) == [f"{row.name}: spilled bytes must be 0, got 84"]


def test_code_that_two_steps_share_is_compiled_once() -> None:
    decode = [row for row in read(table_file("sm_90a").read_text()) if row.kernel == "decode" and row.head_dim == 64]
    steps = {(row.function, row.variant) for row in decode if (row.dtype, row.tile) == ("bf16", "1x64w4s4")}
    assert steps == {("decode_kernel", step) for step in ("middle x7", "only x1")} | {
        ("merge_kernel", step) for step in ("first x7", "middle x7", "last x7", "only x1")
    }


def test_an_ampere_kernel_has_less_memory_and_other_products() -> None:
    plain = replace(FUSED, kernel="flash_dkdv", facts=replace(FACTS, hgmma=0, hmma=0, tma_loads=0, shared=101377))
    assert list(limits(plain, "sm_80")) == [
        f"{plain.name}: shared bytes must be at most 101376, got 101377",
        f"{plain.name}: HMMA must be at least 1, got 0",
    ]


@pytest.mark.parametrize("fact", ["shared", "programs", "groups", "order"])
def test_what_is_recorded_must_stay(fact: str) -> None:
    other = replace(FUSED, facts=replace(FACTS, **{fact: "other"}))
    assert [f"{fact} must be 'other'" in problem for problem in changes(FUSED, other)] == [True]
    assert not list(changes(FUSED, FUSED))


@pytest.mark.parametrize(("loop", "changed"), [(443, False), (465, False), (466, True), (421, False), (420, True)])
def test_a_loop_may_drift_by_a_twentieth(loop: int, changed: bool) -> None:
    assert bool(list(changes(replace(FUSED, facts=replace(FACTS, loop=loop)), FUSED))) is changed


def test_a_table_reads_as_written_and_tells_of_other_columns() -> None:
    header = table_file("sm_90a").read_text().splitlines()[1]
    assert read(f"# a title\n{header}\n{line(FUSED.cells)}") == [FUSED]
    with pytest.raises(ValueError, match=r"columns must be kernel function .* got kernel: "):
        read("kernel\n")


@pytest.mark.parametrize(
    ("interpret", "argv", "message"),
    [
        ("1", [], "TRITON_INTERPRET is set"),
        ("0", ["--write", "--head-dim", "64"], "leave out --kernel, --head-dim and --dtype"),
        ("0", ["--check", "--table", "nowhere.txt"], "nowhere.txt is not there"),
        ("0", ["--head-dim", "63"], "nothing that is asked for ships for sm_90a"),
    ],
)
def test_mistakes_are_told(monkeypatch: pytest.MonkeyPatch, interpret: str, argv: list[str], message: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(ValueError, match=message):
        main(argv)
