"""The grid of ranks: data x ring x ulysses, ulysses innermost.

rank = (data_rank * ring + ring_rank) * ulysses + ulysses_rank. The axis "sp" is ring and ulysses together,
"world" is every rank. A mesh holds ints and a transport, no process group: several live side by side.
"""

import pickle
from functools import cached_property
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .gloo import GlooTransport
from .transport import Transport

Axis = Literal["world", "data", "sp", "ring", "ulysses"]
AXES: tuple[Axis, ...] = ("world", "data", "sp", "ring", "ulysses")


def axis_ranks(rank: int, axis: Axis, data: int, ring: int, ulysses: int) -> list[int]:
    """Global ranks along `axis` through `rank`, in axis order."""
    sp_size = ring * ulysses
    data_rank, sp_rank = divmod(rank, sp_size)
    group = data_rank * sp_size
    ring_rank, ulysses_rank = divmod(sp_rank, ulysses)
    return {
        "world": list(range(data * sp_size)),
        "data": list(range(sp_rank, data * sp_size, sp_size)),
        "sp": list(range(group, group + sp_size)),
        "ring": list(range(group + ulysses_rank, group + sp_size, ulysses)),
        "ulysses": list(range(group + ring_rank * ulysses, group + (ring_rank + 1) * ulysses)),
    }[axis]


class Mesh:
    """One rank's place in the grid, and the transport between the ranks.

    Stands on the default process group; a world of one needs none. `device` is where this rank's tensors live.
    `alone`: this process by itself, whatever process group there is.
    Raises ValueError where data x ring x ulysses is not the world size.
    """

    def __init__(
        self,
        *,
        data: int = 1,
        ring: int = 1,
        ulysses: int = 1,
        device: str | torch.device = "cpu",
        alone: bool = False,
    ) -> None:
        initialised = not alone and dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if initialised else 1
        self.rank = dist.get_rank() if initialised else 0
        if min(data, ring, ulysses) < 1 or data * ring * ulysses != self.world_size:
            grid = f"data {data} x ring {ring} x ulysses {ulysses} = {data * ring * ulysses} ranks"
            raise ValueError(f"{grid}, but the world has {self.world_size}")
        self.data, self.ring, self.ulysses = data, ring, ulysses
        self.sp_size = ring * ulysses
        self.data_rank, self.sp_rank = divmod(self.rank, self.sp_size)
        self.ring_rank, self.ulysses_rank = divmod(self.sp_rank, ulysses)
        self.device = torch.device(device)
        self.transport: Transport = GlooTransport(self.rank, {axis: self.axis_ranks(axis) for axis in AXES})

    def axis_ranks(self, axis: Axis) -> list[int]:
        """Global ranks along `axis` through this rank, in axis order."""
        return axis_ranks(self.rank, axis, self.data, self.ring, self.ulysses)

    @cached_property
    def device_mesh(self) -> DeviceMesh:
        """All ranks in one dimension, for FSDP2. Collective; needs a process group."""
        return init_device_mesh(self.device.type, (self.world_size,))

    def gather_objects(self, obj: Any, axis: Axis = "world") -> list[Any]:
        """Every rank's small picklable `obj` along `axis`, in axis order. Collective along that axis."""
        payload = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8).to(self.device)
        num_peers = len(self.axis_ranks(axis))
        sizes = torch.empty(num_peers, 1, dtype=torch.int64, device=self.device)
        size = torch.tensor([payload.numel()], device=self.device)
        self.transport.all_to_all(axis, [[size]] * num_peers, [[row] for row in sizes])
        received = [payload.new_empty(num_bytes) for num_bytes in sizes.flatten().tolist()]
        self.transport.all_to_all(axis, [[payload]] * num_peers, [[buffer] for buffer in received])
        return [pickle.loads(buffer.cpu().numpy().tobytes()) for buffer in received]

    def barrier(self) -> None:
        """Wait until every rank of the world is here."""
        self.gather_objects(None)
