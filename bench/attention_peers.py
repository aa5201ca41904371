"""Who is timed: our backends, and the attention of PyTorch and of others, on the same tensors, as users call them.

Outputs and gradients are allocated by the call; a backward is the whole of it: preparation, gradients, casts.
"""

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..kernels.attention import attention
from ..kernels.backend import block_backward, block_forward
from ..kernels.operator import visibility_of
from ..kernels.visibility import Visibility
from .attention_shapes import Shape, twin, visibility

BACKENDS = ("triton", "gluon")
FASTEST = ("gluon",)  # may use a backward whose sums are in an order of chance
OTHERS = {"FlashAttention-3": "flash_attn_interface", "FlashAttention-4": "flash_attn.cute"}

Kind = Literal["ours", "plain call", "peer"]
Call = Callable[[], tuple[Tensor, ...]]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class NotServedError(ValueError):
    """This contender has nothing for such a shape."""


@dataclass(frozen=True)
class Inputs:
    """q, dout [B, Sq, Hq, D]; k, v [B, Sk, Hkv, D]; without B where documents are packed. cu_seqlens int32, if so."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    cu_seqlens: Tensor | None


@dataclass(frozen=True)
class Contender:
    """make(shape, inputs, direction): a call that returns out, or dq, dk, dv. It may raise NotServedError.

    backend: of ours, by name. on_twin: of a zigzag step it computes the plain call of the same visible area.
    """

    name: str
    kind: Kind
    make: Callable[[Shape, Inputs, str], Call]
    backend: str | None = None
    on_twin: bool = False


def contenders(shape: Shape, device: torch.device) -> list[Contender]:
    """Who takes part, ours first. On a CPU the peers are others of the same signatures."""
    zigzag = shape.mask == "zigzag"
    found = [Contender(name, "ours", _ours(name), name) for name in BACKENDS]
    if zigzag:
        found += [Contender(f"{name}, plain call", "plain call", _ours(name), name, True) for name in BACKENDS]
    on_gpu = device.type == "cuda"
    flash = SDPBackend.FLASH_ATTENTION if on_gpu else SDPBackend.MATH
    peers = {
        "SDPA flash": _varlen if shape.documents else _sdpa(flash),
        "SDPA cuDNN": _no_packed if shape.documents else _sdpa(SDPBackend.CUDNN_ATTENTION if on_gpu else flash),
    }
    if shape.flex:
        peers["FlexAttention"] = _flex
    peers |= {name: _flash_attn(module) for name, module in OTHERS.items() if is_installed(module)}
    return [*found, *(Contender(name, "peer", make, on_twin=zigzag) for name, make in peers.items())]


def is_installed(module: str) -> bool:
    """Whether it can be imported; nothing of it is."""
    parent = module.rpartition(".")[0]
    return (not parent or is_installed(parent)) and importlib.util.find_spec(module) is not None


def random_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Normal numbers: zeros would be faster."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(length: int, heads: int) -> Tensor:
        sizes = (length, heads, shape.head_dim) if shape.documents else (shape.batch, length, heads, shape.head_dim)
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

    q, dout = (normal(shape.queries, shape.heads) for _ in range(2))
    k, v = (normal(shape.keys, shape.kv_heads) for _ in range(2))
    cu_seqlens = torch.tensor(shape.offsets, dtype=torch.int32, device=device) if shape.documents else None
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout, cu_seqlens)


def mask_of(shape: Shape, inputs: Inputs) -> Visibility:
    """What our kernels work on; the same object as in the calls, so that what is known of it is known there."""
    if shape.mask == "zigzag":
        return visibility(shape, inputs.q.device)
    return visibility_of(inputs.q, inputs.k, inputs.cu_seqlens, shape.causal, None)


def with_autograd(forward: Callable[[], Tensor], inputs: Inputs, direction: str) -> Call:
    """The call in that direction; a forward is one that a backward could follow."""
    if direction == "forward":
        return lambda: (forward(),)
    out = forward()
    qkv = (inputs.q, inputs.k, inputs.v)
    return lambda: torch.autograd.grad(out, qkv, inputs.dout, retain_graph=True)


# Ours


def _ours(backend: str) -> Callable[[Shape, Inputs, str], Call]:
    def make(shape: Shape, inputs: Inputs, direction: str) -> Call:
        if shape.mask == "zigzag":
            return _ring_step(shape, inputs, direction, backend)

        def forward() -> Tensor:
            return attention(
                inputs.q,
                inputs.k,
                inputs.v,
                causal=shape.causal,
                cu_seqlens=inputs.cu_seqlens,
                deterministic=backend not in FASTEST,
                backend=backend,
            )

        return with_autograd(forward, inputs, direction)

    return make


def _ring_step(shape: Shape, inputs: Inputs, direction: str, backend: str) -> Call:
    """Returns the rows that see keys, and the keys that are seen: those of the plain call."""
    q, k, v, dout = (x.detach()[0] for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    mask, scale = mask_of(shape, inputs), shape.head_dim**-0.5
    queries, keys = twin_parts(shape)
    state: tuple[Tensor, Tensor] | None = None
    dq = dk = dv = None
    if shape.carried:
        state = torch.zeros_like(q, dtype=torch.float32), q.new_full(q.shape[1::-1], -torch.inf, dtype=torch.float32)
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    grads = dq, dk, dv

    def forward() -> tuple[Tensor, Tensor]:
        return block_forward(q, k, v, mask, scale=scale, state=state, final=not shape.carried, backend=backend)

    if direction == "forward":
        return lambda: (forward()[0][queries],)
    out, lse = block_forward(q, k, v, mask, scale=scale, final=True, backend=backend)

    def backward() -> tuple[Tensor, ...]:
        found = block_backward(
            q,
            k,
            v,
            out,
            lse,
            dout,
            mask,
            scale=scale,
            grads=grads,
            final=not shape.carried,
            deterministic=backend not in FASTEST,
            backend=backend,
        )
        return found[0][queries], found[1][keys], found[2][keys]

    return backward


def twin_parts(shape: Shape) -> tuple[slice, slice]:
    """The queries and the keys of a zigzag step that the plain call consists of."""
    plain = twin(shape)
    return slice(shape.queries - plain.queries, None), slice(0, plain.keys)


def twin_inputs(shape: Shape, inputs: Inputs) -> tuple[Shape, Inputs]:
    """The plain call of a zigzag step, on the part of the same tensors that it consists of."""
    queries, keys = twin_parts(shape)
    q, dout = (x.detach()[:, queries] for x in (inputs.q, inputs.dout))
    k, v = (x.detach()[:, keys] for x in (inputs.k, inputs.v))
    return twin(shape), Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout, None)


# Others


def _sdpa(backend: SDPBackend) -> Callable[[Shape, Inputs, str], Call]:
    def make(shape: Shape, inputs: Inputs, direction: str) -> Call:
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        grouped = shape.heads != shape.kv_heads

        def forward() -> Tensor:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=grouped)
            return out.transpose(1, 2)

        return with_autograd(forward, inputs, direction)

    return make


def _no_packed(shape: Shape, inputs: Inputs, direction: str) -> Call:
    raise NotServedError("no packed documents")


def _varlen(shape: Shape, inputs: Inputs, direction: str) -> Call:
    """PyTorch's flash kernels for packed documents."""
    from torch.nn.attention import varlen

    known = inspect.signature(varlen.varlen_attn)
    # PyTorch 2.11 has no such argument: it takes fewer key heads without being told.
    grouped = {"enable_gqa": shape.heads != shape.kv_heads} if "enable_gqa" in known.parameters else {}
    window = -1, 0 if shape.causal else -1
    offsets = inputs.cu_seqlens, inputs.cu_seqlens, max(shape.documents), max(shape.documents)
    call = partial(varlen.varlen_attn, inputs.q, inputs.k, inputs.v, *offsets, window_size=window, **grouped)
    known.bind(*call.args, **call.keywords)  # raises TypeError, without a GPU too, where this PyTorch takes others
    if not inputs.q.is_cuda:
        raise NotServedError("PyTorch has no such kernel for a CPU")

    def forward() -> Tensor:
        out = call()
        return out[0] if isinstance(out, tuple) else out

    return with_autograd(forward, inputs, direction)


def _flex(shape: Shape, inputs: Inputs, direction: str) -> Call:
    q, k, v = (x if x.dim() == 4 else x[None] for x in (inputs.q, inputs.k, inputs.v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not q.is_cuda:
        if direction == "backward":
            raise NotServedError("it has no backward on a CPU")
        q, k, v = (x.detach() for x in (q, k, v))
    run = _compiled_flex(shape) if q.is_cuda else flex_attention
    rule = flex_mask(shape, q.device)
    block_mask = None if rule is None else create_block_mask(rule, None, None, shape.queries, shape.keys, q.device)

    def forward() -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")  # on a CPU
            out = run(q, k, v, block_mask=block_mask, enable_gqa=shape.heads != shape.kv_heads).transpose(1, 2)
        return out if inputs.q.dim() == 4 else out[0]

    return with_autograd(forward, inputs, direction)


@lru_cache(maxsize=1)
def _compiled_flex(shape: Shape) -> Callable[..., Any]:
    """For both directions of a shape."""
    import torch._functorch.config

    torch.compiler.reset()  # of the shape before
    torch._functorch.config.donated_buffer = False  # else a backward runs once only
    return torch.compile(flex_attention, dynamic=False)


def flex_mask(shape: Shape, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """The mask as FlexAttention's users write it; None: all keys."""
    if shape.documents:
        lengths = torch.tensor(shape.documents, device=device)
        document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        if shape.causal:
            return lambda batch, head, query, key: (document[query] == document[key]) & (query >= key)
        return lambda batch, head, query, key: document[query] == document[key]
    return (lambda batch, head, query, key: query >= key) if shape.causal else None


def _flash_attn(module: str) -> Callable[[Shape, Inputs, str], Call]:
    """The functions of the FlashAttention repository, versions 3 and 4."""

    def make(shape: Shape, inputs: Inputs, direction: str) -> Call:
        package = importlib.import_module(module)

        def forward() -> Tensor:
            if inputs.cu_seqlens is None:
                out = package.flash_attn_func(inputs.q, inputs.k, inputs.v, causal=shape.causal)
            else:
                out = package.flash_attn_varlen_func(
                    inputs.q,
                    inputs.k,
                    inputs.v,
                    cu_seqlens_q=inputs.cu_seqlens,
                    cu_seqlens_k=inputs.cu_seqlens,
                    max_seqlen_q=max(shape.documents),
                    max_seqlen_k=max(shape.documents),
                    causal=shape.causal,
                )
            return out[0] if isinstance(out, tuple) else out

        return with_autograd(forward, inputs, direction)

    return make
