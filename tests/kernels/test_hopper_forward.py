"""The Gluon forward on the CPU, as its host function launches it, and bugs planted in it."""

import pytest
import torch
from longtake.kernels import hopper_forward, hopper_schedule, reference
from longtake.kernels.candidates import Config
from longtake.kernels.visibility import Visibility
from torch import Tensor

from tests.kernels.closeness import error, normal, ring_step, zigzag
from tests.kernels.far import spread
from tests.kernels.gluon_machine import KernelError
from tests.kernels.gluon_threads import Threads
from tests.kernels.masks import cases, shard_visibility

KERNEL = hopper_forward.forward_kernel
CONFIG = Config("hopper_forward", rows=32, keys=32, warps=4, stages=2)
OUT, LSE = 1e-6, 1e-5  # limits
MASKS = [
    "full",
    "causal",
    "packed, not causal",
    "window both ways",
    "zigzag on another",
    "decode",
    "nothing",
    "random 1",
]


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches go to the threads of a GPU with three multiprocessors; fresh memory holds NaN."""

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(torch.Size(shape) if isinstance(shape[0], int) else shape[0], torch.nan, dtype=dtype)

    monkeypatch.setattr(hopper_forward, "forward_kernel", Threads(KERNEL))
    monkeypatch.setattr(hopper_schedule, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(torch, "empty", empty)


def tensors(visibility: Visibility, heads: int, key_heads: int, head_dim: int) -> list[Tensor]:
    rows, keys = len(visibility.start), len(visibility.kstart)
    return normal((rows, heads, head_dim), (keys, key_heads, head_dim), (keys, key_heads, head_dim))


def errors(
    visibility: Visibility, heads: int = 4, key_heads: int = 2, head_dim: int = 64, **changes: int
) -> list[float]:
    q, k, v = tensors(visibility, heads, key_heads, head_dim)
    config = Config(**(vars(CONFIG) | changes))
    got = hopper_forward.forward(q, k, v, visibility, scale=head_dim**-0.5, config=config)
    want = reference.forward(q.double(), k, v, visibility, scale=head_dim**-0.5)
    return [error(x, y) for x, y in zip(got, want, strict=True)]


def assert_small(found: list[float]) -> None:
    out, lse = found
    assert out <= OUT
    assert lse <= LSE


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str) -> None:
    assert_small(errors(cases()[mask]))


@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128, 256])
def test_head_dims_and_seven_query_heads_to_a_key_head(head_dim: int) -> None:
    assert_small(errors(cases()["packed"], 7, 1, head_dim))


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("keys", [16, 64])
def test_tiles_and_depths_of_the_ring(stages: int, keys: int) -> None:
    assert_small(errors(cases()["zigzag on itself"], stages=stages, keys=keys))


@pytest.mark.parametrize("programs", [1, 2, 5, 132])
def test_numbers_of_multiprocessors(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_schedule, "multiprocessors", lambda device: programs)
    assert_small(errors(cases()["causal"], 3, 1))


@pytest.mark.parametrize("fit", [0, 1, 2, 4])
def test_heads_at_once(fit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    visibility = cases()["causal"]
    monkeypatch.setattr(hopper_schedule, "L2_BYTES", fit * 2 * visibility.num_keys * 64 * 4)
    assert_small(errors(visibility, 10, 5))


@pytest.mark.parametrize("longest_run", [1, 3, 7])
@pytest.mark.parametrize("mask", ["causal", "nothing", "zigzag on another"])
def test_programs_that_make_room(mask: str, longest_run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hopper_forward, hopper_schedule):
        monkeypatch.setattr(module, "LONGEST_RUN", longest_run)
    monkeypatch.setattr(hopper_schedule, "multiprocessors", lambda device: 1)
    assert_small(errors(cases()[mask], 6, 3))


def test_as_many_programs_as_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    visibility = shard_visibility(4096, causal=False)
    tiles_of_128 = Config("hopper_forward", 128, 128, 4, 2)
    num_visited = 32 * 33  # key tiles of a head, and one more for each tile
    assert hopper_schedule.num_programs(visibility, tiles_of_128, 2) == 3 + 2 * num_visited // 256
    assert hopper_schedule.num_programs(visibility, Config("hopper_forward", 4096, 128, 4, 2), 2) == 2
    monkeypatch.setattr(hopper_schedule, "is_capturing", lambda device: True)
    monkeypatch.setattr(Visibility, "visited", lambda *_: pytest.fail("reads from the device"))
    assert hopper_schedule.num_programs(visibility, tiles_of_128, 2) == 3 + 2 * num_visited // 256


@pytest.mark.parametrize("seed", range(1, 6))
def test_orders_in_which_partitions_may_run(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_forward, "forward_kernel", Threads(KERNEL, seed=seed))
    assert_small(errors(cases()["causal"], 2, 1))


def test_strides() -> None:
    visibility = shard_visibility(70, causal=False, lengths=[30, 40])
    [fused] = normal((70, 8, 64))
    [heads_first] = normal((2, 70, 64), seed=1)
    q, k, v = fused[:, 2:6], fused[:, 6:], heads_first.transpose(0, 1)
    wide = torch.full((70, 6, 72), torch.nan)
    out, lse = wide[:, 1:5, :64], torch.full((6, 90), torch.nan)[1:5, 3:73]
    out.zero_()
    lse.fill_(-torch.inf)
    hopper_forward.forward(q, k, v, visibility, scale=0.125, config=CONFIG, state=(out, lse))
    want = reference.forward(q.double(), k, v, visibility, scale=0.125)
    assert_small([error(out, want[0]), error(lse, want[1])])
    assert int(wide.isnan().sum()) == wide.numel() - out.numel()


def test_a_block_folds_into_what_was_before() -> None:
    visibility = cases()["zigzag, packed"]
    q, k, v = tensors(visibility, 4, 2, 72)
    out, lse = normal((len(q), 4, 72), (4, len(q)), seed=2)
    lse[:, ::3] = -torch.inf  # rows that had seen nothing
    out[::3] = 0
    want = reference.forward(q.double(), k, v, visibility, scale=0.1, state=(out.double(), lse.double()))
    got = hopper_forward.forward(q, k, v, visibility, scale=0.1, config=CONFIG, state=(out, lse))
    assert got[0] is out
    assert got[1] is lse
    assert_small([error(out, want[0]), error(lse, want[1])])


def test_rows_that_see_nothing_keep_their_state_to_the_bit() -> None:
    lo, hi = torch.tensor([[0] * 5 + [10] * 95, [9] * 100])  # rows 0 to 4 see something
    visibility = Visibility.from_bounds(lo, hi, torch.arange(50))
    q, k, v = tensors(visibility, 4, 2, 64)
    out, lse = normal((100, 4, 64), (4, 100), seed=3)
    out[32:] = -0.0  # tiles without keys: 0.0 if they were written
    before = out.clone(), lse.clone()
    hopper_forward.forward(q, k, v, visibility, scale=0.1, config=CONFIG, state=(out, lse))
    assert torch.equal(out[5:], before[0][5:])
    assert out[32:].signbit().all()
    assert torch.equal(lse[:, 5:], before[1][:, 5:])
    assert not (out[:5] == before[0][:5]).any()


@pytest.mark.parametrize("first", [True, False])
def test_the_last_block_comes_in_the_dtype_of_q(first: bool) -> None:
    visibility = cases()["decode" if first else "zigzag, later keys hidden"]
    q, k, v = (x.half() for x in tensors(visibility, 4, 2, 80))
    out, lse = normal((len(q), 4, 80), (4, len(q)), seed=2)
    state = None if first else (out, lse)
    want = reference.forward(
        q.double(), k, v, visibility, scale=0.1, state=state and (state[0].double(), state[1].double())
    )
    before = out.clone()
    got = hopper_forward.forward(q, k, v, visibility, scale=0.1, config=CONFIG, state=state, final=True)
    assert got[0].dtype == torch.float16
    assert torch.equal(out, before)
    assert first or got[1] is lse
    assert error(got[0], want[0]) <= 2**-10  # weights and result are rounded to 11 bits
    assert error(got[1], want[1]) <= LSE


def test_a_zigzag_ring_of_four_is_one_attention() -> None:
    mask = {"window": 60, "lengths": [3, 47, 1, 89, 61]}
    q, k, v = normal((201, 4, 64), (201, 2, 64), (201, 2, 64))
    want = reference.forward(q.double(), k, v, shard_visibility(201, **mask), scale=0.125)  # pyright: ignore[reportArgumentType]
    shards = zigzag(201, 4)
    for rank, rows in enumerate(shards):
        state = None
        for step in range(4):
            keys, visibility = ring_step(shards, rank, step, **mask)
            state = hopper_forward.forward(
                q[rows], k[keys], v[keys], visibility, scale=0.125, config=CONFIG, state=state, final=step == 3
            )
        assert state is not None
        assert_small([error(state[0], want[0][rows]), error(state[1], want[1][:, rows])])


def test_offsets_beyond_32_bits() -> None:
    visibility = shard_visibility(40)
    q, k, v = tensors(visibility, 3, 1, 64)
    out = spread(torch.zeros_like(q), 64, 2**30)  # two heads are 2^31 numbers apart
    lse = torch.full((3, 40), -torch.inf)
    hopper_forward.forward(q, k, v, visibility, scale=0.1, config=CONFIG, state=(out, lse))
    want = reference.forward(q.double(), k, v, visibility, scale=0.1)
    assert_small([error(out, want[0]), error(lse, want[1])])


ARRIVE_K = "mbarrier.arrive(k_empty.index(i), count=1)"
FIRST = "scores = warpgroup_mma_wait(0, deps=[products(q, tile(k_memory, i), nothing)])"
WAIT_Q = "            mbarrier.wait(q_empty.index(half), (turn & 1) ^ 1)\n"
TELL = "            tell(told, half, row + half * HALF, head, first, num_tiles)\n"
COPY_Q = "            copy(q, head, row + half * HALF, q_memory, half, q_full.index(half), 0)\n"
BUGS = {
    "scores: keys not waited for": ("            mbarrier.wait(k_full.index(i), ((count + j) // STAGES) & 1)\n", ""),
    "first scores: keys not waited for": ("        mbarrier.wait(k_full.index(i), (count // STAGES) & 1)\n", ""),
    "queries not waited for": ("        mbarrier.wait(q_full.index(WHICH), turn & 1)\n", ""),
    "first queries not waited for": ("    mbarrier.wait(q_full.index(WHICH), 0)\n", ""),
    "values not waited for": ("            mbarrier.wait(v_full.index(before), before_phase)\n", ""),
    "last values not waited for": ("        mbarrier.wait(v_full.index(i), ((count - 1) // STAGES) & 1)\n", ""),
    "keys given back under their products": (
        f"{FIRST}\n        {ARRIVE_K}",
        f"scores = products(q, tile(k_memory, i), nothing)\n        {ARRIVE_K}\n"
        "        scores = warpgroup_mma_wait(0, deps=[scores])",
    ),
    "values given back under their products": (
        "            acc = await_parts(acc, 0)\n            mbarrier.arrive(v_empty.index(before), count=1)\n",
        "            mbarrier.arrive(v_empty.index(before), count=1)\n            acc = await_parts(acc, 0)\n",
    ),
    "last values given back under their products": (
        "        acc = await_parts(acc, 0)\n        mbarrier.arrive(v_empty.index(i), count=1)\n",
        "        mbarrier.arrive(v_empty.index(i), count=1)\n        acc = await_parts(acc, 0)\n",
    ),
    "queries given back too early": (
        "        for j in range(1, num_tiles):\n            b",
        "        mbarrier.arrive(q_empty.index(WHICH), count=1)\n        for j in range(1, num_tiles):\n            b",
    ),
    "loader: free keys not waited for": ("            mbarrier.wait(k_empty.index(i), phase ^ 1)\n", ""),
    "loader: free values not waited for": ("            mbarrier.wait(v_empty.index(i), phase ^ 1)\n", ""),
    "loader: free queries not waited for": (WAIT_Q, ""),
    "loader: wrong phase": ("(turn & 1) ^ 1", "turn & 1"),
    "phase of the ring stuck": ("((count + j) // STAGES) & 1", "0"),
    "phase of the queries stuck": (
        "mbarrier.wait(q_full.index(WHICH), turn & 1)",
        "mbarrier.wait(q_full.index(WHICH), 0)",
    ),
    "one arrival frees keys": (
        "barriers(STAGES, 2),\n        barriers(STAGES, 1),",
        "barriers(STAGES, 1),\n        barriers(STAGES, 1),",
    ),
    "bytes of the second part not expected": ("(descs[1].block_type.nbytes if len(memory) > 1 else 0)", "0"),
    "second part of the scores not waited for": (
        "warpgroup_mma_wait(PARTS, deps=[scores])",
        "warpgroup_mma_wait(3, deps=[scores])",
    ),
    "second part of the outputs not waited for": (
        "acc = await_parts(acc, 0)\n            mb",
        "acc = await_parts(acc, 1)\n            mb",
    ),
    "barriers without a fence": ("    fence_async_shared()", "    pass"),
    "both warpgroups wait for their turn": ("((count - turn + j) & 1) ^ (1 - WHICH)", "((count - turn + j) & 1) ^ 1"),
    "turn not handed over": ("            mbarrier.arrive(order.index(1 - WHICH), count=1)\n", ""),
    "left edge not masked": ("(j < left) | (j >= right)", "j >= right"),
    "right edge not masked": ("(j < left) | (j >= right)", "j < left"),
    "first tile not masked": ("(left > 0) | (right <= 0)", "left > 0"),
    "rows past the end": ("rows = gl.minimum(rows, num_rows - 1)", "rows = rows"),
    "rows past the end written": ("inside = (rows < num_rows)[:, None]", "inside = (rows >= 0)[:, None]"),
    "columns past the end written": ("inside = inside & (columns < D)[None, :]", "inside = inside"),
    "a tile too many": ("while ticket < num_tickets", "while ticket <= num_tickets"),
    "a tile too few": ("while ticket < num_tickets", "while ticket < num_tickets - 1"),
    "a tile told while the one before may be read": (WAIT_Q + TELL, TELL + WAIT_Q),
    "a tile told too late": (TELL + COPY_Q, COPY_Q + TELL),
    "the end not told": ("        mbarrier.arrive(q_full.index(half), count=1)\n", ""),
    "the last heads counted as all others": ("gl.minimum(at_once, num_heads - first_head)", "at_once"),
    "one key head for all": ("head // GROUP", "head * 0"),
    "output not rescaled": ("acc = scaled_parts(acc, decay, D)", "pass"),
}


def planted_errors() -> list[float]:
    """Of a call that has every edge there is, 24 tiles for 3 programs, two key heads before the third."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper_schedule, "L2_BYTES", 2 * 2 * 120 * 72 * 4)
        return errors(shard_visibility(120, window=70), 6, 3, head_dim=72, keys=16)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        monkeypatch.setattr(hopper_forward, "forward_kernel", Threads(KERNEL, seed=seed, edits=[BUGS[bug]]))
        try:
            if max(planted_errors()) > 1e-3:
                return
        except KernelError:
            return
    pytest.fail("the results are right")


def test_without_a_planted_bug_all_is_well() -> None:
    assert_small(planted_errors())
