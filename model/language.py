"""The language model: Qwen2's decoder on packed tokens, with attention passed in.

A stream of tokens [T, C] holds any number of documents, whose positions restart. Which tokens see
each other, on how many ranks, and where keys and values are kept, is the business of the `attend`
callable. Parameter names are those of the published checkpoints.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import LanguageConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer index, q [T, Hq, D], k and v [T, Hkv, D], rotary applied) -> out [T, Hq, D]"""


def rotary_angles(positions: Tensor, *, head_dim: int, theta: float, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [T, 1, head_dim / 2], of RoPE (arXiv 2104.09864) at int64 positions [T] / factor.

    The angles are float64: at position 2 ** 20 a float32 angle is off by up to 0.03.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.double()[:, None] * (theta**-exponents / factor)
    return angles.cos().float()[:, None], angles.sin().float()[:, None]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + D / 2]) of x [T, H, D] by its angle, in float32 at least."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, config: LanguageConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        num_q, num_kv = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, num_q)
        self.k_proj = nn.Linear(config.hidden_size, num_kv)
        self.v_proj = nn.Linear(config.hidden_size, num_kv)
        self.o_proj = nn.Linear(num_q, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = attend(self.index, apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: LanguageConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(config, index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, *, recompute: bool) -> Tensor:
        for layer in self.layers:
            if recompute:
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, attend)
        return self.norm(x)


class LanguageModel(nn.Module):
    """Embedding, decoder and head.

    `recompute`: training keeps only the input of each layer and runs the layer again in the backward pass.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [T] -> [T, hidden_size]"""
        return self.model.embed_tokens(ids)

    def forward(self, embeds: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """embeds [T, hidden_size], positions int64 [T] -> hidden states after the final norm; T may be 0."""
        config = self.config
        cos, sin = rotary_angles(
            positions, head_dim=config.head_dim, theta=config.rope_theta, factor=config.rope_factor
        )
        return self.model(embeds, cos, sin, attend, recompute=self.recompute and self.training)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] -> [n, vocab_size]"""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(hidden, head.weight)
