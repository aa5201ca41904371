"""The CUDA backends: one call of attention as launches of the kernels that the table chooses.

On CPU tensors they run in Triton's interpreter, if TRITON_INTERPRET=1 was set before triton was imported.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from . import decode, flash_backward, flash_forward, flash_prepare, hopper_backward, hopper_forward
from .backend import running
from .blocks import aligned, is_aligned, tma_fits
from .device import architecture, launching_on
from .table import Choice, choose
from .visibility import Visibility

TWO_KERNEL_BACKWARD = frozenset({"flash_dkdv", "flash_dq"})
PLAIN = frozenset({"flash_forward", "decode"}) | TWO_KERNEL_BACKWARD
GLUON = frozenset({"hopper_forward", "hopper_backward"})
FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "flash_forward": flash_forward.forward,
    "hopper_forward": hopper_forward.forward,
    "decode": decode.forward,
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
DECODE_ROWS = 16  # up to so many query rows are few: the keys are split over the chip


@dataclass(frozen=True)
class CudaBackend:
    """kernels: those that may serve; by_hand: even where no measurement has shown that they are ahead."""

    kernels: frozenset[str]
    by_hand: bool = False

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visibility: Visibility,
        *,
        scale: float,
        state: tuple[Tensor, Tensor] | None = None,
        final: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See `backend.block_forward`."""
        check(q, (state or ())[:1])
        if q.numel() == 0 or k.shape[0] == 0:
            return state or nothing_seen(q)
        few = q.shape[0] <= DECODE_ROWS and "decode" in self.kernels
        with launching_on(q.device):
            q, k, v = map(aligned, (q, k, v))
            config = self.choose("decode" if few else "forward", visibility, q, k, v).config
            return FORWARD[config.kernel](q, k, v, visibility, scale=scale, config=config, state=state, final=final)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        visibility: Visibility,
        *,
        scale: float,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
        dlse: Tensor | None = None,
        final: bool = False,
        deterministic: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `backend.block_backward`."""
        check(q, grads)
        if q.numel() == 0 or k.shape[0] == 0:
            dq, dk, dv = running(grads, q, k, v)
            return dq, dk, dv
        with launching_on(q.device):
            q, k, v, out, dout = map(aligned, (q, k, v, out, dout.to(q.dtype)))
            operands = q, k, v, dout
            by_keys = self.choose("dkdv", visibility, *operands)
            by_rows = self.choose("dq", visibility, *operands)
            fused = None if deterministic else self.find("backward", visibility, *operands)
            block = *operands, *flash_prepare.prepare(out, lse, dout, dlse), visibility
            dk, dv, add = targets(grads[1:], (k, v), final)
            if fused is not None and fused.cost < by_keys.cost + by_rows.cost:
                (dq,) = running(grads[:1], q)  # it can only be added to
                hopper_backward.backward(*block, scale=scale, config=fused.config, dq=dq, dk=dk, dv=dv, add=add)
                return dq, dk, dv
            flash_backward.dkdv(*block, scale=scale, config=by_keys.config, dk=dk, dv=dv, add=add)
            dq, add = targets(grads[:1], (q,), final)
            flash_backward.dq(*block, scale=scale, config=by_rows.config, dq=dq, add=add)
            return dq, dk, dv

    def find(self, direction: str, visibility: Visibility, *operands: Tensor) -> Choice | None:
        """What serves a direction, if anything does; Gluon kernels take only operands that TMA can load."""
        q = operands[0]
        kernels = self.kernels if tma_fits(*operands) else self.kernels - GLUON
        return choose(
            direction,
            visibility,
            head_dim=q.shape[-1],
            dtype=q.dtype,
            device=q.device,
            kernels=kernels,
            unmeasured=self.by_hand,
        )

    def choose(self, direction: str, visibility: Visibility, *operands: Tensor) -> Choice:
        """What serves a direction. Raises ValueError where nothing does."""
        choice = self.find(direction, visibility, *operands)
        if choice is None:
            q = operands[0]
            raise ValueError(
                f"none of {', '.join(sorted(self.kernels))} serves {direction} with head_dim {q.shape[-1]}, {q.dtype} "
                f"on {architecture(q.device)}: see `longtake tune --show`"
            )
        return choice


tuned = CudaBackend(PLAIN | GLUON)
triton = CudaBackend(PLAIN)
gluon = CudaBackend(GLUON | TWO_KERNEL_BACKWARD, by_hand=True)


def check(q: Tensor, carried: Sequence[Tensor | None]) -> None:
    """Raises ValueError for what no kernel takes; carried: out or gradients so far, which are updated in place."""
    if q.dtype not in DTYPES:
        raise ValueError(f"q, k, v must be {', '.join(map(str, DTYPES))}, got {q.dtype}: cast, or backend='reference'")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}: use backend='reference'")
    if q.device.type == "cpu" and not knobs.runtime.interpret:
        raise ValueError("these kernels run on CPU tensors in Triton's interpreter alone: set TRITON_INTERPRET=1 first")
    for x in carried:
        if x is not None and x.shape[2] % 8 == 0 and not is_aligned(x):
            raise ValueError(
                "out and gradients so far must be contiguous in head_dim, with other strides of whole 8 numbers, and "
                f"start at 16 bytes, got strides {list(x.stride())}: pass what the call for the block before returned"
            )


def nothing_seen(q: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of rows that see nothing."""
    return q.new_zeros(q.shape, dtype=torch.float32), q.new_full(
        (q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32
    )


def targets(grads: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...], final: bool) -> tuple[Any, ...]:
    """The gradients so far and True: add to them; or, where all are None, fresh ones and False: write them."""
    if all(grad is None for grad in grads):
        return *(
            torch.empty_like(x, dtype=x.dtype if final else torch.float32, memory_format=torch.contiguous_format)
            for x in inputs
        ), False
    return *running(grads, *inputs), True
