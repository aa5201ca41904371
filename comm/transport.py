"""What a transport does: move lists of tensors between the ranks along one axis of the mesh.

Both sides know every shape beforehand. The tensors for one peer travel as one message, and a message without
bytes is not sent at all, on either side.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Handle(Protocol):
    """A transfer in flight."""

    def wait(self) -> None:
        """Return when what was to be received is in its buffers and what was sent may be overwritten."""
        ...


class Transport(Protocol):
    """Transfers along an axis ("world", "data", "sp", "ring", "ulysses"); peers are indices along it.

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

        Exchanges between the same two ranks along one axis arrive in the order in which they were started.
        """
        ...
