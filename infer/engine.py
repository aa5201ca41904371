"""Sequence-parallel inference: all ranks prefill and decode together, and the cache is spread evenly over them.

Prompts are packed on one axis of slots: each document's tokens, then room for what it generates. The axis is
cut into chunks; each chunk is dealt to the ranks by a layout of its own, runs through 2D attention, and leaves its
keys and values where they were computed: each rank keeps its heads of its ring part. To decode, each rank attends
with its heads over its slots, and the partial results are merged by their lse.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..comm.layout import Layout, balanced
from ..comm.mesh import Mesh
from ..kernels.backend import block_forward
from ..kernels.device import to_device
from ..kernels.visibility import Visibility, mask_bounds
from ..model.attention_plan import plan_attention
from ..model.batch import Document, packed_frame_starts
from ..model.features import route_frames
from ..model.merge import merge_partials
from ..model.ring import ring_attention
from ..model.ulysses import HeadSplit, pick_heads, to_heads, to_tokens
from ..model.vlm import VisionLanguageModel
from .sampling import sample

log = logging.getLogger(__name__)

ReadFrames = Callable[[int, int], Tensor]
"""(first, last) -> pixels [last - first, 3, H, W], uint8 or normalised, of those frames, counted over all prompts"""


@dataclass(frozen=True, eq=False)
class Slots:
    """The axis. Document i has slots [cu_seqlens[i], cu_seqlens[i + 1]); its prompt fills the first prompt_lengths[i].

    input_ids int64 [num_slots], filled bool [num_slots], frame_starts int64 [num_frames]: positions on the axis.
    """

    cu_seqlens: Tensor
    prompt_lengths: Tensor
    input_ids: Tensor
    filled: Tensor
    frame_starts: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Document], max_new_tokens: int) -> "Slots":
        """Lay out prompts. Raises ValueError for one without tokens, and for max_new_tokens below 1."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts])
        if not lengths.all():
            raise ValueError(f"prompt {int(lengths.argmin())} has no tokens")
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), (lengths + max_new_tokens).cumsum(0)])
        room = torch.zeros(max_new_tokens, dtype=torch.int64)
        input_ids = torch.cat([part for prompt in prompts for part in (prompt.input_ids, room)])
        slot = torch.arange(len(input_ids))
        document = torch.searchsorted(cu_seqlens, slot, right=True) - 1
        filled = slot - cu_seqlens[document] < lengths[document]
        return cls(cu_seqlens, lengths, input_ids, filled, packed_frame_starts(prompts, cu_seqlens))

    def place_in_document(self, positions: Tensor) -> Tensor:
        """RoPE positions of slots: they restart at each document."""
        document = torch.searchsorted(self.cu_seqlens, positions, right=True) - 1
        return positions - self.cu_seqlens[document]

    def chunk_edges(self, size: int, tokens_per_frame: int) -> list[int]:
        """Cut the axis into chunks of at most about `size` slots, never through a frame."""
        total, edges = len(self.input_ids), [0]
        while edges[-1] < total:
            edge = min(edges[-1] + size, total)
            frame = int(torch.searchsorted(self.frame_starts, edge)) - 1  # the last frame that begins before
            if frame >= 0 and edge < (end := int(self.frame_starts[frame]) + tokens_per_frame):
                begin = int(self.frame_starts[frame])
                edge = begin if begin > edges[-1] else end
            edges.append(edge)
        return edges


@dataclass(frozen=True, eq=False)
class Chunk:
    """Slots [first, last) of the axis, and the layout that deals them to the ranks."""

    first: int
    last: int
    layout: Layout

    def positions(self, sp_rank: int) -> Tensor:
        """Positions on the axis of a rank's slots, int64, increasing."""
        return self.layout.positions(sp_rank) + self.first


class KeyValueCache:
    """One rank's keys and values: its heads, of the slots of its ring part, in increasing order.

    parts: the positions that each ring rank holds so far; keys, values: a layer's [num_local_slots, H, D].
    """

    def __init__(self, model: VisionLanguageModel, mesh: Mesh, num_local_slots: int) -> None:
        config = model.config.language
        self.heads = HeadSplit(config.num_attention_heads, config.num_key_value_heads, mesh.ulysses)
        mine = self.heads.kv[mesh.ulysses_rank]
        self.expand = self.heads.kv_of_q(mesh.ulysses_rank)
        num_heads = mine.stop - mine.start if self.expand is None else len(self.expand)
        shape = (config.num_hidden_layers, num_local_slots, num_heads, config.head_dim)
        dtype = model.llm.model.embed_tokens.weight.dtype
        # zeros: a masked tile reads slots that are not filled yet, and hides no NaN
        self.keys = torch.zeros(shape, dtype=dtype, device=mesh.device)
        self.values = torch.zeros_like(self.keys)
        self.parts = [torch.empty(0, dtype=torch.int64) for _ in range(mesh.ring)]
        self.ring_rank = mesh.ring_rank

    @property
    def positions(self) -> Tensor:
        """Positions of this rank's slots."""
        return self.parts[self.ring_rank]

    def grow(self, chunk: Chunk) -> None:
        """Hold the slots of one more chunk."""
        self.parts = [torch.cat([part, chunk.layout.ring_part(r) + chunk.first]) for r, part in enumerate(self.parts)]

    def find(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the positions are held here, as indices, and the local slots of those."""
        slots = torch.searchsorted(self.positions, positions)
        held = torch.searchsorted(self.positions, positions, right=True) > slots
        return held.nonzero().squeeze(1), slots[held]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.keys[layer, slots], self.values[layer, slots] = k, v

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer, : len(self.positions)], self.values[layer, : len(self.positions)]


class Engine:
    """Generates for packed prompts on all ranks of a mesh (data degree 1). chunk: slots prefilled at once."""

    def __init__(self, model: VisionLanguageModel, mesh: Mesh, *, chunk: int = 65_536) -> None:
        if mesh.data != 1:
            raise ValueError(f"inference runs on one sequence-parallel group, got data degree {mesh.data}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.model, self.mesh, self.chunk = model.eval(), mesh, chunk
        self.warned = False

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Document],
        read_frames: ReadFrames,
        *,
        max_new_tokens: int,
        stop: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[list[int | None]]:
        """Yield the next token of each prompt until all have produced `stop` or max_new_tokens; None: it is done.

        Greedy at temperature 0. Every rank passes the same arguments and gets the same tokens. Collective.
        Prompts beyond the model's context are answered, with one warning for all.
        """
        slots = Slots.of(prompts, max_new_tokens)
        self._warn_beyond_context(slots)
        generator = torch.Generator(self.mesh.device).manual_seed(seed)
        cache, hidden = self._prefill(slots, read_frames)
        active = list(range(len(prompts)))
        for step in range(max_new_tokens):
            tokens = sample(self.model.llm.logits(hidden), temperature=temperature, top_p=top_p, generator=generator)
            said = tokens.tolist()  # the one wait for the device: the caller wants to read it
            yield _spread(said, active, len(prompts))
            going = [i for i, token in enumerate(said) if token != stop]
            if not going or step == max_new_tokens - 1:
                return
            active, tokens = [active[i] for i in going], tokens[to_device(torch.tensor(going), tokens.device)]
            positions = slots.cu_seqlens[active] + slots.prompt_lengths[active] + step
            hidden = self._decode(slots, cache, positions, tokens)

    def _warn_beyond_context(self, slots: Slots) -> None:
        longest = int(slots.cu_seqlens.diff().max())
        context = self.model.config.language.max_position_embeddings
        if longest > context and self.mesh.rank == 0 and not self.warned:
            log.warning(
                "%d tokens, of a prompt and its answer, are more than the model's context of %d: "
                "answers may be wrong; take fewer frames, or a model of more context",
                longest,
                context,
            )
            self.warned = True

    def _prefill(self, slots: Slots, read_frames: ReadFrames) -> tuple[KeyValueCache, Tensor]:
        """Run the prompts. Returns the cache and the hidden state [num_prompts, C] of each prompt's last token."""
        chunks = self._chunks(slots)
        num_local_slots = sum(len(chunk.layout.ring_part(self.mesh.ring_rank)) for chunk in chunks)
        cache = KeyValueCache(self.model, self.mesh, num_local_slots)
        ends = slots.cu_seqlens[:-1] + slots.prompt_lengths - 1
        last_tokens = []
        for chunk in chunks:
            positions, hidden = self._prefill_chunk(slots, cache, chunk, read_frames)
            mine = torch.isin(positions, ends).nonzero().squeeze(1)
            last_tokens.append(hidden[to_device(mine, hidden.device)])
        return cache, self._everywhere(chunks, ends, torch.cat(last_tokens))

    def _chunks(self, slots: Slots) -> list[Chunk]:
        """The axis in chunks, each dealt out by itself, with its documents balanced."""
        chunks, cu_seqlens = [], slots.cu_seqlens
        for first, last in pairwise(slots.chunk_edges(self.chunk, self.model.config.tokens_per_frame)):
            inside = cu_seqlens[(cu_seqlens > first) & (cu_seqlens < last)]
            documents = torch.cat([torch.tensor([first]), inside, torch.tensor([last])]) - first
            chunks.append(Chunk(first, last, balanced(documents, ring=self.mesh.ring, ulysses=self.mesh.ulysses)))
        return chunks

    def _prefill_chunk(
        self, slots: Slots, cache: KeyValueCache, chunk: Chunk, read_frames: ReadFrames
    ) -> tuple[Tensor, Tensor]:
        """Positions and hidden states of this rank's prompt tokens in a chunk, which the cache then holds."""
        mesh = self.mesh
        cache.grow(chunk)
        held = [chunk.positions(rank) for rank in range(mesh.sp_size)]
        queries = [positions[slots.filled[positions]] for positions in held]
        plan = plan_attention(
            mesh,
            queries,
            cache.parts,
            num_tokens=len(slots.input_ids),
            causal=True,
            cu_seqlens=slots.cu_seqlens,
        )
        group = slice(mesh.ring_rank * mesh.ulysses, (mesh.ring_rank + 1) * mesh.ulysses)
        new_slots = to_device(cache.find(torch.cat(queries[group]))[1], mesh.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = to_heads(q, k, v, heads=cache.heads, plan=plan)
            cache.write(layer, new_slots, k, v)
            out = ring_attention(q, *cache.read(layer), plan, scale=q.shape[-1] ** -0.5)
            return to_tokens(out, heads=cache.heads, plan=plan)

        mine, filled = queries[mesh.sp_rank], slots.filled[held[mesh.sp_rank]].nonzero().squeeze(1)
        embedded = self._embed(slots, chunk, read_frames)[to_device(filled, mesh.device)]
        return mine, self.model.llm(embedded, to_device(slots.place_in_document(mine), mesh.device), attend)

    def _embed(self, slots: Slots, chunk: Chunk, read_frames: ReadFrames) -> Tensor:
        """Embeddings [n, C] of this rank's slots of a chunk, filled or not, from the frames that it encodes."""
        begin, end = torch.searchsorted(slots.frame_starts, torch.tensor([chunk.first, chunk.last])).tolist()
        starts = slots.frame_starts[begin:end] - chunk.first
        route = route_frames(starts, self.model.config.tokens_per_frame, chunk.layout, self.mesh)
        pixels = to_device(read_frames(begin + route.first, begin + route.last), self.mesh.device)
        input_ids = to_device(slots.input_ids[chunk.positions(self.mesh.sp_rank)], self.mesh.device)
        return self.model.embed(input_ids, pixels, route)

    def _everywhere(self, chunks: Sequence[Chunk], ends: Tensor, hidden: Tensor) -> Tensor:
        """Hidden states [num_prompts, C] of all prompts' last tokens, at `ends`, from this rank's: [n, C], rising."""
        ranks = range(self.mesh.sp_size)
        held = [torch.cat([chunk.positions(rank) for chunk in chunks]) for rank in ranks]
        held = [positions[torch.isin(positions, ends)] for positions in held]
        everyone = [hidden.new_empty(len(positions), hidden.shape[1]) for positions in held]
        self.mesh.transport.all_to_all("sp", [[hidden] for _ in ranks], [[part] for part in everyone])
        return torch.cat(everyone)[to_device(torch.cat(held).argsort(), hidden.device)]

    def _decode(self, slots: Slots, cache: KeyValueCache, positions: Tensor, tokens: Tensor) -> Tensor:
        """One more token [B] of the documents at slots `positions` [B]. Every rank runs them; attention is shared."""
        mesh, heads = self.mesh, cache.heads
        bounds = mask_bounds(positions, num_tokens=len(slots.input_ids), causal=True, cu_seqlens=slots.cu_seqlens)
        visibility = Visibility.from_bounds(*bounds, cache.positions).to(mesh.device)
        owned, new_slots = (to_device(x, mesh.device) for x in cache.find(positions))
        my_q, my_kv = heads.q[mesh.ulysses_rank], heads.kv[mesh.ulysses_rank]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (pick_heads(x[owned, my_kv], cache.expand) for x in (k, v))
            cache.write(layer, new_slots, k, v)
            keys, values = cache.read(layer)
            out, lse = block_forward(q[:, my_q].contiguous(), keys, values, visibility, scale=q.shape[-1] ** -0.5)
            return merge_partials(out, lse, heads, mesh).to(q.dtype)

        embedded = self.model.llm.embed(tokens)
        return self.model.llm(embedded, to_device(slots.place_in_document(positions), mesh.device), attend)


def _spread(tokens: list[int], active: list[int], num_prompts: int) -> list[int | None]:
    whole: list[int | None] = [None] * num_prompts
    for i, token in zip(active, tokens, strict=True):
        whole[i] = token
    return whole
