"""How far results are from a float64 reference, and rings to test on."""

import torch
import torch.nn.functional as F
from longtake.kernels.visibility import Visibility
from torch import Tensor

from tests.kernels.masks import shard_visibility


def error(got: Tensor, want: Tensor) -> float:
    """Largest error, relative to the largest number wanted; inf where other entries are finite than should be."""
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(got[~finite].double(), want[~finite].double()):
        return torch.inf
    if not finite.any():
        return 0.0
    return float((got.double() - want.double())[finite].abs().max() / want[finite].abs().max().clamp_min(1e-9))


def lost(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, want: Tensor) -> float:
    """What PyTorch's own attention loses in the inputs' dtype, where a row sees anything. Scale: 1 / sqrt(head_dim)."""
    keys = torch.arange(len(visibility.kend))
    mask = (keys >= visibility.start[:, None]) & (keys < visibility.end[:, None])
    seeing = mask.any(1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q[seeing], k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[seeing], enable_gqa=True)
    return error(out[0].transpose(0, 1), want[seeing])


def normal(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Tensors of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def zigzag(num_tokens: int, ranks: int) -> list[Tensor]:
    """The positions of each rank: an early and a late chunk, of lengths that differ."""
    chunks = torch.arange(num_tokens).tensor_split(2 * ranks)
    return [torch.cat([chunks[rank], chunks[-1 - rank]]) for rank in range(ranks)]


def ring_step(shards: list[Tensor], rank: int, step: int, **mask: object) -> tuple[Tensor, Visibility]:
    """The key positions that `rank` works on in a step of the ring, and what it sees of them."""
    keys = shards[(rank - step) % len(shards)]
    return keys, shard_visibility(sum(map(len, shards)), shards[rank], keys, **mask)  # pyright: ignore[reportArgumentType]
