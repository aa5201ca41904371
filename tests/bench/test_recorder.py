"""What the recorder reads off a kernel, apart from what needs a compiler: see test_compiled.py."""

from typing import Any

import pytest
from longtake.bench.recorder import box_problems, num_bytes, programs

BOX = {"swizzle": 3, "elem_size": 2, "elem_type": 10}


def ttgir(entry: str = "1x64x128xbf16", block: str = "1x64x128xbf16", buffer: str = "64x128xbf16", expect: int = 16384):
    """A kernel that loads one block by TMA, as Triton 3.6 writes it."""
    barrier = "!ttg.memdesc<1xi64, #shared1, #smem, mutable>"
    copy = f"!tt.tensordesc<tensor<{block}, #shared>>, {barrier} -> !ttg.memdesc<{buffer}, #shared2, #smem, mutable>"
    return f"""\
  tt.func public @forward_kernel(%Q: !tt.tensordesc<tensor<{entry}, #shared>> loc("Q"), %Start: !tt.ptr<i32>) {{
    ttng.barrier_expect %dq.0_45, {expect}, %true : {barrier} loc(#loc1)
    ttng.async_tma_copy_global_to_local %Q[%h, %row, %c0] %x, %dq.0_45, %true : {copy} loc(#loc1)
"""


def test_a_block_in_two_boxes_as_wide_as_the_swizzle_is_right() -> None:
    descriptors = [BOX | {"block_size": [1, 64, 64]}]
    assert box_problems(ttgir(), descriptors) == []
    assert box_problems(ttgir().replace("tensor<1x64x128xbf16, #shared>", "1x64x128xbf16, #shared"), descriptors) == []


@pytest.mark.parametrize(
    ("faults", "box", "problem"),
    [
        ({"buffer": "64x64xbf16"}, [1, 64, 64], "copy_global_to_local of 1x64x128xbf16, buffer 64x64xbf16"),
        ({"expect": 8192}, [1, 64, 64], "copies bring 16384 bytes, barriers expect 8192"),
        ({}, [1, 128, 64], "box [1, 128, 64] for 1x64x128xbf16"),
        ({}, [1, 64, 96], "box [1, 64, 96] for 1x64x128xbf16"),
        ({"entry": "1x64x128xf32"}, [1, 64, 64], "box [1, 64, 64] for 1x64x128xf32"),
    ],
)
def test_a_copy_that_does_not_fit_is_told(faults: dict[str, Any], box: list[int], problem: str) -> None:
    assert problem in box_problems(ttgir(**faults), [BOX | {"block_size": box}])


def test_a_reduction_must_fit_its_buffer_but_is_awaited_by_no_barrier() -> None:
    line = (
        "ttng.async_tma_reduce add, %dq[%h, %m] %smem : !tt.tensordesc<1x64x64xf32, #shared2>, !ttg.memdesc<{}, #smem>"
    )
    assert box_problems(ttgir() + line.format("1x64x64xf32"), [BOX | {"block_size": [1, 64, 64]}]) == []
    assert box_problems(ttgir() + line.format("1x32x64xf32"), [BOX | {"block_size": [1, 64, 64]}]) == [
        "reduce of 1x64x64xf32, buffer 1x32x64xf32"
    ]


def test_bytes_of_a_block() -> None:
    assert num_bytes("1x128x64xbf16") == 16384
    assert num_bytes("1x64xf32") == 256


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "fit"),
    [
        (90, 107, 64 * 1024, 8, 2),  # registers: 2 x 8 warps x 3584
        (90, 255, 0, 4, 2),
        (90, 168, 198128, 12, 1),
        (90, 40, 76 * 1024, 4, 2),  # shared memory: 77 KiB each, with what is reserved
        (80, 40, 81 * 1024, 4, 2),
        (80, 40, 82 * 1024, 4, 1),
        (90, 16, 0, 16, 4),  # warps
    ],
)
def test_programs_on_an_sm(capability: int, registers: int, shared: int, warps: int, fit: int) -> None:
    assert programs(capability, registers, shared, warps) == fit
