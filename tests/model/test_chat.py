from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.model.chat import (
    MEDIA_TOKENS,
    Encoded,
    Kind,
    build_tokenizer,
    encode,
    encode_prompt,
    load_tokenizer,
    media_token_id,
)
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

WORDS = ["red", "blue", "circle", "colour"]
TEXTS = [Path(__file__).read_text(encoding="utf-8")]
LONG = "which of these colour names is shared by all of the frames, été ?\n"

Turns = list[dict[str, str]]


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return build_tokenizer(TEXTS, WORDS, 400)


def turns(*values: str) -> Turns:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def answer_text(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> str:
    return str(tokenizer.decode(encoded.input_ids[encoded.loss_weight == 1]))


def test_the_vocabulary_has_no_more_tokens_than_asked_for(tokenizer: Qwen2Tokenizer) -> None:
    assert 400 - len(WORDS) <= len(tokenizer) <= 400
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_a_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size 200 is less than the 262 "):
        build_tokenizer(TEXTS, ["red"], 200)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("before", ["", " ", "\n", "a ", "<|im_start|>assistant\n"])
@pytest.mark.parametrize("after", ["", " ", ".", "<|im_end|>"])
def test_an_extra_word_that_stands_alone_is_one_token(
    tokenizer: Qwen2Tokenizer, word: str, before: str, after: str
) -> None:
    ids = tokenizer.encode(before + word + after)
    without = tokenizer.encode(before) + tokenizer.encode(after)
    assert len(ids) == len(without) + 1
    assert tokenizer.convert_tokens_to_ids(word) in ids


def test_an_extra_word_splits_no_longer_word() -> None:
    """Longer words come out as they do from a tokenizer that knows no extra words."""
    with_word = build_tokenizer(TEXTS, ["zqx"], 381)
    without = build_tokenizer(TEXTS, [], 380)
    assert with_word.tokenize("azqx zqxs azqxs") == without.tokenize("azqx zqxs azqxs")
    assert with_word.tokenize("a zqx s") != without.tokenize("a zqx s")


@pytest.mark.parametrize("text", ["shared red, (blue)\n\n circle", "été 漢字 \x00 🙂 <image> <vila/video>\t", ""])
def test_decoding_gives_the_text_back(tokenizer: Qwen2Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_saved_tokenizer_is_the_same_when_loaded(tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    conversation = turns(f"<video>{LONG}", "red")
    expected = encode(tokenizer, conversation, [("video", 2)], tokens_per_frame=3)
    actual = encode(loaded, conversation, [("video", 2)], tokens_per_frame=3)
    assert torch.equal(actual.input_ids, expected.input_ids)
    assert torch.equal(actual.loss_weight, expected.loss_weight)
    assert loaded.eos_token == "<|im_end|>" and isinstance(loaded, Qwen2Tokenizer)


def test_a_tokenizer_without_media_tokens_is_refused(tmp_path: Path) -> None:
    Qwen2Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}: .*<image>, <vila/video>"):
        load_tokenizer(tmp_path)


def test_the_chat_format_is_that_of_qwen2(tokenizer: Qwen2Tokenizer) -> None:
    conversation = [{"from": "system", "value": "Be brief."}, *turns(LONG, "red", "And ?", "blue")]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{LONG}<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nAnd ?<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>\n"
    )
    encoded = encode(tokenizer, conversation, tokens_per_frame=1)
    assert tokenizer.decode(encoded.input_ids) == expected
    assert encoded.input_ids.dtype == torch.int64 and encoded.loss_weight.dtype == torch.float32


def test_ids_are_those_of_transformers_own_chat_template(tokenizer: Qwen2Tokenizer) -> None:
    messages = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "a red circle"}]
    theirs: Any = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    ours = encode(tokenizer, turns(LONG, "a red circle"), tokens_per_frame=1)
    assert torch.equal(ours.input_ids, theirs["input_ids"][0])
    assert ours.loss_weight.tolist() == torch.as_tensor(theirs["assistant_masks"]).flatten().tolist()


def test_loss_is_on_answers_and_their_ends_alone(tokenizer: Qwen2Tokenizer) -> None:
    encoded = encode(tokenizer, turns("What ?", "a red circle", "And ?", "blue"), tokens_per_frame=1)
    assert answer_text(tokenizer, encoded) == "a red circle<|im_end|>blue<|im_end|>"


@pytest.mark.parametrize("answer", ["red", " red", "\nred\n", "", "a\n\nb", LONG, "<|im_end|>"])
def test_prompt_and_answer_are_the_beginning_of_the_whole(tokenizer: Qwen2Tokenizer, answer: str) -> None:
    conversation = turns(f"<video>{LONG}", "ok", "<image>And ?\n", answer)
    media: list[tuple[Kind, int]] = [("video", 3), ("image", 1)]
    whole = encode(tokenizer, conversation, media, tokens_per_frame=2)
    prompt = encode_prompt(tokenizer, conversation[:-1], media, tokens_per_frame=2)
    answered = torch.cat([prompt.input_ids, torch.tensor(tokenizer.encode(f"{answer}<|im_end|>"))])
    assert torch.equal(whole.input_ids[: len(answered)], answered)
    assert torch.equal(whole.loss_weight[: len(prompt.input_ids)], prompt.loss_weight)
    assert whole.loss_weight[len(prompt.input_ids) : len(answered)].all()
    assert torch.equal(whole.frame_starts, prompt.frame_starts)


def test_each_placeholder_becomes_the_visual_tokens_of_its_medium(tokenizer: Qwen2Tokenizer) -> None:
    text = "one <image> two <video>\nthree <image><video>"
    media: list[tuple[Kind, int]] = [("image", 1), ("video", 4), ("image", 1), ("video", 1)]
    encoded = encode(tokenizer, turns(text, "red"), media, tokens_per_frame=5)
    ids, expected = encoded.input_ids, []
    image, video = (media_token_id(tokenizer, kind) for kind in ("image", "video"))
    for start in encoded.frame_starts.tolist():
        [token] = set(ids[start : start + 5].tolist())
        expected.append(token)
    assert expected == [image, *[video] * 4, image, video]
    assert int(torch.isin(ids, torch.tensor([image, video])).sum()) == 7 * 5
    rest = ids[~torch.isin(ids, torch.tensor([image, video]))]
    assert str(tokenizer.decode(rest)).startswith("<|im_start|>user\none  two \nthree <|im_end|>")


def test_a_newline_follows_each_frame_and_bears_no_loss(tokenizer: Qwen2Tokenizer) -> None:
    conversation = turns("<video> and <image>", "red")
    media: list[tuple[Kind, int]] = [("video", 2), ("image", 1)]
    [newline] = tokenizer.encode("\n")
    plain = encode(tokenizer, conversation, media, tokens_per_frame=3)
    ended = encode(tokenizer, conversation, media, tokens_per_frame=3, newline_token_id=newline)
    places = ended.frame_starts + 3
    assert len(places) == 3 and ended.input_ids[places].tolist() == [newline] * 3
    assert not ended.loss_weight[places].any()
    others = torch.ones(len(ended.input_ids), dtype=torch.bool)
    others[places] = False
    assert torch.equal(ended.input_ids[others], plain.input_ids)
    assert torch.equal(ended.loss_weight[others], plain.loss_weight)
    assert torch.equal(ended.frame_starts, plain.frame_starts + torch.arange(3))


def test_a_million_visual_tokens_do_not_pass_through_the_tokenizer(tokenizer: Qwen2Tokenizer) -> None:
    conversation = turns("<video>", "red")
    short = encode(tokenizer, conversation, [("video", 1)], tokens_per_frame=1)
    long = encode(tokenizer, conversation, [("video", 6000)], tokens_per_frame=196)
    assert len(long.input_ids) == len(short.input_ids) - 1 + 6000 * 196
    start = int(short.frame_starts[0])
    assert torch.equal(long.frame_starts, start + 196 * torch.arange(6000))
    assert torch.equal(long.input_ids[start + 6000 * 196 :], short.input_ids[start + 1 :])


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([], "0 turns"),
        (turns("a"), "does not end with one from 'gpt'"),
        ([{"from": "gpt", "value": "a"}], "turn 1 is from 'gpt', not 'human'"),
        ([*turns("a", "b"), {"from": "gpt", "value": "c"}], "turn 3 is from 'gpt', not 'human'"),
        ([{"from": "user", "value": "a"}], "turn 1 is from 'user'"),
        ([*turns("a", "b"), {"from": "system", "value": "c"}], "turn 3 is from 'system'"),
        ([{"value": "a"}], "turn 1 has no text in its field 'from'"),
        ([{"from": "human", "value": 3}], "turn 1 has no text in its field 'value'"),
        (["hello"], "turn 1 has no text"),
    ],
)
def test_turns_that_do_not_alternate_are_refused(tokenizer: Qwen2Tokenizer, conversation: Turns, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        encode(tokenizer, conversation, tokens_per_frame=1)


def test_a_prompt_ends_with_a_question(tokenizer: Qwen2Tokenizer) -> None:
    with pytest.raises(ValueError, match="2 turns does not end with one from 'human'"):
        encode_prompt(tokenizer, turns("a", "b"), tokens_per_frame=1)


@pytest.mark.parametrize(
    ("text", "media", "reason"),
    [
        ("<video>", [], "1 placeholders for 0 media"),
        ("none", [("image", 1)], "0 placeholders for 1 media"),
        ("<image><video>", [("image", 1), ("image", 1)], "placeholder 2 is <video>"),
        (f"<video>{MEDIA_TOKENS['video']}", [("video", 8)], "2 placeholders for 1 media"),
    ],
)
def test_placeholders_that_do_not_match_the_media_are_refused(
    tokenizer: Qwen2Tokenizer, text: str, media: list[tuple[Kind, int]], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        encode(tokenizer, turns(text, "red"), media, tokens_per_frame=1)


def test_a_template_that_marks_no_answers_is_refused() -> None:
    tokenizer = build_tokenizer(TEXTS, [], 300)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="marks no answer"):
        encode(tokenizer, turns("a", "b"), tokens_per_frame=1)
