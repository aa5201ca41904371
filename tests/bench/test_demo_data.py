"""The demo's training data: what is shown, what is asked, and that ranks do not matter."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from longtake.bench.demo_data import MIXES, WORDS, Mix, captions_of, demo_config, library_texts, plan_clips, write_rows
from longtake.bench.text_needles import TEXT_WEIGHT, TextNeedles
from longtake.infer.haystack import Photographs, write_clips
from longtake.infer.needle_images import COLOURS, SHAPES, Needle
from longtake.model.chat import build_tokenizer, media_token_id
from longtake.model.vlm import VisionLanguageModel
from longtake.train.conversations import ConversationDataset
from longtake.train.rows import JsonRows

TEXTS = library_texts(max_chars=50_000)
TOKENIZER = build_tokenizer(TEXTS, WORDS, 1024)
NEEDLES = TextNeedles(TOKENIZER, TEXTS)


def test_the_model_has_fewer_than_five_million_parameters():
    ids = {f"{kind}_token_id": media_token_id(TOKENIZER, kind) for kind in ("image", "video")}
    config = demo_config(vocab_size=len(TOKENIZER), **ids)
    model = VisionLanguageModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 5e6
    assert config.tokens_per_frame == 4


def test_each_answer_is_one_token():
    for word in [*COLOURS, *SHAPES]:
        assert len(TOKENIZER.encode(word)) == 1


@pytest.mark.parametrize("stage", MIXES)
def test_no_training_clip_shows_a_held_out_needle(stage: int):
    clips = plan_clips(stage, MIXES[stage], seed=0)
    assert not any(clip.needle and clip.needle.held_out for clip in clips)
    assert all(clip.split == "train" for clip in clips)


def test_lengths_are_drawn_by_their_shares():
    clips = plan_clips(5, Mix(num_clips=4000, lengths={16: 3.0, 64: 1.0}), seed=0)
    count = Counter(clip.num_frames for clip in clips)
    assert abs(count[16] - 3000) < 5 * (4000 * 0.75 * 0.25) ** 0.5  # five standard deviations


def test_a_clip_does_not_depend_on_how_many_there_are():
    few, many = (plan_clips(3, Mix(num_clips=n, lengths=MIXES[3].lengths), seed=1) for n in (5, 50))
    assert many[:5] == few


def test_files_and_rows_are_what_training_reads(tmp_path: Path):
    clips = plan_clips(3, Mix(num_clips=12, lengths={1: 1, 4: 1}), seed=2)
    for part in range(3):
        write_clips(tmp_path / "media", clips[part::3], source=Photographs(names=("coffee.png",)))
    num_rows = write_rows(tmp_path / "rows.jsonl", clips, media="media")
    data = ConversationDataset(
        JsonRows(tmp_path / "rows.jsonl"), tokenizer=TOKENIZER, tokens_per_frame=4, num_frames=8, context=100
    )
    frames = [len(data[index].frame_starts) for index in range(len(data))]
    expected = [clip.num_frames for clip in clips if clip.needle for _ in clip.needle.questions]
    assert len(data) == num_rows and frames == expected


def test_a_row_asks_one_question(tmp_path: Path):
    clips = plan_clips(2, Mix(num_clips=20, lengths={1: 1.0}), seed=3)
    write_rows(tmp_path / "rows.jsonl", clips, media="media")
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        human, gpt = json.loads(line)["conversations"]
        assert gpt["value"] in (COLOURS if "colour" in human["value"] else SHAPES)


def test_captions_name_only_what_has_a_name():
    assert captions_of(None) == ["a photo ."]
    assert captions_of(Needle("red", "star")) == ["a red shape .", "a star .", "a red star ."]
    assert captions_of(Needle("red", "arrow")) == ["a red shape ."]
    assert captions_of(Needle("other", "star")) == ["a star ."]


@pytest.mark.parametrize("length", [40, 128])
def test_a_text_needle_has_its_length_and_the_answer_in_its_text(length: int):
    rng = np.random.default_rng(4)
    for _ in range(20):
        ids, weights = NEEDLES.document(length, rng)
        assert ids.shape == weights.shape == (length,)
        answer = str(TOKENIZER.decode(ids[weights == 1])).removesuffix("<|im_end|>")
        before = TOKENIZER.decode(ids[: int((weights == 1).nonzero()[0])])
        assert answer in before
        assert set(weights.unique().tolist()) <= {0.0, torch.tensor(TEXT_WEIGHT).item(), 1.0}


def test_a_text_needle_without_room_is_refused():
    with pytest.raises(ValueError, match="10 tokens"):
        NEEDLES.document(10, np.random.default_rng(0))
