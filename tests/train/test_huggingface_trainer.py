"""Transformers' Trainer on groups of ranks trains as one process does on the same global batches."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from longtake.comm.mesh import Mesh
from longtake.train.huggingface_trainer import SequenceParallelTrainer
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, EvalPrediction, PreTrainedTokenizerFast, Trainer, TrainingArguments

from tests.model.tiny_transformers import IMAGE, SIZES, llama, llava, lora, qwen2
from tests.ranks import run_ranks

TOLERANCE = 1e-5  # float32 sums in another order
NUM_STEPS, EVAL_LENGTH = 4, 26


def rows(num: int, lengths: tuple[int, int], seed: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(num):
        length = int(torch.randint(*lengths, (1,), generator=generator))
        ids = torch.randint(1, SIZES["vocab_size"], (length,), generator=generator)
        labels = ids.masked_fill(torch.rand(length, generator=generator) < 0.4, -100)
        samples.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return samples


def pad(samples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    def stack(values: list[list[int]], filler: int) -> Tensor:
        tensors = [torch.tensor(value) for value in values]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler)

    ids = [sample["input_ids"] for sample in samples]
    return {
        "input_ids": stack(ids, 0),
        "attention_mask": stack([[1] * len(x) for x in ids], 0),
        "labels": stack([sample["labels"] for sample in samples], -100),
    }


def pad_with_images(samples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """An image in each row, of 4 tokens."""
    batch = pad(samples)
    batch["input_ids"].masked_fill_(batch["input_ids"] == IMAGE, 1)
    batch["input_ids"][:, 2:6], batch["labels"][:, 2:6] = IMAGE, -100
    seeds = [sum(sample["input_ids"]) for sample in samples]
    images = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return batch | {"pixel_values": torch.stack(images)}


def arguments(out: Path, data: int, **changes: Any) -> dict[str, Any]:
    """A step is 4 samples in 2 parts, whatever `data`."""
    return {
        "output_dir": str(out),
        "use_cpu": True,
        "per_device_train_batch_size": 2 // data,
        "per_device_eval_batch_size": 2 // data,
        "gradient_accumulation_steps": 2,
        "max_steps": NUM_STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "include_num_input_tokens_seen": "non_padding",
        "seed": 3,
    } | changes


def as_torchrun(rank: int, world_size: int) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in names.items()} | {"OMP_NUM_THREADS": "1"}


def curve(trainer: Trainer, **kwargs: Any) -> dict[str, list[float]]:
    """Train; what is logged of each step."""
    trainer.train(**kwargs)
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {name: [entry[name] for entry in steps] for name in ("loss", "grad_norm", "num_input_tokens_seen")}


def worst_difference(found: dict[str, list[float]], expected: dict[str, list[float]]) -> float:
    assert found.keys() == expected.keys()
    assert all(len(values) == NUM_STEPS for values in (*found.values(), *expected.values()))
    return max(np.abs(np.array(found[name]) / np.array(expected[name]) - 1).max() for name in expected)


def mean_of_logits(prediction: EvalPrediction) -> dict[str, float]:
    return {"rows": len(prediction.label_ids), "mean": float(np.abs(prediction.predictions).mean())}


def run_trainer(out: Path, mesh: Mesh | None, num_rows: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Evaluate, train, evaluating every second step, save. mesh None: Transformers' own, on one process."""
    data = 1 if mesh is None else mesh.data
    held_out = rows(5, (EVAL_LENGTH, EVAL_LENGTH + 1), seed=2)
    kwargs: dict[str, Any] = {
        "model": qwen2(),
        "args": TrainingArguments(**arguments(out, data, eval_strategy="steps", eval_steps=2, **changes)),
        "train_dataset": rows(num_rows, (20, 50), seed=1),
        "eval_dataset": held_out[:4],
        "data_collator": pad,
        "compute_metrics": mean_of_logits,
    }
    trainer = Trainer(**kwargs) if mesh is None else SequenceParallelTrainer(**kwargs, mesh=mesh)
    found: dict[str, Any] = {"before": trainer.evaluate(), "predictions": trainer.predict(held_out)}
    found["curve"] = curve(trainer)
    found["evals"] = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    trainer.save_model()
    return found


def trainer_on_ranks(rank: int, out: Path, grid: dict[str, int], *options: Any) -> dict[str, Any]:
    as_torchrun(rank, 4)
    return run_trainer(out, Mesh(**grid), *options)


@pytest.mark.parametrize(
    ("grid", "num_rows", "changes"),  # an epoch's last step is of one part, with 11 rows the last batch of one row
    [
        ({"data": 2, "ring": 2}, 10, {"max_steps": -1, "num_train_epochs": NUM_STEPS / 3}),
        ({"data": 2, "ulysses": 2}, 10, {"gradient_checkpointing": True, "train_sampling_strategy": "sequential"}),
        (
            {"ring": 2, "ulysses": 2},
            11,
            {"average_tokens_across_devices": False, "train_sampling_strategy": "group_by_length", "max_grad_norm": 0},
        ),
    ],
)
def test_trainer_equals_one_process(
    grid: dict[str, int], num_rows: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    expected = run_trainer(tmp_path / "one", None, num_rows, changes)
    assert max(expected["curve"]["grad_norm"]) > 0.5  # clipped
    assert len(set(expected["curve"]["loss"])) == NUM_STEPS
    for found in run_ranks(trainer_on_ranks, 4, tmp_path / "ranks", grid, num_rows, changes, timeout=400):
        assert worst_difference(found["curve"], expected["curve"]) < TOLERANCE
        evals = [[found["before"], *found["evals"]], [expected["before"], *expected["evals"]]]
        assert len(evals[0]) == len(evals[1]) == 3
        for of_ranks, of_one in zip(*evals, strict=True):
            assert of_ranks["eval_loss"] == pytest.approx(of_one["eval_loss"], rel=TOLERANCE)
            assert of_ranks["eval_mean"] == pytest.approx(of_one["eval_mean"], rel=TOLERANCE)
        logits, reference = found["predictions"].predictions, expected["predictions"].predictions
        assert reference.shape == (5, EVAL_LENGTH, SIZES["vocab_size"])  # the last batch is filled up, and cut again
        assert np.abs(logits - reference).max() < TOLERANCE * np.abs(reference).max()
        assert np.array_equal(found["predictions"].label_ids, expected["predictions"].label_ids)
    one, ranks = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "ranks"))
    assert all(torch.allclose(ranks[name], one[name], atol=1e-4) for name in one)


def resumed_on_ranks(rank: int, out: Path) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    as_torchrun(rank, 4)
    torch.serialization.register_package(  # for Transformers 5.5, which loads an optimizer to cpu:0
        15, lambda storage: None, lambda storage, location: storage if location == "cpu:0" else None
    )
    mesh, dataset = Mesh(data=2, ring=2), rows(12, (20, 50), seed=1)
    args = TrainingArguments(**arguments(out, mesh.data, save_strategy="steps", save_steps=NUM_STEPS // 2, bf16=True))
    whole = curve(SequenceParallelTrainer(qwen2(), args, pad, dataset, mesh=mesh))
    trainer = SequenceParallelTrainer(qwen2(), args, pad, dataset, mesh=mesh)
    return whole, curve(trainer, resume_from_checkpoint=str(out / f"checkpoint-{NUM_STEPS // 2}"))


def test_a_run_that_is_resumed_goes_on_as_it_did_in_bfloat16(tmp_path: Path) -> None:
    precise, rounded = (
        curve(Trainer(qwen2(), TrainingArguments(**arguments(tmp_path, 1, bf16=bf16)), pad, rows(12, (20, 50), seed=1)))
        for bf16 in (False, True)
    )
    for whole, resumed in run_ranks(resumed_on_ranks, 4, tmp_path, timeout=400):
        assert worst_difference(resumed, whole) < TOLERANCE
        assert TOLERANCE < worst_difference(whole, precise) < 2 * worst_difference(rounded, precise)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def stream() -> Any:
    """Read from two files, one longer than the other."""
    return Dataset.from_list(rows(4 * NUM_STEPS + 1, (20, 50), seed=4)).to_iterable_dataset(num_shards=2)


def sharded_on_ranks(rank: int, out: Path) -> tuple[dict[str, list[float]], float]:
    """As on accelerators, where a plugin makes FSDP accelerate's type; on the CPU it leaves it at DDP."""
    as_torchrun(rank, 4)
    mesh = Mesh(data=2, ring=2)
    args = TrainingArguments(**arguments(out, mesh.data))
    trainer = SequenceParallelTrainer(qwen2(), args, pad, stream(), mesh=mesh)
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True
    found = curve(trainer)
    assert isinstance(trainer.model, FSDPModule)
    return found, trainer.evaluate(rows(4, (20, 50), seed=2))["eval_loss"]


def test_fsdp2_of_accelerate_and_a_stream_equal_one_process(tmp_path: Path) -> None:
    args = TrainingArguments(**arguments(tmp_path, 1))
    trainer = Trainer(qwen2(), args, pad, stream())
    expected, expected_loss = curve(trainer), trainer.evaluate(rows(4, (20, 50), seed=2))["eval_loss"]
    for found, loss in run_ranks(sharded_on_ranks, 4, tmp_path, timeout=400):
        assert worst_difference(found, expected) < TOLERANCE
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE)


def run_sft(out: Path, mesh: Mesh | None, adapter: bool) -> dict[str, list[float]]:
    """Packed, or with an adapter of PEFT. With gradient checkpointing, TRL's default."""
    from peft import LoraConfig  # slow to import
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class SequenceParallelSFTTrainer(SequenceParallelTrainer, SFTTrainer):
        pass

    words = {"<pad>": 0, "<eos>": 1} | {str(n): n for n in range(2, SIZES["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    changes = {"bf16": False, "max_length": 64, "packing": not adapter}
    kwargs: dict[str, Any] = {
        "model": qwen2(),
        "args": SFTConfig(**arguments(out, 1 if mesh is None else mesh.data, **changes)),
        "train_dataset": Dataset.from_list(rows(40, (20, 50), seed=1)),
        "processing_class": PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
        "peft_config": LoraConfig(target_modules="all-linear") if adapter else None,
    }
    return curve(SFTTrainer(**kwargs) if mesh is None else SequenceParallelSFTTrainer(**kwargs, mesh=mesh))


def sft_on_ranks(rank: int, out: Path, adapter: bool) -> dict[str, list[float]]:
    as_torchrun(rank, 4)
    return run_sft(out, Mesh(data=2, ulysses=2), adapter)


@pytest.mark.parametrize("adapter", [False, True])
def test_sft_of_trl_equals_one_process(adapter: bool, tmp_path: Path) -> None:
    expected = run_sft(tmp_path, None, adapter)
    for found in run_ranks(sft_on_ranks, 4, tmp_path, adapter, timeout=400):
        assert worst_difference(found, expected) < TOLERANCE


def run_adapters(out: Path, mesh: Mesh | None) -> list[dict[str, list[float]]]:
    """An adapter of PEFT on a text model, then on the language model of a vision-language one; both are saved."""
    curves = []
    for build, collate in ((qwen2, pad), (llava, pad_with_images)):
        args = TrainingArguments(**arguments(out / build.__name__, 1 if mesh is None else mesh.data))
        options: tuple[Any, ...] = (lora(build()), args, collate, rows(12, (20, 50), seed=1))
        trainer = Trainer(*options) if mesh is None else SequenceParallelTrainer(*options, mesh=mesh)
        curves.append(curve(trainer))
        trainer.save_model()
    return curves


def adapters_on_ranks(rank: int, out: Path) -> list[dict[str, list[float]]]:
    as_torchrun(rank, 4)
    return run_adapters(out, Mesh(data=2, ring=2))


def test_adapters_of_peft_equal_those_of_one_process(tmp_path: Path) -> None:
    expected = run_adapters(tmp_path / "one", None)
    for found in run_ranks(adapters_on_ranks, 4, tmp_path / "ranks", timeout=400):
        assert max(map(worst_difference, found, expected)) < TOLERANCE
    for model in ("qwen2", "llava"):
        one, ranks = (load_file(tmp_path / name / model / "adapter_model.safetensors") for name in ("one", "ranks"))
        assert one.keys() == ranks.keys()
        assert len(one) == 2 * 2 * SIZES["num_hidden_layers"]
        assert all(torch.allclose(ranks[name], one[name], rtol=0, atol=TOLERANCE) for name in one)


class Weighted(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)


def test_what_goes_past_the_loss_is_refused(tmp_path: Path) -> None:
    def build(mesh: Mesh, changes: dict[str, Any], trainer: Any = SequenceParallelTrainer, **kwargs: Any) -> Trainer:
        args = TrainingArguments(**arguments(tmp_path, 1, **changes))
        return trainer(**{"model": qwen2(), "args": args, "mesh": mesh} | kwargs)

    wide = Mesh(alone=True)
    wide.world_size = 4
    with pytest.raises(ValueError, match="the mesh has 4 ranks, Trainer 1: start it with torchrun"):
        build(wide, {})
    with pytest.raises(ValueError, match="label_smoothing_factor does not go with a mesh"):
        build(Mesh(alone=True), {"label_smoothing_factor": 0.1})
    with pytest.raises(ValueError, match="model_init does not go with a mesh"):
        build(Mesh(alone=True), {}, model=None, model_init=llama)
    with pytest.raises(ValueError, match="neftune_noise_alpha does not go with a mesh"):
        build(Mesh(alone=True), {"neftune_noise_alpha": 5.0})
    with pytest.raises(ValueError, match="Weighted has a loss of its own"):
        build(Mesh(alone=True), {}, trainer=type("OnRanks", (SequenceParallelTrainer, Weighted), {}))
    with pytest.raises(ValueError, match="a Linear is no model of Transformers: pass a PreTrainedModel"):
        build(Mesh(alone=True), {}, model=torch.nn.Linear(1, 1))
