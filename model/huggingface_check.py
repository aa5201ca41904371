"""Which models of Transformers go over ranks."""

from typing import cast

from transformers import PreTrainedConfig, PreTrainedModel

LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_model(model: PreTrainedModel) -> None:
    """Raises ValueError, with the reason, for a model whose attention we do not do across ranks."""
    config, decoder = model.config.get_text_config(decoder=True), cast(PreTrainedModel, model.get_decoder())
    layer_types = set(getattr(config, "layer_types", None) or []) - LAYER_TYPES
    rope_types = _rope_types(config) & {"dynamic", "longrope"}
    reasons = {
        "has an encoder beside its decoder": config.is_encoder_decoder,
        "puts soft caps on its scores": getattr(config, "attn_logit_softcapping", None) is not None,
        "has attention sinks": any(name.endswith("sinks") for name, _ in model.named_parameters()),
        f"has layers of {', '.join(sorted(layer_types))}": layer_types,
        f"scales its RoPE ({', '.join(rope_types)}) by the longest position that a rank sees": rope_types,
        "looks both ways": not getattr(config, "is_causal", True)
        or getattr(config, "use_bidirectional_attention", None),
        "attends in chunks": getattr(config, "attention_chunk_size", None) is not None,
        "adds a loss of its router": getattr(config, "output_router_logits", False),
        "shares keys between layers": getattr(config, "num_kv_shared_layers", 0),
        "does not take its attention from AttentionInterface": not decoder._can_set_attn_implementation(),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"{type(model).__name__} {reason}, which longtake does not do across ranks")


def _rope_types(config: PreTrainedConfig) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [x for x in parameters.values() if isinstance(x, dict)]
    return {str(x.get("rope_type")) for x in by_layer_type or [parameters]}
