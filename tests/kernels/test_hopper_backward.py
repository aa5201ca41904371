"""The fused Gluon backward on the CPU, as its host function launches it, and bugs planted in it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from longtake.kernels import flash_prepare, hopper_backward, reference
from longtake.kernels.candidates import Config
from longtake.kernels.visibility import Visibility
from torch import Tensor

from tests.kernels.closeness import error, normal, ring_step, zigzag
from tests.kernels.far import spread
from tests.kernels.gluon_machine import KernelError
from tests.kernels.gluon_threads import Threads
from tests.kernels.masks import cases, shard_visibility

KERNEL = hopper_backward.backward_kernel
CONFIG = Config("hopper_backward", rows=16, keys=32, warps=4, stages=2)
LIMIT = 1e-5
MASKS = [
    "full",
    "causal",
    "packed, not causal",
    "zigzag, later keys hidden",
    "decode",
    "nothing",
    "random 1",
    "random 3",
]


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches go to the threads of a GPU."""
    monkeypatch.setattr(hopper_backward, "backward_kernel", Threads(KERNEL))


def tensors(visibility: Visibility, heads: int, key_heads: int, head_dim: int) -> list[Tensor]:
    """q, k, v, dout, dlse."""
    rows, keys = len(visibility.start), len(visibility.kstart)
    q, k = (rows, heads, head_dim), (keys, key_heads, head_dim)
    return normal(q, k, k, q, (heads, rows))


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dlse: Tensor,
    visibility: Visibility,
    scale: float,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """lse2 and delta, and dq, dk, dv in float64."""
    q, k, v, do, dl = (x.double() for x in (q, k, v, dout, dlse))
    out, lse = reference.forward(q, k, v, visibility, scale=scale)
    want = reference.backward(q, k, v, out, lse, do, visibility, scale=scale, dlse=dl)
    return flash_prepare.prepare(out.float(), lse.float(), dout, dlse), want


@dataclass(frozen=True)
class Case:
    """A call, and the gradients that it should give."""

    visibility: Visibility
    heads: int = 4
    key_heads: int = 2
    head_dim: int = 64
    steep: float = 0.0  # how negative all scores are

    @cached_property
    def call(self) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]]:
        q, k, v, dout, dlse = tensors(self.visibility, self.heads, self.key_heads, self.head_dim)
        if self.steep:
            q, k = torch.full_like(q, self.steep), -k.abs()
        rows, want = gradients(q, k, v, dout, dlse, self.visibility, self.head_dim**-0.5)
        return (q, k, v, dout, *rows, self.visibility), want

    def errors(self, **changes: int) -> list[float]:
        """Of a launch, with these changes of the tiles."""
        (q, k, v, *others), want = self.call
        dq, dk, dv = torch.zeros_like(q), torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
        scale, config = self.head_dim**-0.5, Config(**(vars(CONFIG) | changes))
        hopper_backward.backward(q, k, v, *others, scale=scale, config=config, dq=dq, dk=dk, dv=dv, add=False)
        return [error(x, y) for x, y in zip((dq, dk, dv), want, strict=True)]


PLANTED = Case(shard_visibility(97, causal=False, window=70), head_dim=72)  # every edge there is
STEEP = Case(shard_visibility(97, causal=False), 2, 1, steep=20.0)


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str) -> None:
    assert max(Case(cases()[mask]).errors()) <= LIMIT


@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128])
def test_head_dims_and_seven_query_heads_to_a_key_head(head_dim: int) -> None:
    assert max(Case(cases()["packed"], 7, 1, head_dim).errors()) <= LIMIT


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("rows", [16, 32])
def test_tiles_and_depths_of_the_ring(stages: int, rows: int) -> None:
    assert max(Case(cases()["zigzag on itself"]).errors(stages=stages, rows=rows)) <= LIMIT


@pytest.mark.parametrize("seed", range(1, 6))
def test_orders_in_which_partitions_may_run(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_backward, "backward_kernel", Threads(KERNEL, seed=seed))
    assert max(Case(cases()["causal"], 2, 1).errors()) <= LIMIT


def test_keys_past_the_end_under_scores_whose_weights_overflow() -> None:
    assert max(STEEP.errors()) <= 5 * LIMIT  # scores near -150 are rounded to 2^-17


def test_sums_of_before_are_added_to() -> None:
    visibility = cases()["zigzag, packed"]
    q, k, v, dout, dlse = tensors(visibility, 4, 2, 72)
    rows, want = gradients(q, k, v, dout, dlse, visibility, 0.1)
    dq, dk, dv = normal(q.shape, k.shape, v.shape, seed=3)
    before = dq.clone(), dk.clone(), dv.clone()
    hopper_backward.backward(q, k, v, dout, *rows, visibility, scale=0.1, config=CONFIG, dq=dq, dk=dk, dv=dv, add=True)
    for x, y, z in zip((dq, dk, dv), before, want, strict=True):
        assert error(x, y + z) <= LIMIT


def test_keys_that_nobody_sees_keep_their_sums_to_the_bit() -> None:
    visibility = shard_visibility(140, torch.arange(70), causal=True)  # the keys from 70 on
    q, k, v, dout, dlse = tensors(visibility, 4, 2, 64)
    rows, want = gradients(q, k, v, dout, dlse, visibility, 0.1)
    dq, (dk, dv) = torch.zeros_like(q), normal(k.shape, v.shape, seed=3)
    before = dk.clone(), dv.clone()
    for x in (dk, dv):
        x[96:] = -0.0  # would be 0.0 if anything was added
    hopper_backward.backward(q, k, v, dout, *rows, visibility, scale=0.1, config=CONFIG, dq=dq, dk=dk, dv=dv, add=True)
    for x, y, z in zip((dk, dv), before, want[1:], strict=True):
        assert error(x[:70], (y + z)[:70]) <= LIMIT
        assert torch.equal(x[70:96], y[70:96])
        assert x[96:].signbit().all()


def test_strides_and_16_bits() -> None:
    visibility = shard_visibility(70, causal=False, lengths=[30, 40])
    [fused] = normal((70, 8, 64))
    [heads_first] = normal((6, 70, 64), seed=1)
    q, k = fused.half()[:, 2:6], fused.half()[:, 6:]
    v, dout = heads_first.half()[:2].transpose(0, 1), heads_first.half()[2:].transpose(0, 1)
    rows, want = gradients(q, k, v, dout, torch.zeros(4, 70), visibility, 0.125)
    wide = torch.full((70, 8, 72), torch.nan)
    dq, dk, dv = wide[:, :4, :64].zero_(), wide.half()[:, 4:6, :64], torch.full((2, 70, 64), torch.nan).half()
    dv = dv.transpose(0, 1)
    hopper_backward.backward(
        q, k, v, dout, *rows, visibility, scale=0.125, config=CONFIG, dq=dq, dk=dk, dv=dv, add=False
    )
    for x, y in zip((dq, dk, dv), want, strict=True):
        assert error(x, y) <= 2**-9  # weights, their gradients and what is written are rounded to 11 bits
    assert int(wide.isnan().sum()) == wide.numel() - dq.numel()


def test_a_zigzag_ring_of_four_is_one_attention() -> None:
    mask = {"window": 60, "lengths": [3, 47, 1, 89, 61]}
    whole = shard_visibility(201, **mask)  # pyright: ignore[reportArgumentType]
    q, k, v, dout, dlse = tensors(whole, 4, 2, 64)
    (lse2, delta), want = gradients(q, k, v, dout, dlse, whole, 0.125)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    shards = zigzag(201, 4)
    for rank, rows in enumerate(shards):
        some_lse2, some_delta = (torch.nn.functional.pad(x[:, rows], (0, -len(rows) % 4 + 16)) for x in (lse2, delta))
        some_dq = torch.zeros_like(q[rows])
        for step in range(4):
            keys, visibility = ring_step(shards, rank, step, **mask)
            some_dk, some_dv = dk[keys], dv[keys]
            hopper_backward.backward(
                q[rows],
                k[keys],
                v[keys],
                dout[rows],
                some_lse2,
                some_delta,
                visibility,
                scale=0.125,
                config=CONFIG,
                dq=some_dq,
                dk=some_dk,
                dv=some_dv,
                add=True,
            )
            dk[keys], dv[keys] = some_dk, some_dv
        dq[rows] = some_dq
    assert max(error(x, y) for x, y in zip((dq, dk, dv), want, strict=True)) <= LIMIT


def test_offsets_beyond_32_bits() -> None:
    visibility = shard_visibility(40)
    q, k, v, dout, dlse = tensors(visibility, 3, 3, 64)
    rows, want = gradients(q, k, v, dout, dlse, visibility, 0.1)
    dk, dv = (spread(torch.full_like(x, torch.nan), 64, 2**30) for x in (k, v))  # two heads are 2^31 numbers apart
    dq = torch.zeros_like(q)
    hopper_backward.backward(q, k, v, dout, *rows, visibility, scale=0.1, config=CONFIG, dq=dq, dk=dk, dv=dv, add=False)
    assert max(error(x, y) for x, y in zip((dq, dk, dv), want, strict=True)) <= LIMIT


FREE = "        mbarrier.arrive(empty.index(i), count=1)\n"
STORE = "        ds_memory.index(count & 1).slice(WHICH * HALF, HALF).store(ds)\n"
DS_FENCE = "        fence_async_shared()  # the products read what was just stored\n"
ARRIVE_DS = "        mbarrier.arrive(ds_full.index(0), count=1)\n"
BUGS: dict[str, tuple[str, str]] = {
    "queries not waited for": ("        mbarrier.wait(q_full.index(i), phase)\n", ""),
    "dout not waited for": ("        mbarrier.wait(dout_full.index(i), phase)\n", ""),
    "keys and values not waited for": ("    mbarrier.wait(kv_full.index(0), 0)\n", ""),
    "buffers given back under dk and dv": (
        "        dk, dv = _await(dk, dv, 1)\n",
        FREE + "        dk, dv = _await(dk, dv, 1)\n",
    ),
    "loader: free buffers not waited for": ("        mbarrier.wait(empty.index(i), ((count // STAGES) & 1) ^ 1)\n", ""),
    "one buffer for ds": ("ds_memory.index(count & 1)", "ds_memory.index(0)"),
    "the other half of ds not waited for": ("        mbarrier.wait(ds_full.index(0), count & 1)\n", ""),
    "ds announced before it is stored": (STORE + DS_FENCE + ARRIVE_DS, ARRIVE_DS + STORE + DS_FENCE),
    "ds stored without a fence": (DS_FENCE, ""),
    "phase of ds stuck": ("mbarrier.wait(ds_full.index(0), count & 1)", "mbarrier.wait(ds_full.index(0), 0)"),
    "one arrival completes ds": ("ds_full = barriers(1, 2)", "ds_full = barriers(1, 1)"),
    "dq stored under the last addition": (
        "        tma.store_wait(0)  # the last addition",
        "        pass  # the last addition",
    ),
    "dq stored without a fence": ("        fence_async_shared()  # TMA reads", "        pass  # TMA reads"),
    "last additions not waited for": ("    tma.store_wait(0)  # shared memory must", "    pass  # shared memory must"),
    "barriers without a fence": ("    fence_async_shared()  # without it TMA", "    pass  # without it TMA"),
    "bytes of lse2 not expected": ("q_full.index(i), lse.block_type.nbytes)", "q_full.index(i), 0)"),
    "second part of s not waited for": ("s = warpgroup_mma_wait(PARTS", "s = warpgroup_mma_wait(3"),
    "dp not waited for": ("dp = warpgroup_mma_wait(PARTS, deps=[dp])", "dp = warpgroup_mma_wait(4, deps=[dp])"),
    "dq not waited for": ("warpgroup_mma_wait(0, deps=[dq])", "warpgroup_mma_wait(1, deps=[dq])"),
    "keys past the end not masked": ("    right = gl.where(key + KEYS > num_keys, 0, right)  #", "    pass  #"),
    "keys past the end visible": ("gl.where(keys < num_keys, gl.load(KEnd + clamped), 0)", "gl.load(KEnd + clamped)"),
    "edge not masked": ("(row < left) | (row >= right)", "row >= right"),
    "other edge not masked": ("(row < left) | (row >= right)", "row < left"),
    "rows from anywhere": ("first = start & -4", "first = start"),
    "heads not walked": ("gl.where(wrap, head + 1, head)", "head"),
    "columns of dq": ("column: gl.constexpr = WHICH * D0", "column: gl.constexpr = 0"),
    "halves of the keys": (
        "halves = (first, parts[1].slice(WHICH * HALF, HALF))",
        "halves = (first, parts[1].slice(0, HALF))",
    ),
    "rows written past the end": ("inside = (rows < num_rows)[:, None]", "inside = (rows >= 0)[:, None]"),
    "dk not scaled": ("dk[1] * scale", "dk[1]"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = STEEP if "keys past the end" in bug else PLANTED
    for seed in range(3):
        monkeypatch.setattr(hopper_backward, "backward_kernel", Threads(KERNEL, seed=seed, edits=[BUGS[bug]]))
        try:
            if max(case.errors()) > 1e-3:
                return
        except KernelError:
            return
    pytest.fail("the results are right")


def test_without_a_planted_bug_all_is_well() -> None:
    assert max(PLANTED.errors()) <= LIMIT
