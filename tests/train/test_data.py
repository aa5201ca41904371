"""A run's data: JSON, shards, packed text, or a mixture of them."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.model.chat import load_tokenizer
from longtake.model.config import ModelConfig
from longtake.train.config import TrainConfig
from longtake.train.data import count_samples, open_data, open_rows
from longtake.train.mixture import Mixture
from longtake.train.packed import write_packed
from longtake.train.rows import JsonRows
from longtake.train.sample import Sample, SampleError
from longtake.train.shards import ShardRows

from tests.training_files import conversation, run_config, write_rows


def write_text_shard(path: Path, count: int) -> Path:
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            data, member = json.dumps(conversation(i, ())).encode(), tarfile.TarInfo(f"{i}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def opened(config: TrainConfig, start: Path) -> Mixture[Sample]:
    return open_data(config, load_tokenizer(start), ModelConfig.load(start))


def test_rows_are_opened_by_what_they_lie_in(tmp_path: Path) -> None:
    write_text_shard(tmp_path / "a.tar", 3)
    write_rows(tmp_path / "rows.tar.jsonl", [conversation(0, ())])
    assert isinstance(open_rows(tmp_path / "a.tar"), ShardRows) and isinstance(open_rows(tmp_path), ShardRows)
    assert isinstance(open_rows(tmp_path / "rows.tar.jsonl"), JsonRows)
    with pytest.raises(SampleError, match=f"{tmp_path / 'none.json'}: no such file"):
        open_rows(tmp_path / "none.json")
    with pytest.raises(ValueError, match=f"{tmp_path}: shards hold their media, leave media = 'x' out"):
        open_rows(tmp_path, Path("x"))


def test_a_mixture_of_files_shards_and_folders_is_trained_on(tmp_path: Path, start: Path, conversations: Path) -> None:
    write_text_shard(tmp_path / "a.tar", 4)
    rows = write_rows(tmp_path / "rows.jsonl", [conversation(1, (3,))])
    text = f"""
    [[source]]
    data = "a.tar"
    [[source]]
    data = "rows.jsonl"
    media = "{conversations.parent}"
    repeat = 2
    [[source]]
    data = "{conversations}"
    """
    (tmp_path / "mix.toml").write_text(text)
    config = run_config(start, tmp_path / "mix.toml", tmp_path)
    data = opened(config, start)
    assert len(data) == count_samples(config) == 4 + 2 + 6
    samples = [data[index] for index in data.order(config.seed, 0, len(data))]
    sources = sorted(sample.source for sample in samples)
    expected = [f"{tmp_path / 'a.tar'}: row {i}" for i in (1, 2, 3, 4)] + 2 * [f"{rows}: row 1"]
    assert sources == sorted(expected + [f"{conversations}: row {i}" for i in range(1, 7)])


def test_packed_files_are_mixed_too(tmp_path: Path, start: Path) -> None:
    for name, value, length in (("a", 1, 40), ("b", 2, 100)):
        write_packed(tmp_path / f"{name}.safetensors", [torch.full((length,), value)])
    sources = "".join(f'[[source]]\ndata = "{name}.safetensors"\nweight = 1\n' for name in "ab")
    (tmp_path / "mix.toml").write_text(sources)
    config = run_config(start, tmp_path / "mix.toml", tmp_path, stage=4, context=10)
    data = opened(config, start)
    assert len(data) == count_samples(config) == 4 + 10
    values = [int(data[index].input_ids[0]) for index in data.order(0, 0, 14)]
    assert values.count(1) == values.count(2) == 7


def test_counting_samples_makes_the_indices_of_shards(tmp_path: Path, start: Path) -> None:
    for name, count in (("a", 3), ("b", 2)):
        write_text_shard(tmp_path / f"{name}.tar", count)
    assert count_samples(run_config(start, tmp_path, tmp_path)) == 5
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["a.tar.index.npy", "b.tar.index.npy"]


def test_packed_text_has_no_media(tmp_path: Path, start: Path, packed: Path) -> None:
    (tmp_path / "mix.toml").write_text(f'[[source]]\ndata = "{packed}"\nmedia = "videos"')
    config = run_config(start, tmp_path / "mix.toml", tmp_path, stage=4)
    for use in (count_samples, lambda config: opened(config, start)):
        with pytest.raises(ValueError, match=f"{packed}: packed text has no media, leave media = .*videos' out"):
            use(config)


def settings_of(config: TrainConfig, start: Path) -> dict[str, Any]:
    dataset: Any = opened(config, start).datasets[0]
    return vars(dataset)


def test_the_run_says_how_samples_are_read(tmp_path: Path, start: Path, conversations: Path) -> None:
    fields = {"num_frames": 5, "max_fps": 2.0, "context": 77}
    found = settings_of(run_config(start, conversations, tmp_path, **fields), start)
    model = ModelConfig.load(start)
    told = {"tokens_per_frame": model.tokens_per_frame, "newline_token_id": model.newline_token_id}
    assert {name: found[name] for name in fields | told} == fields | told
