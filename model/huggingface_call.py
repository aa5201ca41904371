"""What an enabled model was called with, and what its hooks leave to each other during the call."""

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .huggingface_attention import KeyIntervals
from .huggingface_loss import LabelledTokens, shift


@dataclass
class Call:
    """arguments: what the model's forward() takes, by name; without what it makes a loss of, which is taken here.

    shifted_labels [B, S]: what each token predicts. num_items: tokens that their loss is divided by, None: all.
    labelled: this rank's tokens that bear a loss. blanks: 0, of what was encoded only to be encoded everywhere.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    shifted_labels: Tensor | None = None
    num_items: Tensor | int | None = None
    labelled: LabelledTokens | None = None
    blanks: Tensor | float = 0.0

    @classmethod
    def of(cls, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """Raises ValueError for labels beside logits_to_keep."""
        named = signature.bind_partial(*args, **kwargs).arguments
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                named |= named.pop(parameter.name, {})
        labels, shifted, num_items = (
            named.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch")
        )
        if labels is None:
            return cls(named)
        call = cls(named, shift(labels) if shifted is None else shifted, num_items)
        if call.num_columns is not None:
            raise ValueError("labels and logits_to_keep do not go together: leave out logits_to_keep")
        return call

    @property
    def num_columns(self) -> int | None:
        """How many of the last columns have logits; None: all."""
        keep = self.arguments.get("logits_to_keep", 0)
        return keep if isinstance(keep, int) and keep > 0 else None


def padding_of(mask: Any, num_columns: int) -> Tensor | None:
    """The padding mask [batch, num_columns] in what was passed as attention_mask: that one, or the whole batch's masks
    by type of layer. None: no padding. Raises ValueError for a mask of another kind."""
    if isinstance(mask, dict) and all(x is None or isinstance(x, KeyIntervals) for x in mask.values()):
        mask = next((x.padding for x in mask.values() if x is not None and x.padding is not None), None)
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, :num_columns]
    raise ValueError(
        f"attention_mask is no padding mask [batch, seq], but a {type(mask).__name__}: masks of one's own do not go "
        "over ranks"
    )


def text_positions(position_ids: Tensor | None) -> Tensor | None:
    """Of position_ids [B, S], [3, B, S] (M-RoPE) or [4, B, S] (text's first): those that restart at documents."""
    if position_ids is None or position_ids.dim() == 2:
        return position_ids
    return position_ids[0] if len(position_ids) == 4 else None
