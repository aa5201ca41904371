"""The order in which the ring starts transfers, runs kernels and waits: a transfer flies while a kernel works."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from longtake.comm.layout import zigzag
from longtake.comm.mesh import Grid
from longtake.model import ring
from longtake.model.attention_plan import Route
from longtake.model.sequence_parallel import parallel_attention
from torch import Tensor


class Diary(Grid):
    """Rank 1 of a ring of three and its own transport, which fills buffers with zeros and writes down what it does."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__(1, ring=3)
        self.transport, self.entries = self, []

    def exchange(self, axis: str, *, send: Sequence[Tensor], recv: Sequence[Tensor], **peers: Any) -> "Note":
        for buffer in recv:
            buffer.zero_()
        what = "k, v" if not self.entries or recv[0].dtype == torch.float16 else "dk, dv"
        self.entries.append(f"start {what}")
        return Note(self, f"wait {what}")


class Note:
    def __init__(self, diary: Diary, text: str) -> None:
        self.diary, self.text = diary, text

    def wait(self) -> None:
        self.diary.entries.append(self.text)


def diary_of(route: Route, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """Of the forward and of the backward pass."""
    mesh, layout = Diary(), zigzag(96, ring=3)
    for name in ("block_forward", "block_backward"):
        kernel = getattr(ring, name)

        def noted(*args: Any, kernel: Any = kernel, **options: Any) -> Any:
            if len(args[0]):  # not where the backend is asked whether it takes such tensors
                mesh.entries.append("kernel")
            return kernel(*args, **options)

        monkeypatch.setattr(ring, name, noted)
    q, k, v = (torch.randn(32, 2, 8, dtype=torch.float16, requires_grad=True) for _ in range(3))
    out = parallel_attention(q, k, v, mesh=mesh, layout=layout, causal=True, route=route, backend="reference")  # pyright: ignore[reportArgumentType]
    forward = mesh.entries.copy()
    out.sum().backward()
    return forward, mesh.entries[len(forward) :]


FORWARD = ["start k, v", "kernel", "wait k, v", "start k, v", "kernel", "wait k, v", "kernel"]


def test_the_next_block_flies_while_the_kernel_works_and_gradients_fly_home_during_the_next_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward, backward = diary_of("direct", monkeypatch)
    assert forward == FORWARD
    own, first, second = backward[:3], backward[3:7], backward[7:]
    assert own == ["start k, v", "kernel", "wait k, v"]
    assert first == ["start k, v", "kernel", "start dk, dv", "wait k, v"]
    assert second == ["kernel", "wait dk, dv", "start dk, dv", "wait dk, dv"]


def test_in_a_relay_the_gradients_travel_on_while_the_next_kernel_works(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = diary_of("relay", monkeypatch)
    assert forward == FORWARD
    assert backward[:4] == ["start k, v", "kernel", "start dk, dv", "wait k, v"]
    assert backward[4:9] == ["start k, v", "kernel", "wait dk, dv", "start dk, dv", "wait k, v"]
    assert backward[9:] == ["kernel", "wait dk, dv", "start dk, dv", "wait dk, dv"]
