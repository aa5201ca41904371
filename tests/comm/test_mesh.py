"""Coordinates as pure functions; the mesh itself alone and on four ranks."""

import pytest
import torch
from longtake.comm.mesh import AXES, TENSOR_AXES, Axis, Grid, Mesh

from tests.ranks import run_ranks

GRIDS = [(1, 1, 1), (1, 2, 2), (2, 3, 1), (2, 1, 4), (2, 3, 4)]


@pytest.mark.parametrize(("data", "ring", "ulysses"), GRIDS)
def test_ranks_along_an_axis_differ_in_that_coordinate_alone(data: int, ring: int, ulysses: int) -> None:
    def coordinates(rank: int) -> tuple[int, int, int]:
        return rank // (ring * ulysses), rank // ulysses % ring, rank % ulysses

    varying = {"world": (0, 1, 2), "data": (0,), "sp": (1, 2), "ring": (1,), "ulysses": (2,)}
    for rank in range(data * ring * ulysses):
        for axis in AXES:
            fixed = [i for i in range(3) if i not in varying[axis]]
            expected = [
                other
                for other in range(data * ring * ulysses)
                if all(coordinates(other)[i] == coordinates(rank)[i] for i in fixed)
            ]
            assert Grid(rank, data=data, ring=ring, ulysses=ulysses).axis_ranks(axis) == expected


def test_a_world_of_one_needs_no_process_group() -> None:
    mesh = Mesh()
    assert (mesh.world_size, mesh.rank, mesh.sp_size, mesh.sp_rank) == (1, 0, 1, 0)
    assert mesh.gather_objects({"a": 1}) == [{"a": 1}]
    mesh.barrier()
    x, y = torch.arange(3), torch.empty(3, dtype=torch.int64)
    mesh.transport.all_to_all("ulysses", [[x]], [[y]])
    assert torch.equal(x, y)
    assert set(mesh.transport.bytes_sent.values()) == {0}


@pytest.mark.parametrize("grid", [{"ring": 2}, {"ulysses": 0}, {"data": -1, "ring": -1}])
def test_a_grid_that_is_not_the_world_is_refused(grid: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="but the world has 1"):
        Mesh(**grid)


def two_meshes(rank: int) -> None:
    first, second = Mesh(ring=2, ulysses=2), Mesh(data=2, ulysses=2)
    assert (first.ring_rank, first.ulysses_rank, first.sp_rank) == (rank // 2, rank % 2, rank)
    assert (second.data_rank, second.ring_rank, second.ulysses_rank) == (rank // 2, 0, rank % 2)
    for mesh in (first, second):
        for axis in AXES:
            assert mesh.gather_objects((rank, "x" * rank), axis) == [(r, "x" * r) for r in mesh.axis_ranks(axis)]
    first.barrier()
    assert first.device_mesh.mesh.tolist() == [0, 1, 2, 3]


def test_two_meshes_live_side_by_side() -> None:
    assert run_ranks(two_meshes, 4) == [None] * 4


def data_alone(rank: int) -> tuple[list[int], dict[str, int]]:
    mesh = Mesh(data=2, device="cpu", transport="nccl")
    return mesh.gather_objects(rank, "data"), mesh.transport.bytes_sent


def test_data_parallel_ranks_need_no_nccl_of_ours() -> None:
    assert run_ranks(data_alone, 2) == [([0, 1], dict.fromkeys(TENSOR_AXES, 0))] * 2


def lone_axis(rank: int, axis: Axis) -> list[int] | None:
    mesh = Mesh(data=2, ring=2)
    return mesh.gather_objects(rank, axis) if mesh.data_rank == 0 else None


def test_gathering_along_an_axis_concerns_its_ranks_alone() -> None:
    assert run_ranks(lone_axis, 4, "ring") == [[0, 1], [0, 1], None, None]
