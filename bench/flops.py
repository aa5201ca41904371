"""Floating-point operations of a training step: those that the model needs, whatever the code does more."""

from collections.abc import Sequence

from ..model.config import LanguageConfig, ModelConfig, VisionConfig

MATRIX = 6  # of a weight and a row: 2 forward, 2 for the input's gradient, 2 for the weight's
ATTENTION = 12  # of a visible pair and channel: 2 products forward, 4 backward, each 2


def step_flops(config: ModelConfig, lengths: Sequence[int], *, num_frames: int, num_targets: int) -> dict[str, int]:
    """Of forward and backward with all parameters training, by part of the model; their sum is what MFU counts.

    lengths: tokens of each document; num_targets: tokens with a weight in the loss, which alone reach the head.
    With T tokens, N frames of P patches, and A = sum over documents of length (length + 1) / 2:

        language            6 T layers (C (2 Hq + 2 Hkv) D + 3 C I)
        head                6 num_targets C vocabulary
        attention           12 A layers Hq D
        tower               6 N P layers (4 C^2 + 2 C I) + 4 N P (3 patch_size^2 C): pixels have no gradient
        tower attention     12 N P^2 layers C
        projector           6 N tokens_per_frame (4 C_tower C + C^2)

    Not counted: what is computed again (recompute; the scores in attention's backward; the head, whose logits are not
    kept), what a mask hides, and all that is no matrix product.
    """
    language, vision = config.language, config.vision
    num_tokens, area = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    patches = vision.patch_grid**2
    width = language.hidden_size
    visual_tokens = num_frames * config.tokens_per_frame
    return {
        "language": MATRIX * num_tokens * language.num_hidden_layers * _decoder_layer(language),
        "head": MATRIX * num_targets * width * language.vocab_size,
        "attention": ATTENTION * area * language.num_hidden_layers * language.num_attention_heads * language.head_dim,
        "tower": num_frames * patches * _tower_row(vision),
        "tower attention": ATTENTION * num_frames * patches**2 * vision.num_selected_layers * vision.hidden_size,
        "projector": MATRIX * visual_tokens * (4 * vision.hidden_size * width + width**2),
    }


def _decoder_layer(config: LanguageConfig) -> int:
    """Weights of its matrices: q, k, v, o, gate, up, down."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)


def _tower_row(config: VisionConfig) -> int:
    """Operations for one patch: its embedding, and the matrices of each layer."""
    width = config.hidden_size
    layer = 4 * width**2 + 2 * width * config.intermediate_size
    return MATRIX * config.num_selected_layers * layer + (MATRIX - 2) * 3 * config.patch_size**2 * width
