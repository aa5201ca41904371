"""Small random checkpoints in the official layout, made with transformers' own classes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from longtake.model.chat import build_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
)

TEXTS = ["what is red and what is blue ? <|im_start|> user assistant system You are a helpful assistant \n"]
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 21,  # 5 x 5 patches, a pixel left over
    "patch_size": 4,
}
LANGUAGE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def official_projector(kind: str) -> nn.Sequential:
    """The MLP of a kind, by its place in the official Sequential; its first module reshapes and has no parameter."""
    c, hidden = VISION["hidden_size"], LANGUAGE["hidden_size"]
    if kind == "mlp_downsample_3x3_fix":
        layers = [
            nn.LayerNorm(9 * c),
            nn.Linear(9 * c, 3 * c),
            nn.GELU(),
            nn.LayerNorm(3 * c),
            nn.Linear(3 * c, hidden),
        ]
    else:
        layers = [nn.LayerNorm(4 * c), nn.Linear(4 * c, hidden)]
    return nn.Sequential(nn.Identity(), *layers, nn.GELU(), nn.Linear(hidden, hidden))


def official_tokens(features: Tensor, kind: str) -> Tensor:
    """[N, grid ** 2, C] -> [N, tokens, side ** 2 C], written token by token."""
    side = 3 if kind == "mlp_downsample_3x3_fix" else 2
    grid = round(features.shape[1] ** 0.5)
    squares = -(-grid // side)
    nothing = torch.zeros_like(features[:, 0])
    tokens = []
    for a in range(squares):
        for b in range(squares):
            row, column = (b, a) if kind == "mlp_downsample_columns" else (a, b)
            patches = [(side * row + i, side * column + j) for i in range(side) for j in range(side)]
            inside = [features[:, i * grid + j] if max(i, j) < grid else nothing for i, j in patches]
            tokens.append(torch.cat(inside, dim=1))
    return torch.stack(tokens, dim=1)


@dataclass(frozen=True, eq=False)
class Theirs:
    """The same weights in transformers' modules, to be put together as the official code does."""

    vision: SiglipVisionModel
    projector: nn.Sequential
    llm: Qwen2ForCausalLM
    kind: str

    def features(self, pixels: Tensor) -> Tensor:
        """Visual tokens [N, tokens, C] from the last but one hidden state."""
        hidden = self.vision(pixels, output_hidden_states=True).hidden_states[-2]
        return self.projector(official_tokens(hidden, self.kind))

    def embeds(self, prompt: list[int | Tensor], end: int | None) -> Tensor:
        """[1, T, C]: text ids one by one, and frames [3, H, W], each followed by the token `end`."""
        parts = []
        for item in prompt:
            ids = [item]
            if isinstance(item, Tensor):
                parts.append(self.features(item[None])[0])
                ids = [] if end is None else [end]
            parts += [self.llm.get_input_embeddings()(torch.tensor([token])) for token in ids]
        return torch.cat(parts)[None]

    def gradients(self) -> dict[str, Tensor | None]:
        """By our names."""
        return (
            {f"llm.{name}": p.grad for name, p in self.llm.named_parameters()}
            | {f"mm_projector.layers.{name}": p.grad for name, p in self.projector.named_parameters()}
            | {f"vision_tower.{_prefixed(name)}": p.grad for name, p in self.vision.named_parameters()}
        )


def _prefixed(name: str) -> str:
    return f"vision_model.{name.removeprefix('vision_model.')}"


def write_official(
    folder: Path,
    *,
    kind: str = "mlp_downsample",
    tied: bool = False,
    prefix: bool = True,
    max_shard_size: str = "5GB",
    media_tokens: bool = True,
    dtype: torch.dtype = torch.float32,
    root: dict[str, Any] | None = None,
    **language: Any,
) -> Theirs:
    """prefix: whether the tower's keys begin with `vision_model.`; max_shard_size: of the language model's files."""
    tokenizer = small_tokenizer(media_tokens)
    tokenizer.save_pretrained(folder / "llm")
    vocab_size = len(tokenizer) + 8  # room for the media tokens
    settings = LANGUAGE | {"vocab_size": vocab_size, "tie_word_embeddings": tied} | language
    llm = Qwen2ForCausalLM(Qwen2Config(**settings))
    vision = SiglipVisionModel(SiglipVisionConfig(**VISION))
    projector = official_projector(kind)
    for module in (llm, vision, projector):
        for name, parameter in module.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            std = 0.3 / parameter.shape[-1] ** 0.5 if parameter.dim() == 4 else 0.2
            nn.init.normal_(parameter, mean=float(is_norm), std=std)
        module.to(dtype).eval()
    llm.save_pretrained(folder / "llm", max_shard_size=max_shard_size)
    vision.save_pretrained(folder / "vision_tower")
    path = folder / "vision_tower" / "model.safetensors"
    stored = {name.removeprefix("vision_model."): tensor for name, tensor in load_file(path).items()}
    save_file({("vision_model." if prefix else "") + name: t for name, t in stored.items()}, path, {"format": "pt"})
    size = {"height": VISION["image_size"], "width": VISION["image_size"]}
    half = [0.5, 0.5, 0.5]
    write_json(folder / "vision_tower" / "preprocessor_config.json", image_mean=half, image_std=half, size=size)
    (folder / "mm_projector").mkdir()
    tensors = {f"layers.{name}": parameter.detach() for name, parameter in projector.named_parameters()}
    save_file(tensors, folder / "mm_projector" / "model.safetensors", {"format": "pt"})
    write_json(folder / "mm_projector" / "config.json", model_type="v2l_projector", mm_projector_type=kind)
    layer = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "cls_patch"}
    write_json(folder / "config.json", **({"model_type": "llava_llama"} | layer | (root or {})))
    return Theirs(vision, projector, llm, kind)


def small_tokenizer(media_tokens: bool) -> PreTrainedTokenizerBase:
    """A Qwen2 tokenizer, with our media tokens or without them and a chat template."""
    if media_tokens:
        return build_tokenizer(TEXTS, ["red", "blue"], 300)
    tokens = {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    fresh = Qwen2Tokenizer(**tokens, extra_special_tokens=["<|im_start|>"])
    return fresh.train_new_from_iterator(TEXTS, vocab_size=300, show_progress=False)


def write_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values))


def change_json(path: Path, **values: Any) -> None:
    write_json(path, **(json.loads(path.read_text()) | values))
