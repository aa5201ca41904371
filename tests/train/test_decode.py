"""Frames are the same whoever decodes them, and a rank decodes its own alone."""

import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from longtake.model.media import read_frames, read_image
from longtake.train.decode import FrameReader, Task
from longtake.train.sample import MediaItem, Sample, SampleError

from tests.media_files import count_decoded, moving_square, write_image, write_video


def sample(*media: MediaItem, source: str = "rows: row 1") -> Sample:
    nothing = torch.empty(0, dtype=torch.int64)
    return Sample(nothing, nothing.float(), nothing, torch.tensor([0, 0]), source=source, media=media)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """17 frames in four media."""
    folder = tmp_path_factory.mktemp("media")
    long = write_video(folder / "a.mp4", moving_square(70, seed=1), options={"preset": "ultrafast", "g": "12"})
    short = write_video(folder / "b.mkv", moving_square(3, seed=2))
    image = write_image(folder / "a.png", moving_square(1, seed=3)[0])
    frames = MediaItem(long, "video", tuple(range(0, 70, 6)))
    picture = MediaItem(image, "image", (0,))
    return [sample(frames, picture), sample(), sample(MediaItem(short, "video", (0, 1, 2)), picture)]


def read_all(samples: list[Sample]) -> torch.Tensor:
    items = [item for sample in samples for item in sample.media]
    return torch.cat(
        [
            read_image(item.path, size=16) if item.kind == "image" else read_frames(item.path, item.indices, size=16)
            for item in items
        ]
    )


@pytest.fixture(scope="module")
def workers() -> Iterator[FrameReader]:
    reader = FrameReader(16, workers=2)
    yield reader
    reader.close()


@pytest.mark.parametrize(("first", "last"), [(0, 17), (0, 0), (5, 9), (11, 14), (16, 17)])
def test_workers_read_what_the_thread_reads(samples: list[Sample], workers: FrameReader, first: int, last: int) -> None:
    expected = read_all(samples)
    assert len(expected) == 17
    for reader in (FrameReader(16), workers):
        pixels = reader.begin(samples, first, last)()
        assert pixels.dtype == torch.uint8 and torch.equal(pixels, expected[first:last])


def test_frames_of_others_are_not_decoded(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks that each read their share of the frames decode every one of them once, together."""
    decoded = []

    def watched(path: Path, indices: tuple[int, ...], **options: int) -> torch.Tensor:
        decoded.extend(indices)
        return read_frames(path, indices, **options)

    monkeypatch.setattr("longtake.train.decode.read_frames", watched)
    shares = [FrameReader(16).begin(samples[:1], 13 * rank // 4, 13 * (rank + 1) // 4)() for rank in range(4)]
    assert decoded == list(range(0, 70, 6))
    assert torch.equal(torch.cat(shares), read_all(samples)[:13])


class InPlace:
    """A pool that works in this process; pieces: how many it was handed."""

    def map(self, function: Callable[[Task], np.ndarray], pieces: Sequence[Task]) -> Iterator[np.ndarray]:
        self.pieces = len(pieces)
        return map(function, pieces)


@pytest.mark.parametrize(("stride", "pieces"), [(1, 1), (5, 2), (18, 8)])
def test_a_video_is_shared_by_the_workers_where_few_frames_are_decoded_twice_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int, pieces: int
) -> None:
    """120 frames over 8 workers, keyframes every 50: by a frame each worker would decode what is before it as well."""
    options = {"preset": "ultrafast", "g": "50", "sc_threshold": "0"}
    path = write_video(tmp_path / "a.mp4", moving_square(120 * stride), options=options)
    video = sample(MediaItem(path, "video", tuple(range(0, 120 * stride, stride))))
    expected, decoded = read_all([video]), count_decoded(monkeypatch)
    reader = FrameReader(16, workers=8)
    reader.pool = pool = InPlace()  # type: ignore[assignment]
    assert torch.equal(reader.begin([video], 0, 120)(), expected)
    assert pool.pieces == pieces
    assert len(decoded) <= 120 * stride + (pieces - 1) * 50


@pytest.mark.parametrize("in_workers", [False, True])
def test_a_bad_medium_is_named_with_its_row(samples: list[Sample], workers: FrameReader, in_workers: bool) -> None:
    gone = sample(MediaItem(Path("gone.mp4"), "video", (0, 1)), source="rows: row 7")
    reader = workers if in_workers else FrameReader(16)
    with pytest.raises(SampleError, match=r"^rows: row 7: gone.mp4: no such file") as caught:
        reader.begin([samples[0], gone], 10, 15)()
    assert caught.value.source == "rows: row 7"
    assert torch.equal(reader.begin(samples, 2, 4)(), read_all(samples)[2:4])  # and it still reads


def test_workers_end_with_the_process_that_had_them(samples: list[Sample], tmp_path: Path) -> None:
    """Where it is killed, too: the fork server that they come from outlives it."""
    context, pids = get_context("forkserver"), tmp_path / "pids"
    process = context.Process(target=work_for_ever, args=(samples, pids))
    process.start()
    deadline = time.monotonic() + 60
    while not pids.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(pid) for pid in pids.read_text().split()]
    assert workers and all(is_running(pid) for pid in workers)
    process.kill()
    process.join()
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in workers)


def work_for_ever(samples: list[Sample], pids: Path) -> None:
    reader = FrameReader(16, workers=1)
    reader.begin(samples, 0, 1)()
    assert reader.pool is not None
    pids.with_suffix(".part").write_text(" ".join(map(str, reader.pool._processes)))
    pids.with_suffix(".part").rename(pids)
    time.sleep(600)


def is_running(pid: int) -> bool:
    """A process that has ended but that nobody has waited for is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_that_dies_is_said_to_have(samples: list[Sample]) -> None:
    reader = FrameReader(16, workers=1)
    reader.begin(samples, 0, 1)()
    assert reader.pool is not None
    [process] = reader.pool._processes.values()
    process.kill()
    process.join()
    with pytest.raises(RuntimeError, match="one of 1 workers that decode frames died"):
        reader.begin(samples, 0, 1)()
    reader.close()
