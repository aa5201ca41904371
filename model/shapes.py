"""The shapes of the published models, to plan and to measure with where no checkpoint is at hand."""

from typing import Literal

from .config import LanguageConfig, ModelConfig, VisionConfig

ShapeName = Literal["qwen2-1.5b", "qwen2-7b"]

LANGUAGE: dict[ShapeName, LanguageConfig] = {
    "qwen2-1.5b": LanguageConfig(),
    "qwen2-7b": LanguageConfig(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
}


def published_shape(name: ShapeName, image_size: int = 448) -> ModelConfig:
    """SigLIP so400m at `image_size` pixels (384: 196 tokens a frame, 448: 256) before Qwen2-1.5B or Qwen2-7B.

    Raises ValueError for another name.
    """
    if name not in LANGUAGE:
        raise ValueError(f"shape {name!r} is unknown, expected one of {', '.join(LANGUAGE)}")
    return ModelConfig(
        vision=VisionConfig(image_size=image_size),
        language=LANGUAGE[name],
        image_token_id=151_649,
        video_token_id=151_650,
    )
