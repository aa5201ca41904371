"""Documents of plain text with the sentence " a red circle ." somewhere, and a question about it at the end.

A document is a training row whose visual tokens are tokens of text instead: it teaches to look far back in text alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..infer.needle_images import ALL_NEEDLES, Needle
from ..model.chat import Encoded, encode
from .demo_data import CAPTION_QUESTION

TEXT_WEIGHT = 0.05
SHARES = (0.4, 0.4, 0.2)  # of the questions for colour, shape and caption


class TextNeedles:
    """Draws documents: the text has weight 0.05 in the loss, the sentence none, the answer and its end token 1."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self.text = _ids(tokenizer, "\n".join(texts))
        self.sentences = [_ids(tokenizer, f" a {needle.colour} {needle.shape} .") for needle in ALL_NEEDLES]
        self.forms = [_forms(tokenizer, needle) for needle in ALL_NEEDLES]

    def document(self, length: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """input_ids int64 [length] and the weight of each, float32 [length].

        Raises ValueError where the question leaves no room for text.
        """
        needle = rng.integers(len(ALL_NEEDLES))
        sentence, form = self.sentences[needle], self.forms[needle][rng.choice(3, p=SHARES)]
        num_text = length - (len(form.input_ids) - 1) - len(sentence)
        if num_text < 1:
            raise ValueError(f"a text needle of {length} tokens is {1 - num_text} too short")
        start, cut = rng.integers(len(self.text) - num_text), rng.integers(num_text + 1)
        text, weight = self.text[start : start + num_text], torch.full((num_text,), TEXT_WEIGHT)
        slot, silent = int(form.frame_starts[0]), torch.zeros(len(sentence))
        ids = (form.input_ids[:slot], text[:cut], sentence, text[cut:], form.input_ids[slot + 1 :])
        weights = (form.loss_weight[:slot], weight[:cut], silent, weight[cut:], form.loss_weight[slot + 1 :])
        return torch.cat(ids), torch.cat(weights)


def _forms(tokenizer: PreTrainedTokenizerBase, needle: Needle) -> list[Encoded]:
    """A conversation for each question, about an image of a single token, which stands where the text will."""
    pairs = [*needle.questions, (CAPTION_QUESTION, f"a {needle.colour} {needle.shape} .")]
    return [
        encode(
            tokenizer,
            [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
            [("image", 1)],
            tokens_per_frame=1,
        )
        for question, answer in pairs
    ]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False))
