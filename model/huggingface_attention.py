"""What `attn_implementation="longtake"` runs: an attention function and the mask function that goes with it.

Transformers describes a mask as a function of a query and a key. All of its masks (causal, window, packed documents,
chunks, blocks of image tokens that see each other) show a query one run of keys around its own place, so bisection
finds the two edges of every query at once, and no dense mask is ever made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..comm.mesh import Mesh
from ..comm.plan import direct
from ..kernels.attention import attention, check_shapes, score_scale
from ..kernels.visibility import Visibility
from .attention_plan import AttentionPlan
from .ring import ring_attention

UNSUPPORTED = {  # by the name under which Transformers passes it
    "softcap": "soft caps on the scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias on the scores",
}


class Share(Protocol):
    """This rank's part in a forward pass of all ranks of a group."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, mask: "KeyIntervals | None", scale: float
    ) -> Tensor:
        """Causal attention of this rank's tokens; q, k, v [T, heads, D] of its tokens; returns [T, heads, D]."""
        ...


@dataclass(frozen=True, eq=False)
class KeyIntervals:
    """A mask of Transformers as one interval of keys for each query: worked out when a layer first asks.

    Queries are [batch, num_queries], the first at place query_offset; keys [batch, num_keys] from key_offset on.
    visible: (row, head, query, key) -> bool, elementwise; padding: bool [batch, >= num_keys + key_offset], False for
    padding, or None. window: that of a sliding layer, which `visible` has in it.
    """

    batch: int
    num_queries: int
    num_keys: int
    query_offset: int | Tensor
    key_offset: int
    visible: Callable[..., Tensor]
    padding: Tensor | None
    window: int | None
    device: torch.device
    checked: bool

    @cached_property
    def kept_keys(self) -> Tensor | None:
        """int64 [n]: keys that are no padding, as indices into all rows' keys laid end to end; None: all."""
        return None if self.padding is None else self._is_token.flatten().nonzero().squeeze(1)

    @cached_property
    def plan(self) -> AttentionPlan:
        """Attention of all rows' queries, laid end to end, over the kept keys."""
        alone = Mesh(alone=True, device=self.device, transport="torch")
        steps = tuple(direct([[torch.empty(0, dtype=torch.int64)]], 0))
        return AttentionPlan(alone, "direct", (self.batch * self.num_queries,), steps, (self._visibility(),))

    def _visibility(self) -> Visibility:
        first, last = self.edges
        row_start = torch.arange(self.batch, device=self.device)[:, None] * self.num_keys - self.key_offset
        before = self._is_token.flatten().cumsum(0)
        before = torch.cat([before.new_zeros(1), before])  # [i]: tokens among the keys before key i
        start, end = before[row_start + first], before[row_start + last + 1]
        return Visibility(start.flatten().int(), end.flatten().int(), self._num_kept)

    @cached_property
    def edges(self) -> tuple[Tensor, Tensor]:
        """Places of the first and the last visible key, int64 [batch, num_queries], padding not looked at."""
        row = torch.arange(self.batch, device=self.device)[:, None].expand(-1, self.num_queries)
        query = (torch.arange(self.num_queries, device=self.device) + self.query_offset).expand(self.batch, -1)
        head = torch.zeros_like(row)
        begin, end = self.key_offset, self.key_offset + self.num_keys - 1
        first, last = torch.full_like(row, begin), torch.full_like(row, end)
        seen_first = seen_last = query.clamp(begin, end)
        for _ in range(self.num_keys.bit_length()):
            middle = (first + seen_first).div(2, rounding_mode="floor")
            visible = self.visible(row, head, query, middle)
            seen_first, first = torch.where(visible, middle, seen_first), torch.where(visible, first, middle + 1)
            middle = (last + seen_last + 1).div(2, rounding_mode="floor")
            visible = self.visible(row, head, query, middle)
            seen_last, last = torch.where(visible, middle, seen_last), torch.where(visible, last, middle - 1)
        if not self.checked:
            self._probe(row, head, query, seen_first, seen_last)
        return seen_first, seen_last

    def _probe(self, row: Tensor, head: Tensor, query: Tensor, first: Tensor, last: Tensor) -> None:
        """Raises ValueError where a key on every 64th of the way shows that the mask is no run of keys a query."""
        risen = bool((first.diff() >= 0).all() and (last.diff() >= 0).all())
        for key in torch.linspace(self.key_offset, self.key_offset + self.num_keys - 1, 65).long().tolist():
            seen = self.visible(row, head, query, torch.full_like(query, key))
            risen = risen and bool((seen == ((first <= key) & (key <= last))).all())
        if not risen:
            raise ValueError("the model's mask shows a query other keys than one run around its place: use sdpa for it")

    @property
    def _is_token(self) -> Tensor:
        if self.padding is None:
            return torch.ones(self.batch, self.num_keys, dtype=torch.bool, device=self.device)
        return self.padding[:, self.key_offset : self.key_offset + self.num_keys]

    @property
    def _num_kept(self) -> int:
        return self.batch * self.num_keys if self.kept_keys is None else len(self.kept_keys)


def longtake_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> KeyIntervals | None:
    """The mask function (AttentionMaskInterface): None for a plain causal mask, else intervals.

    use_vmap: `mask_function` has a part of the model's own, which is then checked.
    """
    if attention_mask is not None:
        missing = kv_length + kv_offset - attention_mask.shape[-1]
        attention_mask = nn.functional.pad(attention_mask, (0, max(0, missing)))
    aligned = q_offset + q_length == kv_length + kv_offset
    padded = attention_mask is not None and not bool(attention_mask.all())
    if allow_is_causal_skip and local_size is None and aligned and not padded:
        return None
    assert mask_function is not None
    return KeyIntervals(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        visible=mask_function,
        padding=attention_mask if padded else None,
        window=local_size,
        device=torch.device(device),
        checked=not use_vmap,
    )


def longtake_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: KeyIntervals | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    token_share: Share | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function (AttentionInterface). query [B, Hq, S, D], key, value [B, Hkv, S_keys, D].

    attention_mask: what `longtake_mask` made. token_share: set where the tokens are those of one rank of a group.
    cu_seq_lens_q: of a vision encoder, the bounds of its images, frames or windows, in a batch of one.
    Returns [B, S, Hq, D], and None in place of weights. Raises ValueError for attention that it does not do.
    """
    _refuse(module, attention_mask, dropout, kwargs)
    q, k, v = (x.transpose(1, 2) for x in _as_autocast(query, key, value))
    check_shapes(q, k, v)
    scale = score_scale(scaling, q.shape[-1])
    if token_share is not None:
        rows = token_share.attend(
            module.layer_idx, *(x.flatten(0, 1) for x in (q, k, v)), mask=attention_mask, scale=scale
        )
        return rows.unflatten(0, q.shape[:2]), None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if cu_seq_lens_q is not None and not causal:
            return attention(q[0], k[0], v[0], cu_seqlens=cu_seq_lens_q, scale=scale)[None], None
        return attention(q, k, v, causal=causal and q.shape[1] > 1, scale=scale), None
    q_rows, k_rows, v_rows = (x.flatten(0, 1) for x in (q, k, v))
    if attention_mask.kept_keys is not None:
        k_rows, v_rows = (x.index_select(0, attention_mask.kept_keys) for x in (k_rows, v_rows))
    out = ring_attention(q_rows, k_rows, v_rows, attention_mask.plan, scale=scale)
    return out.unflatten(0, q.shape[:2]), None


def _as_autocast(*operands: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, in its dtype, as PyTorch's own attention takes them: RoPE leaves q and k in float32."""
    device = operands[0].device.type
    if not torch.is_autocast_enabled(device):
        return operands
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in operands)


def _refuse(module: Any, mask: KeyIntervals | Tensor | None, dropout: float, options: dict[str, Any]) -> None:
    name = type(module).__name__
    for option, what in UNSUPPORTED.items():
        if options.get(option) is not None:
            raise ValueError(f"{name} has {what} ({option}), which longtake does not do: use eager for this model")
    if dropout:
        raise ValueError(f"{name} drops attention weights with probability {dropout}: set attention_dropout to 0")
    if isinstance(mask, Tensor):
        raise ValueError(
            f"{name} got a dense mask {list(mask.shape)}, longtake takes a padding mask [batch, seq]: pass that one"
        )
