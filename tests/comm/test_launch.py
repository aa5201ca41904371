"""Starting ranks, joining torchrun's, and every way in which they end, each in seconds."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from longtake.comm.launch import RankError, launch, take_device
from longtake.comm.mesh import Mesh
from torch.distributed.launcher.api import LaunchConfig

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


def test_ranks_start_on_a_pytorch_whose_launcher_cannot_be_told_to_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    class Of211(LaunchConfig):
        def __init__(
            self,
            *,
            min_nodes: int,
            max_nodes: int,
            nproc_per_node: int,
            run_id: str,
            rdzv_backend: str,
            rdzv_endpoint: str,
            local_addr: str,
            max_restarts: int,
            start_method: str,
        ) -> None:
            known = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
            super().__init__(**known)

    monkeypatch.setattr("longtake.comm.launch.LaunchConfig", Of211)
    assert len(launch(launch_bodies.report, 2, world_size=2)) == 2


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


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, int], list[int]]:
    """Stands in for `num` visible GPUs; returns the list of those that are taken."""

    def show(visible: str | None, num: int) -> list[int]:
        taken: list[int] = []
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        for name in ("NCCL_LAUNCH_ORDER_IMPLICIT", "PYTORCH_ALLOC_CONF"):
            monkeypatch.setenv(name, "unset after the test")
            monkeypatch.delenv(name)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        return taken

    return show


def test_a_rank_that_sees_one_gpu_of_its_own_takes_it(gpus: Callable[[str | None, int], list[int]]) -> None:
    for visible in ("5", "GPU-8932f937"):
        taken = gpus(visible, 1)
        assert take_device(3, 8) == "cpu:gloo,cuda:nccl" and taken == [0]
        assert os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"] == "1"
    taken = gpus(None, 8)
    take_device(3, 8)
    assert taken == [3]


def test_more_ranks_than_gpus_are_refused(gpus: Callable[[str | None, int], list[int]]) -> None:
    for visible, num in ((None, 1), (None, 2), ("0,1", 2)):
        gpus(visible, num)
        with pytest.raises(ValueError, match=f"3 ranks on this host, but {num} GPUs"):
            take_device(2, 3)


def test_ranks_that_start_here_share_the_one_visible_gpu_and_are_refused(
    gpus: Callable[[str | None, int], list[int]],
) -> None:
    gpus("0", 1)
    with pytest.raises(ValueError, match="3 ranks on this host, but 1 GPUs"):
        launch(launch_bodies.report, 3, world_size=3)


ON_A_GPU = """
from unittest.mock import patch
import torch
from longtake.comm.launch import take_device
with patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 1, set_device=lambda device: None):
    assert take_device(0, 1) == "cpu:gloo,cuda:nccl"
print(torch._C._accelerator_getAllocatorSettings())
"""


@pytest.mark.skipif(not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="PyTorch does not tell")
@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, "max_split_size_mb:512"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, "max_split_size_mb:512"),
    ],
    ids=str,
)
def test_a_gpus_memory_grows_in_place_unless_the_user_says_otherwise(
    environment: dict[str, str], settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    process = start("-c", ON_A_GPU)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert out.strip() == settings
