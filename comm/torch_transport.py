"""The transport over torch.distributed's point-to-point calls on the default process group: gloo, or NCCL on a GPU.

gloo tells messages apart by a tag per axis, NCCL by their order alone, which is the same on all ranks: no subgroups
are needed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .transport import Operation, TransferError

Message = tuple[int, list[Tensor]]  # the peer along the axis, and what goes to it or comes from it


def as_bytes(tensor: Tensor) -> Tensor:
    """uint8 [num_bytes] view of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8)


@dataclass(frozen=True, eq=False)
class Transfer:
    """Messages in flight: keeps them alive, then deals what arrived to the buffers that it is meant for."""

    operation: Operation
    works: Sequence[dist.Work]
    deadline: timedelta | None  # None: on a GPU, where a bounded wait would hold up the caller
    sent: list[Tensor]
    received: list[tuple[list[Tensor], list[Tensor]]]  # messages, and the buffers that they fill together

    def wait(self) -> None:
        try:
            for work in reversed(self.works):  # sends first: 0.2 ms for a small exchange, against 1 to 3 ms
                work.wait(*([] if self.deadline is None else [self.deadline]))
        except RuntimeError as error:
            raise TransferError(f"{self.operation}: {error}") from error
        for messages, parts in self.received:
            if len(messages) < len(parts):
                pieces = messages[0].split([part.numel() for part in parts])
                for part, piece in zip(parts, pieces, strict=True):
                    part.copy_(piece)
        self.sent.clear()
        self.received.clear()


class TorchTransport:
    """See Transport. `axes`: the global ranks along each axis through `rank`; `deadline` bounds every wait."""

    def __init__(self, rank: int, axes: Mapping[str, list[int]], *, deadline: timedelta) -> None:
        self.rank, self.axes, self.deadline = rank, dict(axes), deadline
        self.tags = {axis: tag for tag, axis in enumerate(self.axes)}
        self.bytes_sent = dict.fromkeys(self.axes, 0)

    def all_to_all(self, axis: str, send: Sequence[Sequence[Tensor]], recv: Sequence[Sequence[Tensor]]) -> None:
        num_peers = len(self.axes[axis])
        assert len(send) == len(recv) == num_peers, f"{len(send)} and {len(recv)} lists, {num_peers} peers"
        me = self.axes[axis].index(self.rank)
        targets = [(me + shift) % num_peers for shift in range(1, num_peers)]
        sources = [(me - shift) % num_peers for shift in range(1, num_peers)]
        transfer = self._start(
            axis, "all_to_all", [(peer, list(send[peer])) for peer in targets], [(p, list(recv[p])) for p in sources]
        )
        for buffer, tensor in zip(recv[me], send[me], strict=True):
            buffer.copy_(tensor)
        transfer.wait()

    def exchange(
        self,
        axis: str,
        *,
        send_to: int | None,
        send: Sequence[Tensor],
        recv_from: int | None,
        recv: Sequence[Tensor],
    ) -> Transfer:
        sends = [] if send_to is None else [(send_to, list(send))]
        return self._start(axis, "exchange", sends, [] if recv_from is None else [(recv_from, list(recv))])

    def _start(self, axis: str, name: str, sends: list[Message], receives: list[Message]) -> Transfer:
        ops, sent, received = [], [], []
        sizes: dict[str, list[tuple[int, int]]] = {"sends": [], "receives": []}
        for peer, tensors in receives:
            parts = [as_bytes(tensor) for tensor in tensors if tensor.numel()]
            if parts:
                messages = _messages(parts, filled=False)
                ops += self._ops(dist.irecv, messages, axis, peer)
                received.append((messages, parts))
                sizes["receives"].append((self.axes[axis][peer], sum(map(Tensor.numel, parts))))
        for peer, tensors in sends:
            parts = [as_bytes(tensor.contiguous()) for tensor in tensors if tensor.numel()]
            if parts:
                messages = _messages(parts, filled=True)
                ops += self._ops(dist.isend, messages, axis, peer)
                sent += messages
                sizes["sends"].append((self.axes[axis][peer], sum(map(Tensor.numel, parts))))
        self.bytes_sent[axis] += sum(num_bytes for _, num_bytes in sizes["sends"])
        operation = Operation(name, axis, self.rank, tuple(sizes["sends"]), tuple(sizes["receives"]))
        try:
            works = dist.batch_isend_irecv(ops) if ops else []
        except RuntimeError as error:
            raise TransferError(f"{operation}: {error}") from error
        on_gpu = bool(ops) and ops[0].tensor.is_cuda
        return Transfer(operation, works, None if on_gpu else self.deadline, sent, received)

    def _ops(self, kind: Callable[..., Any], messages: list[Tensor], axis: str, peer: int) -> list[dist.P2POp]:
        return [dist.P2POp(kind, message, self.axes[axis][peer], tag=self.tags[axis]) for message in messages]


def _messages(parts: list[Tensor], *, filled: bool) -> list[Tensor]:
    """What travels for these parts: on the CPU one message, each costs a round trip; on a GPU all are one launch."""
    if len(parts) == 1 or parts[0].is_cuda:
        return parts
    return [torch.cat(parts) if filled else parts[0].new_empty(sum(map(Tensor.numel, parts)))]
