"""The CUDA backends on CPU tensors: which kernel they launch, with what, and what they refuse."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from longtake.bench.recorder import CompileOnly
from longtake.kernels import blocks, cuda, table
from longtake.kernels.backend import block_backward, block_forward
from longtake.kernels.blocks import is_aligned
from longtake.kernels.candidates import Config
from longtake.kernels.visibility import Visibility
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.masks import cases, shard_visibility

SCALE = 0.3
NEAR = {"rtol": 1e-5, "atol": 2e-5}
NOT_INTERPRETED = SimpleNamespace(runtime=SimpleNamespace(interpret=False))  # triton.knobs as on a GPU
EMPTY = ["nothing", "no keys", "no queries", "random 2"]


def tensors(visibility: Visibility, dtype: torch.dtype = torch.float32, head_dim: int = 16) -> list[Tensor]:
    """q, k, v, dout of 4 query heads and 2 key heads."""
    generator = torch.Generator().manual_seed(1)
    rows, keys = len(visibility.start), len(visibility.kstart)
    sizes = ((rows, 4), (keys, 2), (keys, 2), (rows, 4))
    return [torch.randn(t, h, head_dim, generator=generator).to(dtype) for t, h in sizes]


def run(backend: str, visibility: Visibility, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    q, k, v, dout = tensors(visibility, dtype)
    out, lse = block_forward(q, k, v, visibility, scale=SCALE, backend=backend, final=options.get("final", False))
    return [out, lse, *block_backward(q, k, v, out, lse, dout, visibility, scale=SCALE, backend=backend, **options)]


@pytest.mark.parametrize("name", ["zigzag, packed", "decode", *EMPTY])
def test_a_block_forward_and_backward(name: str) -> None:
    torch.testing.assert_close(run("triton", cases()[name]), run("reference", cases()[name]), **NEAR)


def test_the_last_block_comes_in_the_dtype_of_the_input() -> None:
    visibility = shard_visibility(40)
    got = run("triton", visibility, torch.float16, final=True)
    assert [x.dtype for x in got] == [torch.float16, torch.float32, *[torch.float16] * 3]
    want = run("reference", visibility, torch.float16, final=True)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("given", [(True, False, False), (False, True, True), (True, True, True)])
def test_gradients_are_added_to_those_given(given: tuple[bool, ...]) -> None:
    visibility = shard_visibility(40)
    q, k, v, dout = tensors(visibility)
    out, lse = block_forward(q, k, v, visibility, scale=SCALE, backend="reference")
    grads: Any = tuple(torch.ones_like(x) if there else None for x, there in zip((q, k, v), given, strict=True))
    found = block_backward(q, k, v, out, lse, dout, visibility, scale=SCALE, backend="triton", grads=grads)
    plain = block_backward(q, k, v, out, lse, dout, visibility, scale=SCALE, backend="reference")
    for x, before, there, alone in zip(found, grads, given, plain, strict=True):
        assert not there or x is before
        torch.testing.assert_close(x, alone + there, **NEAR)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows of odd length": lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1],
    "an odd start": lambda x: torch.cat([x[:1].flatten()[:1], x.flatten()])[1:].view(x.shape),
    "gaps in head_dim": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "repeated heads": lambda x: x[:, :1].expand(-1, x.shape[1], -1),
}


@pytest.mark.parametrize(("layout", "num_rows"), [*((layout, 40) for layout in LAYOUTS), ("an odd start", 5)])
def test_kernels_are_given_aligned_tensors_alone(layout: str, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    visibility = shard_visibility(40, torch.arange(40 - num_rows, 40))
    strided = [LAYOUTS[layout](x) for x in tensors(visibility, torch.float16)]
    assert not any(map(is_aligned, strided))
    given: list[Tensor] = []

    def noting(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            given.extend(x for x in args if isinstance(x, Tensor) and x.dim() == 3)
            return kernel(*args, **options)

        return noted

    for name, kernel in cuda.FORWARD.items():
        monkeypatch.setitem(cuda.FORWARD, name, noting(kernel))
    for module, name in ((cuda.flash_backward, "dkdv"), (cuda.flash_backward, "dq"), (cuda.flash_prepare, "prepare")):
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    found = {}
    for backend, (q, k, v, dout) in {"triton": strided, "reference": [x.double() for x in strided]}.items():
        out, lse = block_forward(q, k, v, visibility, scale=SCALE, backend=backend)
        out = LAYOUTS[layout](out) if layout != "repeated heads" else out
        grads = block_backward(q, k, v, out, lse, dout, visibility, scale=SCALE, backend=backend)
        found[backend] = [x.double() for x in (out, lse, *grads)]
    assert len(given) == 3 + 2 + 2 * 4 and all(map(is_aligned, given))
    torch.testing.assert_close(found["triton"], found["reference"], rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_head_dim_of_no_whole_16_bytes(dtype: torch.dtype) -> None:
    visibility = shard_visibility(40)
    q, k, v, dout = tensors(visibility, dtype, head_dim=20)
    found = {}
    for backend in ("triton", "reference"):
        out, lse = block_forward(q, k, v, visibility, scale=SCALE, backend=backend, final=True)
        grads = block_backward(q, k, v, out, lse, dout, visibility, scale=SCALE, backend=backend)
        found[backend] = [out, lse, *grads]
    torch.testing.assert_close(found["triton"], found["reference"], rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize(("capability", "uses"), [(80, False), (90, True), (100, False), (120, False)])
def test_tma_serves_on_hopper_alone(capability: int, uses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "knobs", NOT_INTERPRETED)
    monkeypatch.setattr(blocks.driver, "_active", CompileOnly(capability))
    q = torch.randn(8, 2, 64).half()
    assert blocks.use_tma(q) is uses
    assert not blocks.use_tma(q, q[..., :60])


def test_what_is_carried_must_be_aligned() -> None:
    visibility = shard_visibility(20)
    q, k, v, dout = tensors(visibility)
    out, lse = block_forward(q, k, v, visibility, scale=SCALE, backend="reference")
    odd = LAYOUTS["rows of odd length"]
    message = r"out and gradients so far must .*, got strides \[68, 17, 1\]: pass what the call for the block before"
    with pytest.raises(ValueError, match=message):
        block_forward(q, k, v, visibility, scale=SCALE, backend="triton", state=(odd(out), lse))
    for grads in ((odd(q), None, None), (q, k, odd(v))):
        with pytest.raises(ValueError, match="out and gradients so far must"):
            block_backward(q, k, v, out, lse, dout, visibility, scale=SCALE, backend="triton", grads=grads)


class NoWaiting(TorchDispatchMode):
    """Fails where a tensor is read back on the host, which a CUDA graph cannot record."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "is_capturing", lambda device: True)
    visibility = shard_visibility(70, lengths=[10, 60])
    with NoWaiting():
        captured = run("triton", visibility)
    monkeypatch.undo()
    torch.testing.assert_close(captured, run("triton", visibility))
    with pytest.raises(AssertionError), NoWaiting():
        run("triton", shard_visibility(70, lengths=[10, 60]))  # outside of a capture tiles are counted


def spy(calls: list[str], name: str) -> Callable[..., Any]:
    """A kernel that notes its call and leaves out and lse, or the gradients, as they are."""

    def kernel(q: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(name)
        return cuda.nothing_seen(q)

    return kernel


@pytest.mark.parametrize(("rows", "kernel"), [(1, "decode"), (16, "decode"), (17, "flash_forward")])
def test_few_rows_are_decoded(rows: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in cuda.FORWARD:
        monkeypatch.setitem(cuda.FORWARD, name, spy(calls, name))
    visibility = shard_visibility(40, torch.arange(40 - rows, 40))
    q, k, v, _ = tensors(visibility)
    block_forward(q, k, v, visibility, scale=SCALE, backend="triton")
    assert calls == [kernel]


@pytest.mark.parametrize(
    ("backend", "deterministic", "fused_cost", "kernels"),
    [
        ("tuned", False, 1.0, ["backward"]),
        ("tuned", False, 3.0, ["dkdv", "dq"]),
        ("tuned", True, 1.0, ["dkdv", "dq"]),
        ("gluon", False, 1.0, ["backward"]),
        ("triton", False, 1.0, ["dkdv", "dq"]),
    ],
)
def test_the_fused_backward_serves_where_it_is_ahead_and_asked_for(
    backend: str, deterministic: bool, fused_cost: float, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {
        "dkdv": (Config("flash_dkdv", 32, 32, 4, 2), 1.0),
        "dq": (Config("flash_dq", 32, 32, 4, 2), 1.0),
        "backward": (Config("hopper_backward", 32, 32, 4, 2), fused_cost),
    }
    entries = tuple(table.Entry(name, 64, "float16", 1024, *cost) for name, cost in costs.items())
    monkeypatch.setattr(table, "entries_for", lambda device: entries)
    calls: list[str] = []
    monkeypatch.setattr(cuda.flash_backward, "dkdv", spy(calls, "dkdv"))
    monkeypatch.setattr(cuda.flash_backward, "dq", spy(calls, "dq"))
    monkeypatch.setattr(cuda.hopper_backward, "backward", spy(calls, "backward"))
    visibility = shard_visibility(40)
    q, k, v, dout = tensors(visibility, torch.float16)
    out, lse = cuda.nothing_seen(q)
    options: Any = {"scale": SCALE, "backend": backend, "deterministic": deterministic}
    block_backward(q, k, v, out, lse, dout, visibility, **options)
    assert calls == kernels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, r"q, k, v must be .*, got torch.float64: cast, or backend='reference'"),
        ({"head_dim": 264}, r"head_dim must be at most 256, got 264"),
        ({"backend": "gluon"}, r"none of flash_dkdv, flash_dq, hopper_backward, hopper_forward serves forward"),
    ],
)
def test_what_no_kernel_takes(change: dict[str, Any], message: str) -> None:
    call = {"dtype": torch.float32, "head_dim": 16, "backend": "triton"} | change
    q = torch.zeros(20, 2, call["head_dim"], dtype=call["dtype"])
    with pytest.raises(ValueError, match=message):
        block_forward(q, q, q, shard_visibility(20), scale=1.0, backend=call["backend"])


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "knobs", NOT_INTERPRETED)
    q = torch.zeros(20, 2, 16)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 first"):
        block_forward(q, q, q, shard_visibility(20), scale=1.0, backend="triton")
