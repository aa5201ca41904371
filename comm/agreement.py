"""The debug mode of a transport: before each transfer all ranks along the axis compare what they are about to do.

A mismatch is an error on all of them, with both sides' sizes, before any of them enters the transfer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .transport import Handle, Transport

Gather = Callable[[Any, Any], list[Any]]  # (object, axis) -> every rank's, in axis order
Sizes = list[tuple[str, int]]  # dtype and number of elements of each tensor


@dataclass(frozen=True)
class Intent:
    """What a rank is about to do. sends, receives: by the peer's index along the axis."""

    call: str
    sends: dict[int, Sizes]
    receives: dict[int, Sizes]


class AgreedTransport:
    """A transport that asks first. Raises ValueError on all ranks along the axis where two do not agree."""

    def __init__(self, transport: Transport, rank: int, axes: Mapping[str, list[int]], gather: Gather) -> None:
        self.transport, self.rank, self.axes, self.gather = transport, rank, axes, gather
        self.bytes_sent = transport.bytes_sent
        self.num_calls = dict.fromkeys(axes, 0)

    def all_to_all(self, axis: str, send: Sequence[Sequence[Tensor]], recv: Sequence[Sequence[Tensor]]) -> None:
        self._agree(axis, Intent("all_to_all", *({p: sizes(x) for p, x in enumerate(xs)} for xs in (send, recv))))
        self.transport.all_to_all(axis, send, recv)

    def exchange(
        self,
        axis: str,
        *,
        send_to: int | None,
        send: Sequence[Tensor],
        recv_from: int | None,
        recv: Sequence[Tensor],
    ) -> Handle:
        sends = {} if send_to is None else {send_to: sizes(send)}
        receives = {} if recv_from is None else {recv_from: sizes(recv)}
        self._agree(axis, Intent("exchange", sends, receives))
        return self.transport.exchange(axis, send_to=send_to, send=send, recv_from=recv_from, recv=recv)

    def _agree(self, axis: str, intent: Intent) -> None:
        number, self.num_calls[axis] = self.num_calls[axis], self.num_calls[axis] + 1
        if (problem := disagreement(self.gather(intent, axis), self.axes[axis])) is not None:
            raise ValueError(f"axis {axis}, transfer {number}: {problem}")


def sizes(tensors: Sequence[Tensor]) -> Sizes:
    """What travels of these tensors: an empty one does not."""
    return [(str(x.dtype).removeprefix("torch."), x.numel()) for x in tensors if x.numel()]


def disagreement(intents: Sequence[Intent], ranks: Sequence[int]) -> str | None:
    """The first two ranks that do not fit each other, in words; None where all do. ranks: global, in axis order."""
    for rank, intent in zip(ranks, intents, strict=True):
        if intent.call != intents[0].call:
            return f"rank {ranks[0]} is in {intents[0].call}, rank {rank} in {intent.call}"
    for i, sender in enumerate(intents):
        for j, receiver in enumerate(intents):
            sent, expected = sender.sends.get(j, []), receiver.receives.get(i, [])
            if sent != expected:
                return (
                    f"rank {ranks[i]} sends {_words(sent)} to rank {ranks[j]}, "
                    f"which is ready to receive {_words(expected)}"
                )
    return None


def _words(tensors: Sizes) -> str:
    return " and ".join(f"{num} {dtype}" for dtype, num in tensors) or "nothing"
