"""What test_launch runs on ranks, and how: `python -m tests.comm.launch_bodies NAME WORLD_SIZE`."""

import os
import signal
import sys
import time

import torch
from longtake.comm.launch import launch
from longtake.comm.mesh import Mesh

from tests.comm import launch_bodies


def report(world_size: int) -> list[tuple[int, int]]:
    return Mesh(ring=world_size).gather_objects((os.getpid(), torch.get_num_threads()))


def refuse(world_size: int) -> None:
    mesh = Mesh(ring=world_size)
    if mesh.rank == world_size - 1:
        raise ValueError("clips.jsonl, row 3: no 'video'")
    mesh.barrier()


def miss(world_size: int) -> None:
    if Mesh(ring=world_size).rank == 0:
        open("no/such/file.mp4").close()
    time.sleep(60)


def crash(world_size: int) -> None:
    mesh = Mesh(ring=world_size)
    if mesh.rank == 1:
        raise ZeroDivisionError("a bug")
    mesh.barrier()


def die(world_size: int) -> None:
    mesh = Mesh(ring=world_size)
    if mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    mesh.barrier()


def stall(world_size: int) -> None:
    pids = Mesh(ring=world_size).gather_objects(os.getpid())
    if Mesh(ring=world_size).rank == 0:
        print(*pids, flush=True)
    time.sleep(60)


if __name__ == "__main__":
    size = int(sys.argv[2])
    body = getattr(launch_bodies, sys.argv[1])
    print(launch(body, size, world_size=size))
