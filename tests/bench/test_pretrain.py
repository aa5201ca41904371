"""Stage 0 of the demo: a few steps of it learn, and what it measures is what it says."""

import numpy as np
import torch
from longtake.bench.demo_data import WORDS, demo_config, library_texts
from longtake.bench.pretrain import answered, draw_pictures, pretrain_text, pretrain_vision, recognised, words_of
from longtake.bench.text_needles import TextNeedles
from longtake.infer.haystack import Photographs
from longtake.infer.needle_images import Needle
from longtake.model.chat import build_tokenizer
from longtake.model.init import init
from longtake.model.language import LanguageModel
from longtake.model.vision import VisionTower

SOURCE = Photographs(names=("coffee.png",))
CONFIG = demo_config(vocab_size=1024, image_token_id=0, video_token_id=1)


def test_words_are_those_that_are_true_of_a_picture():
    assert words_of(None).nonzero()[0].tolist() == [14]
    assert words_of(Needle("red", "circle")).nonzero()[0].tolist() == [0, 8]
    assert words_of(Needle("red", "arrow")).nonzero()[0].tolist() == [0]


def test_every_fifth_picture_is_without_needle():
    pixels, words = draw_pictures(20, SOURCE, "train", np.random.default_rng(0))
    assert pixels.shape == (20, 3, 32, 32) and pixels.abs().max() <= 1
    assert words[:, -1].nonzero().flatten().tolist() == [4, 9, 14, 19]


def test_a_few_steps_teach_the_tower_colours():
    tower = VisionTower(CONFIG.vision)
    init(tower, 0)
    losses, captions = pretrain_vision(tower, SOURCE, seed=0, steps=30, num_pictures=500)
    colour, _ = recognised(tower, captions, SOURCE, num_pictures=200, seed=1)
    assert len(losses) == 30 and losses[-1] < 0.6 * losses[0]
    assert colour > 0.25  # by chance 1/8


def test_pretraining_follows_from_the_seed():
    runs = []
    for _ in range(2):
        tower = VisionTower(CONFIG.vision)
        init(tower, 1)
        runs.append(pretrain_vision(tower, SOURCE, seed=3, steps=3, num_pictures=100)[0])
    assert runs[0] == runs[1]


def test_a_few_steps_lower_the_loss_on_text():
    texts = library_texts(max_chars=50_000)
    needles = TextNeedles(build_tokenizer(texts, WORDS, 1024), texts)
    model = LanguageModel(CONFIG.language)
    init(model, 0)
    losses = pretrain_text(model, needles, seed=0, steps=12, tokens=512, longest=48)
    assert np.mean(losses[-3:]) < 0.7 * losses[0]


def test_answered_counts_right_tokens():
    texts = library_texts(max_chars=50_000)
    needles = TextNeedles(build_tokenizer(texts, WORDS, 1024), texts)
    model = LanguageModel(CONFIG.language)
    init(model, 0)
    share = answered(model, needles, length=64, num_documents=8, seed=0)
    assert 0 <= share < 0.2
    assert torch.is_grad_enabled()
