"""Packed text is written as a stream and read by stretches, and each document keeps its edges."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from longtake.train.packed import PackedDataset, PackedWriter, write_packed
from longtake.train.sample import SampleError
from safetensors.torch import load_file, save_file

from tests.media_files import truncate


def documents(lengths: Sequence[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 50_000, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("context", [1, 4, 7, 100])
@pytest.mark.parametrize("weighted", [False, True])
def test_packs_hold_every_token_once_in_order(tmp_path: Path, context: int, weighted: bool) -> None:
    docs = documents([3, 9, 0, 1, 1, 16])
    weights = [torch.rand(len(doc)) for doc in docs]
    write_packed(tmp_path / "a.safetensors", docs, weights if weighted else None)
    packs = PackedDataset(tmp_path / "a.safetensors", context=context)
    samples = [packs[i] for i in range(len(packs))]
    assert all(len(sample.input_ids) == context for sample in samples[:-1])
    assert torch.equal(torch.cat([s.input_ids for s in samples]), torch.cat(docs))
    expected = torch.cat(weights) if weighted else torch.ones(30)
    assert torch.equal(torch.cat([s.loss_weight for s in samples]), expected)
    assert samples[0].input_ids.dtype == torch.int64 and samples[0].loss_weight.dtype == torch.float32


def test_documents_of_a_pack_keep_their_edges(tmp_path: Path) -> None:
    docs = documents([3, 9, 0, 1, 1, 16])  # edges at 0, 3, 12, 12, 13, 14, 30
    write_packed(tmp_path / "a.safetensors", docs)
    packs = PackedDataset(tmp_path / "a.safetensors", context=13)
    assert [packs[i].cu_seqlens.tolist() for i in range(len(packs))] == [[0, 3, 12, 13], [0, 1, 13], [0, 4]]
    parts = packs[0].documents()
    assert [part.input_ids.tolist() for part in parts] == [docs[i].tolist() for i in (0, 1, 3)]
    assert [part.cu_seqlens.tolist() for part in parts] == [[0, 3], [0, 9], [0, 1]]
    assert all(len(part.loss_weight) == len(part.input_ids) for part in parts)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"tokens": torch.zeros(3)}, r"has \['tokens'\], not tokens and cu_seqlens"),
        ({"tokens": torch.zeros(3), "cu_seqlens": torch.tensor([0, 4])}, "from 0 to 4 for 3 tokens"),
    ],
)
def test_a_bad_packed_file_is_named(tmp_path: Path, tensors: dict[str, torch.Tensor], reason: str) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    with pytest.raises(SampleError, match=f"{path}: .*{reason}"):
        PackedDataset(path, context=4)
    truncate(path, keep=0.5)
    with pytest.raises(SampleError, match=f"{path}: not a safetensors file, or truncated"):
        PackedDataset(path, context=4)


def test_weights_that_do_not_match_the_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 weights for 4 tokens"):
        write_packed(tmp_path / "a.safetensors", documents([4]), [torch.ones(3)])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=f"{tmp_path / 'none'}: no such file"):
        PackedDataset(tmp_path / "none", context=9)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_stream_of_pieces_is_the_file_of_the_whole(tmp_path: Path, weighted: bool) -> None:
    docs = documents([5, 0, 700, 1])
    weights = [torch.rand(len(doc)) for doc in docs]
    with PackedWriter(tmp_path / "a", weighted=weighted) as writer:
        for doc, weight in zip(docs, weights, strict=True):
            for start in range(0, len(doc), 3):
                piece = slice(start, start + 3)
                writer.write(doc[piece].numpy(), weight[piece].numpy() if weighted else None)
            writer.end_document()
    assert (writer.num_tokens, writer.num_documents) == (706, 4)
    expected = {"tokens": torch.cat(docs).int(), "cu_seqlens": torch.tensor([0, 5, 5, 705, 706])}
    if weighted:
        expected["loss_weight"] = torch.cat(weights)
    found = load_file(tmp_path / "a")
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in expected.items()}
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert int.from_bytes((tmp_path / "a").read_bytes()[:8], "little") % 8 == 0  # what follows the header is aligned


def test_a_file_that_fails_is_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), PackedWriter(tmp_path / "a") as writer:
        writer.write(np.arange(9))
        _ = 1 // 0
    assert list(tmp_path.iterdir()) == []
