"""From logits to the next token."""

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row of logits [B, vocab], int64 [B]: the most likely at temperature 0, else drawn.

    top_p keeps the fewest most likely tokens whose probabilities reach it (nucleus, arXiv 1904.09751).
    The generator lives on the device of the logits. Raises ValueError for a negative temperature, one
    that is no number, and a top_p outside (0, 1].
    """
    if not temperature >= 0:  # as nan is not
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, order = (logits.double() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    probabilities.masked_fill_(probabilities.cumsum(dim=-1) - probabilities >= top_p, 0)
    # What torch.multinomial draws, bit for bit, without its checks, which wait for the device twice.
    races = torch.empty_like(probabilities).exponential_(generator=generator)
    drawn = (probabilities / races).argmax(dim=-1, keepdim=True)
    return order.gather(-1, drawn).squeeze(-1)
