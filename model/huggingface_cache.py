"""A cache for `generate()` that is spread evenly: each rank keeps its heads of its ring part's tokens."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..comm.mesh import Mesh
from ..kernels.device import to_device

ROOM = 256  # slots that a layer gets ahead of its use, so that not every new token copies all that is held


class EvenCache(Cache):
    """One rank's keys and values of a batch that all ranks of a group generate for.

    Tokens have slots on one axis, where row b of the batch begins at b * ROW. parts: int64, increasing, for each
    ring rank: the slots that it holds. num_columns: columns of the batch seen so far, padding included.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(layers=[])
        self.mesh = mesh
        self.reset()

    def reset(self) -> None:
        """Hold nothing."""
        self.num_columns = 0
        self.parts = [torch.empty(0, dtype=torch.int64) for _ in range(self.mesh.ring)]
        self._order: Tensor | None = None
        self._held: dict[int, Tensor] = {}  # a layer's [2, room, H, D]: keys, values

    def grow(self, slots: list[Tensor], num_columns: int) -> None:
        """Make place for new slots, int64, increasing, for each ring rank: those that `append` then brings."""
        self.num_columns += num_columns
        self._order = None
        for r, (part, new) in enumerate(zip(self.parts, slots, strict=True)):
            self.parts[r] = torch.cat([part, new])
            if len(part) and len(new) and new[0] < part[-1]:  # of several rows: each grows in its own place
                order = self.parts[r].argsort()
                self.parts[r] = self.parts[r][order]
                if r == self.mesh.ring_rank:
                    self._order = to_device(order, self.mesh.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's k, v [n, H, D] of this rank's new slots; returns all that it holds, by rising slot."""
        total = len(self.parts[self.mesh.ring_rank])
        used, held = total - len(k), self._held.get(layer)
        if held is None or held.shape[1] < total:
            grown = k.new_empty(2, total + ROOM if used else total, *k.shape[1:])
            if held is not None:
                grown[:, :used] = held[:, :used]
            self._held[layer] = held = grown
        held[0, used:total], held[1, used:total] = k, v
        if self._order is not None:
            held[:, :total] = held[:, self._order]
        return held[0, :total], held[1, :total]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What the layers of Transformers call: the tokens stay as they are, attention appends its heads of them."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.num_columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that the next query_length ones see, and the first of them, on all ranks together."""
        return self.num_columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ValueError("an even cache does not reorder its rows: generate with num_beams=1")

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("an even cache does not forget tokens: generate without an assistant model")
