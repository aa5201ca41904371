"""Start the ranks of one job on this host, or join those that torchrun started.

A rank that fails ends the job: its error is raised once, in the process that started the ranks.
"""

import inspect
import json
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

TIMEOUT = timedelta(minutes=10)


class RankError(RuntimeError):
    """A rank failed; the message names it and holds its traceback."""


def launch(
    body: Callable[..., Any], *args: Any, world_size: int, timeout: timedelta = TIMEOUT, share_gpu: bool = False
) -> Any:
    """Run body(*args) on `world_size` ranks in one group; returns what rank 0 (joined: this rank) returns.

    Under torchrun this process is one of the ranks; a world of one runs here; else the ranks are processes on
    this host, for which `body` must stand at the top level of a module, and `args` and the result be picklable.
    Where there are GPUs, each rank's becomes its current one; `share_gpu`: several ranks may have the same.
    `timeout` bounds every wait for another rank. Raises ValueError where torchrun's world has another size; and for
    the first rank to fail, ValueError where it raised that or an OSError (a user's mistake), else RankError.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if int(os.environ["WORLD_SIZE"]) != world_size:
            raise ValueError(f"torchrun started {os.environ['WORLD_SIZE']} ranks, but the grid has {world_size}")
        return _join(body, args, timeout, share_gpu)
    if world_size < 1:
        raise ValueError(f"world_size {world_size}: no ranks to run on")
    if world_size > 1:
        return _start(body, args, world_size, timeout, share_gpu)
    dist.init_process_group(take_device(0, 1), store=HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        return body(*args)
    finally:
        dist.destroy_process_group()


def share_cores(local_world_size: int) -> None:
    """Fit this CPU rank among the ranks of this host; before the process group starts its threads.

    Where ranks share a core, gloo's event thread can preempt its own main thread inside a lock, and then spins
    for a time slice: 4 ranks on 2 cores took 2.5 ms for a small exchange and 4.7 ms for an all-reduce. Under
    SCHED_BATCH no thread preempts another by waking up: 0.5 and 1.5 ms.
    """
    num_cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, num_cores // local_world_size))
    if local_world_size >= num_cores:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def take_device(local_rank: int, local_world_size: int, *, share_gpu: bool = False) -> str:
    """Make this rank's GPU the current one, where there are any; returns the backends of the process group.

    PyTorch's memory on it grows in place, where the environment does not say otherwise: sequences of another length in
    every step leave blocks behind that no later one fits. To be called before anything is put on a GPU.
    Ranks that share a GPU are hosts of their own to NCCL, which talk over loopback: it refuses two on one GPU.
    Where CUDA_VISIBLE_DEVICES names one GPU alone, the launcher has chosen it for this rank.
    Raises ValueError for more ranks than GPUs otherwise, without share_gpu.
    """
    if not torch.cuda.is_available():
        return "gloo"
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # PYTORCH_CUDA_ALLOC_CONF goes before it
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")  # NCCL reads it at its first launch: see nccl.py
    num_gpus = torch.cuda.device_count()
    if share_gpu and local_world_size > num_gpus:
        os.environ["NCCL_HOSTID"] = f"longtake-{os.getpid()}"  # NCCL before 2.30
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"  # and from then on
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    elif "," in os.environ.get("CUDA_VISIBLE_DEVICES", ","):  # not one alone
        refuse_too_many(local_world_size)
    torch.cuda.set_device(local_rank % num_gpus)
    return "cpu:gloo,cuda:nccl"


def refuse_too_many(num_ranks: int) -> None:
    """Raises ValueError where this host has GPUs, but fewer than ranks."""
    if torch.cuda.is_available() and num_ranks > (num_gpus := torch.cuda.device_count()):
        raise ValueError(
            f"{num_ranks} ranks on this host, but {num_gpus} GPUs: take a smaller grid, "
            "or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )


def _join(body: Callable[..., Any], args: tuple[Any, ...], timeout: timedelta, share_gpu: bool) -> Any:
    """Run the body in the group that the environment describes."""
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share_cores(local_world_size)
    dist.init_process_group(take_device(local_rank, local_world_size, share_gpu=share_gpu), timeout=timeout)
    result = body(*args)
    dist.barrier()  # nobody hangs up while another still talks
    dist.destroy_process_group()
    return result


def shutdown_timeout() -> dict[str, Any]:
    """Seconds that torch's launcher gives other ranks to end; PyTorch 2.11 cannot be told and gives them 30."""
    return {"shutdown_timeout": 5} if "shutdown_timeout" in inspect.signature(LaunchConfig).parameters else {}


def _start(
    body: Callable[..., Any], args: tuple[Any, ...], world_size: int, timeout: timedelta, share_gpu: bool
) -> Any:
    if not share_gpu:
        refuse_too_many(world_size)  # here: ranks started by this process see the same GPUs, be it one alone
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed", body.__module__])
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).addHandler(logging.NullHandler())  # what they would log is raised below
        logging.getLogger(name).propagate = False
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world_size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            start_method="forkserver",
            **shutdown_timeout(),
        )
        try:
            return elastic_launch(config, _rank_main)(folder, body, args, timeout, share_gpu)[0]
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
        except ChildFailedError as error:
            raise _first_failure(Path(folder), world_size, error) from None


def _rank_main(
    folder: str, body: Callable[..., Any], args: tuple[Any, ...], timeout: timedelta, share_gpu: bool
) -> Any:
    end_with_parent()
    try:
        return _join(body, args, timeout, share_gpu)
    except Exception as error:
        report = {
            "user": isinstance(error, ValueError | OSError),
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
        Path(folder, os.environ["RANK"]).write_text(json.dumps(report))
        raise


def end_with_parent() -> None:
    """For a process of the fork server: leave no orphan where the parent is killed, which the server outlives."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process: only the first of them speaks
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _first_failure(folder: Path, world_size: int, error: ChildFailedError) -> Exception:
    """What the first rank to fail reported: the others fail next, for want of it."""
    reports = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    silent = sorted(set(range(world_size)) - {int(path.name) for path in reports})  # one may have been killed
    if not reports:  # killed: nothing was written
        rank, failure = error.get_first_failure()
        return RankError(f"rank {rank}: {failure.message}")
    report = json.loads(reports[0].read_text())
    if report["user"]:
        return ValueError(report["message"])
    return RankError(f"rank {reports[0].name} failed; ranks {silent} said nothing\n{report['traceback']}")
