"""The five stages of LongVILA (arXiv 2408.10188, section 4): what trains, on what data, how."""

from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class Stage:
    """trains: the modules whose parameters move; low_rank: q, k, v, o by LoRA; schedule: after the warm-up."""

    name: str
    trains: tuple[str, ...]
    data: Literal["conversations", "packed"] = "conversations"
    low_rank: bool = False
    schedule: Literal["cosine", "constant"] = "cosine"
    learning_rate: float = 2e-5


ALL = ("vision_tower", "mm_projector", "llm")
STAGES = {
    1: Stage("multimodal alignment", ("mm_projector",), learning_rate=1e-3),
    2: Stage("large-scale pre-training", ("mm_projector", "llm"), learning_rate=5e-5),
    3: Stage("short supervised fine-tuning", ALL),
    4: Stage("context extension", ("llm",), data="packed", low_rank=True, schedule="constant"),
    5: Stage("long supervised fine-tuning", ALL),
}


def freeze_for(stage: Stage, model: nn.Module) -> None:
    """Let the parameters of the stage's modules train, and no other."""
    for name, module in model.named_children():
        module.requires_grad_(name in stage.trains)
