"""What a transport does: move lists of tensors between the ranks along one axis of the mesh.

Both sides know every shape beforehand. The tensors for one peer travel together, in order, and a tensor without
bytes is not sent at all, on either side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class TransferError(RuntimeError):
    """A transfer failed or outlasted its deadline: says on which rank and axis, in what operation, of what sizes."""


class Handle(Protocol):
    """A transfer in flight."""

    def wait(self) -> None:
        """From here on, what was to be received is in its buffers and what was sent may be overwritten.

        On the CPU the caller waits, and gets a TransferError where it comes to nothing; on a GPU the current stream
        waits, the caller does not.
        """
        ...


class Transport(Protocol):
    """Transfers along an axis ("sp", "ring", "ulysses"); peers are indices along it.

    bytes_sent: per axis, the bytes that left this rank for another rank.
    """

    bytes_sent: dict[str, int]

    def all_to_all(self, axis: str, send: Sequence[Sequence[Tensor]], recv: Sequence[Sequence[Tensor]]) -> None:
        """Send the tensors send[i] to peer i and fill the contiguous buffers recv[i] with what peer i sends.

        Peer i's send[me] and my recv[i] agree in order, dtypes and sizes. The own index is a copy.
        """
        ...

    def exchange(
        self,
        axis: str,
        *,
        send_to: int | None,
        send: Sequence[Tensor],
        recv_from: int | None,
        recv: Sequence[Tensor],
    ) -> Handle:
        """Start to send to one peer and to receive from one, which may differ; None: nothing on that side.

        All ranks along the axis call it at the same places, also those with nothing on either side. Exchanges
        between the same two ranks along one axis arrive in the order in which they were started.
        """
        ...


@dataclass(frozen=True)
class Operation:
    """What a rank does in one call, for error messages. sends, receives: (global rank of the peer, bytes)."""

    name: str
    axis: str
    rank: int
    sends: tuple[tuple[int, int], ...]
    receives: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        sends = [f"sending {num_bytes} bytes to rank {peer}" for peer, num_bytes in self.sends]
        receives = [f"receiving {num_bytes} bytes from rank {peer}" for peer, num_bytes in self.receives]
        return f"rank {self.rank}, axis {self.axis}: {self.name} {', '.join(sends + receives) or 'of nothing'}"
