"""Tiny models for tests: the real modules, at a few thousand parameters, that can be built anew on every rank."""

import torch
from longtake.model.config import LanguageConfig, ModelConfig, VisionConfig
from longtake.model.vlm import VisionLanguageModel

IMAGE_TOKEN, VIDEO_TOKEN = 4, 5


def tiny_config(
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    vocab_size: int = 64,
    image_token_id: int = IMAGE_TOKEN,
    video_token_id: int = VIDEO_TOKEN,
) -> ModelConfig:
    """4 visual tokens a frame of 16 x 16 pixels; 2 language layers of `num_heads` heads of 8."""
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
        language=LanguageConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=8,
            rope_theta=1e4,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        ),
        image_token_id=image_token_id,
        video_token_id=video_token_id,
    )


@torch.no_grad()
def random_model(config: ModelConfig, *, seed: int) -> VisionLanguageModel:
    """Weights of unit gain, so that attention is sharp and tokens vary; the same on every rank."""
    model, generator = VisionLanguageModel(config), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            fan_in = 1 if "embed" in name else parameter.shape[1:].numel()
            parameter.normal_(0, fan_in**-0.5, generator=generator)
        else:
            mean = float(name.endswith("weight"))  # of a norm, else a bias
            parameter.normal_(mean, 0.1, generator=generator)
    return model.eval()
