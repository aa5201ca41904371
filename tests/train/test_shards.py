"""Samples in tar shards are found by index without unpacking, and are those of the files beside a JSONL."""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from longtake.model.chat import load_tokenizer
from longtake.train import shards
from longtake.train.conversations import ConversationDataset
from longtake.train.decode import FrameReader
from longtake.train.rows import JsonRows, Rows
from longtake.train.sample import SampleError
from longtake.train.shards import ShardRows
from transformers import PreTrainedTokenizerBase

from tests.media_files import moving_square, truncate, write_image, write_video

Files = Sequence[tuple[str, bytes | dict[str, Any]]]


def write_shard(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def row(question: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]
    return {"conversations": turns, **fields}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "a.mp4", moving_square(9, seed=1))
    write_video(folder / "b.mp4", moving_square(3, seed=2))
    write_image(folder / "a.png", moving_square(1, seed=3)[0])
    write_image(folder / "b.jpg", moving_square(1, seed=4)[0])
    return folder


ROWS = [
    row("<video> what", video="a.mp4"),
    row("no picture"),
    row("<image> or <video> or <image>", image=["a.png", "b.jpg"], video=["b.mp4"]),
    row("<image> what", image="b.jpg"),
]


@pytest.fixture
def shard(media: Path, tmp_path: Path) -> Path:
    """The rows of ROWS: with names, without, with others' names, in folders, one of them very long."""
    files = {path.name: path.read_bytes() for path in media.iterdir()}
    unnamed = {"conversations": ROWS[2]["conversations"]}
    renamed = {**ROWS[3], "image": "coco/train/000000012.jpg"}
    return write_shard(
        tmp_path / "00.tar",
        [
            ("x/a.json", {**ROWS[0], "video": "long/ago/a.mp4"}),
            ("x/a.mp4", files["a.mp4"]),
            ("x/b.json", ROWS[1]),
            (f"{'d' * 120}/a.0.png", files["a.png"]),
            (f"{'d' * 120}/a.1.jpg", files["b.jpg"]),
            (f"{'d' * 120}/a.2.MP4", files["b.mp4"]),
            (f"{'d' * 120}/a.json", unnamed),
            ("c.json", renamed),
            ("c.jpg", files["b.jpg"]),
        ],
    )


def dataset(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> ConversationDataset:
    return ConversationDataset(rows, tokenizer=tokenizer, tokens_per_frame=4, num_frames=8, context=500)


def test_samples_are_those_of_the_files_by_themselves(media: Path, shard: Path, start: Path) -> None:
    (media / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = load_tokenizer(start)
    plain, packed = dataset(JsonRows(media / "rows.jsonl"), tokenizer), dataset(ShardRows(shard), tokenizer)
    assert len(packed) == len(plain) == len(ROWS)
    reader = FrameReader(16)
    for index in (3, 0, 2, 1):
        sample, expected = packed[index], plain[index]
        assert torch.equal(sample.input_ids, expected.input_ids)
        assert [item.indices for item in sample.media] == [item.indices for item in expected.media]
        num_frames = len(expected.frame_starts)
        assert torch.equal(reader.begin([sample], 0, num_frames)(), reader.begin([expected], 0, num_frames)())
        assert sample.source == f"{shard}: row {index + 1}"


def test_a_folder_is_its_shards_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, count in (("b", 2), ("a", 3), ("c", 1)):
        write_shard(tmp_path / f"{name}.tar", [(f"{i}.json", row(f"{name}{i}")) for i in range(count)])
    rows = ShardRows(tmp_path)
    questions = [rows[i].fields["conversations"][0]["value"] for i in range(len(rows))]
    assert questions == ["a0", "a1", "a2", "b0", "b1", "c0"]
    assert [rows.source(i) for i in (0, 4)] == [f"{tmp_path / 'a.tar'}: row 1", f"{tmp_path / 'b.tar'}: row 2"]


def test_the_index_is_made_once_and_again_for_another_file(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, scans, scan = ShardRows(shard), [], shards._scan
    monkeypatch.setattr(shards, "_scan", lambda path: scans.append(path) or scan(path))
    again = ShardRows(shard)
    assert not scans and [again[i].fields for i in range(4)] == [first[i].fields for i in range(4)]
    write_shard(shard, [("a.json", row("other"))])
    assert len(ShardRows(shard)) == 1 and scans == [shard]
    shard.with_name("00.tar.index.npy").write_bytes(b"")
    assert len(ShardRows(shard)) == 1 and len(scans) == 2
    assert sorted(path.name for path in shard.parent.iterdir()) == ["00.tar", "00.tar.index.npy"]


def test_an_index_that_cannot_be_kept_is_not(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(shards, "NamedTemporaryFile", refuse)
    assert len(ShardRows(shard)) == 4
    assert os.listdir(shard.parent) == ["00.tar"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("a.mp4", b"")], "one .json is expected in a sample, found 0 among a.mp4"),
        ([("a.json", {}), ("a.b.json", {})], "found 2 among a.json, a.b.json"),
        ([("a.json", b"[1]")], r"not an object: \[1\]"),
        ([("a.json", row("<image>")), ("a.mp4", b"")], "row 2: .*a.tar: a.mp4: not a media file"),
        (
            [("a.json", row("<image>", image=["b.png", "c.png"])), ("a.png", b"")],
            "field 'image' has b.png, c.png: files of the sample are expected, which has a.png",
        ),
        ([("a.json", row("<video>", video="b.mp4"))], "files of the sample are expected, which has no video"),
        ([("a.json", row("<image>")), ("a.png", b"none")], "row 2: .*a.tar: a.png: not an image"),
        ([("a.json", row("<image>", image=3)), ("a.png", b"none")], "field 'image' has 3, neither a path"),
    ],
)
def test_a_bad_sample_is_named_with_shard_row_and_field(tmp_path: Path, start: Path, files: Files, reason: str) -> None:
    path = write_shard(tmp_path / "a.tar", [("0.json", row("a")), *files])
    rows = dataset(ShardRows(path), load_tokenizer(start))
    assert rows[0].source == f"{path}: row 1"
    with pytest.raises(SampleError, match=reason) as caught:
        rows[1]
    assert str(caught.value).startswith(f"{path}: row 2: ")


def test_what_is_no_shard_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(5000)
    good = [("a.json", row("a")), ("a.mp4", noise)]
    with pytest.raises(SampleError, match=f"{tmp_path / 'none.tar'}: no such file"):
        ShardRows(tmp_path / "none.tar")
    with pytest.raises(SampleError, match=f"{tmp_path}: no .tar in this folder"):
        ShardRows(tmp_path)
    (tmp_path / "text.tar").write_text("text")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "text.tar")
    for name in ("text.tar", "a.tar.gz"):
        with pytest.raises(SampleError, match=f"{tmp_path / name}: not a tar, compressed, or damaged"):
            ShardRows(tmp_path / name)
    with pytest.raises(SampleError, match=r"empty.tar: has no files"):
        ShardRows(write_shard(tmp_path / "empty.tar", []))
    with pytest.raises(SampleError, match=r"cut.tar: .*(truncated|damaged)"):
        ShardRows(truncate(write_shard(tmp_path / "cut.tar", good), keep=0.4))
