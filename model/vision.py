"""The vision tower: SigLIP's encoder up to the hidden state that is used, nothing after it.

Parameter names are those of the published checkpoints (`vision_model.encoder.layers.0...`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.attention import attention
from .config import VisionConfig
from .once import OnceDifferentiable

FRAMES_PER_PASS = 8  # rows enough for full matrix products; a pass keeps 7.6 GB of so400m's 26 layers at 448 pixels


class PatchEmbedding(nn.Conv2d):
    """A convolution whose stride is its kernel, as one matrix product, which takes zero images too."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, patches, C], row by row; pixels beyond the last whole patch are dropped."""
        height, width = self.kernel_size
        patches = input.unfold(2, height, height).unfold(3, width, width)  # [N, 3, rows, columns, height, width]
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(
            3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(config.patch_grid**2, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = normalise(pixels).to(self.patch_embedding.weight.dtype)
        return self.patch_embedding(pixels) + self.position_embedding.weight


def normalise(pixels: Tensor) -> Tensor:
    """uint8, as decoded, to float32 from -1 to 1, (x / 255 - 0.5) / 0.5 as SigLIP; what is no uint8 is so already."""
    return pixels.float().div_(127.5).sub_(1) if pixels.dtype == torch.uint8 else pixels


class SelfAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_selected_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionTransformer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(self.embeddings(pixels))


class InPasses(OnceDifferentiable):
    """A module over a few frames at a time: forward keeps the pixels alone, backward runs pass after pass again.

    Unlike with torch.utils.checkpoint around each pass, the passes' gradients are added in float32 at least: autograd
    would add them in the parameters' dtype. Nothing in here talks to other ranks, so each has its own number of passes.
    """

    @staticmethod
    def forward(ctx: Any, module: nn.Module, pixels: Tensor, *trained: Tensor) -> Tensor:
        """trained: the module's parameters that require a gradient."""
        ctx.module = module
        ctx.save_for_backward(pixels)
        return torch.cat([module(frames) for frames in pixels.split(FRAMES_PER_PASS)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [pixels] = ctx.saved_tensors
        trained = _trained(ctx.module)
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        for frames, grad in zip(pixels.split(FRAMES_PER_PASS), grads[0].split(FRAMES_PER_PASS), strict=True):
            with torch.enable_grad():
                features = ctx.module(frames)
            for total, of_pass in zip(sums, torch.autograd.grad(features, trained, grad), strict=True):
                total.add_(of_pass)
        return None, None, *sums


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class VisionTower(nn.Module):
    """Frames to patch features.

    `recompute`: training runs in passes of a few frames, keeps only their pixels, which get no gradient then, and runs
    each pass again in backward.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.vision_model = VisionTransformer(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """The hidden state `select_layer` of every patch, as transformers' SiglipVisionModel gives it.

        pixels: [N, 3, image_size, image_size], uint8, or normalised to -1 .. 1; N may be 0. Returns [N, patches,
        hidden_size]. Raises ValueError for frames of another size.
        """
        size = self.config.image_size
        if pixels.dim() != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels must be [N, 3, {size}, {size}], got {list(pixels.shape)}")
        if self.recompute and self.training:
            return InPasses.apply(self.vision_model, pixels, *_trained(self.vision_model))
        return self.vision_model(pixels)
