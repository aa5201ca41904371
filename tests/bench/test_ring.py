"""The ring benchmark: what it counts is checked against formulas; what it times is only there."""

import json
from typing import Any

import pytest
import torch
from longtake.bench.peer import peer_limit
from longtake.bench.ring import format_row, grids, main, sequences
from longtake.comm.layout import contiguous

TOKENS, KV_HEADS, HEAD_DIM, WORLD = 256, 2, 16, 4
ARGUMENTS = f"--tokens {TOKENS} --heads 4 --kv-heads {KV_HEADS} --head-dim {HEAD_DIM} --world {WORLD} --repeats 1"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Rows of ours by sequence, ring degree and route."""
    file = tmp_path_factory.mktemp("bench") / "ring.json"
    main([*ARGUMENTS.split(), "--json", str(file)])
    table = json.loads(file.read_text())["rows"]
    return {(row["sequence"], row["ring"], row["route"]): row for row in table if row["route"] != "peer"}


def test_every_grid_route_and_sequence_has_a_row(rows: dict) -> None:
    expected = {(ring, route) for ring in (4, 2) for route in ("direct", "relay")} | {(1, "direct")}
    assert set(rows) == {(sequence, *case) for sequence in ("causal", "packed") for case in expected}
    for row in rows.values():
        assert row["ring"] * row["ulysses"] == WORLD
        assert row["forward_ms"] > 0 and row["backward_ms"] > 0
        assert len(row["bytes_sent"]) == len(row["work"]) == WORLD


def test_direct_is_the_measure_of_time(rows: dict) -> None:
    assert {row["time"] for row in rows.values() if row["route"] == "direct"} == {1.0}


@pytest.mark.parametrize("sequence", ["causal", "packed"])
def test_a_relay_sends_whole_shards(rows: dict, sequence: str) -> None:
    """Keys and values travel R - 1 hops in the forward and again in the backward, their gradients R hops."""
    rank_bytes = TOKENS // WORLD * 2 * KV_HEADS * HEAD_DIM * 4
    assert rows[sequence, 4, "relay"]["bytes_sent"] == [(3 + 3 + 4) * rank_bytes] * WORLD


def test_ulysses_sends_each_other_rank_its_heads(rows: dict) -> None:
    """q, out, dq and dout: a head for each of 4 ranks; k, v, dk and dv: each of the 2 heads goes to 2 ranks."""
    others, num_tensors = WORLD - 1, 8
    row = rows["causal", 1, "direct"]
    assert row["bytes_sent"] == [others * TOKENS // WORLD * num_tensors * HEAD_DIM * 4] * WORLD


@pytest.mark.parametrize("ring", [4, 2])
@pytest.mark.parametrize("sequence", ["causal", "packed"])
def test_direct_sends_less_than_a_relay(rows: dict, sequence: str, ring: int) -> None:
    direct, relay = (sum(rows[sequence, ring, route]["bytes_sent"]) for route in ("direct", "relay"))
    assert direct < relay


@pytest.mark.parametrize("ring", [4, 2, 1])
def test_the_zigzag_ring_is_even(rows: dict, ring: int) -> None:
    work = rows["causal", ring, "direct"]["work"]
    assert max(work) <= 1.1 * min(work)
    assert sum(work) == 4 * TOKENS * (TOKENS + 1) // 2  # heads x the causal triangle: each pair once


@pytest.mark.parametrize("ring", [4, 2])
@pytest.mark.parametrize("sequence", ["causal", "packed"])
def test_the_route_does_not_change_the_work(rows: dict, sequence: str, ring: int) -> None:
    assert rows[sequence, ring, "direct"]["work"] == rows[sequence, ring, "relay"]["work"]


def test_grids_go_from_ring_to_ulysses() -> None:
    assert grids(6) == [(6, 1), (3, 2), (2, 3), (1, 6)]


@pytest.mark.parametrize("num_tokens", [1, 7, 1000])
def test_sequences_are_whole(num_tokens: int) -> None:
    for cu_seqlens in sequences(num_tokens).values():
        assert (cu_seqlens[0], cu_seqlens[-1]) == (0, num_tokens)
        assert torch.all(cu_seqlens.diff() > 0)


def test_a_case_that_the_peer_cannot_do_says_why() -> None:
    assert peer_limit(contiguous(256, ring=2, ulysses=2), num_kv_heads=2) is None
    assert peer_limit(contiguous(256, ulysses=4), num_kv_heads=2) == "needs kv heads that 4 divides"
    assert peer_limit(contiguous(255, ring=4), num_kv_heads=2) == "needs shards of one length"
    row = {"sequence": "causal", "ring": 1, "ulysses": 4, "route": "peer", "note": "needs this"}
    assert format_row(row).split() == ["causal", "1x4", "peer", *["-"] * 6, "needs", "this"]


def test_a_setting_that_cannot_be_is_refused_before_any_rank_starts() -> None:
    with pytest.raises(ValueError, match="num_tokens must be at least 1, got 0"):
        main(["--tokens", "0"])
