"""Four ranks that share one GPU, over NCCL: they equal one rank and the CPU, do not wait, and end when one is lost."""

import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from longtake.comm.launch import launch
from longtake.comm.layout import balanced
from longtake.comm.mesh import Mesh
from longtake.comm.nccl import NcclTransport
from longtake.comm.watchdog import EXIT_CODE
from longtake.kernels.attention import attention
from longtake.model.attention_plan import Route
from longtake.model.batch import shard_documents
from longtake.model.sequence_parallel import parallel_attention
from longtake.model.vlm import VisionLanguageModel
from longtake.train.config import TrainConfig
from longtake.train.loader import StepData
from longtake.train.trainer import compute_gradients, shard_parameters
from torch import Tensor

from tests.model.documents import TOKENS_PER_FRAME, make_document
from tests.tiny import random_model, tiny_config

ROOT = Path(__file__).parents[2]
CU_SEQLENS = torch.tensor([0, 700, 705, 2100, 3001])


def shards(mesh: Mesh, route: Route, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """out, dq, dk, dv of this rank, and what one rank has in the same places."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(3001, heads, 128) for heads in (6, 2, 2, 6)]
    *whole, dout = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes)
    cu_seqlens = CU_SEQLENS.to(device)
    layout = balanced(CU_SEQLENS, ring=mesh.ring, ulysses=mesh.ulysses)

    alone = [x.clone().requires_grad_() for x in whole]
    out = attention(*alone, causal=True, cu_seqlens=cu_seqlens)
    expected = [out, *torch.autograd.grad(out, alone, dout)]

    mine = [layout.shard(x, mesh.sp_rank).requires_grad_() for x in whole]
    out = parallel_attention(*mine, mesh=mesh, layout=layout, causal=True, cu_seqlens=CU_SEQLENS, route=route)
    found = [out, *torch.autograd.grad(out, mine, layout.shard(dout, mesh.sp_rank))]
    return [(a.detach(), layout.shard(b, mesh.sp_rank).detach()) for a, b in zip(found, expected, strict=True)]


def attend() -> None:
    for ring, ulysses in ((4, 1), (2, 2), (1, 4)):
        mesh = Mesh(ring=ring, ulysses=ulysses)
        peers = {"nccl": mesh, "torch": Mesh(ring=ring, ulysses=ulysses, transport="torch")}
        assert isinstance(mesh.transport, NcclTransport)
        for name, through in peers.items():
            for route in ("direct", "relay"):
                for found, expected in shards(through, route, mesh.device):
                    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
                    assert error <= 2**-7, (name, ring, ulysses, route, float(error))  # two roundings to bfloat16


def test_attention_on_four_ranks_equals_one() -> None:
    launch(attend, world_size=4, share_gpu=True)


def gradients(device: str | None) -> dict[str, Tensor]:
    """Of a step in float32: FSDP2 over torch.distributed's NCCL and the ring over ours, in one program."""
    mesh = Mesh(ring=2, ulysses=2, device=device)
    documents = [make_document((3, 2), seed=1), make_document((), seed=2), make_document((5,), seed=3)]
    batch = shard_documents(documents, mesh=mesh, tokens_per_frame=TOKENS_PER_FRAME)
    pixels = torch.cat([document.pixels for document in documents])[batch.frames.first : batch.frames.last]
    model = random_model(tiny_config(), seed=0).to(mesh.device).train()
    config = TrainConfig(stage=5, model=Path(), data=Path(), out=Path(), steps=1, ring=2, ulysses=2, dtype="float32")
    shard_parameters(model, mesh, config)
    data = StepData([(batch, pixels.to(mesh.device))], batch.total_weight, batch.num_tokens, batch.num_frames, 0, 0, 0)
    loss = compute_gradients(model, data, mesh)
    assert isinstance(model, VisionLanguageModel)
    whole = {name: p.grad.full_tensor().cpu() for name, p in model.named_parameters() if p.grad is not None}  # pyright: ignore[reportAttributeAccessIssue]
    return {"loss": loss.cpu(), **whole}


def step() -> None:
    found, expected = gradients(None), gradients("cpu")
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(found[name].to(want), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()), msg=name)


def test_a_training_step_equals_the_one_on_the_cpu() -> None:
    launch(step, world_size=4, share_gpu=True)


def lose() -> None:
    """Rank 1 never sends; rank 0's GPU would wait for ever, and its host with it."""
    mesh = Mesh(ring=2, deadline=timedelta(seconds=5))
    got = torch.empty(1024, device=mesh.device)
    if mesh.rank == 1:
        time.sleep(120)
    mesh.transport.exchange("ring", send_to=None, send=[], recv_from=1, recv=[got]).wait()
    torch.cuda.synchronize()


def test_a_stalled_peer_is_named_within_the_deadline() -> None:
    program = "from tests.gpu.test_nccl import launch, lose; launch(lose, world_size=2, share_gpu=True)"
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode != 0 and time.monotonic() - began < 90
    assert "rank 0, axis ring: exchange receiving 4096 bytes from rank 1: not done after 5 s" in ended.stderr
    assert str(EXIT_CODE) in ended.stderr


@pytest.fixture(autouse=True, scope="module")
def a_gpu() -> None:
    assert torch.cuda.is_available(), "these tests are for a machine with a GPU: make gpu"
