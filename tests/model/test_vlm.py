"""The promise: loss and every parameter's gradient on 4 ranks are those of one rank, vision tower included.

4 ranks train as the trainer does it, under FSDP2 and with each rank's share of frames and tokens; one rank is plain
PyTorch with the whole sequence. Two models with different meshes live side by side in each process.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from longtake.comm.mesh import Mesh
from longtake.model import vision
from longtake.model.batch import ShardedBatch, shard_documents
from longtake.model.vlm import VisionLanguageModel
from longtake.train.loader import StepData
from longtake.train.trainer import compute_gradients, shard_parameters
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.model.documents import IMAGE_TOKEN, TOKENS_PER_FRAME, Document, make_document
from tests.ranks import run_ranks
from tests.tiny import random_model, tiny_config
from tests.training_files import run_config

TOLERANCE = 1e-5  # float32 sums in another order; errors seen are below 2e-6 of the largest value
SAMPLES = {  # frames of each sample's videos
    "0 frames": [(), ()],
    "1 frame": [(), (1,)],
    "3 frames": [(2, 1), ()],
    "9 frames": [(1,), (), (4, 2), (2,)],
}


@dataclass(frozen=True, eq=False)
class Rival:
    """The same model twice: sharded over the 4 ranks of a mesh, and whole."""

    mesh: Mesh
    sharded: VisionLanguageModel
    whole: VisionLanguageModel


def rival(mesh: Mesh, *, tied: bool, **fields: Any) -> Rival:
    config = tiny_config(num_heads=6, num_kv_heads=3)
    config = replace(config, language=replace(config.language, tie_word_embeddings=tied))
    sharded, whole = (random_model(config, seed=3).train() for _ in range(2))
    settings = run_config(Path(), Path(), Path(), **fields)
    sharded.llm.recompute = sharded.vision_tower.recompute = settings.recompute
    shard_parameters(sharded, mesh, settings)
    return Rival(mesh, sharded, whole)


def one_sequence(documents: Sequence[Document], mesh: Mesh, **how: Any) -> tuple[ShardedBatch, Tensor]:
    batch = shard_documents(documents, mesh=mesh, tokens_per_frame=TOKENS_PER_FRAME, **how)
    pixels = torch.cat([torch.empty(0, 3, 16, 16), *(document.pixels for document in documents)])
    return batch, pixels[batch.frames.first : batch.frames.last]


def step_data(documents: Sequence[Document], mesh: Mesh, **how: Any) -> StepData:
    """One step: each data-parallel group packs its share of the documents into one sequence."""
    batch, pixels = one_sequence(documents[mesh.data_rank :: mesh.data], mesh, **how)
    weight = sum(float(document.loss_weight[1:].sum()) for document in documents)
    return StepData([(batch, pixels)], weight, 0, 0, 0, 0, 0)


def loss_and_gradients(model: nn.Module, data: StepData, mesh: Mesh) -> dict[str, Tensor]:
    model.zero_grad()
    found = {"loss": compute_gradients(model, data, mesh)}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad = parameter.grad
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return found


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference over largest value, of each gradient and the loss.

    A constant added to all keys moves no softmax: the key bias of a tower, which has no rotary, has the gradient 0 but
    for rounding, and is measured by that of the key weights.
    """
    assert found.keys() == expected.keys()
    errors = {}
    for name, gradient in expected.items():
        is_zero = name.startswith("vision_tower.") and name.endswith("k_proj.bias")
        scale = expected[name.replace("bias", "weight") if is_zero else name].abs().max()
        error = (found[name] - gradient).abs().max()
        errors[name] = float(error / scale) if scale else float(error)
    return errors


def plain_loss(model: VisionLanguageModel, documents: Sequence[Document]) -> Tensor:
    """Their mean weighted loss, one document after another: no plan, no route and no gradient of ours."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)

    total, weight = torch.zeros(()), torch.zeros(())
    for document in documents:
        ids, features = document.input_ids, model.mm_projector(model.vision_tower(document.pixels)).flatten(0, 1)
        embedded = model.llm.embed(ids).masked_scatter((ids == IMAGE_TOKEN)[:, None], features)
        hidden = model.llm(embedded, torch.arange(len(ids)), attend)
        losses = F.cross_entropy(model.llm.logits(hidden[:-1]), ids[1:], reduction="none")
        total, weight = total + losses @ document.loss_weight[1:], weight + document.loss_weight[1:].sum()
    return total / weight


@pytest.mark.parametrize("tied", [True, False])
def test_one_rank_is_the_plain_model(tied: bool) -> None:
    """What the ranks are compared with below."""
    config, alone = tiny_config(num_heads=6, num_kv_heads=3), Mesh(alone=True)
    model = random_model(replace(config, language=replace(config.language, tie_word_embeddings=tied)), seed=3).train()
    documents = [make_document(frames, seed=i) for i, frames in enumerate(SAMPLES["9 frames"])]
    found = loss_and_gradients(model, step_data(documents, alone), alone)
    model.zero_grad()
    loss = plain_loss(model, documents)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = {name: grad for name, grad in gradients.items() if grad is not None} | {"loss": loss.detach()}
    assert max(differences(found, expected).values()) < TOLERANCE


def compare(rank: int) -> dict[str, dict[str, float]]:
    rivals = {
        "2 x 2, layer": rival(Mesh(ring=2, ulysses=2), tied=True, shard="layer"),
        "data 2, ulysses 2, model": rival(Mesh(data=2, ulysses=2), tied=False, shard="model", recompute=True),
    }
    alone, errors = Mesh(alone=True), {}
    for samples, videos in SAMPLES.items():
        documents = [make_document(frames, seed=i) for i, frames in enumerate(videos)]
        expected = {name: loss_and_gradients(r.whole, step_data(documents, alone), alone) for name, r in rivals.items()}
        for how in ("zigzag direct", "zigzag relay", "balanced direct", "balanced relay"):
            layout, route = how.split()
            for name, r in rivals.items():
                data = step_data(documents, r.mesh, layout=layout, route=route)
                found = loss_and_gradients(r.sharded, data, r.mesh)
                errors[f"{name}, {samples}, {how}"] = differences(found, expected[name])
    return errors


def test_loss_and_all_gradients_are_those_of_one_rank() -> None:
    for errors in run_ranks(compare, 4):
        wrong = {(case, n): e for case, found in errors.items() for n, e in found.items() if e > TOLERANCE}
        assert not wrong
        assert len(errors) == 32
        assert any(name.startswith("vision_tower.") for name in errors["2 x 2, layer, 9 frames, zigzag relay"])


def run_in_passes(rank: int) -> dict[str, tuple[list[int], float]]:
    """Frames of each of the tower's runs on this rank, and the largest difference; only one group has frames."""
    alone, found = Mesh(alone=True), {}
    documents = [make_document((4, 5), seed=0), make_document((), seed=1)]
    for shard in ("layer", "model"):
        r = rival(Mesh(data=2, ring=2), tied=True, shard=shard, recompute=True)
        runs: list[int] = []
        r.sharded.vision_tower.vision_model.register_forward_hook(lambda *call, runs=runs: runs.append(len(call[-1])))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vision, "FRAMES_PER_PASS", 2)
            ours = loss_and_gradients(r.sharded, step_data(documents, r.mesh), r.mesh)
        expected = loss_and_gradients(r.whole, step_data(documents, alone), alone)
        found[shard] = runs, max(differences(ours, expected).values())
    return found


def test_each_rank_runs_the_tower_in_as_many_passes_as_its_frames_need() -> None:
    runs = [[2, 2], [2, 2, 1], [0], [0]]
    for found, of_rank in zip(run_ranks(run_in_passes, 4), runs, strict=True):
        for shard in ("layer", "model"):
            assert found[shard][0] == 2 * of_rank and found[shard][1] < TOLERANCE


def no_weight_here(rank: int) -> dict[str, float]:
    """One token bears the loss, so that three ranks have none; then less tokens than ranks."""
    r, alone, worst = rival(Mesh(ring=2, ulysses=2), tied=True), Mesh(alone=True), {}
    documents = {
        "one weight": make_document((3,), seed=0, num_answer=1),
        "three tokens": replace(
            make_document((), seed=1),
            input_ids=torch.tensor([8, 9, 10]),
            loss_weight=torch.tensor([0.0, 0.0, 1.0]),
        ),
    }
    for name, document in documents.items():
        data = step_data([document], r.mesh, layout="zigzag")
        found = loss_and_gradients(r.sharded, data, r.mesh)
        expected = loss_and_gradients(r.whole, step_data([document], alone), alone)
        worst[name] = max(differences(found, expected).values())
        weighted = r.mesh.gather_objects(int(data.batches[0][0].weights.count_nonzero()))
        assert sorted(weighted) == [0, 0, 0, 1]
    return worst


def test_ranks_without_a_weighted_token_or_any_token_take_part() -> None:
    for worst in run_ranks(no_weight_here, 4):
        assert max(worst.values()) < TOLERANCE and len(worst) == 2


def in_bfloat16(rank: int) -> tuple[float, float, float]:
    """Loss by layer, by model and in float32."""
    mesh, alone = Mesh(ring=2), Mesh(alone=True)
    documents = [make_document((4,), seed=0), make_document((), seed=1)]
    losses = []
    for shard in ("layer", "model"):
        r = rival(mesh, tied=True, shard=shard, dtype="bfloat16")
        losses.append(float(compute_gradients(r.sharded, step_data(documents, mesh), mesh)))
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in r.sharded.parameters())
    exact = compute_gradients(r.whole, step_data(documents, alone), alone)
    return losses[0], losses[1], float(exact)


def test_bfloat16_is_the_same_by_layer_and_by_model_and_near_float32() -> None:
    for by_layer, by_model, exact in run_ranks(in_bfloat16, 2):
        assert by_layer == by_model  # who is gathered when does not change what is computed
        assert by_layer == pytest.approx(exact, rel=0.02)  # 8 bits of mantissa in a model of 2 layers
