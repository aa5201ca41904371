from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from longtake.kernels import operator
from longtake.kernels.attention import attention
from longtake.kernels.operator import attention_backward_operator, attention_operator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BACKENDS = ["cpu", "triton"]


def inputs(*shape: int, heads: int = 4, key_heads: int = 2, head_dim: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, h, head_dim, generator=generator) for h in (heads, key_heads, key_heads)]


def with_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_it_is_a_well_made_operator(backend: str, packed: bool) -> None:
    q, k, v = (x.requires_grad_() for x in (inputs(20) if packed else inputs(2, 10)))
    cu_seqlens = torch.tensor([0, 3, 20]) if packed else None
    options = (cu_seqlens, True, 5, 0.25, True, backend)
    torch.library.opcheck(attention_operator, (q, k, v, *options))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = attention_operator(q, k, v, *options)
    torch.library.opcheck(attention_backward_operator, (q, k, v, out, lse, out, lse, *options))
    torch.library.opcheck(attention_backward_operator, (q, k, v, out, lse, None, lse, *options))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_before_tokens(backend: str, deterministic: bool) -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(1, 20))
    options = (None, True, 5, 0.25, deterministic, backend)
    torch.library.opcheck(attention_operator, tuple(x.clone().requires_grad_() for x in (q, k, v)) + options)
    out, lse = attention_operator(q, k, v, *options)
    torch.library.opcheck(attention_backward_operator, (q, k, v, out, lse, out, lse, *options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_whole(backend: str, dynamic: bool) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        out, lse = attention(q * 2, k, v, causal=True, cu_seqlens=cu_seqlens, return_lse=True, backend=backend)
        return out + lse.transpose(-1, -2).unsqueeze(-1)

    torch.compiler.reset()  # all parameters of this test compile the same function
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tensors in (inputs(2, 20), inputs(2, 30)):
        torch.testing.assert_close(with_gradients(compiled, tensors), with_gradients(model, tensors))
    cu_seqlens = torch.tensor([0, 7, 20])
    packed = inputs(20)
    got = with_gradients(lambda q, k, v: compiled(q, k, v, cu_seqlens), packed)
    torch.testing.assert_close(got, with_gradients(lambda q, k, v: model(q, k, v, cu_seqlens), packed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_changes_nothing(backend: str) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q.tanh(), k, v, causal=True, backend=backend)

    def checkpointed(*tensors: Tensor) -> Any:
        return checkpoint(model, *tensors, use_reentrant=False)

    torch.testing.assert_close(with_gradients(checkpointed, inputs(2, 20)), with_gradients(model, inputs(2, 20)))


def test_fake_tensors_have_the_shapes_of_the_real_ones() -> None:
    q, k, v = (x.bfloat16() for x in inputs(2, 10))
    options = (None, False, None, 1.0, True, "cpu")
    real = attention_operator(q, k, v, *options)
    fake = attention_operator(*(x.to("meta") for x in (q, k, v)), *options)
    assert [(x.shape, x.dtype, x.stride()) for x in fake] == [(x.shape, x.dtype, x.stride()) for x in real]


class OnGpu(Tensor):
    """On the CPU, but does not say so."""

    is_cpu = False  # pyright: ignore[reportAssignmentType]


def test_one_mask_serves_all_layers_and_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    check = operator.check_cu_seqlens
    monkeypatch.setattr(operator, "check_cu_seqlens", lambda *arguments: (checks.append(arguments), check(*arguments)))
    q, k, _ = inputs(20)
    cu_seqlens = torch.tensor([0, 3, 20]).as_subclass(OnGpu)
    first = operator.visibility_of(q, k, cu_seqlens, True, None)
    assert operator.visibility_of(q, k, cu_seqlens, True, None) is first
    assert operator.visibility_of(q, k, torch.tensor([0, 3, 20]), True, None) is first
    assert len(checks) == 2
    cu_seqlens[1] = 5
    assert operator.visibility_of(q, k, cu_seqlens, True, None) is not first
    assert len(checks) == 3
    with pytest.raises(ValueError, match="must end at the number of tokens, 19, got 20"):
        operator.visibility_of(q[:19], k[:19], cu_seqlens, True, None)


def test_tensors_on_the_cpu_are_read_every_time() -> None:
    q, k, _ = inputs(20)
    offsets = np.array([0, 3, 20])
    cu_seqlens = torch.from_numpy(offsets)
    assert operator.visibility_of(q, k, cu_seqlens, True, None).start[4] == 3
    offsets[1] = 4
    assert operator.visibility_of(q, k, cu_seqlens, True, None).start[4] == 4
    cu_seqlens.data[1] = 5
    assert operator.visibility_of(q, k, cu_seqlens, True, None).start[4] == 0


def test_inference_tensors_are_read_every_time() -> None:
    q, k, _ = inputs(20)
    with torch.inference_mode():
        cu_seqlens = torch.tensor([0, 3, 20])
        first = operator.visibility_of(q, k, cu_seqlens, True, None)
        cu_seqlens[1] = 5
        assert operator.visibility_of(q, k, cu_seqlens, True, None).start[4] == 0
        assert first.start[4] == 3
