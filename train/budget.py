"""What a run puts on a rank: tokens, frames, and an estimate of bytes, without ranks, data or checkpoint.

Pure functions of a TrainConfig, a ModelConfig and a number of ranks. All of it for the longest sequence that the
config allows, batch_size samples of `context` tokens and `num_frames` frames, on the rank that holds most of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..comm.layout import Layout, balanced, contiguous, zigzag
from ..model.config import ModelConfig
from ..model.features import share
from ..model.low_rank import add_low_rank
from ..model.precision import DTYPES, usual_dtype
from ..model.ulysses import HeadSplit
from ..model.vision import FRAMES_PER_PASS
from ..model.vlm import VisionLanguageModel
from .config import TrainConfig
from .stages import freeze_for

GPU_BYTES = 80 * 10**9  # of an H100's 85.5e9: CUDA, NCCL and fragments take the rest
FLOAT32 = 4
LOSS_ROWS = 1024  # that reach the head at a time


@dataclass(frozen=True)
class Shares:
    """What the groups take in a step, and how a group's ranks share a sequence at its longest.

    data: groups; samples: of a step, over all groups; tokens, frames: of each rank of a group, in sp_rank order.
    """

    data: int
    samples: int
    tokens: tuple[int, ...]
    frames: tuple[int, ...]


def share_out(config: TrainConfig, model: ModelConfig, world_size: int) -> Shares:
    """Who holds how much on `world_size` ranks.

    Raises ValueError for what cannot run there: a grid that does not divide the world, a global batch that the groups
    cannot split, a context without room for the frames.
    """
    data = config.num_groups(world_size)
    accumulation = config.resolve(data=data, num_samples=None).accumulation
    has_frames = config.plan.data == "conversations"
    if has_frames and config.num_frames * model.tokens_per_frame >= config.context:
        raise ValueError(
            f"num_frames {config.num_frames} x {model.tokens_per_frame} tokens leave no room for text in a context of "
            f"{config.context}: take fewer frames, a longer context, or a tower of smaller frames"
        )
    num_frames, ranks = has_frames * config.batch_size * config.num_frames, config.ring * config.ulysses
    frames = [share(num_frames, rank, ranks) for rank in range(ranks)]
    return Shares(
        data,
        samples=config.batch_size * data * accumulation,
        tokens=_layout(config).counts,
        frames=tuple(last - first for first, last in frames),
    )


def _layout(config: TrainConfig) -> Layout:
    grid = {"ring": config.ring, "ulysses": config.ulysses}
    if config.layout == "balanced":
        return balanced(torch.arange(config.batch_size + 1) * config.context, **grid)
    return {"zigzag": zigzag, "contiguous": contiguous}[config.layout](config.batch_size * config.context, **grid)


def estimate(config: TrainConfig, model: ModelConfig, world_size: int) -> dict[str, int]:
    """Bytes on the busiest rank by what they are for; the sum is near the peak, since each is taken at its largest.

    Raises ValueError as `share_out` does.
    """
    shares = share_out(config, model, world_size)
    config = config.resolve(data=shares.data, num_samples=None)
    shaped = shaped_model(config, model)
    return (
        state_bytes(shaped, world_size)
        | gathered_bytes(shaped, config)
        | Activations(config, model, shares).bytes_by_purpose()
    )


def shaped_model(config: TrainConfig, model: ModelConfig) -> VisionLanguageModel:
    """The model as the stage trains it, on the meta device: every shape, and what trains, but no values."""
    with torch.device("meta"):
        shaped = VisionLanguageModel(model)
    freeze_for(config.plan, shaped)
    if rank := config.rank_of_update:
        add_low_rank(shaped.llm, rank=rank, alpha=2 * rank)
    return shaped


def count(parameters: Iterable[nn.Parameter], *, trained: bool = False, pieces: int = 1) -> int:
    """Numbers in the parameters, or in those that train; the first of `pieces` equal ones, cut along dim 0."""
    return sum(-(-len(p) // pieces) * p[0].numel() for p in parameters if p.requires_grad or not trained)


def state_bytes(model: nn.Module, world_size: int) -> dict[str, int]:
    """Parameters, gradients and AdamW's two moments, float32, each cut over all ranks by FSDP2."""
    whole, trained = (count(model.parameters(), trained=trained, pieces=world_size) for trained in (False, True))
    return {"parameters": FLOAT32 * whole, "gradients": FLOAT32 * trained, "AdamW": 2 * FLOAT32 * trained}


def gathered_bytes(model: VisionLanguageModel, config: TrainConfig) -> dict[str, int]:
    """What FSDP2 holds whole for a while: parameters in the computation's dtype, gradients until they are reduced.

    Units are the decoder's layers and the tower. Parameters. shard "layer": those outside the units (embeddings, head,
    projector) from forward to the end of backward, a unit, in forward as it arrived besides, and the next one on its
    way. shard "model": all.
    Gradients. Those outside the units, and of a unit, or in turn of what is outside, the float32 copy that is
    reduced. (For the tower in passes it is the sum of their gradients before.)
    """
    size = element_size(config)
    units = model.units if config.shard == "layer" else []
    sizes, trained_sizes = (
        sorted(count(unit.parameters(), trained=trained) for unit in units) for trained in (False, True)
    )
    outside = count(model.parameters()) - sum(sizes)
    trained_outside = count(model.parameters(), trained=True) - sum(trained_sizes)
    reduced = max((size + FLOAT32) * max(trained_sizes, default=0), FLOAT32 * trained_outside)
    return {
        "gathered parameters": size * (outside + sum(sizes[-2:] + sizes[-1:])),
        "whole gradients": size * trained_outside + reduced,
    }


def element_size(config: TrainConfig) -> int:
    """Bytes of a number in a GPU's computation."""
    return DTYPES[config.dtype or usual_dtype("cuda")].itemsize


class Activations:
    """What forward keeps for backward, and what is there while a layer works.

    T tokens and F frames on the rank, e bytes a number; C hidden, M MLP size, Q = Hq D of the language model. A ring
    part has n = T x ulysses tokens, of which the rank takes q heads and k, v heads (where groups are cut unevenly, one
    for each q head).

    - decoder layer: T e (4 C + 4 M + Q) + n e D (2 q + 2 k) + 4 n q: both norms and their inputs; gate, SiLU, up and
      their product; out by tokens (with Ulysses a copy); q, k, v, out and lse by heads.
    - tower, N = F x patches: N e (8 C' + 2 M') a layer: norms and inputs, q, k, v, out; both sides of the GELU; and
      the patches.
    - kept: each layer's, or with `recompute` a decoder layer's input alone, then the layer at work has its own once
      more; and nothing of the tower but the pixels, then the pass at work has all of its few frames' own, and the
      features stand twice, by passes and joined.
    - gradients at work: of a layer's MLP, T e (3 M + 2 C). Attention: float32 dq and both of q's size in e; in a ring
      two blocks of k, v and four of float32 dk, dv (own, computed, sent, received).
    - pixels: of one sequence. (On the host those of all of a step's, and of the `prefetch` next ones'.)
    - visual features: in the projector V e (8 C' + 2 C) of the V = F x tokens a frame; on their way 2 V e C.
    - logits: 1,024 rows at a time, in e and float32, and their gradient.

    What a frozen part would not keep is counted as if it trained, but for the tower, of which nothing is kept then.
    """

    def __init__(self, config: TrainConfig, model: ModelConfig, shares: Shares) -> None:
        self.config, self.model, self.size = config, model, element_size(config)
        self.tokens, self.frames = max(shares.tokens), max(shares.frames)
        ring_ranks = range(0, len(shares.tokens), config.ulysses)
        self.part = max(sum(shares.tokens[first : first + config.ulysses]) for first in ring_ranks)
        language = model.language
        split = HeadSplit(language.num_attention_heads, language.num_key_value_heads, config.ulysses)
        self.q_heads = max(heads.stop - heads.start for heads in split.q)
        self.kv_heads = max(
            len(split.kv_of_q(rank) or range(heads.stop - heads.start)) for rank, heads in enumerate(split.kv)
        )
        self.frames_at_work = min(self.frames, FRAMES_PER_PASS) if config.recompute else self.frames
        self.tower_trains = "vision_tower" in config.plan.trains

    def bytes_by_purpose(self) -> dict[str, int]:
        language = self.model.language
        tower = self.tower_at_work() - self.kept_by_decoder()  # it works when the decoder keeps nothing
        return {
            "pixels": self.pixels_of_a_step() // self.config.accumulation,
            "visual features": self.visual_features(),
            "tower activations": self.kept_by_tower(),
            "decoder activations": self.kept_by_decoder(),
            "layer at work": max(self.decoder_at_work(), tower),
            "attention at work": self.attention_at_work(),
            "logits": min(LOSS_ROWS, self.tokens) * language.vocab_size * (self.size + 2 * FLOAT32),
        }

    def pixels_of_a_step(self) -> int:
        """Of the frames that the rank encodes in all sequences of a step, uint8."""
        return 3 * self.config.accumulation * self.frames * self.model.vision.image_size**2

    def decoder_layer(self) -> int:
        language = self.model.language
        by_tokens = 4 * language.hidden_size + 4 * language.intermediate_size
        if self.config.ulysses > 1:
            by_tokens += language.num_attention_heads * language.head_dim
        by_heads = 2 * language.head_dim * (self.q_heads + self.kv_heads)
        return self.size * (self.tokens * by_tokens + self.part * by_heads) + FLOAT32 * self.part * self.q_heads

    def tower_values(self) -> int:
        """Of all layers and the patches, for the frames that are encoded at a time."""
        vision = self.model.vision
        row = vision.num_selected_layers * (8 * vision.hidden_size + 2 * vision.intermediate_size)
        return self.size * self.frames_at_work * vision.patch_grid**2 * (row + 3 * vision.patch_size**2)

    def kept_by_decoder(self) -> int:
        """Of all layers; the final norm's input, the rows of it that reach the head, and the rotary angles."""
        language = self.model.language
        row = self.size * self.tokens * language.hidden_size
        ends = 2 * row + FLOAT32 * self.tokens * language.head_dim
        return language.num_hidden_layers * (row if self.config.recompute else self.decoder_layer()) + ends

    def kept_by_tower(self) -> int:
        return 0 if self.config.recompute or not self.tower_trains else self.tower_values()

    def decoder_at_work(self) -> int:
        language = self.model.language
        gradients = self.size * self.tokens * (3 * language.intermediate_size + 2 * language.hidden_size)
        return gradients + self.config.recompute * self.decoder_layer()

    def tower_at_work(self) -> int:
        """A frozen tower has a layer's values, one that trains their gradients and, in passes, the values of all."""
        vision, again = self.model.vision, self.tower_trains and self.config.recompute
        row = self.frames_at_work * (2 * vision.intermediate_size + 2 * vision.hidden_size)
        features = self.config.recompute * 2 * self.frames * vision.hidden_size
        return self.size * vision.patch_grid**2 * (row + features) + again * self.tower_values()

    def attention_at_work(self) -> int:
        in_ring = self.config.ring > 1
        queries = self.q_heads * (FLOAT32 + 2 * self.size)
        keys = 2 * self.kv_heads * (4 * FLOAT32 + 2 * self.size if in_ring else FLOAT32)
        return self.part * self.model.language.head_dim * (queries + keys)

    def visual_features(self) -> int:
        row = 8 * self.model.vision.hidden_size + 4 * self.model.language.hidden_size
        return self.size * self.frames * self.model.tokens_per_frame * row
