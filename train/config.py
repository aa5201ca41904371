"""What `longtake train` takes: each field is a key of the TOML file and a flag of the command."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .stages import STAGES, Stage

LEAST = {
    1: ("batch_size", "accumulation", "context", "num_frames", "ring", "ulysses"),
    0: (
        *("steps", "epochs", "global_batch", "warmup", "warmup_ratio", "save_every", "low_rank", "seed", "workers"),
        *("prefetch", "weight_decay", "min_learning_rate", "tower_learning_rate"),
    ),
}
POSITIVE = ("learning_rate", "max_fps", "clip", "rope_theta", "deadline")


@dataclass(frozen=True)
class TrainConfig:
    """A training run of one stage.

    A sequence-parallel group (ring x ulysses ranks) counts as one device:
    global batch = batch_size x data-parallel degree x accumulation. Three things can be said in numbers of this run,
    or relative to the data and the GPUs: steps or epochs, warmup or warmup_ratio, accumulation or global_batch.
    `resolve` turns the second form into the first.

    Args:
        stage: 1 multimodal alignment, 2 pre-training, 3 short fine-tuning, 4 context extension, 5 long fine-tuning.
        model: Checkpoint folder to start from, ours or an official one.
        data: Conversations in the LLaVA format (JSON, JSONL, a .tar shard or a folder of them), for stage 4 a packed
            file (longtake pack); or a mixture of such, a .toml file.
        out: Folder for the checkpoints and the TensorBoard log.
        steps: Optimizer steps; 0: as many as the epochs take.
        epochs: Passes over the data; the last step is filled from the next pass.
        batch_size: Samples that one sequence-parallel group packs into one sequence.
        accumulation: Sequences a step and group.
        global_batch: Samples a step over all groups, however many GPUs there are; 0: what accumulation makes.
        context: Longest sample in tokens; a longer one is a bad sample.
        num_frames: Most frames taken of a video, spread evenly over it.
        max_fps: Most frames taken a second of video.
        learning_rate: Peak; None takes the stage's.
        tower_learning_rate: Factor on it for the vision tower.
        min_learning_rate: Where the cosine ends, as a fraction of the peak.
        warmup: Steps of linear warm-up.
        warmup_ratio: The same as a fraction of all steps.
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
        recompute: Keep only each decoder layer's input and the tower's pixels; run them again in the backward pass.
        dtype: Of the computation; None takes bfloat16 on GPUs, float32 on a CPU. Parameters, gradients and the
            optimizer stay float32.
        on_bad_sample: Stop, or skip and count.
        workers: Processes of a rank that decode frames; 0: the thread that reads ahead does.
        prefetch: Steps read ahead. Each takes num_frames x 3 x size x size bytes of the host for a rank's frames:
            154 MB where 8 ranks share a sequence of 2,048 frames of 448 pixels, times accumulation.
        save_every: Steps between checkpoints; 0 saves at the end only.
        deadline: Seconds that a transfer between ranks may take, before the run ends with a word on which.
    """

    stage: int
    model: Path
    data: Path
    out: Path
    steps: int = 0
    epochs: int = 0
    batch_size: int = 1
    accumulation: int = 1
    global_batch: int = 0
    context: int = 131_072
    num_frames: int = 8
    max_fps: float | None = None
    learning_rate: float | None = None
    tower_learning_rate: float = 1.0
    min_learning_rate: float = 0.0
    warmup: int = 0
    warmup_ratio: float = 0.0
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
    dtype: Literal["float32", "bfloat16"] | None = None
    on_bad_sample: Literal["stop", "skip"] = "stop"
    workers: int = 0
    prefetch: int = 2
    save_every: int = 0
    deadline: float = 600.0

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
        if self.seed >= 2**63:
            raise ValueError(f"seed must be less than 2**63, got {self.seed}")
        self._check_said_once()
        if self.rank_of_update and "llm" not in self.plan.trains:
            raise ValueError(f"low_rank {self.low_rank} has nothing to train: stage {self.stage} leaves the llm alone")

    def _check_said_once(self) -> None:
        if bool(self.steps) == bool(self.epochs):
            raise ValueError(f"steps {self.steps} and epochs {self.epochs}: give one, and leave the other 0")
        if self.warmup and self.warmup_ratio:
            raise ValueError(f"warmup {self.warmup} and warmup_ratio {self.warmup_ratio}: give one, the other 0")
        if self.warmup_ratio >= 1:
            raise ValueError(f"warmup_ratio must be less than 1, got {self.warmup_ratio}: warmup is a number of steps")
        if self.global_batch and self.accumulation > 1:
            raise ValueError(
                f"accumulation {self.accumulation} and global_batch {self.global_batch}: leave accumulation 1, "
                "global_batch sets it, or make global_batch 0"
            )

    def num_groups(self, world_size: int) -> int:
        """Sequence-parallel groups, the data-parallel degree. Raises ValueError where the grid does not divide."""
        groups, rest = divmod(world_size, self.ring * self.ulysses)
        if rest or not groups:
            raise ValueError(
                f"ring {self.ring} x ulysses {self.ulysses} = {self.ring * self.ulysses} ranks "
                f"do not divide a world of {world_size}: set --ring and --ulysses"
            )
        return groups

    def resolve(self, *, data: int, num_samples: int | None) -> "TrainConfig":
        """The run in plain numbers, on `data` sequence-parallel groups and num_samples of data.

        accumulation stands for global_batch, steps for epochs and warmup for warmup_ratio, which are then 0; what was
        left to the stage is filled in. Where num_samples is None, what depends on it stays. Raises ValueError where
        the groups cannot split the global batch.
        """
        accumulation = self._split(data)
        steps = self.steps if num_samples is None else self.steps_left(data=data, num_samples=num_samples)
        known = replace(
            self,
            accumulation=accumulation,
            global_batch=0,
            learning_rate=self.plan.learning_rate if self.learning_rate is None else self.learning_rate,
            schedule=self.schedule or self.plan.schedule,
            low_rank=self.rank_of_update,
        )
        if not steps:
            return known
        warmup = self.warmup or math.ceil(self.warmup_ratio * steps)
        return replace(known, steps=steps, epochs=0, warmup=warmup, warmup_ratio=0.0)

    def samples_per_step(self, data: int) -> int:
        """Of all `data` groups together."""
        return self.batch_size * data * self._split(data)

    def steps_left(self, *, data: int, num_samples: int, step: int = 0, consumed: int = 0) -> int:
        """Steps on `data` groups from where a run stands, after `step` steps and `consumed` samples, to its end."""
        if self.epochs:
            return math.ceil((self.epochs * num_samples - consumed) / self.samples_per_step(data))
        return self.steps - step

    def _split(self, data: int) -> int:
        """Sequences a step and group."""
        accumulation, rest = divmod(self.global_batch, self.batch_size * data)
        if not rest:
            return accumulation or self.accumulation
        cure = "take larger groups, ring x ulysses, so that they are fewer"
        if self.global_batch % data == 0:
            cure = f"take batch_size {math.gcd(self.batch_size, self.global_batch // data)}"
        raise ValueError(
            f"global_batch {self.global_batch} is no multiple of batch_size {self.batch_size} x {data} "
            f"data-parallel groups: {cure}"
        )

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
