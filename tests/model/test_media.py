from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.container import InputContainer
from longtake.model.media import Inside, MediaError, probe, probe_image, read_frames, read_image, sample_frames
from PIL import Image
from torch import Tensor

from tests.media_files import count_decoded, moving_square, truncate, write_audio, write_image, write_video

MEDIUM = {"preset": "medium", "g": "12", "bf": "3", "crf": "18"}
OPEN_GOP = {**MEDIUM, "x264-params": "open-gop=1"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}

GREY_LEVEL = 1  # the scaler's ways to RGB, which the interpolation chooses, may round differently

FORMATS: dict[str, Any] = {
    "plain.mp4": {},
    "reordered.mp4": {"options": MEDIUM},
    "open.mp4": {"options": OPEN_GOP},
    "fragments.mp4": {"container": FRAGMENTS},
    "reordered.mkv": {"options": MEDIUM},
    "reordered.ts": {"options": MEDIUM},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=12:open-gop=1:log-level=none"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12"}},
    "reordered.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
}


def decode_all(path: Path) -> Tensor:
    """Every frame, straight from PyAV, as read_frames should give it; uint8 [n, 3, H, W]."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype == torch.uint8
    torch.testing.assert_close(actual.short(), expected.short(), rtol=0, atol=GREY_LEVEL)


def assert_any_frames_are_read(path: Path, num_frames: int) -> None:
    expected = decode_all(path)
    size = expected.shape[-1]
    assert probe(path).num_frames == len(expected) == num_frames
    rng = np.random.default_rng(num_frames)
    singles = [[int(i)] for i in rng.integers(0, num_frames, 12)]
    several = [rng.integers(0, num_frames, 9).tolist(), sample_frames(num_frames, 4), range(num_frames)]
    for indices in [[0], [num_frames - 1], *singles, *several]:
        actual = read_frames(path, indices, size=size)
        assert_near(actual, expected[list(indices)])


@pytest.mark.parametrize("name", FORMATS)
def test_any_frames_of_any_format_are_those_of_a_full_decode(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, moving_square(70), **FORMATS[name])
    assert_any_frames_are_read(path, 70)


@pytest.mark.parametrize("reordered", [False, True])
def test_frames_at_a_varying_rate_are_found(tmp_path: Path, reordered: bool) -> None:
    milliseconds = np.random.default_rng(3).integers(20, 200, 70).cumsum().tolist()
    options = {**MEDIUM, "bf": "3" if reordered else "0"}
    path = write_video(tmp_path / "varying.mp4", moving_square(70), options=options, milliseconds=milliseconds)
    assert_any_frames_are_read(path, 70)


def test_frames_before_an_edit_list_do_not_count(tmp_path: Path) -> None:
    """A clip cut without encoding anew begins at a keyframe that is not shown."""
    whole = write_video(tmp_path / "whole.mp4", moving_square(70), options={**MEDIUM, "bf": "0"})
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                packet.pts = packet.dts = (packet.dts or 0) - 5 * (packet.duration or 0)
                target.mux(packet)
    assert_any_frames_are_read(tmp_path / "cut.mp4", 65)


def test_few_frames_of_a_long_video_are_read_without_decoding_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"preset": "ultrafast", "g": "20"}
    path = write_video(tmp_path / "long.mp4", moving_square(2000), options=options)
    indices = sample_frames(2000, 8)
    expected, decoded = decode_all(path)[indices], count_decoded(monkeypatch)
    actual = read_frames(path, indices, size=32)
    assert_near(actual, expected)
    assert len(decoded) <= 8 * 20


@pytest.mark.parametrize(("stride", "num_seeks"), [(1, 0), (8, 0), (60, 6)])
def test_frames_closer_than_keyframes_are_read_on_end_others_after_a_seek_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int, num_seeks: int
) -> None:
    """Keyframes every 40 frames."""
    path = write_video(tmp_path / "a.mp4", moving_square(400), options={"preset": "ultrafast", "g": "40"})
    indices, seeks = range(0, 400, stride), []
    expected, seek = decode_all(path)[list(indices)], InputContainer.seek
    monkeypatch.setattr(InputContainer, "seek", lambda *args, **options: seeks.append(args) or seek(*args, **options))
    assert_near(read_frames(path, indices, size=32), expected)
    assert len(seeks) == num_seeks


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_inside_another_is_read_as_by_itself(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, moving_square(30), **FORMATS[name])
    content = path.read_bytes()
    (tmp_path / "a.tar").write_bytes(b"before" * 100 + content + content[:1000])
    inside = Inside(tmp_path / "a.tar", name, start=600, size=len(content))
    assert probe(inside) == probe(path)
    assert torch.equal(read_frames(inside, [0, 29, 13], size=32), read_frames(path, [0, 29, 13], size=32))


def test_errors_name_the_file_inside_and_the_one_around_it(tmp_path: Path) -> None:
    content = write_video(tmp_path / "a.mp4", moving_square(30)).read_bytes()
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(MediaError, match=r"a\.tar: b\.mp4: .*truncated"):
        probe(Inside(tmp_path / "a.tar", "b.mp4", start=0, size=len(content) // 2))
    with pytest.raises(MediaError, match=r"a\.tar: b\.mp4: frame 30 was asked for"):
        read_frames(Inside(tmp_path / "a.tar", "b.mp4", start=0, size=len(content)), [30], size=8)
    with pytest.raises(MediaError, match=r"none\.tar: b\.mp4: no such file"):
        probe(Inside(tmp_path / "none.tar", "b.mp4", start=0, size=9))
    image = write_image(tmp_path / "a.png", moving_square(1)[0])
    whole = Inside(image, "a.png", start=0, size=image.stat().st_size)
    probe_image(whole)
    assert torch.equal(read_image(whole, size=16), read_image(image, size=16))


def test_probing_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_video(tmp_path / name, moving_square(9)) for name in ("a.mp4", "a.mkv", "a.ts")]
    monkeypatch.setattr(InputContainer, "decode", None)
    assert [probe(path).num_frames for path in paths] == [9, 9, 9]
    assert probe(paths[0]).fps == 8


def test_frames_are_resized_as_pillow_resizes_images(tmp_path: Path) -> None:
    """A video of one colour a frame, and an image of the same: equal up to the loss of the video's encoding."""
    frames = np.full((2, 48, 64, 3), (200, 60, 90), np.uint8)
    video = read_frames(write_video(tmp_path / "a.mp4", frames), [1], size=28)
    image = read_image(write_image(tmp_path / "a.png", frames[1]), size=28)
    assert video.shape == image.shape == (1, 3, 28, 28)
    assert video.dtype == image.dtype == torch.uint8
    assert video.is_contiguous() and image.is_contiguous()
    expected = torch.tensor([200, 60, 90]).view(1, 3, 1, 1).expand(1, 3, 28, 28)
    assert torch.equal(image, expected)
    torch.testing.assert_close(video.long(), expected, rtol=0, atol=4)  # rounding to YUV at crf 18


def test_no_indices_read_no_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_square(3))
    assert read_frames(path, [], size=16).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_turned_videos_are_read_upright(tmp_path: Path, rotation: int) -> None:
    """FFmpeg's rotation is how far a frame must be turned counterclockwise to be shown."""
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    frames[:, :16, :16] = 255
    path = write_video(tmp_path / "turned.mp4", frames, rotation=rotation)
    expected = np.rot90(frames[0, :, :, 0], rotation // 90) > 127
    assert np.array_equal(read_frames(path, [0], size=32)[0, 0].numpy() > 127, expected)


def test_turned_images_are_read_upright(tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (40, 20)), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 20, 20))
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees: what was on the left is on top
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = read_image(tmp_path / "turned.png", size=20)[0, 0]
    assert (pixels[:9] > 240).all() and (pixels[11:] < 15).all()


def test_transparent_and_grey_images_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "LA", "RGBA", "P", "1"):
        Image.new(mode, (10, 10), 1).save(tmp_path / f"{mode}.png")
        assert read_image(tmp_path / f"{mode}.png", size=14).shape == (1, 3, 14, 14)


@pytest.mark.parametrize("name", ["a.mp4", "fast.mp4", "fragments.mp4", "a.mkv", "a.webm", "a.avi"])
@pytest.mark.parametrize("keep", [0.05, 0.5, 0.8])
def test_truncated_video_is_found_out_by_probing(tmp_path: Path, name: str, keep: float) -> None:
    container = {"fast.mp4": {"movflags": "faststart"}, "fragments.mp4": FRAGMENTS}.get(name)
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    options = {} if codec != "libx264" else None
    path = write_video(tmp_path / name, moving_square(80), codec=codec, options=options, container=container)
    truncate(path, keep=keep)
    with pytest.raises(MediaError, match=f"{path}: .*truncated"):
        probe(path)
    with pytest.raises(MediaError, match=f"{path}: .*truncated"):
        read_frames(path, [0], size=32)


def no_file(path: Path) -> None:
    """Leaves nothing there."""


def text(path: Path) -> None:
    path.write_text("a plain text, not a film\n" * 100)


def empty(path: Path) -> None:
    path.touch()


def no_frames(path: Path) -> None:
    write_video(path, moving_square(0))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (no_file, "no such file"),
        (Path.mkdir, "no such file"),
        (text, "not a media file"),
        (empty, "not a media file"),
        (write_audio, "no video in it, only audio"),
        (no_frames, "no video in it"),
    ],
)
def test_what_is_no_video_is_named_with_its_reason(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
    path = tmp_path / "bad.mp4"
    make(path)
    with pytest.raises(MediaError, match=f"{path}: .*{reason}"):
        probe(path)
    with pytest.raises(MediaError, match=f"{path}: .*{reason}"):
        read_frames(path, [0], size=32)


@pytest.mark.parametrize("indices", [[0, 8], [-1, 3]])
def test_a_frame_that_is_not_there_is_named(tmp_path: Path, indices: list[int]) -> None:
    path = write_video(tmp_path / "a.mp4", moving_square(8))
    with pytest.raises(MediaError, match=rf"{path}: frame (8|-1) .* has 8"):
        read_frames(path, indices, size=32)


def test_bad_images_are_named_with_their_reason(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    cut_png = truncate(write_image(tmp_path / "cut.png", pixels), keep=0.5)
    cut_jpeg = truncate(write_image(tmp_path / "cut.jpg", pixels), keep=0.5)
    text(tmp_path / "text.png")
    with pytest.raises(MediaError, match=f"{tmp_path / 'none.png'}: no such file"):
        probe_image(tmp_path / "none.png")
    for path in (cut_png, tmp_path / "text.png"):
        with pytest.raises(MediaError, match=f"{path}: not an image, or truncated"):
            probe_image(path)
    for path in (cut_png, cut_jpeg, tmp_path / "text.png"):
        with pytest.raises(MediaError, match=f"{path}: not an image, or truncated"):
            read_image(path, size=32)
    assert probe_image(write_image(tmp_path / "good.png", pixels)) is None


@pytest.mark.parametrize(("available", "wanted"), [(1, 1), (1, 8), (7, 8), (8, 8), (100_000, 8), (257, 256)])
def test_sampled_frames_are_even_from_first_to_last(available: int, wanted: int) -> None:
    indices = sample_frames(available, wanted)
    assert len(indices) == min(available, wanted)
    assert indices[0] == 0 and (wanted == 1 or indices[-1] == available - 1)
    gaps = np.diff(indices)
    assert len(indices) == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_no_more_frames_are_sampled_than_max_fps_allows() -> None:
    assert len(sample_frames(300, 256, fps=30, max_fps=2)) == 20
    assert len(sample_frames(300, 8, fps=30, max_fps=2)) == 8
    assert len(sample_frames(300, 256, fps=None, max_fps=2)) == 256
    assert len(sample_frames(3, 8, fps=30, max_fps=2)) == 1


def test_counts_that_make_no_sense_are_refused() -> None:
    for available, wanted in ((0, 8), (8, 0)):
        with pytest.raises(ValueError, match=f"{wanted} frames of {available}"):
            sample_frames(available, wanted)
    with pytest.raises(ValueError, match="-1"):
        sample_frames(8, 8, fps=8, max_fps=-1)
