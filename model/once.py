"""Functions of autograd whose gradients have none."""

from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable


class OnceDifferentiable(torch.autograd.Function):
    """A gradient of its gradient raises RuntimeError: autograd would silently leave out what other ranks have of it."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.backward = cast(Any, staticmethod(once_differentiable(cls.backward)))
