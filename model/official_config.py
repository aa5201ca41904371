"""The JSON files of official LongVILA checkpoints: from them our config, and from our config them."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Qwen2Config, SiglipVisionConfig

from .chat import CHAT_TEMPLATE, media_token_id
from .config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig

QWEN2_TEMPLATE = (  # the official `qwen2`: a conversation without a system message gets this one, without a full stop
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' -}}"
    "{%- endif -%}\n" + CHAT_TEMPLATE
)
HALF = [0.5, 0.5, 0.5]  # mean and deviation of pixels from 0 to 1, which become -1 to 1


def is_official(folder: Path) -> bool:
    """Whether a folder is a checkpoint in the official layout."""
    path = folder / "config.json"
    return path.is_file() and _read_json(path).get("model_type") == "llava_llama"


def official_config(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, newline: bool = True, projector: str | None = None
) -> ModelConfig:
    """Our config of an official folder.

    newline: whether a newline follows each frame's tokens. The official code has it there, except where sequence
    parallelism is on: to go on exactly as its stage 5 trains, pass False.
    projector: the kind, where the name in the folder is not what is meant, see `ProjectorConfig`.
    Raises ValueError that names the file and the field for what is not supported.
    """
    path = folder / "config.json"
    root = _read_json(path)
    if root.get("model_type") != "llava_llama":
        raise ValueError(f"{path}: model_type is {root.get('model_type')!r}, expected 'llava_llama'")
    off = dict.fromkeys(("s2", "dynamic_s2", "ps3", "mm_use_im_start_end"), False)
    _expect(path, root, {"mm_vision_select_feature": "cls_patch", **off})
    end = _frame_end(path, root, tokenizer)
    return ModelConfig(
        vision=_vision_config(folder / "vision_tower", root.get("mm_vision_select_layer")),
        projector=_projector_config(folder / "mm_projector" / "config.json", projector),
        language=_language_config(folder / "llm" / "config.json"),
        image_token_id=media_token_id(tokenizer, "image"),
        video_token_id=media_token_id(tokenizer, "video"),
        newline_token_id=end if newline else None,
    )


def official_json(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: str) -> dict[str, dict[str, Any]]:
    """The files that say the same, by their paths in the folder; the last makes it complete.

    Their fields are those that transformers 4, with which the official code runs, and 5 understand.
    """
    vision = {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "torch_dtype": dtype,
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
        "vision_use_head": False,
        **asdict(config.vision),
    }
    select_layer = vision.pop("select_layer")
    language = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **asdict(config.language),
    }
    if (factor := language.pop("rope_factor")) != 1.0:
        language["rope_scaling"] = {"type": "linear", "factor": factor}
    projector = {
        "architectures": ["MultimodalProjector"],
        "model_type": "v2l_projector",
        "torch_dtype": dtype,
        "mm_projector_type": config.projector.kind,
    }
    newline = config.newline_token_id
    end = None if newline is None else tokenizer.decode([newline])
    root = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "model_dtype": f"torch.{dtype}",
        "llm_cfg": language,
        "vision_tower_cfg": vision,
        "mm_projector_cfg": projector,
        "hidden_size": config.language.hidden_size,
        "mm_hidden_size": config.vision.hidden_size,
        "mm_vision_select_layer": select_layer,
        "mm_vision_select_feature": "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "resize",
        "num_video_frames": 8,
        "fps": 0.0,
        "chat_template": "qwen2" if tokenizer.chat_template == QWEN2_TEMPLATE else None,
        "image_encoder": {"_target_": "llava.model.encoders.BasicImageEncoder", "end_tokens": end},
        "video_encoder": {"_target_": "llava.model.encoders.BasicVideoEncoder", "end_tokens": end},
    }
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": HALF,
        "image_std": HALF,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": _square(config.vision),
    }
    return {
        "llm/config.json": language,
        "vision_tower/config.json": vision,
        "vision_tower/preprocessor_config.json": preprocessor,
        "mm_projector/config.json": projector,
        "config.json": root,
    }


def _projector_config(path: Path, kind: str | None) -> ProjectorConfig:
    kind = kind or str(_read_json(path).get("mm_projector_type"))
    try:
        return ProjectorConfig(kind=kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _vision_config(folder: Path, select_layer: int | None) -> VisionConfig:
    path = folder / "config.json"
    values = _read_json(path)
    _expect(path, values, {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "num_channels": 3})
    theirs = SiglipVisionConfig.from_dict(values)  # with the defaults of what the file leaves out
    names = [f.name for f in fields(VisionConfig) if f.name != "select_layer"]
    selected = -2 if select_layer is None else select_layer
    config = VisionConfig(**{name: getattr(theirs, name) for name in names}, select_layer=selected)
    path = folder / "preprocessor_config.json"
    _expect(path, _read_json(path), {"image_mean": HALF, "image_std": HALF, "size": _square(config)})
    return config


def _square(config: VisionConfig) -> dict[str, int]:
    return {"height": config.image_size, "width": config.image_size}


def _language_config(path: Path) -> LanguageConfig:
    values = _read_json(path)
    _expect(path, values, {"model_type": "qwen2", "hidden_act": "silu"})
    theirs = Qwen2Config.from_dict(values)
    if set(theirs.layer_types or ()) - {"full_attention"}:
        raise ValueError(f"{path}: use_sliding_window is set, only full attention is supported")
    rope: Any = theirs.rope_parameters
    if (kind := rope.get("rope_type", "default")) not in ("default", "linear"):
        raise ValueError(f"{path}: RoPE is scaled by {kind!r}, supported are 'linear' and no scaling")
    names = {f.name for f in fields(LanguageConfig)} - {"head_dim", "rope_theta", "rope_factor"}
    return LanguageConfig(
        **{name: getattr(theirs, name) for name in names},
        head_dim=values.get("head_dim") or 0,
        rope_theta=float(rope["rope_theta"]),
        rope_factor=float(rope["factor"]) if kind == "linear" else 1.0,
    )


def _frame_end(path: Path, root: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the official encoders put behind each frame and each image: a newline, if nothing else is said."""
    ends = []
    for name in ("BasicImageEncoder", "BasicVideoEncoder"):
        field = "image_encoder" if "Image" in name else "video_encoder"
        encoder = root.get(field) or {}
        encoder = json.loads(encoder) if isinstance(encoder, str) else encoder
        target = encoder.get("_target_", name)
        if target.rpartition(".")[2] != name:
            raise ValueError(f"{path}: {field} is {target}, supported is {name}")
        _expect(path, encoder, {"start_tokens": None})
        ends.append(encoder.get("end_tokens", "\n"))
    image, video = ends
    ids: Any = [] if video is None else tokenizer(video, add_special_tokens=False)["input_ids"]
    if image != video or len(ids) > 1:
        raise ValueError(
            f"{path}: end_tokens are {image!r} and {video!r}, supported is one token for images and videos"
        )
    return ids[0] if ids else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file, an official checkpoint has it")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


def _expect(path: Path, values: dict[str, Any], supported: dict[str, Any]) -> None:
    """Raises ValueError for a field with another value than the supported one; absent and null are fine."""
    for name, value in supported.items():
        if values.get(name) not in (None, value):
            raise ValueError(f"{path}: {name} is {values[name]!r}, supported is {value!r}")
