"""Small media files for tests, written with PyAV and Pillow."""

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image


def moving_square(num_frames: int, *, size: int = 32, seed: int = 0) -> np.ndarray:
    """uint8 [n, size, size, 3]: a ground that brightens with each frame, and a square that walks over it."""
    rng = np.random.default_rng(seed)
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    for i in range(num_frames):
        frames[i] = 20 + (3 * i) % 180
        x, y = i % (size - 8), (2 * i) % (size - 8)
        frames[i, y : y + 8, x : x + 8] = rng.integers(0, 256, 3)
    return frames


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    options: Mapping[str, str] | None = None,
    container: Mapping[str, str] | None = None,
    milliseconds: Sequence[int] | None = None,
    rotation: int = 0,
) -> Path:
    """frames uint8 [n, H, W, 3], shown at `milliseconds`, or 8 a second."""
    with av.open(str(path), "w", options=dict(container or {})) as output:
        stream = output.add_stream(codec, rate=8)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = dict(options or {"preset": "ultrafast", "crf": "18"})
        if rotation:
            stream.set_display_rotation(rotation)
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        output.start_encoding()
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[i], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def write_audio(path: Path) -> Path:
    """Half a second of silence."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=16_000)
        assert isinstance(stream, av.AudioStream)
        stream.layout = "mono"
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16_000, 1024 * i
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def write_image(path: Path, pixels: np.ndarray) -> Path:
    """pixels uint8 [H, W, 3]."""
    Image.fromarray(pixels).save(path)
    return path


def truncate(path: Path, *, keep: float) -> Path:
    """Cut the file's end off, so that the share `keep` of its bytes remains."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each frame that is decoded from here on, in this process."""
    decoded, decode = list[int](), InputContainer.decode

    def counted(container: InputContainer, stream: VideoStream) -> Iterator[Any]:
        for frame in decode(container, stream):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(InputContainer, "decode", counted)
    return decoded
