"""Starting ranks, joining torchrun's, and every way in which they end, each in seconds."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from longtake.comm.launch import RankError, launch
from longtake.comm.mesh import Mesh

from tests.comm import launch_bodies

ROOT = Path(__file__).parents[2]
LIMIT = 50  # seconds: the bodies sleep for 60 and would wait for each other for longer, on a busy machine too


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < LIMIT


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alive(pid: int) -> bool:
    """Whether the process runs; one that died and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_ranks_are_processes_of_their_own_with_their_share_of_the_cores() -> None:
    reports = launch(launch_bodies.report, 3, world_size=3)
    pids, threads = zip(*reports, strict=True)
    assert len({os.getpid(), *pids}) == 4
    assert set(threads) == {max(1, len(os.sched_getaffinity(0)) // 3)}
    assert gone(list(pids))


def test_one_rank_runs_here_and_leaves_no_group_behind() -> None:
    assert launch(lambda: (os.getpid(), Mesh().rank, dist.get_world_size()), world_size=1) == (os.getpid(), 0, 1)
    with pytest.raises(ValueError, match="of mine"):
        launch(_raise, ValueError("of mine"), world_size=1)
    assert not dist.is_initialized()


def _raise(error: Exception) -> None:
    raise error


def test_a_users_mistake_on_a_rank_comes_back_as_it_was() -> None:
    with pytest.raises(ValueError, match=r"^clips\.jsonl, row 3: no 'video'$"):
        launch(launch_bodies.refuse, 4, world_size=4)


def test_a_missing_file_on_a_rank_is_a_users_mistake() -> None:
    with pytest.raises(ValueError, match=r"no/such/file\.mp4"):
        launch(launch_bodies.miss, 2, world_size=2)


def test_a_bug_on_a_rank_comes_back_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)^rank 1 failed.*launch_bodies\.py.*in crash.*a bug"):
        launch(launch_bodies.crash, 4, world_size=4)


def test_a_killed_rank_ends_the_job() -> None:
    with pytest.raises(RankError, match=r"SIGKILL|1.* said nothing"):
        launch(launch_bodies.die, 4, world_size=4)


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="world_size 0"):
        launch(launch_bodies.report, 0, world_size=0)


def test_a_failure_exits_non_zero_and_is_shown_once() -> None:
    process = start("-m", "tests.comm.launch_bodies", "refuse", "4")
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert (out + err).count("clips.jsonl, row 3") == 1
    assert "elastic" not in err


def test_no_rank_outlives_the_process_that_started_it() -> None:
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    processes = [start("-m", "tests.comm.launch_bodies", "stall", "2") for _ in signals]
    for process, signum in zip(processes, signals, strict=True):
        with process:  # closes its pipes
            assert process.stdout is not None
            pids = [int(pid) for pid in process.stdout.readline().split()]
            assert len(pids) == 2 and all(map(alive, pids))
            if signum == signal.SIGINT:
                os.killpg(process.pid, signum)  # as a terminal does
            else:
                os.kill(process.pid, signum)
            assert process.wait(timeout=LIMIT) != 0
            assert gone(pids), signum


def test_ranks_of_torchrun_are_joined() -> None:
    arguments = ("--standalone", "--nproc-per-node", "2", "-m", "tests.comm.launch_bodies", "report")
    process = start("-m", "torch.distributed.run", *arguments, "2")
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 2


def test_a_grid_that_is_not_the_world_of_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun started 2 ranks, but the grid has 4"):
        launch(launch_bodies.report, 4, world_size=4)
