"""A mesh of ranks that are threads, on the NCCL transport over its double."""

from datetime import timedelta
from typing import Any

import torch
from longtake.comm.mesh import AXES, TENSOR_AXES, Grid
from longtake.comm.nccl import NcclTransport

from tests.comm.fake_nccl import FakeCuda, FakeNccl, World


class ThreadMesh(Grid):
    device = torch.device("cpu")

    def __init__(self, rank: int, world: World, **degrees: int) -> None:
        super().__init__(rank, **degrees)
        self.world, self.num_gathers = world, dict.fromkeys(AXES, 0)
        self.nccl, self.cuda = FakeNccl(world), FakeCuda(world)
        self.transport = NcclTransport(
            rank,
            {axis: self.axis_ranks(axis) for axis in TENSOR_AXES},
            device=self.device,
            gather=self.gather_objects,
            deadline=timedelta(days=1),  # or the watchdog would end this process, for what a test leaves in flight
            nccl=self.nccl,
            cuda=self.cuda,
            driver=self.cuda,
        )
        world.kept.append(self.transport)

    def gather_objects(self, obj: Any, axis: Any = "world") -> list[Any]:
        ranks = self.axis_ranks(axis)
        self.num_gathers[axis] += 1
        return self.world.gather(self.rank, ranks, (self.ring, self.ulysses, axis, *ranks, self.num_gathers[axis]), obj)
