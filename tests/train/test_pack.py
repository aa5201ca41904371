"""`longtake pack`: every document's tokens, once, in order, and its edges kept."""

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from longtake.model.chat import load_tokenizer
from longtake.train import pack as packing
from longtake.train.pack import main
from longtake.train.packed import PackedDataset, write_packed
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

TEXTS = ["what is red ?", "and blue\n\n  é 🙂 <image> <|im_end|>", "", "what\nis\nblue\n" * 30]


@pytest.fixture(scope="module")
def tokenizer(start: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(start)


@pytest.fixture(params=[None, 7])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With everything held at a time, and with little."""
    if request.param:
        monkeypatch.setattr(packing, "CHARACTERS", request.param)
        monkeypatch.setattr(packing, "TOKENS", request.param)
    yield


def documents(path: Path) -> list[list[int]]:
    """Read back through the data set of training."""
    pack = PackedDataset(path, context=100_000)[0]
    lengths = pack.cu_seqlens.diff().tolist()
    return [part.tolist() for part in pack.input_ids.split(lengths)]


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 200, count).tolist()


def plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


@pytest.mark.usefixtures("small")
def test_raw_text_is_tokenised_a_document_a_file_or_row(
    tmp_path: Path, start: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    for i, text in enumerate(TEXTS[:2]):
        (tmp_path / f"{i}.txt").write_text(text, "utf-8")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    (tmp_path / "list.json").write_text(json.dumps([{"text": TEXTS[3], "id": 3}]))
    inputs = [str(tmp_path / name) for name in ("1.txt", "rows.jsonl", "0.txt", "list.json")]
    main([*inputs, str(tmp_path / "out"), "--model", str(start), "--end", "<|endoftext|>"])
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    order = [TEXTS[1], *TEXTS, TEXTS[0], TEXTS[3]]
    assert documents(tmp_path / "out") == [[*plain(tokenizer, text), end] for text in order]
    special = {tokenizer.get_vocab()[name] for name in ("<image>", "<|im_end|>")}
    assert not special & set(documents(tmp_path / "out")[0])  # they are text here
    main([inputs[0], str(tmp_path / "bare"), "--model", str(start)])
    assert documents(tmp_path / "bare") == [plain(tokenizer, TEXTS[1])]


@pytest.mark.usefixtures("small")
def test_tokenised_files_of_every_sort(tmp_path: Path) -> None:
    one, rows = ids(30, 1), [ids(9, seed) for seed in (2, 3)]
    np.save(tmp_path / "one.npy", np.array(one, np.uint16))
    np.save(tmp_path / "rows.npy", np.array(rows))
    save_file({"input_ids": torch.tensor(rows), "other": torch.zeros(3)}, tmp_path / "rows.safetensors")
    write_packed(tmp_path / "packed.safetensors", [torch.tensor(part) for part in (one, rows[0])])
    (tmp_path / "a.jsonl").write_text(json.dumps({"input_ids": one}) + "\n" + json.dumps({"input_ids": rows[1]}))
    names = ("one.npy", "rows.npy", "rows.safetensors", "packed.safetensors", "a.jsonl")
    main([*(str(tmp_path / name) for name in names), str(tmp_path / "out")])
    assert documents(tmp_path / "out") == [one, *rows, *rows, one, rows[0], one, rows[1]]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("tail", [[], [5, 6]])
def test_one_row_of_tokens_is_cut_after_each_end(tmp_path: Path, tail: Sequence[int]) -> None:
    parts = [[1, 2, 3, 0], [0], [4] * 20 + [0], [9, 9, 0]]
    np.save(tmp_path / "one.npy", np.array([*chain(*parts), *tail]))
    main([str(tmp_path / "one.npy"), str(tmp_path / "out"), "--end", "0"])
    assert documents(tmp_path / "out") == [*parts, *([list(tail)] if tail else [])]


def test_texts_and_ids_keep_their_order(tmp_path: Path, start: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"text": "red"}, {"input_ids": [1, 2]}, {"text": "blue"}, {"text": "what"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    main([str(tmp_path / "a.jsonl"), str(tmp_path / "out"), "--model", str(start)])
    red, blue, what = (plain(tokenizer, text) for text in ("red", "blue", "what"))
    assert documents(tmp_path / "out") == [red, [1, 2], blue, what]


def test_a_folder_stands_for_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in (2, 0, 1):
        np.save(tmp_path / f"{i}.npy", np.full(3, i))
    (tmp_path / "read.me").touch()
    out = tmp_path / "out" / "text.safetensors"
    out.parent.mkdir()
    main([str(tmp_path), str(out)])
    assert documents(out) == [[0] * 3, [1] * 3, [2] * 3]
    assert capsys.readouterr().out == f"wrote {out}: 9 tokens in 3 documents\n"


BAD = {
    "raw text, no model": ("a.txt", "text", "a.txt: raw text has to be tokenised: name a checkpoint with --model"),
    "a row's, no model": ("a.jsonl", '\n{"text": "a"}', "a.jsonl: row 2: raw text has to be tokenised"),
    "other fields": ("a.jsonl", '{"content": "a"}', "a.jsonl: row 1: no text in field 'text', nor .* has content$"),
    "no json": ("a.jsonl", "[1, 2]\n{", "a.jsonl"),
    "no ids": ("a.jsonl", '{"input_ids": ["a"]}', "row 1: tokens must be whole numbers in one row, got <U1"),
    "negative": ("a.jsonl", '{"input_ids": [1, -1]}', "row 1: token -1 is not in the vocabulary: 0 to 2147483647"),
    "no array": ("a.npy", "text", "a.npy: "),
    "empty": ("a.npy", "", "a.npy: "),
    "no tensors": ("a.safetensors", "text", "a.safetensors: not a safetensors file"),
    "suffix": ("a.csv", "text", r"a.csv: the name must end with one of .txt, .jsonl"),
    "nothing": ("a.jsonl", '{"input_ids": []}', "no token in .*a.jsonl"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_packed_is_named_and_leaves_no_file(tmp_path: Path, case: str) -> None:
    name, content, reason = BAD[case]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=reason):
        main([str(tmp_path / name), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for tensors, reason in (
        ({"x": torch.zeros(2)}, "has x, not input_ids"),
        ({"input_ids": torch.zeros(2)}, "whole numbers in one row, got float32"),
        ({"input_ids": torch.zeros(2, 2, 2)}, r"tokens must be \[n\] or \[n, T\], got \[2, 2, 2\]"),
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=f"{path}: .*{reason}"):
            main([str(path), str(tmp_path / "out")])
    write_packed(path, [torch.zeros(2)], [torch.zeros(2)])
    with pytest.raises(ValueError, match="has a loss_weight for each token, which would be lost"):
        main([str(path), str(tmp_path / "out")])


def test_tokens_of_another_vocabulary_are_refused(tmp_path: Path, start: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, 5000]))
    with pytest.raises(ValueError, match=r"a.npy: token 5000 is not in the vocabulary: 0 to \d+$"):
        main([str(tmp_path / "a.npy"), str(tmp_path / "out"), "--model", str(start)])


def test_an_end_that_is_no_token_is_refused(tmp_path: Path, start: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="--end '</s>': give its id, or the checkpoint that knows it with --model"):
        main([str(tmp_path / "a.txt"), str(tmp_path / "out"), "--end", "</s>"])
    with pytest.raises(ValueError, match=f"--end '</s>' is no token of {start}: one is '<|endoftext|>'"):
        main([str(tmp_path / "a.txt"), str(tmp_path / "out"), "--end", "</s>", "--model", str(start)])


def test_the_output_is_no_input(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    with pytest.raises(ValueError, match=r"a.npy is an input as well: write to another file"):
        main([str(tmp_path / "a.npy"), str(tmp_path / "a.npy")])
