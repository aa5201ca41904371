"""Every token on one rank, equal counts, sorted runs, equal areas; shard and unshard are inverse."""

import random
from collections.abc import Callable

import pytest
import torch
from longtake.bench.layout import measure
from longtake.comm.layout import BLOCK, Layout, balanced, block_size, contiguous, zigzag
from torch import Tensor

LAYOUTS = ["contiguous", "zigzag", "balanced"]
GRIDS = [(1, 1), (2, 1), (1, 3), (3, 2), (4, 4), (7, 1)]


def documents(num_tokens: int, generator: random.Random) -> Tensor:
    """cu_seqlens of up to six documents, some of them empty."""
    inner = sorted(generator.choices(range(num_tokens + 1), k=generator.randrange(6)))
    return torch.tensor([0, *inner, num_tokens])


def make(kind: str, cu_seqlens: Tensor, ring: int, ulysses: int = 1) -> Layout:
    if kind == "balanced":
        return balanced(cu_seqlens, ring=ring, ulysses=ulysses)
    factory: Callable[..., Layout] = {"contiguous": contiguous, "zigzag": zigzag}[kind]
    return factory(int(cu_seqlens[-1]), ring=ring, ulysses=ulysses)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("ring", "ulysses"), GRIDS)
def test_every_token_is_on_one_rank_and_counts_differ_by_at_most_one_block(kind: str, ring: int, ulysses: int) -> None:
    generator = random.Random(f"{kind} {ring} {ulysses}")
    size = ring * ulysses
    for num_tokens in [0, 1, 2, size - 1, size, size + 1, 97, 1000, *(generator.randrange(20_000) for _ in range(8))]:
        layout = make(kind, documents(num_tokens, generator), ring, ulysses)
        positions = [layout.positions(sp_rank) for sp_rank in range(size)]
        assert torch.equal(torch.cat(positions).sort().values, torch.arange(num_tokens))
        assert all(bool((part.diff() > 0).all()) for part in positions)
        counts = [part.numel() for part in positions]
        assert layout.counts == tuple(counts)
        assert max(counts) - min(counts) <= block_size(num_tokens, ring)
        parts = [layout.ring_part(ring_rank).numel() for ring_rank in range(ring)]
        assert max(parts) - min(parts) <= block_size(num_tokens, ring)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_ulysses_runs_together_are_the_ring_part(kind: str) -> None:
    layout = make(kind, torch.tensor([0, 700, 2999]), 3, 4)
    for ring_rank in range(3):
        runs = [layout.positions(4 * ring_rank + ulysses_rank) for ulysses_rank in range(4)]
        assert torch.equal(torch.cat(runs), layout.ring_part(ring_rank))


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("num_tokens", [0, 3, 2999])
def test_unshard_inverts_shard_in_any_dim(kind: str, num_tokens: int) -> None:
    layout = make(kind, torch.tensor([0, num_tokens // 3, num_tokens]), 2, 2)
    x = torch.randn(2, num_tokens, 3)
    parts = [layout.shard(x, sp_rank, dim=1) for sp_rank in range(4)]
    assert torch.equal(layout.unshard(parts, dim=1), x)
    for sp_rank in range(4):
        assert torch.equal(parts[sp_rank], x[:, layout.owner == sp_rank])


@pytest.mark.parametrize("kind", LAYOUTS)
def test_long_sequences_are_cut_at_multiples_of_the_tile(kind: str) -> None:
    layout = make(kind, torch.tensor([0, 5000, 16_421]), 4)
    for ring_rank in range(4):
        positions = layout.ring_part(ring_rank)
        jumps = positions[1:][positions.diff() > 1]
        assert bool((jumps % BLOCK == 0).all())


@pytest.mark.parametrize("ring", [2, 3, 4, 8])
def test_zigzag_spreads_the_causal_area_of_any_length(ring: int) -> None:
    for num_tokens in (16_384, 16_421, 50_000, 2999):
        area, _ = measure(zigzag(num_tokens, ring=ring), torch.tensor([0, num_tokens]))
        num_blocks = num_tokens / ring / block_size(num_tokens, ring)
        assert area <= 1 + 2 / num_blocks, num_tokens  # a spare block at the end is twice the mean block's area


def test_one_document_is_a_plain_zigzag() -> None:
    for cu_seqlens in ([0, 5000], [0, 0, 5000, 5000]):
        layout = balanced(torch.tensor(cu_seqlens), ring=4)
        expected = zigzag(5000, ring=4)
        assert all(torch.equal(*pair) for pair in zip(layout.parts, expected.parts, strict=True))


@pytest.mark.parametrize("cu_seqlens", [[1, 5], [0, 5, 3], [], [[0, 1]]])
def test_documents_that_are_none_are_refused(cu_seqlens: list) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        balanced(torch.tensor(cu_seqlens), ring=2)


def test_wrong_lengths_are_refused_with_the_number() -> None:
    layout = zigzag(10, ring=2)
    with pytest.raises(ValueError, match="11 tokens"):
        layout.shard(torch.zeros(11), 0)
    with pytest.raises(ValueError, match=r"\(5, 4\)"):
        layout.unshard([torch.zeros(5), torch.zeros(4)])
    with pytest.raises(ValueError, match="ring 0"):
        contiguous(10, ring=0)
