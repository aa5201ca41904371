import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from longtake.model.chat import build_tokenizer, encode
from longtake.model.media import read_frames, read_image
from longtake.train.conversations import ConversationDataset
from longtake.train.decode import FrameReader
from longtake.train.rows import JsonRows
from longtake.train.sample import Sample, SampleError
from transformers import Qwen2Tokenizer

from tests.media_files import moving_square, truncate, write_audio, write_image, write_video

Row = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return build_tokenizer([Path(__file__).read_text(encoding="utf-8")], ["red"], 400)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file of each sort, good and bad."""
    folder = tmp_path_factory.mktemp("media")
    for num_frames in (1, 3, 9, 40):
        write_video(folder / f"{num_frames}.mp4", moving_square(num_frames, seed=num_frames))
    write_image(folder / "a.png", moving_square(1, seed=50)[0])
    write_image(folder / "b.jpg", moving_square(1, seed=60)[0])
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    truncate(write_image(folder / "cut.jpg", noise), keep=0.5)
    truncate(write_video(folder / "cut.mp4", moving_square(40)), keep=0.5)
    write_audio(folder / "audio.mp4")
    (folder / "text.png").write_text("no image")
    return folder


def row(*values: str, **fields: Any) -> Row:
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "a", "conversations": turns, **fields}


GOOD = [
    row("<video>\nWhat ?", "red", video="9.mp4"),
    row("No pictures ?", "none", "Sure ?", "yes, été 🙂"),
    row("<image> or <image>", "red", image=["a.png", "b.jpg"]),
    row("<video><image>", "red", "<video>", "red", image="a.png", video=["3.mp4", "40.mp4"]),
    row("Again <video>", "red", video="1.mp4"),
]


def dataset(path: Path, rows: Sequence[Row | str], tokenizer: Qwen2Tokenizer, **options: Any) -> ConversationDataset:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8", "surrogateescape")
    settings = {"tokens_per_frame": 4, "num_frames": 8, "context": 1000, **options}
    return ConversationDataset(JsonRows(path), tokenizer=tokenizer, **settings)


def assert_same(actual: Sample, expected: Sample) -> None:
    assert torch.equal(actual.input_ids, expected.input_ids)
    assert torch.equal(actual.loss_weight, expected.loss_weight)
    assert torch.equal(actual.frame_starts, expected.frame_starts)
    assert actual.media == expected.media


def test_a_row_becomes_its_tokens_and_the_frames_to_read(media: Path, tokenizer: Qwen2Tokenizer) -> None:
    sample = dataset(media / "good.jsonl", GOOD, tokenizer)[3]
    kinds = [("video", 3), ("image", 1), ("video", 8)]
    expected = encode(tokenizer, GOOD[3]["conversations"], kinds, tokens_per_frame=4)  # type: ignore[arg-type]
    assert torch.equal(sample.input_ids, expected.input_ids)
    assert torch.equal(sample.loss_weight, expected.loss_weight)
    assert torch.equal(sample.frame_starts, expected.frame_starts)
    assert [(item.path, item.kind) for item in sample.media] == [
        (media / "3.mp4", "video"),
        (media / "a.png", "image"),
        (media / "40.mp4", "video"),
    ]
    assert [item.indices for item in sample.media] == [(0, 1, 2), (0,), (0, 6, 11, 17, 22, 28, 33, 39)]
    assert sample.documents() == [sample]


def test_max_fps_bounds_the_frames_of_a_video(media: Path, tokenizer: Qwen2Tokenizer) -> None:
    """40 frames at 8 a second are 5 seconds."""
    rows = [row("<video>", "red", video="40.mp4")]
    sample = dataset(media / "fps.jsonl", rows, tokenizer, num_frames=256, max_fps=2)[0]
    assert len(sample.media[0].indices) == len(sample.frame_starts) == 10


def test_rows_of_text_alone_have_no_media(media: Path, tokenizer: Qwen2Tokenizer) -> None:
    sample = dataset(media / "good.jsonl", GOOD, tokenizer)[1]
    assert sample.media == () and sample.frame_starts.tolist() == []
    assert sample.cu_seqlens.tolist() == [0, len(sample.input_ids)]
    assert FrameReader(16).begin([sample], 0, 0)().shape == (0, 3, 16, 16)


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_holds_the_same_rows_as_json_lines(
    media: Path, tokenizer: Qwen2Tokenizer, indent: int | None
) -> None:
    lines = dataset(media / "good.jsonl", GOOD, tokenizer)
    text = json.dumps(GOOD, indent=indent, ensure_ascii=False)
    listed = dataset(media / "good.json", [text], tokenizer)
    assert len(listed) == len(lines) == len(GOOD)
    for i in range(len(GOOD)):
        assert_same(listed[i], lines[i])
        assert listed[i].source == f"{media / 'good.json'}: row {i + 1}"


def test_empty_lines_count_as_lines_but_not_as_rows(media: Path, tokenizer: Qwen2Tokenizer) -> None:
    rows = dataset(media / "gaps.jsonl", ["", GOOD[0], "  ", GOOD[1]], tokenizer)
    assert [rows[i].source for i in range(len(rows))] == [f"{media / 'gaps.jsonl'}: row {n}" for n in (2, 4)]


BAD = {
    "not json": ('{"conversations": [', 'not JSON: .*in {"conversations": \\['),
    "not utf-8": ("\udcff", "not JSON"),
    "no object": ("3", "not an object: 3"),
    "no conversations": ({"id": "a"}, "no list in field 'conversations'"),
    "no value": ({"conversations": [{"from": "human"}]}, "turn 1 has no text in its field 'value'"),
    "no from": ({"conversations": [{"value": "a"}]}, "turn 1 has no text in its field 'from'"),
    "no turn": ({"conversations": [3]}, "turn 1 has no text"),
    "no answer": (row("a"), "1 turns does not end with one from 'gpt'"),
    "wrong order": (
        {"conversations": [{"from": "gpt", "value": "a"}]},
        "turn 1 is from 'gpt', not 'human'",
    ),
    "too few placeholders": (row("a", "b", video="9.mp4"), "0 placeholders <video> for 1 in field 'video'"),
    "too many placeholders": (row("<image><image>", "b", image="a.png"), "2 placeholders <image> for 1"),
    "no media": (row("<video>", "b"), "1 placeholders <video> for 0 in field 'video'"),
    "wrong kind": (row("<video>", "b", image="a.png"), "0 placeholders <image> for 1"),
    "too few images": (row("<image>", "b", image=["a.png", "b.jpg"]), "1 placeholders .*expected, found a.png, b.jpg$"),
    "token in the text": (row("<video> <vila/video>", "b", video="9.mp4"), "2 placeholders for 1 media"),
    "other style": ({"video": "9.mp4", "caption": "a"}, "nor a text in 'whole_caption' .* has video, caption$"),
    "no path": (row("<video>", "b", video=3), "field 'video' has 3, neither a path"),
    "no paths": (row("<video>", "b", video=["9.mp4", None]), "field 'video' has .*neither a path"),
    "missing video": (row("<video>", "b", video="none.mp4"), "none.mp4: no such file"),
    "truncated video": (row("<video>", "b", video="cut.mp4"), "cut.mp4: .*truncated"),
    "audio alone": (row("<video>", "b", video="audio.mp4"), "audio.mp4: no video in it, only audio"),
    "missing image": (row("<image>", "b", image="none.png"), "none.png: no such file"),
    "no image": (row("<image>", "b", image="text.png"), "text.png: not an image"),
    "too long": (row("<video>", "b", video="40.mp4"), r"\d+ tokens are more than the context of 40"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_with_its_file_number_and_reason(media: Path, tokenizer: Qwen2Tokenizer, case: str) -> None:
    bad, reason = BAD[case]
    path, good = media / "bad.jsonl", row("a", "b")
    rows = dataset(path, [good, good, "", bad], tokenizer, context=40 if case == "too long" else 1000)
    assert rows[1].source == f"{path}: row 2"
    with pytest.raises(SampleError, match=f"^{re.escape(str(path))}: row 4: .*{reason}") as caught:
        rows[2]
    assert caught.value.source == f"{path}: row 4"


def test_a_sample_may_fill_the_context_to_the_last_token(media: Path, tokenizer: Qwen2Tokenizer) -> None:
    num_tokens = len(dataset(media / "long.jsonl", GOOD, tokenizer)[0].input_ids)
    assert len(dataset(media / "long.jsonl", GOOD, tokenizer, context=num_tokens)[0].input_ids) == num_tokens
    reason = f"{num_tokens} tokens are more than the context of {num_tokens - 1}"
    with pytest.raises(SampleError, match=reason):
        dataset(media / "long.jsonl", GOOD, tokenizer, context=num_tokens - 1)[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ("[]", "has no rows"),
        ('[{"id": 1}, {"id": ]', "row 2: not JSON"),
        ('[{"id": 1}, {"id": 2}', "does not end after row 2"),
    ],
)
def test_a_file_without_rows_is_named(tmp_path: Path, tokenizer: Qwen2Tokenizer, content: str, reason: str) -> None:
    with pytest.raises(SampleError, match=f"{tmp_path / 'a.json'}: .*{reason}"):
        dataset(tmp_path / "a.json", [content], tokenizer)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    with pytest.raises(SampleError, match=f"{path}: no such file"):
        JsonRows(path)


def test_any_share_of_the_frames_is_read(media: Path, tokenizer: Qwen2Tokenizer) -> None:
    rows = dataset(media / "good.jsonl", GOOD, tokenizer)
    samples = [rows[i] for i in range(len(rows))]
    expected = torch.cat(
        [
            read_image(item.path, size=16) if item.kind == "image" else read_frames(item.path, item.indices, size=16)
            for sample in samples
            for item in sample.media
        ]
    )
    total = sum(len(sample.frame_starts) for sample in samples)
    assert len(expected) == total == 8 + 2 + 3 + 1 + 8 + 1
    reader = FrameReader(16)
    for first in range(total + 1):
        for last in range(first, total + 1, 3):
            pixels = reader.begin(samples, first, last)()
            assert pixels.shape == (last - first, 3, 16, 16)
            assert torch.equal(pixels, expected[first:last])


def test_a_medium_that_breaks_when_decoded_is_named_with_its_row(media: Path, tokenizer: Qwen2Tokenizer) -> None:
    """Half a JPEG has a good header, and is found out by decoding alone."""
    rows = dataset(media / "late.jsonl", [GOOD[0], row("<image>", "b", image="cut.jpg")], tokenizer)
    samples = [rows[0], rows[1]]
    assert len(FrameReader(16).begin(samples, 0, 8)()) == 8
    with pytest.raises(SampleError, match=r"late.jsonl: row 2: .*cut.jpg: not an image, or truncated") as caught:
        FrameReader(16).begin(samples, 4, 9)()
    assert caught.value.source == samples[1].source
