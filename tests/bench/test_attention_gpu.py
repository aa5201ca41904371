"""Timing of a shape, on a CPU, by a fake clock: who takes part, that answers agree, what becomes of failures."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from longtake.bench import attention_gpu, attention_peers
from longtake.bench.attention_gpu import Bench, Group, Ready, call_once, choices_of, measure, profile, row_error
from longtake.bench.attention_peers import Contender, Inputs, NotServedError, contenders, flex_mask, random_inputs
from longtake.bench.attention_shapes import (
    DIRECTIONS,
    Shape,
    all_shapes,
    grouped,
    packed,
    plain,
    ring_step,
    tiny,
    visibility,
)
from longtake.bench.clock import Call, Timing
from longtake.kernels.attention import attention
from longtake.kernels.backend import block_backward, block_forward
from longtake.kernels.table import entries_for
from torch import Tensor
from torch.nn.attention import varlen

from tests.kernels.masks import dense

CPU = torch.device("cpu")
SHAPES = {
    "full": plain(72, "full", 4096),
    "causal": plain(64, "causal", 4096, flex=True),
    "grouped": grouped(12, 2, "causal", 8192, flex=True),
    "packed": packed("packed", [3, 9, 1, 20], 64, 4, 2, "packed"),
    "packed, full": packed("packed", [3, 9, 1, 20], 64, 2, 2, "packed-full"),
    "ring, late queries": ring_step("ring", (2, 5)),
    "ring, early keys": ring_step("ring", (5, 2)),
    "ring, itself": ring_step("ring", (3, 3)),
    "ring, carried": ring_step("ring", (2, 5), carried=True),
}


def canary() -> None:
    pass


def one_two_three(calls: Sequence[Call]) -> list[Timing]:
    """A fake clock: a millisecond for the first call, two for the second, and so on."""
    for call in calls:
        call()
    return [Timing(float(i), 0.9 * i, 1.1 * i, 3) for i in range(1, len(calls) + 1)]


BENCH = Bench(CPU, torch.float32, one_two_three, canary, 1e9)


@pytest.fixture
def cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is the CPU's backend, which is fast."""
    monkeypatch.setattr(attention_peers, "BACKENDS", ("cpu",))
    monkeypatch.setattr(attention_gpu, "choices_of", lambda *args: [])


def groups_of(shape: Shape, bench: Bench = BENCH) -> list[Group]:
    return [measure(tiny(shape), direction, bench) for direction in DIRECTIONS]


@pytest.mark.parametrize("name", SHAPES)
def test_all_answers_agree(name: str, cpu_backend: None) -> None:
    for group in groups_of(SHAPES[name]):
        rows = {row.contender: row for row in group.rows}
        assert not any(row.wrong for row in group.rows)
        assert rows["cpu"].timing is not None
        if not SHAPES[name].documents:
            assert rows["SDPA flash"].timing is not None and rows["SDPA cuDNN"].timing is not None
        if name.startswith("ring"):
            assert rows["cpu, plain call"].timing is not None and rows["cpu"].over_plain == 0.5


@pytest.mark.parametrize("name", ["causal", "grouped", "packed", "packed, full"])
def test_flex_attention_computes_the_same(name: str, cpu_backend: None) -> None:
    shape = tiny(SHAPES[name])
    inputs = random_inputs(shape, torch.float32, CPU)
    answers = {
        one.name: one.make(shape, inputs, "forward")()[0] for one in contenders(shape, CPU) if one.kind != "peer"
    }
    flex = next(one for one in contenders(shape, CPU) if one.name == "FlexAttention")
    torch.testing.assert_close(flex.make(shape, inputs, "forward")()[0], answers["cpu"])


@pytest.mark.parametrize("name", ["causal", "packed", "packed, full"])
def test_the_mask_of_flex_attention_is_ours(name: str) -> None:
    shape = tiny(SHAPES[name])
    rule = flex_mask(shape, CPU)
    assert rule is not None
    query, key = torch.arange(shape.queries)[:, None], torch.arange(shape.keys)[None]
    assert torch.equal(rule(query, query, query, key), dense(visibility(shape, CPU)))
    assert flex_mask(tiny(SHAPES["full"]), CPU) is None


@pytest.mark.parametrize("name", ["causal", "grouped", "packed"])
def test_flash_attention_takes_part_where_it_is_installed(
    name: str, cpu_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def varlen(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, None]:
        assert options["max_seqlen_q"] == options["max_seqlen_k"] == max(tiny(SHAPES[name]).documents)
        assert options["cu_seqlens_q"] is options["cu_seqlens_k"]
        cu_seqlens = options["cu_seqlens_q"]
        assert isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype == torch.int32
        return attention(q, k, v, causal=bool(options["causal"]), cu_seqlens=cu_seqlens), None

    package = ModuleType("flash_attn_interface")
    package.__spec__ = ModuleSpec("flash_attn_interface", None)
    package.flash_attn_func = lambda q, k, v, causal: attention(q, k, v, causal=causal)  # type: ignore[attr-defined]
    package.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    assert "FlashAttention-3" not in [one.name for one in contenders(SHAPES[name], CPU)]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    for group in groups_of(SHAPES[name]):
        row = next(row for row in group.rows if row.contender == "FlashAttention-3")
        assert row.timing is not None
        assert row.note == ""


def test_a_wrong_answer_is_named_and_not_timed(cpu_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        out = attention(q, k, v, causal=True)
        return torch.cat([out[:, :-1], 2 * out[:, -1:]], 1)  # one row in 48

    monkeypatch.setattr(attention_peers, "attention", off)
    for group in groups_of(SHAPES["causal"]):
        ours = group.rows[0]
        assert (ours.contender, ours.wrong, ours.timing) == ("cpu", True, None)
        assert ours.note.startswith("rows differ by up to ") and ours.note.endswith(" from SDPA flash")
        assert group.rows[1].timing is not None


def test_an_error_of_ours_is_wrong_and_one_of_a_peer_is_a_note(
    cpu_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise RuntimeError("No available kernel. Aborting execution.\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(attention_peers.F, "scaled_dot_product_attention", fails)
        rows = {row.contender: row for row in groups_of(SHAPES["full"])[0].rows}
    assert rows["SDPA flash"].note == "RuntimeError: No available kernel. Aborting execution."
    assert not rows["SDPA flash"].wrong and rows["cpu"].timing is not None and rows["cpu"].over_peer is None
    monkeypatch.setattr(attention_peers, "attention", fails)
    rows = {row.contender: row for row in groups_of(SHAPES["full"])[0].rows}
    assert rows["cpu"].wrong and rows["cpu"].timing is None and rows["SDPA flash"].timing is not None


def test_kernels_that_were_found_wrong_are_left_out() -> None:
    shape = tiny(SHAPES["full"])
    wrong = {
        (entry.direction, entry.head_dim, entry.dtype, entry.config)
        for entry in entries_for(CPU)
        if entry.direction == "forward"
    }
    for group in groups_of(shape, replace(BENCH, wrong=wrong)):  # the backward follows the forward
        assert group.rows[0].contender == "triton"
        assert group.rows[0].note.startswith("left out: flash_forward ")
        assert not group.rows[0].wrong


def test_what_a_backend_launches() -> None:
    shape = tiny(SHAPES["full"])
    inputs = random_inputs(shape, torch.float32, CPU)
    names = [choice.config.kernel for choice in choices_of("triton", shape, inputs, "backward")]
    assert names == ["flash_forward", "flash_dkdv", "flash_dq"]
    with pytest.raises(NotServedError, match="no gluon kernel for head_dim 72"):
        choices_of("gluon", shape, inputs, "forward")


def test_ratios(cpu_backend: None) -> None:
    group = groups_of(SHAPES["ring, late queries"])[0]
    ours, plain_call, flash, cudnn = group.rows
    assert [row.contender for row in group.rows] == ["cpu", "cpu, plain call", "SDPA flash", "SDPA cuDNN"]
    operations = 4 * 128 * 24 * 48  # a head, half of 48 queries, 48 keys
    assert ours.tflops == pytest.approx(operations / 1e-3 / 1e12)
    assert group.cublas_tflops == pytest.approx(1e9 / 5e-3 / 1e12)
    assert ours.of_cublas == pytest.approx(operations / 1e-3 / (1e9 / 5e-3))
    assert [row.over_peer for row in group.rows] == [3.0, 1.5, 1.0, 0.75]
    assert [row.over_plain for row in group.rows] == [0.5, None, None, None]
    assert (plain_call.kind, flash.kind, cudnn.kind) == ("plain call", "peer", "peer")


def test_one_that_is_left_out_is_not_called_and_counts_as_wrong(
    cpu_backend: None, capsys: pytest.CaptureFixture[str]
) -> None:
    group = measure(tiny(SHAPES["full"]), "forward", BENCH, {"cpu": "no answer in 40 s"})
    assert (group.rows[0].contender, group.rows[0].note, group.rows[0].wrong) == ("cpu", "no answer in 40 s", True)
    assert group.rows[1].timing is not None
    called = [line for line in capsys.readouterr().err.splitlines() if line.startswith("calling")]
    assert called == ["calling SDPA flash on d72-full-4k-forward", "calling SDPA cuDNN on d72-full-4k-forward"]


def test_a_fault_is_that_of_the_one_that_was_called(cpu_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def synchronize() -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "get_device_module", lambda device: Broken)
    message = "^cpu: RuntimeError: CUDA error: an illegal memory access"
    with pytest.raises(RuntimeError, match=message):
        measure(tiny(SHAPES["full"]), "backward", BENCH)
    with pytest.raises(RuntimeError, match=message):
        call_once((tiny(SHAPES["full"]), "forward", "cpu"), device=CPU, dtype=torch.float32, wrong=())


def varlen_of_2_11(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: Any = None,
    window_size: Any = (-1, -1),
) -> None:
    pass


def test_packed_documents_have_a_peer_in_each_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = tiny(SHAPES["packed"])
    assert shape.heads != shape.kv_heads
    flash = next(one for one in contenders(shape, CPU) if one.name == "SDPA flash")
    inputs = random_inputs(shape, torch.float32, CPU)
    with pytest.raises(NotServedError, match="for a CPU"):
        flash.make(shape, inputs, "forward")
    monkeypatch.setattr(varlen, "varlen_attn", varlen_of_2_11)
    with pytest.raises(NotServedError, match="for a CPU"):
        flash.make(shape, inputs, "forward")
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value: None)
    with pytest.raises(TypeError, match="too many positional arguments"):
        flash.make(shape, inputs, "forward")


def test_a_row_that_is_off_is_seen_among_many() -> None:
    expected = torch.randn(4000, 2, 64)
    expected[-1] *= 0.01  # such a row would drown in the largest value
    found = expected.clone()
    assert row_error(found, expected) == 0.0
    found[17] *= 1.05
    assert row_error(found, expected) == pytest.approx(0.05, rel=0.3)
    found[3, 0, 0] = torch.nan
    assert row_error(found, expected) == float("inf")


def test_agreement_of_ours_among_themselves() -> None:
    def ready(name: str, answer: Tensor) -> Ready:
        def make(shape: Shape, inputs: Inputs, direction: str) -> None:
            raise AssertionError

        return Ready(Contender(name, "ours", make), canary, (answer,))

    right = torch.randn(10, 2, 8)
    strays = attention_gpu.disagreeing([ready("a", right), ready("b", right + 1), ready("c", right)], "forward")
    assert list(strays) == ["b"] and strays["b"].wrong


@pytest.mark.parametrize("name", ["full", "ring, itself"])
def test_gluon_alone_may_sum_in_an_order_of_chance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, bool] = {}

    def on_cpu(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, backend: str, deterministic: bool = True, **options: Any) -> Any:
            asked[backend] = asked.get(backend, True) and deterministic
            return call(*args, backend="cpu", deterministic=deterministic, **options)

        return run

    monkeypatch.setattr(attention_peers, "attention", on_cpu(attention))
    monkeypatch.setattr(attention_peers, "block_backward", on_cpu(block_backward))
    monkeypatch.setattr(attention_peers, "block_forward", block_forward_on_cpu)
    monkeypatch.setattr(attention_gpu, "choices_of", lambda *args: [])
    for group in groups_of(SHAPES[name]):
        assert not any(row.wrong for row in group.rows)
    assert asked == {"triton": True, "gluon": False}


def block_forward_on_cpu(*args: Any, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    return block_forward(*args, backend="cpu", **options)


def test_profiles_one_contender(cpu_backend: None, capsys: pytest.CaptureFixture[str]) -> None:
    shape = tiny(SHAPES["full"])
    profile("cpu", shape, "forward", BENCH)
    assert "5 calls of cpu" in capsys.readouterr().out
    with pytest.raises(ValueError, match="unknown contender 'x': one of cpu, SDPA flash"):
        profile("x", shape, "forward", BENCH)
    with pytest.raises(ValueError, match="SDPA cuDNN on packed-backward: not run here"):
        profile("SDPA cuDNN", tiny(SHAPES["packed"]), "backward", BENCH)


def test_every_shape_can_be_measured(cpu_backend: None) -> None:
    for shape in all_shapes():
        for group in groups_of(shape):
            assert not any(row.wrong for row in group.rows), group.name
            assert group.rows[0].timing is not None, group.rows[0].note
