"""Conversations as token ids: the Qwen2 chat format, and the visual tokens that stand for frames.

A conversation is a list of turns as LLaVA writes them, {"from": "human" | "gpt", "value": text}, after an
optional "system" one. A placeholder <image> or <video> in a text stands for one medium. In the ids it becomes as
many copies of its media token as the medium has visual tokens; no text ever grows with the frames.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

Kind = Literal["image", "video"]

MEDIA_TOKENS: dict[Kind, str] = {"image": "<image>", "video": "<vila/video>"}
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A conversation in tokens.

    input_ids: int64 [T]. loss_weight: float32 [T], 1 on answers and the <|im_end|> after each, else 0.
    frame_starts: int64 [num_frames], index in input_ids of each frame's first visual token.
    """

    input_ids: Tensor
    loss_weight: Tensor
    frame_starts: Tensor


def build_tokenizer(texts: Iterable[str], extra_words: Sequence[str] = (), vocab_size: int = 1024) -> Qwen2Tokenizer:
    """Train a Qwen2 tokenizer on texts, with the media tokens, the chat template and at most vocab_size tokens.

    extra_words: words that are one token each wherever they stand alone.
    Raises ValueError where vocab_size has no room for all bytes, special tokens and extra words.
    """
    fresh = Qwen2Tokenizer(
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", *MEDIA_TOKENS.values()],
    )
    needed = 256 + len(fresh) + len(extra_words)
    if vocab_size < needed:
        raise ValueError(f"vocab_size {vocab_size} is less than the {needed} tokens that are always there")
    size = vocab_size - len(extra_words)
    tokenizer = fresh.train_new_from_iterator(texts, vocab_size=size, show_progress=False)
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in extra_words])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that `save_pretrained` wrote into a folder. Raises ValueError if it is not one of ours."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    missing = [token for token in MEDIA_TOKENS.values() if token not in tokenizer.get_vocab()]
    if missing:
        raise ValueError(f"{folder}: the tokenizer has no {', '.join(missing)}")
    return tokenizer


def media_token_id(tokenizer: PreTrainedTokenizerBase, kind: Kind) -> int:
    """The id whose copies stand for the visual tokens of an image or a video."""
    return int(tokenizer.convert_tokens_to_ids(MEDIA_TOKENS[kind]))  # type: ignore[arg-type]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Sequence[Mapping[str, str]],
    media: Sequence[tuple[Kind, int]] = (),
    *,
    tokens_per_frame: int,
    newline_token_id: int | None = None,
) -> Encoded:
    """Tokenise a whole conversation, to train on.

    media: kind and number of frames (of an image 1) for each placeholder, in the order of the text.
    newline_token_id: the token that follows the visual tokens of each frame; None for none.
    Raises ValueError for turns that do not alternate from "human" to "gpt", for placeholders that do not match
    the media, and for a chat template that does not mark its answers.
    """
    messages = _messages(conversation, last="gpt")
    encoded = _encode(tokenizer, messages, media, tokens_per_frame, newline_token_id, add_generation_prompt=False)
    if not encoded.loss_weight.any():
        raise ValueError("the tokenizer's chat template marks no answer with {% generation %}")
    return encoded


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Sequence[Mapping[str, str]],
    media: Sequence[tuple[Kind, int]] = (),
    *,
    tokens_per_frame: int,
    newline_token_id: int | None = None,
) -> Encoded:
    """Tokenise a conversation that ends with a question, up to where the answer begins.

    These are the first tokens of what `encode` makes of the answered conversation. Raises as `encode`.
    """
    messages = _messages(conversation, last="human")
    return _encode(tokenizer, messages, media, tokens_per_frame, newline_token_id, add_generation_prompt=True)


def _messages(conversation: Sequence[Mapping[str, str]], *, last: str) -> list[dict[str, str]]:
    """Turns in LLaVA's words -> messages in those of chat templates, with media tokens for placeholders."""
    messages, expected = [], "human"
    for number, turn in enumerate(conversation, 1):
        for field in ("from", "value"):
            if not isinstance(turn, Mapping) or not isinstance(turn.get(field), str):
                raise ValueError(f"turn {number} has no text in its field {field!r}")
        speaker = turn["from"]
        if speaker != expected and not (speaker == "system" and number == 1):
            raise ValueError(f"turn {number} is from {speaker!r}, not {expected!r}")
        if speaker != "system":
            expected = "gpt" if speaker == "human" else "human"
        text = turn["value"].replace("<video>", MEDIA_TOKENS["video"])
        messages.append({"role": ROLES[speaker], "content": text})
    if not messages or messages[-1]["role"] != ROLES[last]:
        raise ValueError(f"the conversation of {len(messages)} turns does not end with one from {last!r}")
    return messages


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    media: Sequence[tuple[Kind, int]],
    tokens_per_frame: int,
    newline_token_id: int | None,
    *,
    add_generation_prompt: bool,
) -> Encoded:
    template: Any = tokenizer.chat_template
    [text], [answers] = render_jinja_template(
        [messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
    )
    # an answer is tokenised by itself, as in generation: no token reaches across its edges
    cuts = [0, *chain.from_iterable(answers), len(text)]
    pieces = [text[start:end] for start, end in pairwise(cuts)]
    ids: list[list[int]] = tokenizer(pieces, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    input_ids = np.fromiter(chain.from_iterable(ids), np.int64)
    is_answer = np.repeat(np.arange(len(ids)) % 2, [len(piece) for piece in ids])
    return _expand(tokenizer, input_ids, is_answer, media, tokens_per_frame, newline_token_id)


def _expand(
    tokenizer: PreTrainedTokenizerBase,
    input_ids: np.ndarray,
    is_answer: np.ndarray,
    media: Sequence[tuple[Kind, int]],
    tokens_per_frame: int,
    newline_token_id: int | None,
) -> Encoded:
    """Each media token -> as many as its medium has visual tokens, with the newlines of its frames."""
    kinds: dict[int, Kind] = {media_token_id(tokenizer, kind): kind for kind in MEDIA_TOKENS}
    is_media = np.isin(input_ids, list(kinds))
    _check_placeholders([kinds[i] for i in input_ids[is_media].tolist()], [kind for kind, _ in media])
    stride = tokens_per_frame + (newline_token_id is not None)
    repeats = np.ones_like(input_ids)
    repeats[is_media] = [num_frames * stride for _, num_frames in media]
    starts = (repeats.cumsum() - repeats)[is_media].tolist()
    per_medium = [
        torch.arange(num_frames) * stride + start for start, (_, num_frames) in zip(starts, media, strict=True)
    ]
    frame_starts = torch.cat([torch.empty(0, dtype=torch.int64), *per_medium])
    expanded = torch.from_numpy(np.repeat(input_ids, repeats))
    if newline_token_id is not None:
        expanded[frame_starts + tokens_per_frame] = newline_token_id
    return Encoded(
        input_ids=expanded,
        loss_weight=torch.from_numpy(np.repeat(is_answer.astype(np.float32), repeats)),
        frame_starts=frame_starts,
    )


def _check_placeholders(placeholders: Sequence[Kind], media: Sequence[Kind]) -> None:
    if len(placeholders) != len(media):
        raise ValueError(f"{len(placeholders)} placeholders for {len(media)} media")
    for number, (placeholder, kind) in enumerate(zip(placeholders, media, strict=True), 1):
        if placeholder != kind:
            raise ValueError(f"placeholder {number} is <{placeholder}>, the medium of that number is of kind {kind}")
