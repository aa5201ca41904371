"""What `longtake train` takes: each field is a key of the TOML file and a flag of the command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .stages import STAGES, Stage

LEAST = {
    1: ("steps", "batch_size", "accumulation", "context", "num_frames", "ring", "ulysses"),
    0: ("warmup", "save_every", "low_rank", "seed", "weight_decay", "min_learning_rate", "tower_learning_rate"),
}
POSITIVE = ("learning_rate", "max_fps", "clip", "rope_theta")


@dataclass(frozen=True)
class TrainConfig:
    """A training run of one stage.

    A sequence-parallel group (ring x ulysses ranks) counts as one device:
    global batch = batch_size x data-parallel degree x accumulation.

    Args:
        stage: 1 multimodal alignment, 2 pre-training, 3 short fine-tuning, 4 context extension, 5 long fine-tuning.
        model: Checkpoint folder to start from.
        data: JSONL conversations in the LLaVA format, or for stage 4 a packed token file.
        out: Folder for the checkpoints and the TensorBoard log.
        steps: Optimizer steps.
        batch_size: Samples that one sequence-parallel group packs into one sequence.
        accumulation: Sequences a step and group.
        context: Longest sample in tokens; a longer one is a bad sample.
        num_frames: Most frames taken of a video, spread evenly over it.
        max_fps: Most frames taken a second of video.
        learning_rate: Peak; None takes the stage's.
        tower_learning_rate: Factor on it for the vision tower.
        min_learning_rate: Where the cosine ends, as a fraction of the peak.
        warmup: Steps of linear warm-up.
        schedule: After the warm-up; None takes the stage's.
        weight_decay: Of AdamW, on matrices.
        betas: Of AdamW.
        clip: Largest gradient norm over all ranks.
        low_rank: Rank of the low-rank update of q, k, v, o; 0 trains them whole; None takes the stage's.
        rope_theta: New base of the rotary embedding; None keeps the model's.
        seed: Orders the data.
        ring: Ranks of the key ring (between nodes).
        ulysses: Ranks of the all-to-all over heads (inside a node).
        layout: How a sequence's tokens are dealt out.
        route: How keys travel round the ring: straight from their owner, or from neighbour to neighbour.
        shard: Parameters gathered at once by FSDP2: the whole model, or layer by layer.
        recompute: Recompute each layer in the backward pass instead of keeping its activations.
        dtype: Of the computation; parameters, gradients and the optimizer stay float32.
        on_bad_sample: Stop, or skip and count.
        save_every: Steps between checkpoints; 0 saves at the end only.
    """

    stage: int
    model: Path
    data: Path
    out: Path
    steps: int
    batch_size: int = 1
    accumulation: int = 1
    context: int = 131_072
    num_frames: int = 8
    max_fps: float | None = None
    learning_rate: float | None = None
    tower_learning_rate: float = 1.0
    min_learning_rate: float = 0.0
    warmup: int = 0
    schedule: Literal["cosine", "constant"] | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    low_rank: int | None = None
    rope_theta: float | None = None
    seed: int = 0
    ring: int = 1
    ulysses: int = 1
    layout: Literal["balanced", "zigzag", "contiguous"] = "balanced"
    route: Literal["direct", "relay"] = "direct"
    shard: Literal["model", "layer"] = "layer"
    recompute: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    on_bad_sample: Literal["stop", "skip"] = "stop"
    save_every: int = 0

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(map(str, STAGES))}, got {self.stage}")
        for least, names in LEAST.items():
            for name in names:
                if (value := getattr(self, name)) is not None and value < least:
                    raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in POSITIVE:
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be more than 0, got {value}")
        if self.rank_of_update and "llm" not in self.plan.trains:
            raise ValueError(f"low_rank {self.low_rank} has nothing to train: stage {self.stage} leaves the llm alone")

    @property
    def plan(self) -> Stage:
        """The row of the stage table."""
        return STAGES[self.stage]

    @property
    def rank_of_update(self) -> int:
        """Rank of the low-rank update (8 as published), 0 for whole matrices."""
        if self.low_rank is not None:
            return self.low_rank
        return 8 if self.plan.low_rank else 0
