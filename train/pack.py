"""`longtake pack`: text, raw or tokenised, becomes one packed file for stage 4, in bounded memory."""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from ..model.chat import load_tokenizer
from .packed import PackedWriter
from .rows import JsonRows
from .sample import SampleError

SUFFIXES = (".txt", ".jsonl", ".json", ".npy", ".safetensors")
CHARACTERS = 1 << 20  # of text that are tokenised at a time
TOKENS = 1 << 22  # of a tokenised file that are held at a time

Piece = tuple[np.ndarray, bool]  # tokens int [n], and whether a document ends with them


@dataclass(frozen=True)
class Encoding:
    """tokenizer: None where every input is tokenised already. end: id of the token that ends a document, if any."""

    tokenizer: PreTrainedTokenizerBase | None
    end: int | None

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Of each text; special tokens' names in it are text as well. Raises ValueError without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("raw text has to be tokenised: name a checkpoint with --model")
        batch = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [np.array(ids, np.int64) for ids in batch["input_ids"]]  # type: ignore[union-attr]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="longtake pack", description=__doc__)
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="IN",
        help=".txt, a document each; .json or .jsonl, a document a row, in its field `text` or `input_ids`; .npy of "
        "tokens, [n] or a document a row [n, T]; .safetensors with `input_ids` like it, or a packed file; or a folder "
        "of such files",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="safetensors file to write")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint, whose tokenizer raw text is for")
    parser.add_argument(
        "--end",
        metavar="TOKEN",
        help="ends each document: put after raw text, and cutting tokens [n] after each (none); its text, or its id",
    )
    args = parser.parse_args(argv)
    num_tokens, num_documents = pack(args.inputs, args.out, encoding=_encoding(args.model, args.end))
    print(f"wrote {args.out}: {num_tokens:,} tokens in {num_documents:,} documents")


def pack(inputs: Sequence[Path], out: Path, *, encoding: Encoding) -> tuple[int, int]:
    """Write all documents of the inputs, in their order. Returns how many tokens and documents there are.

    Raises ValueError, with file and row, for what cannot be read, is no text, or is no token of the tokenizer.
    """
    files = [file for path in inputs for file in _files(path)]
    if out.resolve() in [file.resolve() for file in files]:
        raise ValueError(f"{out} is an input as well: write to another file")
    with PackedWriter(out) as writer:
        for file in files:
            for tokens, ends in _pieces(file, encoding):
                writer.write(tokens)
                if ends:
                    writer.end_document()
        if not writer.num_tokens:
            raise ValueError(f"no token in {', '.join(map(str, inputs))}")
    return writer.num_tokens, writer.num_documents


def _encoding(model: Path | None, end: str | None) -> Encoding:
    tokenizer = None if model is None else load_tokenizer(model)
    if end is None:
        return Encoding(tokenizer, None)
    if end.isdecimal():
        return Encoding(tokenizer, int(end))
    if tokenizer is None:
        raise ValueError(f"--end {end!r}: give its id, or the checkpoint that knows it with --model")
    if end not in tokenizer.get_vocab():
        raise ValueError(f"--end {end!r} is no token of {model}: one is {tokenizer.pad_token!r}")
    return Encoding(tokenizer, tokenizer.get_vocab()[end])


def _files(path: Path) -> list[Path]:
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
        if file.suffix not in SUFFIXES:
            raise ValueError(f"{file}: the name must end with one of {', '.join(SUFFIXES)}")
    if not files:
        raise ValueError(f"{path}: no file in it ends with one of {', '.join(SUFFIXES)}")
    return files


def _pieces(file: Path, encoding: Encoding) -> Iterator[Piece]:
    try:
        if file.suffix == ".txt":
            yield from _of_text(file, encoding)
        elif file.suffix in (".json", ".jsonl"):
            yield from _of_rows(file, encoding)
        elif file.suffix == ".npy":
            ids = np.load(file, mmap_mode="r")
            yield from _of_array(ids, ids.shape, encoding)
        else:
            yield from _of_safetensors(file, encoding)
    except SampleError:  # names its file
        raise
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file}: {error}") from error


def _of_text(file: Path, encoding: Encoding) -> Iterator[Piece]:
    """A file is cut between lines, before one that begins with a letter or sign: no token of Qwen2 reaches across."""
    rest = ""
    with file.open(encoding="utf-8", newline="") as lines:
        while block := lines.read(CHARACTERS):
            rest += block
            *_, cut = (0, *(match.end() for match in re.finditer(r"\n(?=\S)", rest)))
            if cut:
                yield encoding.tokens([rest[:cut]])[0], False
                rest = rest[cut:]
    yield _ended(encoding.tokens([rest])[0], encoding), True


def _of_rows(file: Path, encoding: Encoding) -> Iterator[Piece]:
    """Texts are tokenised many at a time."""
    rows, texts, characters = JsonRows(file), [], 0
    for index in range(len(rows)):
        try:
            document = _document(rows[index].fields)
            if is_text := isinstance(document, str):
                texts.append(document)
                characters += len(document)
            if texts and (not is_text or characters >= CHARACTERS or index == len(rows) - 1):
                yield from ((_ended(tokens, encoding), True) for tokens in encoding.tokens(texts))
                texts, characters = [], 0
            if not is_text:
                yield _checked(np.array(document), encoding), True
        except ValueError as error:
            raise SampleError(f"{rows.source(index)}: {error}") from error


def _document(fields: dict[str, Any]) -> str | list[int]:
    if isinstance(text := fields.get("text"), str):
        return text
    if isinstance(ids := fields.get("input_ids"), list):
        return ids
    found = ", ".join(fields) or "no fields"
    raise ValueError(f"no text in field 'text', nor a list of ids in 'input_ids': the row has {found}")


def _of_safetensors(file: Path, encoding: Encoding) -> Iterator[Piece]:
    try:
        with safe_open(file, "np") as tensors:
            names = set(tensors.keys())
            if "loss_weight" in names:
                raise ValueError("has a loss_weight for each token, which would be lost")
            if {"tokens", "cu_seqlens"} <= names:
                yield from _of_packed(tensors.get_slice("tokens"), tensors.get_tensor("cu_seqlens"), encoding)
            elif "input_ids" in names:
                ids = tensors.get_slice("input_ids")
                yield from _of_array(ids, ids.get_shape(), encoding)
            else:
                raise ValueError(f"has {', '.join(sorted(names)) or 'nothing'}, not input_ids")
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file, or truncated ({error})") from error


def _of_packed(tokens: Any, cu_seqlens: np.ndarray, encoding: Encoding) -> Iterator[Piece]:
    for start, end in pairwise(cu_seqlens.tolist()):
        for begin in range(start, max(end, start + 1), TOKENS):  # an empty document too
            stop = min(begin + TOKENS, end)
            yield _checked(tokens[begin:stop], encoding), stop == end


def _of_array(ids: Any, shape: Sequence[int], encoding: Encoding) -> Iterator[Piece]:
    """ids: memory-mapped, an array or a safetensors slice. Rows [n, T] are documents; [n] is cut after each `end`."""
    if len(shape) == 2:
        for row in range(shape[0]):
            yield _checked(ids[row : row + 1][0], encoding), True
        return
    if len(shape) != 1:
        raise ValueError(f"tokens must be [n] or [n, T], got {list(shape)}")
    for begin in range(0, shape[0], TOKENS):
        tokens = _checked(ids[begin : min(begin + TOKENS, shape[0])], encoding)
        ends = [] if encoding.end is None else (np.flatnonzero(tokens == encoding.end) + 1).tolist()
        for start, end in pairwise([0, *ends]):
            yield tokens[start:end], True
        start, is_last = (ends or [0])[-1], begin + TOKENS >= shape[0]
        if start < len(tokens):
            yield tokens[start:], is_last


def _ended(tokens: np.ndarray, encoding: Encoding) -> np.ndarray:
    return tokens if encoding.end is None else np.append(tokens, encoding.end)


def _checked(tokens: np.ndarray, encoding: Encoding) -> np.ndarray:
    """The tokens. Raises ValueError for what are none."""
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ValueError(f"tokens must be whole numbers in one row, got {tokens.dtype} {list(tokens.shape)}")
    limit = 1 << 31 if encoding.tokenizer is None else len(encoding.tokenizer)
    wrong = tokens[(tokens < 0) | (tokens >= limit)] if tokens.size else tokens
    if wrong.size:
        raise ValueError(f"token {wrong[0]} is not in the vocabulary: 0 to {limit - 1}")
    return tokens
