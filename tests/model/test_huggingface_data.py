"""Groups of ranks with batches of their own under FSDP: one may have images, and another none."""

from typing import Any, cast

import torch
from longtake.comm.mesh import Mesh
from longtake.model.huggingface import enable
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.model.test_huggingface import TOLERANCE, loss_and_gradients, worst_error
from tests.model.test_huggingface_vision import CLIP, SMALL, WIDE, batch
from tests.model.tiny_transformers import VISION
from tests.ranks import run_ranks

NONE, IMAGES, VIDEO = [[], []], [[WIDE, SMALL], [SMALL]], [[CLIP]]
GROUPS = {
    "llava": [([[SMALL]] * 3, NONE), (NONE, [[SMALL]] * 3)],
    "qwen2_5_vl": [(IMAGES, VIDEO), (NONE, IMAGES)],
    "llava_onevision": [(VIDEO, IMAGES)],
    "qwen3_vl": [(VIDEO, NONE)],
}


def shard_fully(model: PreTrainedModel, mesh: Mesh) -> None:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) > len(cast(Any, model.get_decoder()).layers)  # those of the encoder as well
    for module in (*layers, model):
        fully_shard(module, mesh=mesh.device_mesh)


@torch.no_grad()
def token_logits(model: PreTrainedModel, part: dict[str, Tensor]) -> Tensor:
    """Of a pass without labels: [tokens that are no padding, vocab]."""
    logits = model(**{name: x for name, x in part.items() if name != "labels"}).logits
    return logits[part["attention_mask"].bool()] if "attention_mask" in part else logits


def train_groups(rank: int) -> dict[str, float]:
    """Errors of each group's loss, logits and of the gradients, against the mean over both batches in one process."""
    meshes, errors = (Mesh(data=2, ring=2), Mesh(data=2, ulysses=2)), {}
    for family, cases in GROUPS.items():
        for groups, mesh in zip(cases, meshes, strict=False):
            parts = [batch(rows, family=family) for rows in groups]
            model = VISION[family]()
            model.set_attn_implementation("eager")
            both = [loss_and_gradients(model, part) | {"logits": token_logits(model, part)} for part in parts]
            names = (both[0].keys() | both[1].keys()) - {"logits"}
            mean = {name: sum(one[name] for one in both if name in one) / 2 for name in names}
            enable(model, mesh, gradients="mean")
            shard_fully(model, mesh)
            mine = parts[mesh.data_rank]
            found = loss_and_gradients(model, mine) | {"logits": token_logits(model, mine)}
            whole: dict[str, Tensor] = {n: getattr(x, "full_tensor", lambda x=x: x)() for n, x in found.items()}
            expected: dict[str, Any] = mean | {name: both[mesh.data_rank][name] for name in ("loss", "logits")}
            errors[f"{family}, {groups}"] = worst_error(whole, expected)
    return errors


def test_a_group_without_images_beside_one_with() -> None:
    for errors in run_ranks(train_groups, 4, timeout=90):
        assert not {case: error for case, error in errors.items() if not error < 3 * TOLERANCE}
        assert len(errors) == sum(map(len, GROUPS.values()))
