"""One rank's share of a padded batch [B, S]: which tokens it runs, how they attend, where their outputs belong.

A batch's rows are laid end to end without their padding, and a layout deals out what is left: padding is computed
nowhere, and rows and packed documents are the same thing, documents.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..comm.layout import Layout
from ..comm.mesh import Mesh
from ..kernels.backend import block_forward
from ..kernels.device import to_device
from ..kernels.visibility import Visibility, mask_bounds
from .attention_plan import AttentionPlan, Bounds, Route, plan_attention
from .huggingface_attention import KeyIntervals
from .huggingface_cache import EvenCache
from .merge import merge_partials
from .ring import ring_attention
from .ulysses import HeadSplit, pick_heads, to_heads, to_tokens

ROW = 1 << 32  # slots of each row on the axis: a row may grow while others stand behind it
BLOCK = 128  # tokens that one ring rank keeps in turn, of those that are generated


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a batch [batch, seq] that are no padding, row after row. All tensors are on the CPU.

    flat: int64 [T], increasing: places in the flattened batch. slots: int64 [T], increasing: places on an axis where
    row b begins at b * ROW, in column 0 of all that was ever seen. cu_seqlens: int64, documents' bounds on that axis.
    num_seen: columns in the cache.
    """

    batch: int
    seq: int
    flat: Tensor
    slots: Tensor
    cu_seqlens: Tensor
    num_seen: int = 0

    @classmethod
    def of(
        cls, batch: int, seq: int, *, padding: Tensor | None, position_ids: Tensor | None, num_seen: int = 0
    ) -> "Tokens":
        """padding: bool or integer [batch, num_seen + seq], 0 for padding.

        Without padding or a cache, a document begins where position_ids [batch or 1, seq] do not rise by one, as
        Transformers has it.
        """
        flat = torch.arange(batch * seq)
        if padding is not None:
            flat = padding[:, -seq:].flatten().nonzero().squeeze(1).cpu()
        bounds = torch.arange(batch + 1) * ROW
        if position_ids is not None and padding is None and num_seen == 0:
            row, before = (position_ids.cpu().expand(batch, -1).diff() != 1).nonzero().unbind(1)
            bounds = torch.cat([bounds, row * ROW + before + 1]).sort().values
        return cls(batch, seq, flat, flat // seq * ROW + num_seen + flat % seq, bounds, num_seen)

    @cached_property
    def lengths(self) -> Tensor:
        """cu_seqlens of the tokens themselves, from 0 to T."""
        return torch.searchsorted(self.slots, self.cu_seqlens)


class _Pass:
    """A forward pass. mine: int64 [n], on the device: places in the flattened batch of the tokens that run here.

    batch_masks: the layers' masks are those of the whole batch. Else the decoder makes them, of the tokens that run
    here: then they say no more than a layer's window.
    """

    def __init__(self, tokens: Tokens, mesh: Mesh, flat: Tensor, batch_masks: bool) -> None:
        self.tokens, self.mesh, self.batch_masks = tokens, mesh, batch_masks
        self.mine = to_device(flat, mesh.device)
        self.has_attended = False

    def mask_key(self, mask: KeyIntervals | None) -> KeyIntervals | int | None:
        """What layers with the same mask have in common."""
        return mask if mask is None or self.batch_masks else mask.window

    def bounds(self, mask: KeyIntervals | None) -> Bounds:
        """Slots of the first and the last key that each token of the batch sees, int64 [T]."""
        tokens = self.tokens
        if mask is not None and self.batch_masks:
            first, last = (edge.flatten().cpu()[tokens.flat] for edge in mask.edges)
            row_start = tokens.flat // tokens.seq * ROW
            return row_start + first, row_start + last
        if mask is not None and not mask.checked:
            raise ValueError(
                "the decoder's masks have a part of its own, which it makes of one rank's tokens: longtake does not do "
                "that across ranks"
            )
        return mask_bounds(
            tokens.slots,
            num_tokens=tokens.batch * ROW,
            causal=True,
            window=None if mask is None else mask.window,
            cu_seqlens=tokens.cu_seqlens,
        )

    def take(self, x: Tensor) -> Tensor:
        """This rank's tokens [1, n, ...] of x [batch, seq, ...]."""
        return x.flatten(0, 1).index_select(0, self.mine)[None]

    def take_positions(self, position_ids: Tensor | None) -> Tensor:
        """This rank's positions [..., 1, n] of position_ids [..., batch or 1, seq]; None: columns."""
        tokens = self.tokens
        if position_ids is None:
            return (self.mine % tokens.seq + tokens.num_seen)[None]
        whole = position_ids.expand(*position_ids.shape[:-2], tokens.batch, tokens.seq).flatten(-2)
        return whole.index_select(-1, self.mine).unsqueeze(-2)

    def take_visual(self, is_visual: Tensor, features: list[Tensor]) -> dict[str, Any]:
        """This rank's rows of features that inner layers add to visual tokens; is_visual: bool [batch, seq]."""
        row = is_visual.flatten().cumsum(0)[self.mine] - 1
        mine = self.take(is_visual)
        return {"visual_pos_masks": mine, "deepstack_visual_embeds": [x[row[mine[0]]] for x in features]}


class TokenShare(_Pass):
    """A pass in which each rank of the group runs the tokens that the layout gives it.

    for_decoder: arguments of the decoder that go with these tokens.
    """

    def __init__(
        self,
        tokens: Tokens,
        layout: Layout,
        mesh: Mesh,
        *,
        batch_masks: bool = False,
        route: Route = "direct",
        cache: EvenCache | None = None,
    ) -> None:
        super().__init__(tokens, mesh, tokens.flat[layout.positions(mesh.sp_rank)], batch_masks)
        self.layout, self.cache = layout, cache
        self.for_decoder: dict[str, Any] = {}
        self.route: Route = route
        self._plans: dict[Hashable, AttentionPlan] = {}
        self._held = [tokens.slots[layout.ring_part(r)] for r in range(mesh.ring)]
        if cache is not None:
            cache.grow(self._held, tokens.seq)
            self._held = list(cache.parts)

    def owners(self) -> Tensor:
        """int64 [batch * seq]: the rank that runs each place of the flattened batch; -1 for padding."""
        nobody = torch.full((self.tokens.batch * self.tokens.seq,), -1)
        return nobody.index_copy(0, self.tokens.flat, self.layout.owner)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, mask: KeyIntervals | None, scale: float) -> Tensor:
        """2D attention of this rank's tokens: q [n, Hq, D], k, v [n, Hkv, D]; returns [n, Hq, D]."""
        self.has_attended = True
        heads, plan = HeadSplit(q.shape[1], k.shape[1], self.mesh.ulysses), self._plan(mask)
        q, k, v = to_heads(q, k, v, heads=heads, plan=plan)
        if self.cache is not None:
            k, v = self.cache.append(layer, k, v)
        return to_tokens(ring_attention(q, k, v, plan, scale=scale), heads=heads, plan=plan)

    def _plan(self, mask: KeyIntervals | None) -> AttentionPlan:
        key = self.mask_key(mask)
        if key not in self._plans:
            tokens, (lo, hi) = self.tokens, self.bounds(mask)
            dealt = [self.layout.positions(rank) for rank in range(self.mesh.sp_size)]
            self._plans[key] = plan_attention(
                self.mesh,
                [tokens.slots[index] for index in dealt],
                self._held,
                num_tokens=tokens.batch * ROW,
                bounds=[(lo[index], hi[index]) for index in dealt],
                route=self.route,
            )
        return self._plans[key]

    def gather(self, hidden: Tensor, last: int) -> Tensor:
        """The last columns [batch, last, C] of all ranks' hidden [1, n, C], on every rank; zeros for padding."""
        tokens, mesh = self.tokens, self.mesh
        flats = [tokens.flat[self.layout.positions(rank)] for rank in range(mesh.sp_size)]
        wanted = [flat % tokens.seq >= tokens.seq - last for flat in flats]
        mine = hidden[0, to_device(wanted[mesh.sp_rank], hidden.device)]
        parts = [mine.new_empty(int(w.sum()), mine.shape[1]) for w in wanted]
        mesh.transport.all_to_all("sp", [[mine]] * mesh.sp_size, [[part] for part in parts])
        flat = torch.cat([flat[w] for flat, w in zip(flats, wanted, strict=True)])
        place = flat // tokens.seq * last + flat % tokens.seq - (tokens.seq - last)
        whole = mine.new_zeros(tokens.batch * last, mine.shape[1])
        return whole.index_copy(0, to_device(place, mine.device), torch.cat(parts)).unflatten(0, (tokens.batch, last))


class SharedTokens(_Pass):
    """A pass of few tokens, as in decoding: every rank runs them all, and only attention is shared out."""

    def __init__(self, tokens: Tokens, mesh: Mesh, cache: EvenCache, *, batch_masks: bool = False) -> None:
        super().__init__(tokens, mesh, tokens.flat, batch_masks)
        self.cache = cache
        owner = tokens.slots % ROW // BLOCK % mesh.ring
        self._owned = to_device((owner == mesh.ring_rank).nonzero().squeeze(1), mesh.device)
        self._visible: dict[Hashable, Visibility] = {}
        cache.grow([tokens.slots[owner == r] for r in range(mesh.ring)], tokens.seq)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, mask: KeyIntervals | None, scale: float) -> Tensor:
        """Attention of all tokens with this rank's heads over its slots, merged over the ranks by lse."""
        self.has_attended = True
        mesh, heads = self.mesh, HeadSplit(q.shape[1], k.shape[1], self.mesh.ulysses)
        my_q, my_kv, expand = heads.q[mesh.ulysses_rank], heads.kv[mesh.ulysses_rank], heads.kv_of_q(mesh.ulysses_rank)
        k, v = self.cache.append(layer, *(pick_heads(x[self._owned, my_kv], expand) for x in (k, v)))
        out, lse = block_forward(q[:, my_q].contiguous(), k, v, self._visibility(mask), scale=scale)
        return merge_partials(out, lse, heads, mesh).to(q.dtype)

    def _visibility(self, mask: KeyIntervals | None) -> Visibility:
        key = self.mask_key(mask)
        if key not in self._visible:
            slots = self.cache.parts[self.mesh.ring_rank]
            self._visible[key] = Visibility.from_bounds(*self.bounds(mask), slots).to(self.mesh.device)
        return self._visible[key]

    def gather(self, hidden: Tensor, last: int) -> Tensor:
        """The last columns [batch, last, C] of hidden [1, n, C]; zeros for padding. Nothing travels."""
        tokens = self.tokens
        whole = hidden.new_zeros(tokens.batch * tokens.seq, hidden.shape[2]).index_copy(0, self.mine, hidden[0])
        return whole.unflatten(0, (tokens.batch, tokens.seq))[:, tokens.seq - last :]
