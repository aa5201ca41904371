"""Run a function on several gloo ranks, processes forked from a server that has imported torch."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(body: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call body(rank, *args) on `world_size` ranks in one gloo group and return their results in rank order.

    `body` stands at the top level of a module; arguments and results are pickled by value. What a rank raises is
    raised here, with its traceback as a note; TimeoutError after `timeout` seconds. No process outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    trainers = ["longtake.train.trainer", "longtake.train.huggingface_trainer"]  # and so transformers, accelerate
    context.set_forkserver_preload(["torch", "torch.distributed", *trainers])
    call = pickle.dumps((body, args))
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                arguments = (call, rank, world_size, str(Path(folder, "store")), timeout, theirs)
                process = context.Process(target=_rank_main, args=arguments, daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            return _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        open_pipes = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(open_pipes), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(open_pipes.values())} did not finish in time")
        failures = []
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = open_pipes[pipe]
            try:
                when, failure, result = pickle.loads(pipe.recv_bytes())
            except EOFError:
                when, failure, result = (
                    time.monotonic(),
                    RuntimeError(f"rank {rank} died without a word"),
                    None,
                )
            results[rank] = result
            if failure is not None:
                failures.append((when, rank, failure))
        if failures:
            raise min(failures)[2]  # the first to fail: its peers fail next, for want of it
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(call: bytes, rank: int, world_size: int, store: str, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # as longtake.comm.launch does, and why
    try:
        body, args = pickle.loads(call)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        pipe.send_bytes(pickle.dumps((time.monotonic(), None, body(rank, *args))))
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        error.add_note(f"raised on rank {rank}:\n{traceback.format_exc()}")
        pipe.send_bytes(pickle.dumps((time.monotonic(), error, None)))
