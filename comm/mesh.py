"""The grid of ranks: data x ring x ulysses, ulysses innermost.

rank = (data_rank * ring + ring_rank) * ulysses + ulysses_rank. The axis "sp" is ring and ulysses together,
"world" is every rank. A mesh holds ints and a transport, no process group: several live side by side.
"""

import os
import pickle
from datetime import timedelta
from functools import cached_property
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .agreement import AgreedTransport
from .nccl import NcclTransport
from .torch_transport import TorchTransport
from .transport import Transport

Axis = Literal["sp", "ring", "ulysses", "data", "world"]
TENSOR_AXES: tuple[Axis, ...] = ("sp", "ring", "ulysses")  # along which `Mesh.transport` moves tensors
AXES: tuple[Axis, ...] = (*TENSOR_AXES, "data", "world")  # in this order an axis has one tag in both transports
DEADLINE = timedelta(minutes=10)


class Grid:
    """One rank's place in the grid: ints alone."""

    def __init__(self, rank: int = 0, *, data: int = 1, ring: int = 1, ulysses: int = 1) -> None:
        self.rank, self.data, self.ring, self.ulysses = rank, data, ring, ulysses
        self.sp_size = ring * ulysses
        self.world_size = data * self.sp_size
        self.data_rank, self.sp_rank = divmod(rank, self.sp_size)
        self.ring_rank, self.ulysses_rank = divmod(self.sp_rank, ulysses)

    def axis_ranks(self, axis: Axis) -> list[int]:
        """Global ranks along `axis` through this rank, in axis order."""
        group = self.data_rank * self.sp_size
        return {
            "world": list(range(self.world_size)),
            "data": list(range(self.sp_rank, self.world_size, self.sp_size)),
            "sp": list(range(group, group + self.sp_size)),
            "ring": list(range(group + self.ulysses_rank, group + self.sp_size, self.ulysses)),
            "ulysses": list(range(self.rank - self.ulysses_rank, self.rank - self.ulysses_rank + self.ulysses)),
        }[axis]


class Mesh(Grid):
    """One rank's place in the grid, and the transport between the ranks. Collective.

    Stands on the default process group; a world of one needs none.

    Args:
        device: Where this rank's tensors live; None: the current GPU where there is one, else the CPU.
        transport: "nccl" (communicators of our own, through CuPy), "torch" (torch.distributed on the default group),
            or None: nccl on a GPU, torch on the CPU.
        deadline: How long a transfer may take before it counts as failed.
        alone: This process by itself, whatever process group there is.

    With LONGTAKE_DEBUG=1 the ranks agree on sizes and dtypes before each transfer (see AgreedTransport).
    Raises ValueError where data x ring x ulysses is not the world size, and for nccl without a GPU or CuPy.
    """

    def __init__(
        self,
        *,
        data: int = 1,
        ring: int = 1,
        ulysses: int = 1,
        device: str | torch.device | None = None,
        transport: Literal["nccl", "torch"] | None = None,
        deadline: timedelta = DEADLINE,
        alone: bool = False,
    ) -> None:
        initialised = not alone and dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if initialised else 1
        if min(data, ring, ulysses) < 1 or data * ring * ulysses != world_size:
            grid = f"data {data} x ring {ring} x ulysses {ulysses} = {data * ring * ulysses} ranks"
            raise ValueError(f"{grid}, but the world has {world_size}")
        super().__init__(dist.get_rank() if initialised else 0, data=data, ring=ring, ulysses=ulysses)
        self.device = default_device() if device is None else torch.device(device)
        self.host = TorchTransport(self.rank, {axis: self.axis_ranks(axis) for axis in AXES}, deadline=deadline)
        axes = {axis: self.axis_ranks(axis) for axis in TENSOR_AXES}
        self.transport: Transport = TorchTransport(self.rank, axes, deadline=deadline)
        if transport == "nccl" or (transport is None and self.device.type == "cuda"):
            self.transport = NcclTransport(
                self.rank, axes, device=self.device, gather=self.gather_objects, deadline=deadline
            )
        if os.environ.get("LONGTAKE_DEBUG") == "1":
            self.transport = AgreedTransport(self.transport, self.rank, axes, self.gather_objects)

    @cached_property
    def device_mesh(self) -> DeviceMesh:
        """All ranks in one dimension, for FSDP2. Collective; needs a process group."""
        return init_device_mesh(self.device.type, (self.world_size,))

    def gather_objects(self, obj: Any, axis: Axis = "world") -> list[Any]:
        """Every rank's small picklable `obj` along `axis`, in axis order. Collective along that axis; on the CPU."""
        payload = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        num_peers = len(self.axis_ranks(axis))
        sizes = torch.empty(num_peers, 1, dtype=torch.int64)
        size = torch.tensor([payload.numel()])
        self.host.all_to_all(axis, [[size]] * num_peers, [[row] for row in sizes])
        received = [payload.new_empty(num_bytes) for num_bytes in sizes.flatten().tolist()]
        self.host.all_to_all(axis, [[payload]] * num_peers, [[buffer] for buffer in received])
        return [pickle.loads(buffer.numpy().tobytes()) for buffer in received]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mesh":
        """Itself: what stands on a mesh, a model or a plan, is copied without it."""
        return self

    def __getstate__(self) -> object:
        raise ValueError(
            "a mesh cannot be pickled, it stands on the groups of its process: make one in each. For a model that was "
            "enabled on it: disable(model) before, enable(model, mesh) after"
        )

    def barrier(self) -> None:
        """Wait until every rank of the world is here."""
        self.gather_objects(None)


def default_device() -> torch.device:
    """The current GPU where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
