"""Ranks that were given different batches say so, before anything travels."""

import os
from unittest.mock import patch

import pytest
import torch
from longtake.comm.mesh import Mesh
from longtake.model.huggingface import enable
from torch import Tensor

from tests.model.tiny_transformers import NUM_WORDS, llava, qwen2
from tests.ranks import run_ranks


def words(length: int, seed: int) -> Tensor:
    return torch.randint(0, NUM_WORDS, (1, length), generator=torch.Generator().manual_seed(seed))


def first_batches(rank: int) -> list[float]:
    """Losses of right batches, each of which comes after one that was refused as a model's first."""
    mesh, ids, mask, losses = Mesh(ring=2), words(40, seed=0), torch.ones(1, 40, dtype=torch.int64), []
    mask[:, : 5 * rank] = 0
    other = {
        "input_ids": {"input_ids": words(40, seed=rank)},
        "input_ids, labels": {"input_ids": words(40 + 9 * rank, seed=0), "labels": words(40 + 9 * rank, seed=0)},
        "labels": {"input_ids": ids, "labels": words(40, seed=rank)},
        "attention_mask": {"input_ids": ids, "attention_mask": mask},
        "position_ids": {"input_ids": ids, "position_ids": torch.arange(40)[None] + rank},
        "inputs_embeds": {"inputs_embeds": torch.zeros(1, 40 + rank, 48)},
    }
    for names, batch in other.items():
        model = qwen2()
        enable(model, mesh)
        with pytest.raises(ValueError, match=f"^rank 1 was given another batch than rank 0, in {names}: all ranks"):
            model(**batch)
        losses.append(float(model(ids, labels=ids).loss.detach()))
    return losses


def test_the_first_batch_is_compared() -> None:
    ids = words(40, seed=0)
    expected = float(qwen2()(ids, labels=ids).loss.detach())
    for losses in run_ranks(first_batches, 2, timeout=60):
        assert losses == pytest.approx([expected] * 6, rel=1e-5)


def batches_of_groups(rank: int) -> tuple[list[int], str]:
    """Comparisons in three calls, without debugging and with it; the error of a later batch with it."""
    counts = []
    for debug in ("0", "1"):
        os.environ["LONGTAKE_DEBUG"] = debug
        mesh, model = Mesh(data=2, ring=2), llava()
        enable(model, mesh)
        with patch.object(mesh, "gather_objects", wraps=mesh.gather_objects) as compare:
            for step in range(3):
                ids = words(30 + mesh.data_rank, seed=10 * step + mesh.data_rank)  # a batch of each group's own
                model(ids, labels=ids).loss.backward()
        counts.append(compare.call_count)
    with pytest.raises(ValueError, match="another batch") as refused:
        model(words(30, seed=rank))
    return counts, str(refused.value)


def test_later_batches_are_compared_in_debug_mode_alone_and_groups_have_their_own() -> None:
    for rank, (counts, error) in enumerate(run_ranks(batches_of_groups, 4)):
        assert counts == [1, 3]
        first = rank // 2 * 2
        assert error.startswith(f"rank {first + 1} was given another batch than rank {first}, in input_ids: all ranks")
