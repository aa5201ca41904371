"""Stage 0 of the demo: stands for the pretrained vision tower and language model that LongVILA starts from.

The tower learns with SigLIP's sigmoid loss (arXiv 2303.15343) which of 64 captions are true of which of 64 pictures;
the language model learns text, and to answer questions about a sentence in it. Both know all needles.
"""

from collections.abc import Callable, Sequence
from math import cos, pi

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..infer.haystack import Source
from ..infer.needle_images import ALL_NEEDLES, COLOURS, SHAPES, Needle, Split, render
from ..kernels.attention import attention
from ..model.init import init
from ..model.language import LanguageModel
from ..model.loss import weighted_loss
from ..model.vision import VisionTower
from .text_needles import TextNeedles

SCALE, BIAS = 10.0, -5.0


class Captions(nn.Module):
    """The text side of stage 0: a bag of the embeddings of colour, shape and "photo", and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(len(COLOURS) + len(SHAPES) + 1, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, words: Tensor) -> Tensor:
        """words: float32 [n, num_words], 1 for each word of a caption. Returns unit vectors [n, width]."""
        return F.normalize(self.mlp(words @ self.words.weight), dim=-1)


def words_of(needle: Needle | None) -> np.ndarray:
    """Which words are true of a picture, float32 [num_words]: its colour and shape, or "photo"."""
    names = [*COLOURS, *SHAPES, "photo"]
    true = ("photo",) if needle is None else (needle.colour, needle.shape)
    return np.array([name in true for name in names], dtype=np.float32)


def pretrain_vision(
    tower: VisionTower,
    source: Source,
    *,
    seed: int,
    steps: int = 800,
    batch_size: int = 64,
    lr: float = 3e-3,
    num_pictures: int = 10_000,
) -> tuple[list[float], Captions]:
    """Trains `tower` on pictures drawn once, a fifth of them without needle. Returns the losses and the text side."""
    rng = np.random.default_rng([seed, 0, 0])
    pixels, words = draw_pictures(num_pictures, source, "train", rng)
    captions = Captions(tower.config.hidden_size)
    init(captions, seed)

    def step() -> Tensor:
        rows = torch.from_numpy(rng.integers(len(pixels), size=batch_size))
        asked = words[rows] * _said(batch_size, rng)
        true = asked @ words[rows].T == asked.sum(dim=1, keepdim=True)  # [captions, pictures]
        similarity = captions(asked) @ picture_vectors(tower, pixels[rows]).T
        return -F.logsigmoid((SCALE * similarity + BIAS) * (2.0 * true - 1)).sum() / batch_size

    parameters = [*tower.parameters(), *captions.parameters()]
    return _optimise(step, parameters, steps=steps, lr=lr, title="stage 0, vision"), captions


def pretrain_text(
    model: LanguageModel,
    needles: TextNeedles,
    *,
    seed: int,
    steps: int = 300,
    tokens: int = 1024,
    shortest: int = 34,
    longest: int = 192,
    lr: float = 2e-3,
) -> list[float]:
    """Trains `model` on `tokens` tokens of text needles a step. Returns the losses.

    Documents are short, hardly more than the sentence and the question, in the first half: only so does it learn in
    the time to look the sentence up. In the second half they grow to `longest`.
    """
    rng = np.random.default_rng([seed, 0, 1])
    limits = (round(shortest + max(0, 2 * index / steps - 1) * (longest - shortest)) for index in range(steps))

    def step() -> Tensor:
        length = int(rng.integers(shortest, next(limits) + 1))
        documents = [needles.document(length, rng) for _ in range(tokens // length)]
        hidden, targets, weights = _run(model, documents)
        return weighted_loss(hidden, targets, weights, model.logits) / weights.sum()

    return _optimise(step, list(model.parameters()), steps=steps, lr=lr, title="stage 0, text")


def draw_pictures(num_pictures: int, source: Source, split: Split, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Pictures, every fifth without a needle: pixels float32 [n, 3, size, size] in -1..1, words [n, num_words]."""
    frames = source.frames(num_pictures, rng)
    words = []
    for index in range(num_pictures):
        needle = None if index % 5 == 4 else ALL_NEEDLES[rng.integers(len(ALL_NEEDLES))]
        if needle is not None:
            frames[index] = render(needle, frames[index], split=split, rng=rng)
        words.append(words_of(needle))
    return torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(np.stack(words))


def picture_vectors(tower: VisionTower, pixels: Tensor) -> Tensor:
    """The mean of a picture's patch features as a unit vector, [n, C]."""
    return F.normalize(tower(pixels).mean(dim=1), dim=-1)


@torch.no_grad()
def recognised(
    tower: VisionTower, captions: Captions, source: Source, *, num_pictures: int, seed: int
) -> tuple[float, float]:
    """Shares of test needles whose colour and whose shape the tower tells by the nearest one-word caption."""
    pixels, words = draw_pictures(num_pictures, source, "test", np.random.default_rng(seed))
    shown = words[:, -1] == 0
    scores = picture_vectors(tower, pixels[shown]) @ captions(torch.eye(words.shape[1])).T
    kinds = (slice(0, len(COLOURS)), slice(len(COLOURS), -1))
    right = [scores[:, kind].argmax(1) == words[shown][:, kind].argmax(1) for kind in kinds]
    return right[0].float().mean().item(), right[1].float().mean().item()


def _said(num_captions: int, rng: np.random.Generator) -> Tensor:
    """Which true words a caption says: a fifth the colour, half the shape, the others both."""
    kind = rng.choice(3, size=num_captions, p=(0.2, 0.5, 0.3))
    colour, shape, photo = kind != 1, kind != 0, np.ones_like(kind)
    columns = [colour] * len(COLOURS) + [shape] * len(SHAPES) + [photo]
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))


def _optimise(
    step: Callable[[], Tensor], parameters: list[nn.Parameter], *, steps: int, lr: float, title: str
) -> list[float]:
    """AdamW with a short warm-up and a cosine to a tenth of `lr`."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, foreach=True)
    losses = []
    warmup = min(20, max(1, steps // 10))
    with tqdm(range(steps), desc=title) as progress:
        for index in progress:
            decayed = 0.55 + 0.45 * cos(pi * index / steps)
            optimizer.param_groups[0]["lr"] = lr * min((index + 1) / warmup, decayed)
            loss = step()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


@torch.no_grad()
def answered(model: LanguageModel, needles: TextNeedles, *, length: int, num_documents: int, seed: int) -> float:
    """Share of new text needles' answer tokens, end tokens included, that the model puts first."""
    rng = np.random.default_rng(seed)
    documents = [needles.document(length, rng) for _ in range(num_documents)]
    hidden, targets, weights = _run(model, documents)
    asked = weights == 1
    return (model.logits(hidden[asked]).argmax(-1) == targets[asked]).float().mean().item()


def _run(model: LanguageModel, documents: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, C] of documents of equal length, and the next token and its weight at each, [T]."""
    ids = torch.stack([ids for ids, _ in documents])
    weights = torch.stack([weights for _, weights in documents])
    num, length = ids.shape

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (num, length)) for x in (q, k, v))
        return attention(q, k, v, causal=True).flatten(0, 1)

    hidden = model(model.embed(ids.flatten()), torch.arange(length).repeat(num), attend)
    return hidden, ids.roll(-1, 1).flatten(), F.pad(weights[:, 1:], (0, 1)).flatten()
