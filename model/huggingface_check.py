"""What goes over ranks: which models of Transformers, and a batch that all ranks of a group have in common."""

from hashlib import sha256
from typing import cast

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..comm.mesh import Mesh
from .huggingface_call import Call

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


def check_batch(call: Call, mesh: Mesh) -> None:
    """Raises ValueError, on all ranks of a group, where one was given another batch. Collective; waits for the GPU."""
    if mesh.sp_size == 1:
        return
    ranks, batches = mesh.axis_ranks("sp"), mesh.gather_objects(_fingerprints(call), "sp")
    for rank, batch in zip(ranks, batches, strict=True):
        different = {name for name, _ in batch.items() ^ batches[0].items()}
        if different:
            raise ValueError(
                f"rank {rank} was given another batch than rank {ranks[0]}, in {', '.join(sorted(different))}: all "
                "ranks of a sequence-parallel group take the same, as by DistributedSampler(dataset, "
                "num_replicas=mesh.data, rank=mesh.data_rank)"
            )


def _fingerprints(call: Call) -> dict[str, str]:
    """Of what was passed, by name: whole numbers by value, what is large (pixels, embeddings) by shape."""
    passed = call.arguments | {"labels": call.shifted_labels, "num_items_in_batch": call.num_items}
    tensors = {name: x for name, x in passed.items() if isinstance(x, Tensor)}
    return {
        name: f"{x.dtype} {list(x.shape)}"
        if x.is_floating_point()
        else sha256(str(x.shape).encode() + x.cpu().numpy().tobytes()).hexdigest()
        for name, x in tensors.items()
    }
