"""Split-KV decoding, interpreted, against the float64 reference. All memory that the host takes is full of NaN.

Limits, relative to the largest value: 1e-6 for out and 1e-5 for lse; the worst seen are 4e-7 and 2e-7. In float16
scores and sums are still float32: what is lost is the rounding of p and out, at most what PyTorch itself loses.
"""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from longtake.kernels import decode, reference
from longtake.kernels.candidates import Config
from longtake.kernels.visibility import Visibility
from torch import Tensor

from tests.kernels.masks import cases, shard_visibility

CASES = {name: visibility for name, visibility in cases().items() if len(visibility.end) and len(visibility.kend)}
STARTS, ENDS = [0, 0, 7, 40, 41, 90], [3, 30, 31, 64, 64, 100]  # of six rows that see far apart keys of 110
Block = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))


def between(start: Tensor, end: Tensor, num_keys: int) -> Visibility:
    """Of rows that see the keys `start` to `end` - 1."""
    return Visibility.from_bounds(start.long(), end.long() - 1, torch.arange(num_keys))


def few_rows(visibility: Visibility, num_rows: int) -> Visibility:
    """That many of a mask's rows, spread over it."""
    row = torch.linspace(0, len(visibility.end) - 1, min(num_rows, len(visibility.end))).long()
    return between(visibility.start[row], visibility.end[row], len(visibility.kend))


def last_rows(num_rows: int, num_keys: int) -> Visibility:
    """Of the last tokens of one sequence of `num_keys`, causal."""
    return shard_visibility(num_keys, torch.arange(num_keys - num_rows, num_keys))


def block(visibility: Visibility, heads: int = 4, key_heads: int = 2, head_dim: int = 32) -> Block:
    """Random float32 q, k, v."""
    generator = torch.Generator().manual_seed(len(visibility.end))
    num_rows, num_keys = len(visibility.end), len(visibility.kend)
    shapes = ((num_rows, heads, head_dim), (num_keys, key_heads, head_dim), (num_keys, key_heads, head_dim))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def forward(tensors: Block, visibility: Visibility, *, rows: int = 1, keys: int = 16, **options: Any) -> Any:
    config = Config("decode", rows, keys, 4, 2)
    return decode.forward(*tensors, visibility, scale=0.3, config=config, **options)


def expected(tensors: Block, visibility: Visibility, **options: Any) -> tuple[Tensor, Tensor]:
    q, k, v = (x.double() for x in tensors)
    return reference.forward(q, k, v, visibility, scale=0.3, **options)


def error(got: Tensor, want: Tensor) -> float:
    """The largest, relative to the largest value; infinities must be the same, and NaN is one."""
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(got[~finite].double(), want[~finite]):
        return torch.inf
    largest = want[finite].abs().max() if finite.any() else 0.0
    return float((got - want)[finite].abs().max() / largest) if largest else float(got[finite].abs().sum())


def assert_near(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert error(got[0], want[0]) <= 1e-6
    assert error(got[1], want[1]) <= 1e-5


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_mask(name: str, rows: int) -> None:
    visibility = few_rows(CASES[name], 4)
    tensors = block(visibility, 2, 1)
    assert_near(forward(tensors, visibility, rows=rows, keys=32), expected(tensors, visibility))


@pytest.mark.parametrize(("num_rows", "rows"), [(1, 1), (2, 16), (5, 1), (5, 4)])
@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (7, 1), (16, 2)])
def test_rows_and_heads_of_a_group_share_a_tile(num_rows: int, rows: int, heads: int, key_heads: int) -> None:
    visibility = last_rows(num_rows, 70)
    tensors = block(visibility, heads, key_heads)
    assert_near(forward(tensors, visibility, rows=rows), expected(tensors, visibility))


@pytest.mark.parametrize(("splits", "rows"), [*product([1, 2, 3, 4, 5], [1, 16])])
def test_any_number_of_splits(splits: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "num_splits", lambda *counts: splits)
    visibility = between(torch.tensor(STARTS), torch.tensor(ENDS), 110)  # of 1 to 4 key tiles, or 7: splits go empty
    tensors = block(visibility)
    assert_near(forward(tensors, visibility, rows=rows), expected(tensors, visibility))


def test_more_splits_than_are_merged_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "num_splits", lambda *counts: decode.AT_ONCE + 5)
    visibility = last_rows(1, 600)
    tensors = block(visibility, 2, 1)
    assert_near(forward(tensors, visibility), expected(tensors, visibility))


@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 72, 80, 96, 128, 256])
def test_head_dims(head_dim: int) -> None:
    visibility = last_rows(2, 90)
    q, k, v = block(visibility, head_dim=head_dim)
    tensors = q * head_dim**-0.5, k, v
    assert_near(forward(tensors, visibility, keys=32), expected(tensors, visibility))


@pytest.mark.parametrize("rows", [1, 16])
def test_float16_loses_no_more_than_pytorch(rows: int) -> None:
    visibility = last_rows(2, 200)
    q, k, v = (x.half() for x in block(visibility, head_dim=64))
    want = expected((q, k, v), visibility)
    out, lse = forward((q, k, v), visibility, rows=rows, final=True)
    mask = torch.arange(200) < visibility.end[:, None]
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    theirs = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True).transpose(0, 1)
    assert out.dtype == torch.float16
    assert error(out, want[0]) <= error(theirs, want[0]) + 2e-4
    assert error(lse, want[1]) <= 1e-5


def test_large_scores() -> None:
    visibility = last_rows(2, 90)
    q, k, v = block(visibility)
    tensors = 1e4 * q, k, v
    assert_near(forward(tensors, visibility), expected(tensors, visibility))


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("heads_first", [False, True])
def test_a_part_of_a_layers_cache_whose_other_slots_hold_nan(heads_first: bool, rows: int) -> None:
    start, end = torch.tensor(STARTS), torch.tensor(ENDS)
    key = torch.arange(110)
    seen = ((start[:, None] <= key) & (key < end[:, None])).any(0)
    visibility = between(start, end, 110)
    q, k, v = block(visibility)
    caches = torch.full((2, 3, 2, 130, 32) if heads_first else (2, 3, 130, 2, 32), torch.nan)  # k or v, layer
    layer = caches[:, 1].transpose(1, 2) if heads_first else caches[:, 1]
    layer[:, :110][:, seen] = torch.stack((k, v))[:, seen]
    want = expected((q, k * seen[:, None, None], v * seen[:, None, None]), visibility)
    assert_near(forward((q, layer[0, :110], layer[1, :110]), visibility, rows=rows), want)


def test_strides_that_are_not_of_whole_16_bytes() -> None:
    visibility = last_rows(2, 90)
    q, k, v = block(visibility)
    odd = torch.full((3, 90, 2, 35), torch.nan)
    odd[0, :2, :, :32], odd[1, ..., :32], odd[2, ..., :32] = q[:, :2], k, v
    tensors = odd[0, :2, :, :32], odd[1, ..., :32], odd[2, ..., :32]
    assert_near(forward(tensors, visibility), expected(tensors, visibility))


@pytest.mark.parametrize("rows", [1, 16])
def test_blocks_of_keys_fold_into_the_state_in_place(rows: int) -> None:
    visibility = between(torch.tensor(STARTS), torch.tensor(ENDS), 110)
    q, k, v = block(visibility)
    state = None
    for first, last in ((0, 20), (20, 50), (50, 110)):  # each row sees keys of one or two
        start, end = (bound.clamp(first, last) - first for bound in (visibility.start, visibility.end))
        part = between(start, end, last - first)
        before = None if state is None else [x.clone() for x in state]
        state = forward((q, k[first:last], v[first:last]), part, rows=rows, state=state)
        unseen = start == end
        if before is not None:
            assert torch.equal(state[0][unseen], before[0][unseen])
            assert torch.equal(state[1][:, unseen], before[1][:, unseen])
    assert state is not None
    assert_near(state, expected((q, k, v), visibility))


def test_the_state_given_is_the_one_returned_and_rows_that_see_nothing_are_not_written() -> None:
    visibility = between(torch.tensor([0, 50, 50]), torch.tensor([30, 50, 60]), 60)
    tensors = block(visibility)
    out, lse = torch.full((3, 4, 32), torch.nan), torch.full((4, 3), torch.nan)
    out[::2], lse[:, ::2] = 0.0, -torch.inf
    got = forward(tensors, visibility, state=(out, lse))
    assert got[0] is out and got[1] is lse
    assert out[1].isnan().all() and lse[:, 1].isnan().all()
    want = expected(tensors, visibility)
    assert_near((out[::2], lse[:, ::2]), (want[0][::2], want[1][:, ::2]))


@pytest.mark.parametrize("carried", [False, True])
def test_the_final_block_comes_in_the_dtype_of_the_input_every_row(carried: bool) -> None:
    visibility = between(torch.tensor([0, 50, 50]), torch.tensor([30, 50, 60]), 60)
    tensors = block(visibility)
    q, k, v = (x.half() for x in tensors)
    state = (
        expected((q, k, v), between(torch.tensor([10, 20, 20]), torch.tensor([20, 20, 30]), 60)) if carried else None
    )
    want = expected((q, k, v), visibility, state=None if state is None else (state[0].clone(), state[1].clone()))
    before = None if state is None else (state[0].float(), state[1].float())
    out, lse = forward((q, k, v), visibility, state=before, final=True)
    assert out.dtype == torch.float16 and lse.dtype == torch.float32
    assert before is None or (lse is before[1] and out is not before[0])
    assert error(out, want[0]) <= 1e-3  # half a float16's last place, and p is rounded too
    assert error(lse, want[1]) <= 1e-5


def test_addresses_of_64_bits() -> None:
    visibility = last_rows(1, 140)
    near = tuple(x.half() for x in block(visibility, 2, 2, 16))
    row = 2**24  # numbers: the last rows lie 2^31 numbers behind the first; only what is written takes memory
    memory = torch.empty_strided((140, row), (row, 1), dtype=torch.float16)
    k, v = (memory[:, first : first + 32].unflatten(1, (2, 16)) for first in (0, 32))
    q = memory.as_strided((1, 2, 16), (16, 130 * row, 1), 64)
    for far, x in zip((q, k, v), near, strict=True):
        far.copy_(x)
    for one, other in zip(forward((q, k, v), visibility), forward(near, visibility), strict=True):
        assert torch.equal(one, other)


def test_the_number_of_splits() -> None:
    least, resident = decode.LEAST_TILES, decode.RESIDENT
    assert decode.num_splits(8, 10**6, 132) == resident * 132 // 8  # long: the GPU is full
    assert decode.num_splits(8, 10**6, 108) == resident * 108 // 8
    assert decode.num_splits(8, 7 * least, 132) == 7  # short: splits are not cut shorter
    assert decode.num_splits(8, 1, 132) == decode.num_splits(10**6, 10**6, 132) == decode.num_splits(1, 0, 132) == 1
    for programs, tiles in product((1, 5, 64, 300), (1, 30, 400, 10**5)):
        splits = decode.num_splits(programs, tiles, 132)
        assert splits == 1 or (splits * programs <= resident * 132 and tiles // splits >= least)


GROWING = """
import torch
from longtake.bench.recorder import record
from longtake.kernels.candidates import Config
from longtake.kernels.decode import forward
from longtake.kernels.visibility import Visibility

def grow():
    for n, rows in ((1, 1), (2, 1), (15, 2), (16, 2), (17, 1), (1024, 1), (4097, 16), (2**20, 17)):
        bounds = Visibility(*(torch.empty(rows, dtype=torch.int32, device="meta") for _ in range(2)), n)
        q = torch.empty(rows, 4, 64, dtype=torch.bfloat16, device="meta")
        slots, heads_first = q.new_empty(3, 2**21, 2, 64)[1, :n], q.new_empty(2, n, 64).transpose(0, 1)
        for cache in (slots, heads_first):
            forward(q, cache, cache, bounds, scale=0.1, config=Config("decode", 1, 64, 4, 3))

launches = record(90, grow)
print(len(launches), sorted({(x.kernel.name, x.kernel.hash) for x in launches}).__len__())
"""


def test_a_growing_cache_compiles_once_and_no_tensor_is_read_on_the_host() -> None:
    # Meta tensors hold nothing to read. Compiled, not interpreted: in a process of its own.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", GROWING], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert run.stdout.split() == ["32", "2"], run.stderr
