"""Frames of video files, and images, as the vision tower takes them.

Where the frames of a video stand is read from its container, without decoding. Decoding then starts at the
last keyframe before a wanted frame, so that few frames of a long video cost little, and keeps those alone; where the
wanted frames lie closer than the keyframes it goes on from one to the next.
"""

import io
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EINVAL
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps
from torch import Tensor

SEEK_COST = 16  # frames: skipping fewer than that by a seek gains nothing
MAX_LEADING = 16  # frames shown before a keyframe but stored after it, they refer to what precedes both
SMALL_FRAME = 256 * 256  # pixels: below it threads cost more than they bring (1.4 against 0.6 ms a file)
MISSING_TAIL = 0.5  # seconds: a file that ends earlier than it says by more is truncated


class MediaError(ValueError):
    """A file that cannot be read as video or image; the message names it and says why."""


@dataclass(frozen=True)
class Inside:
    """A file that lies uncompressed in another, a member of a tar: bytes [start, start + size) of `archive`."""

    archive: Path
    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}: {self.name}"


Medium = str | Path | Inside


@dataclass(frozen=True)
class VideoInfo:
    """Frames in a video, and how many of them are shown a second (None: the file does not say)."""

    num_frames: int
    fps: float | None


def sample_frames(available: int, wanted: int, *, fps: float | None = None, max_fps: float | None = None) -> list[int]:
    """Indices of `wanted` frames spread evenly from first to last, or of all where there are fewer.

    fps, max_fps: the video's rate, and the most frames to take of a second of it.
    Raises ValueError for counts below 1, or max_fps <= 0.
    """
    if available < 1 or wanted < 1:
        raise ValueError(f"cannot take {wanted} frames of {available}")
    if max_fps is not None and max_fps <= 0:
        raise ValueError(f"max_fps must be positive, got {max_fps}")
    count = min(available, wanted)
    if fps and max_fps:
        count = min(count, max(1, round(available / fps * max_fps)))
    return np.linspace(0, available - 1, count).round().astype(int).tolist()


def probe(path: Medium) -> VideoInfo:
    """Count a video's frames without decoding any.

    Raises MediaError for a file that is missing, not media, truncated, or has no video in it.
    """
    with _open(path) as (container, stream):
        index = _frame_table(container, stream) or _scan_frames(path)
        fps = stream.average_rate
    return VideoInfo(len(index.times), float(fps) if fps else None)


def read_frames(path: Medium, indices: Sequence[int], *, size: int, threads: int = 0) -> Tensor:
    """Decode frames of a video, as uint8 [n, 3, size, size] RGB, in the order of `indices`.

    Frames are stretched to the square. Memory is that of the frames asked for. threads: 0 for as many as cores.
    Raises MediaError as `probe`, and for a frame that is not in the file or cannot be decoded.
    """
    wanted = sorted(set(indices))
    pixels = np.empty((len(wanted), 3, size, size), np.uint8)
    with _open(path) as (container, stream):
        index = _frame_table(container, stream) or _scan_frames(path)
        if wanted and not 0 <= wanted[0] <= wanted[-1] < len(index.times):
            bad = wanted[0] if wanted[0] < 0 else wanted[-1]
            raise MediaError(f"{path}: frame {bad} was asked for, the video has {len(index.times)}")
        threads = 1 if stream.width * stream.height < SMALL_FRAME else threads
        stream.codec_context.thread_count, stream.thread_type = threads, "AUTO"
        reformatter = VideoReformatter()
        for row, frame in enumerate(_decode(container, stream, index, wanted)):
            square = reformatter.reformat(
                frame, size, size, "rgb24", interpolation=Interpolation.BICUBIC, threads=threads
            )
            pixels[row] = np.rot90(square.to_ndarray(), frame.rotation // 90).transpose(2, 0, 1)
    if wanted != list(indices):
        pixels = pixels[np.searchsorted(wanted, indices)]
    return torch.from_numpy(pixels)


def probe_image(path: Medium) -> None:
    """Check that a file is an image, as far as that goes without decoding it. Raises MediaError."""
    with _open_image(path) as image:
        image.verify()


def read_image(path: Medium, *, size: int) -> Tensor:
    """An image as uint8 [1, 3, size, size] RGB, stretched to the square. Raises MediaError."""
    with _open_image(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        resized = upright.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized).transpose(2, 0, 1)[None].copy())


@dataclass(frozen=True)
class _FrameIndex:
    """times: of the frames, in the order shown. keyframes: places in it, 0 among them, where decoding can start.

    timed: the times are those that decoded frames carry. Otherwise frames must be counted from the first.
    """

    times: Sequence[int]
    keyframes: Sequence[int]
    timed: bool


@contextmanager
def _open(path: Medium) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first moving picture; what FFmpeg raises while it is open becomes a MediaError."""
    try:
        with (
            _file(path) as file,  # for a whole file FFmpeg has a quicker way
            av.open(file if isinstance(path, Inside) else str(path), "r", metadata_errors="replace") as container,
        ):
            for stream in container.streams.video:
                if not stream.disposition & Disposition.attached_pic:
                    break
            else:
                kinds = sorted({stream.type for stream in container.streams})
                raise MediaError(f"{path}: no video in it, only {', '.join(kinds) or 'an empty container'}")
            yield container, stream
    except (FFmpegError, OSError) as error:
        raise MediaError(f"{path}: not a media file, or truncated or damaged ({error.strerror})") from error


def _frame_table(container: InputContainer, stream: VideoStream) -> _FrameIndex | None:
    """The index from the container's table of frames (MP4, MOV, AVI); None where that does not tell all."""
    entries = list(stream.index_entries)
    if not entries or len(entries) != stream.frames or any(entry.is_discard for entry in entries):
        return None
    end = entries[-1].pos + entries[-1].size
    if end > container.size:
        raise MediaError(f"{container.name}: truncated, {container.size} bytes of at least {end}")
    if not _keeps_times(container):
        return _FrameIndex(range(len(entries)), [0], timed=False)
    # the table has the times of decoding: moved by a constant, those of showing, unless the rate varies and
    # frames are reordered
    times = [entry.timestamp for entry in entries]
    if stream.codec_context.has_b_frames and len({b - a for a, b in pairwise(times)}) > 1:
        return None
    shift = (stream.start_time or 0) - times[0]
    keyframes = [0, *(i for i, entry in enumerate(entries) if entry.is_keyframe)]
    return _FrameIndex([time + shift for time in times], keyframes, timed=True)


def _scan_frames(path: Medium) -> _FrameIndex:
    """The index from reading all packets, without decoding them."""
    with _open(path) as (container, stream):
        times, key_times, ends = [], [], {}
        for packet in container.demux():
            if packet.is_corrupt:
                raise MediaError(f"{path}: truncated or damaged after {len(times)} frames")
            time = packet.dts if packet.pts is None else packet.pts
            if time is None:  # what ends each stream
                continue
            which = packet.stream.index
            ends[which] = max(ends.get(which, time), time + (packet.duration or 0))
            if which == stream.index and not packet.is_discard:
                times.append(time)
                if packet.is_keyframe:
                    key_times.append(time)
        if not times:
            raise MediaError(f"{path}: no frames in its video, or truncated")
        seconds = max(end * float(container.streams[i].time_base or 0) for i, end in ends.items())
        promised = ((container.start_time or 0) + (container.duration or 0)) / av.time_base
        if seconds + MISSING_TAIL < promised:
            raise MediaError(f"{path}: truncated, {seconds:.2f} seconds of {promised:.2f}")
        if not _keeps_times(container):
            return _FrameIndex(range(len(times)), [0], timed=False)
        times.sort()
        return _FrameIndex(times, [0, *sorted(bisect_left(times, time) for time in key_times)], timed=True)


def _keeps_times(container: InputContainer) -> bool:
    """Whether the format's times shown are reliable, and seeking by them exact (tried with FFmpeg 8)."""
    return container.format.name.startswith(("mov,", "matroska,"))


def _decode(
    container: InputContainer, stream: VideoStream, index: _FrameIndex, wanted: Sequence[int]
) -> Iterator[VideoFrame]:
    """The wanted frames, which increase. Raises MediaError for one that does not come out of the decoder."""
    leading = MAX_LEADING if stream.codec_context.has_b_frames else 0
    frames, position = container.decode(stream), 0  # position: of the frame that comes next
    for target in wanted:
        key = index.keyframes[bisect_right(index.keyframes, max(target - leading, 0)) - 1]
        if key > position + SEEK_COST:
            container.seek(index.times[key], stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            position = bisect_left(index.times, frame.pts or 0) + 1 if index.timed else position + 1
            if position > target:
                yield frame
                break
        else:
            raise MediaError(f"{container.name}: frame {target} of {len(index.times)} cannot be decoded")


@contextmanager
def _open_image(path: Medium) -> Iterator[Image.Image]:
    try:
        with _file(path) as file, Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's plugins do
        raise MediaError(f"{path}: not an image, or truncated or damaged ({error})") from error


@contextmanager
def _file(path: Medium) -> Iterator[BinaryIO]:
    whole = path.archive if isinstance(path, Inside) else Path(path)
    if not whole.is_file():
        raise MediaError(f"{path}: no such file")
    with whole.open("rb") as file:
        yield io.BufferedReader(_Part(file, path)) if isinstance(path, Inside) else file


class _Part(io.RawIOBase):
    """The bytes of a file inside another. name: what FFmpeg's errors call it."""

    def __init__(self, file: BinaryIO, part: Inside) -> None:
        self.file, self.part, self.position, self.name = file, part, 0, str(part)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.part.size}[whence]
        if position < 0:  # FFmpeg tries that in an empty file
            raise OSError(EINVAL, "no such place in the file")
        self.position = position
        return position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self.file.seek(self.part.start + self.position)
        chunk = self.file.read(max(min(len(buffer), self.part.size - self.position), 0))
        buffer[: len(chunk)] = chunk
        self.position += len(chunk)
        return len(chunk)
