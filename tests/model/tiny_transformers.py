"""Tiny random models of Transformers, the same on every rank, built from configs alone."""

from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
)

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
WINDOW = 9
Model = TypeVar("Model", bound=nn.Module)


def qwen2(**changes: Any) -> PreTrainedModel:
    return settled(Qwen2ForCausalLM(Qwen2Config(**SIZES | changes)))


def llama() -> PreTrainedModel:
    return settled(LlamaForCausalLM(LlamaConfig(**SIZES)))


def qwen3() -> PreTrainedModel:
    return settled(Qwen3ForCausalLM(Qwen3Config(**SIZES)))


def mistral() -> PreTrainedModel:
    """A window in every layer."""
    return settled(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)))


def alternating() -> PreTrainedModel:
    """A full layer, then one with a window."""
    return qwen2(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)


def uneven() -> PreTrainedModel:
    """9 heads in groups of 3, which 2 ranks cannot halve."""
    return qwen2(num_attention_heads=9, num_key_value_heads=3)


def lora(model: PreTrainedModel) -> Any:
    """PEFT's adapters on the queries and values of the decoder, the same on every rank. They alone learn."""
    from peft import LoraConfig, get_peft_model  # slow to import

    torch.manual_seed(7)
    decoder = r".*(?<!encoder)\.layers\.\d+\.self_attn\.(q_proj|v_proj)"
    return get_peft_model(model, LoraConfig(r=4, target_modules=decoder, init_lora_weights=False))


TEXT = {
    "qwen2": qwen2,
    "llama": llama,
    "qwen3": qwen3,
    "mistral": mistral,
    "alternating": alternating,
    "uneven": uneven,
}


@torch.no_grad()
def settled(model: Model, seed: int = 11) -> Model:
    """Weights of unit gain, so that attention is sharp and tokens vary; without dropout."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            fan_in = 1 if "embed" in name else parameter.shape[1:].numel()
            parameter.normal_(0, fan_in**-0.5, generator=generator)
        else:
            parameter.normal_(float(name.endswith("weight")), 0.1, generator=generator)
    return model.eval()


IMAGE, VIDEO, START, END = 57, 58, 59, 60  # token ids at the end of the vocabulary
NUM_WORDS = 57


def siglip(image_size: int = 8) -> SiglipVisionConfig:
    """Patches of 4 x 4 pixels."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return SiglipVisionConfig(**sizes, image_size=image_size, patch_size=4)


def llava() -> PreTrainedModel:
    """SigLIP and Qwen2; 4 tokens an image."""
    config = LlavaConfig(
        vision_config=siglip(),
        text_config=Qwen2Config(**SIZES),
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        image_seq_length=4,
    )
    return settled(LlavaForConditionalGeneration(config))


def llava_onevision() -> PreTrainedModel:
    """As Llava, with images in crops of 9 patches, whose features are packed with newlines, and frames of 4 tokens."""
    config = LlavaOnevisionConfig(
        vision_config=siglip(12),
        text_config=Qwen2Config(**SIZES),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[12, 12], [12, 24], [24, 12]],
        vision_feature_select_strategy="full",
    )
    return settled(LlavaOnevisionForConditionalGeneration(config))


def internvl() -> PreTrainedModel:
    """16 patches an image of 8 x 8 pixels, 4 a token."""
    vision = InternVLVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[8, 8],
        patch_size=[2, 2],
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**SIZES),
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return settled(InternVLForConditionalGeneration(config))


QWEN_TEXT = SIZES | {"bos_token_id": None, "eos_token_id": None}
QWEN_TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
QWEN_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 2,
    "out_hidden_size": SIZES["hidden_size"],
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def qwen2_vl() -> PreTrainedModel:
    """Patches of 2 x 2 pixels and two frames, 4 a token; each frame sees itself."""
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2}
    config = Qwen2VLConfig(text_config=QWEN_TEXT, vision_config=vision, tie_word_embeddings=False, **QWEN_TOKENS)
    return settled(Qwen2VLForConditionalGeneration(config))


def qwen2_5_vl() -> PreTrainedModel:
    """As Qwen2-VL, with windows of 4 x 4 patches in two layers of three."""
    config = Qwen2_5_VLConfig(
        text_config=QWEN_TEXT,
        vision_config=QWEN_VISION | {"window_size": 8, "fullatt_block_indexes": [1]},
        tie_word_embeddings=False,
        **QWEN_TOKENS,
    )
    return settled(Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl() -> PreTrainedModel:
    """As Qwen2.5-VL, with features of an inner vision layer added to the first language layer's (deepstack)."""
    config = Qwen3VLConfig(
        text_config=QWEN_TEXT,
        vision_config=QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [1]},
        tie_word_embeddings=False,
        **QWEN_TOKENS,
    )
    return settled(Qwen3VLForConditionalGeneration(config))


def qwen3_vl_moe() -> PreTrainedModel:
    """As Qwen3-VL, with two of four experts a token."""
    config = Qwen3VLMoeConfig(
        text_config=QWEN_TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        vision_config=QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [1]},
        tie_word_embeddings=False,
        **QWEN_TOKENS,
    )
    return settled(Qwen3VLMoeForConditionalGeneration(config))


VISION = {
    "llava": llava,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
}


def gemma3() -> PreTrainedModel:
    """Image tokens see each other both ways, inside a window in two layers of three."""
    text = SIZES | {
        "num_hidden_layers": 3,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "pad_token_id": 0,
        "query_pre_attn_scalar": 8,
    }
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**text),
        vision_config=siglip(),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return settled(Gemma3ForConditionalGeneration(config))
