"""The virtual ring: its arithmetic on hand-made times, its blocks against the attention that they make up."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from longtake.bench.clock import fake_stopwatch
from longtake.bench.layout import measure as measure_layout
from longtake.bench.ring import sequences
from longtake.bench.ring_virtual import (
    HEADER,
    Setting,
    balance,
    flight_ms,
    flights,
    format_blocks,
    format_row,
    forward,
    main,
    make_plan,
    measure,
    project,
    rank_tensors,
    summary,
    virtual_mesh,
    whole_tensors,
)
from longtake.comm.layout import Layout
from longtake.kernels.attention import attention
from longtake.model.batch import LAYOUTS
from longtake.model.traffic import AttentionShape, planned_traffic

CPU = torch.device("cpu")
TINY = {"num_tokens": 640, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "dtype": "float32"}


def make_layout(setting: Setting, name: str, cu_seqlens: torch.Tensor) -> Layout:
    return LAYOUTS[name](cu_seqlens, virtual_mesh(setting, 0, CPU))


def test_projection_on_times_made_by_hand() -> None:
    """Two ranks, two steps: each step waits for its slowest rank, and what flies last flies alone."""
    compute = np.array([[5.0, 1.0, 0.0], [2.0, 4.0, 0.0]])
    flying = np.array([[3.0, 2.0, 1.0], [6.0, 0.0, 0.5]])
    assert project(compute, flying, hidden=True) == 6 + 4 + 1
    assert project(compute, flying, hidden=False) == 8 + 4 + 1


def test_balance_is_largest_over_mean() -> None:
    assert balance(np.array([1.0, 2.0, 6.0])) == 2.0
    assert balance(np.zeros(3)) == 1.0


def test_a_layer_is_a_forward_and_a_backward() -> None:
    areas, forward_ms, backward_ms = np.array([[3, 1], [4, 0]]), [[1.0, 2.0], [3.0, 0.0]], [[2.0, 5.0], [6.0, 1.0]]
    flying = np.array([[[2.0, 0, 0], [1.0, 0, 0]], [[4.0, 0, 8.0], [0, 3.0, 0]]])
    row = summary(areas, np.array([forward_ms, backward_ms]), flying)
    assert (row["area_balance"], row["time_balance"], row["even_ms"]) == (1.0, 1.0, 10.0)
    assert row["hidden_ms"] == (3 + 2) + (6 + 5 + 8)
    assert row["in_turn_ms"] == (4 + 2) + (6 + 5 + 8)
    assert (row["forward_ms"], row["backward_ms"], row["area"]) == (forward_ms, backward_ms, areas.tolist())


@pytest.mark.parametrize("route", ["direct", "relay"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("sequence", ["causal", "packed"])
def test_what_flies_is_what_the_plan_sends(sequence: str, name: str, route: str) -> None:
    setting = Setting(ring=4, ulysses=1, route=route, **TINY)
    cu_seqlens = sequences(setting.num_tokens)[sequence]
    layout = make_layout(setting, name, cu_seqlens)
    shape = AttentionShape(setting.num_heads, setting.num_kv_heads, setting.head_dim, element_size=2)
    row, totals = 2 * setting.num_kv_heads * setting.head_dim, np.zeros((2, 2))
    for ring_rank in range(setting.ring):
        plan = make_plan(setting, layout, cu_seqlens, ring_rank, CPU)
        keys, gradients = flights(plan)
        traffic = planned_traffic(plan, shape)
        assert keys[:, 0].sum() * row * 2 == traffic.forward["ring"]
        assert (keys[:, 0].sum() * 2 + gradients[:, 0].sum() * 4) * row == traffic.backward["ring"]
        totals += keys.sum(axis=0), gradients.sum(axis=0)
        assert not keys[setting.ring - 1 :].any() and not gradients[0].any()
    assert np.array_equal(totals[:, 0], totals[:, 1])  # what is sent is received


def test_flights_in_milliseconds() -> None:
    """Two halves of a causal sequence: rank 0 lends its 320 rows of k and v, rank 1 returns their gradients."""
    setting = Setting(ring=2, ulysses=1, **TINY)
    cu_seqlens = torch.tensor([0, setting.num_tokens])
    layout = make_layout(setting, "contiguous", cu_seqlens)
    k = torch.empty(setting.num_tokens, 2, 16, dtype=torch.bfloat16)
    keys, gradients = 320 * 2 * 2 * 16 * 2 / 1e6, 320 * 2 * 2 * 16 * 4 / 1e6  # ms at 10^9 bytes a second
    for ring_rank in range(2):  # whether it sends or receives
        passes = flight_ms(make_plan(setting, layout, cu_seqlens, ring_rank, CPU), k, link_gbs=1.0)
        assert [each.tolist() for each in passes] == [[keys, 0, 0], [keys, 0, gradients]]


@pytest.mark.parametrize("route", ["direct", "relay"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("sequence", ["causal", "packed"])
def test_the_blocks_make_up_the_attention(sequence: str, name: str, route: str) -> None:
    setting = Setting(ring=3, ulysses=2, route=route, **TINY)
    cu_seqlens = sequences(setting.num_tokens)[sequence]
    layout = make_layout(setting, name, cu_seqlens)
    q, k, v, dout = whole_tensors(setting, CPU)
    assert q.shape == dout.shape == (640, 2, 16) and k.shape == v.shape == (640, 1, 16)  # of 2 Ulysses ranks
    expected = attention(q, k, v, causal=True, cu_seqlens=cu_seqlens)
    for ring_rank in range(setting.ring):
        plan = make_plan(setting, layout, cu_seqlens, ring_rank, CPU)
        mine, _, blocks = rank_tensors(plan, layout, (q, k, v, dout))
        torch.testing.assert_close(forward(mine, blocks)[0], expected[layout.ring_part(ring_rank)])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("sequence", ["causal", "packed"])
def test_the_balance_of_areas_is_that_of_bench_layout(sequence: str, name: str) -> None:
    setting = Setting(ring=4, ulysses=1, **TINY)
    cu_seqlens = sequences(setting.num_tokens)[sequence]
    layout = make_layout(setting, name, cu_seqlens)
    row = measure(setting, layout, cu_seqlens, whole_tensors(setting, CPU), fake_stopwatch)
    assert row["area_balance"] == pytest.approx(measure_layout(layout, cu_seqlens)[0])
    assert row["time_balance"] == 1.0  # every call took a millisecond
    assert np.shape(row["forward_ms"]) == np.shape(row["backward_ms"]) == np.shape(row["area"]) == (4, 4)


def test_heads_that_do_not_divide_are_those_of_the_busiest_rank() -> None:
    setting = Setting(ring=1, ulysses=2, **TINY | {"num_heads": 6, "num_kv_heads": 3})
    assert [x.shape[1] for x in whole_tensors(setting, CPU)] == [3, 3, 3, 3]  # 2 key heads, one for each query head
    setting = Setting(ring=1, ulysses=4, **TINY | {"num_heads": 6, "num_kv_heads": 3})
    assert [x.shape[1] for x in whole_tensors(setting, CPU)] == [2, 2, 2, 2]  # 1, 2, 1, 2 query heads: the second rank


def test_table_and_json_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--virtual 2x1 --tokens 256 --heads 2 --kv-heads 1 --head-dim 16 --seconds 0 --blocks"
    main([*arguments.split(), "--layouts", "zigzag,balanced", "--json", str(tmp_path / "virtual.json")])
    rows = json.loads((tmp_path / "virtual.json").read_text())["rows"]
    assert [(row["sequence"], row["layout"]) for row in rows] == [
        (sequence, layout) for sequence in ("causal", "packed") for layout in ("zigzag", "balanced")
    ]
    printed = [line for row in rows for line in (format_row(row), *format_blocks(row))]
    assert capsys.readouterr().out.splitlines() == [HEADER, *printed]
    for row in rows:
        assert row["even_ms"] <= row["hidden_ms"] <= row["in_turn_ms"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--virtual 8", "--virtual must be a grid like 8x1 (ring x Ulysses), got '8'"),
        ("--virtual 0x1", "ring must be at least 1, got 0"),
        ("--virtual 2x1 --layouts zigzag,spiral", "layouts must be of contiguous, zigzag, balanced, got 'spiral'"),
        ("--virtual 2x1 --link-gbs 0", "link_gbs must be more than 0, got 0.0"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        main(arguments.split())
