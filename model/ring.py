"""Ring attention (arXiv 2310.01889): key blocks come by, queries and their float32 softmax state stay."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..comm.plan import Step
from ..comm.transport import Handle
from ..kernels.backend import block_backward, block_forward
from ..kernels.visibility import Visibility
from .attention_plan import AttentionPlan, take
from .once import OnceDifferentiable


def ring_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float) -> Tensor:
    """Attention of my ring part's queries [Tq, H, D] over all ring parts' keys; k, v [Tk, Hkv, D] are mine."""
    return _RingAttention.apply(q, k, v, plan, scale)


_NO_ROWS = Visibility(torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32), 0)


class _RingAttention(OnceDifferentiable):
    """Blocks of keys come by, one a step; queries, (out, lse) and dq stay. The state is carried in float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        if plan.mesh.ring > 1:  # what the backend refuses, it refuses here, not with a neighbour's keys on their way
            block_forward(q[:0], k[:0], v[:0], _NO_ROWS, scale=scale, backend=plan.backend)
        state = None
        for step, visibility, k_block, v_block in _blocks(plan, k, v):
            final = step is plan.steps[-1]
            state = block_forward(
                q, k_block, v_block, visibility, scale=scale, state=state, final=final, backend=plan.backend
            )
        assert state is not None
        out, lse = state
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, dout, dq = ctx.plan, grads[0].contiguous(), None
        home = (_DirectReturn if plan.route == "direct" else _RelayReturn)(plan)
        for step, visibility, k_block, v_block in _blocks(plan, k, v):
            dq, dk, dv = block_backward(
                q,
                k_block,
                v_block,
                out,
                lse,
                dout,
                visibility,
                scale=ctx.scale,
                grads=(dq, None, None),
                final=len(plan.steps) == 1,
                deterministic=plan.deterministic,
                backend=plan.backend,
            )
            home.deliver(step, dk, dv)
        assert dq is not None
        dk, dv = home.collect()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _blocks(plan: AttentionPlan, k: Tensor, v: Tensor) -> Iterator[tuple[Step, Visibility, Tensor, Tensor]]:
    """The key block of each step. While the caller works on one, the block of the next step is on its way."""
    own = held = k, v
    for step, following, visibility in zip(plan.steps, [*plan.steps[1:], None], plan.visibility, strict=True):
        if following is None:
            yield step, visibility, *held
            return
        send = [take(x, following.send_rows) for x in (own if plan.route == "direct" else held)]
        arriving = k.new_empty(following.num_rows, *k.shape[1:]), v.new_empty(following.num_rows, *v.shape[1:])
        flight = plan.mesh.transport.exchange(
            "ring", send_to=following.send_to, send=send, recv_from=following.recv_from, recv=arriving
        )
        yield step, visibility, *held
        flight.wait()
        held = arriving


class _DirectReturn:
    """Gradients of borrowed rows go straight back to their owner, who adds them in the order of steps."""

    def __init__(self, plan: AttentionPlan) -> None:
        self.mesh = plan.mesh
        self.flight: tuple[Handle, Step, Tensor, Tensor] | None = None
        self.dk, self.dv = None, None

    def deliver(self, step: Step, dk: Tensor, dv: Tensor) -> None:
        if step.source == self.mesh.ring_rank:
            self.dk, self.dv = dk, dv
            return
        self._land()
        back = [x.new_empty(step.num_send_rows, *x.shape[1:]) for x in (dk, dv)]
        handle = self.mesh.transport.exchange(
            "ring", send_to=step.recv_from, send=[dk, dv], recv_from=step.send_to, recv=back
        )
        self.flight = handle, step, back[0], back[1]

    def _land(self) -> None:
        if self.flight is None:
            return
        handle, step, dk, dv = self.flight
        handle.wait()
        for own, back in ((self.dk, dk), (self.dv, dv)):
            assert own is not None
            if isinstance(step.send_rows, Tensor):
                own.index_add_(0, step.send_rows, back)
            elif step.send_to is not None:
                take(own, step.send_rows).add_(back)

    def collect(self) -> tuple[Tensor, Tensor]:
        self._land()
        assert self.dk is not None and self.dv is not None
        return self.dk, self.dv


class _RelayReturn:
    """Gradients travel with their shard, each rank adding its own, and arrive home after the last step."""

    def __init__(self, plan: AttentionPlan) -> None:
        self.mesh = plan.mesh
        num_rows = [step.num_rows for step in plan.steps]
        self.next_rows = iter([*num_rows[1:], num_rows[0]])  # after the last step one's own shard comes home
        self.flight: tuple[Handle, Tensor, Tensor] | None = None

    def deliver(self, step: Step, dk: Tensor, dv: Tensor) -> None:
        if self.flight is not None:
            handle, travelled_dk, travelled_dv = self.flight
            handle.wait()
            dk, dv = travelled_dk.add_(dk), travelled_dv.add_(dv)
        num_rows, (r, ring) = next(self.next_rows), (self.mesh.ring_rank, self.mesh.ring)
        arriving = [x.new_empty(num_rows, *x.shape[1:]) for x in (dk, dv)]
        handle = self.mesh.transport.exchange(
            "ring", send_to=(r + 1) % ring, send=[dk, dv], recv_from=(r - 1) % ring, recv=arriving
        )
        self.flight = handle, arriving[0], arriving[1]

    def collect(self) -> tuple[Tensor, Tensor]:
        assert self.flight is not None
        handle, dk, dv = self.flight
        handle.wait()
        return dk, dv
