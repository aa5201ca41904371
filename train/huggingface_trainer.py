"""Transformers' Trainer, and what is built on it, on a mesh of ranks.

    torch.distributed.init_process_group("cpu:gloo,cuda:nccl")  # under torchrun; Trainer would make one without gloo
    args = TrainingArguments(...)                               # takes this rank's GPU, for the mesh as well
    SequenceParallelTrainer(model, args, train_dataset=rows, mesh=Mesh(data=2, ring=2, ulysses=2)).train()

Trainer counts ranks, where what counts is groups of ranks with the same samples. So a group is one process to the
data loader and to `accelerator.gather`, and DDP or FSDP still average over all ranks: enable(..., gradients="mean").
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

from accelerate.data_loader import prepare_data_loader
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from ..comm.mesh import Mesh
from ..model.attention_plan import Route
from ..model.huggingface import enable


class SequenceParallelTrainer(Trainer):
    """A Trainer whose data-parallel replicas are sequence-parallel groups of `mesh`; its losses are one process's.

    Mixes with subclasses of Trainer: class MyTrainer(SequenceParallelTrainer, SFTTrainer). Takes what they take, and
    the mesh over all ranks that were started; layout, route: as in `enable`, which it calls.

    - per_device_train_batch_size counts samples of a group: a step takes it times accumulation times mesh.data.
    - num_items_in_batch, logged losses, gradient norm, numbers of tokens, and predictions count each group once.
      With average_tokens_across_devices (the default), the loss is the mean over all tokens of a step.
    - A dataset, map-style or iterable, is read by every rank; it must give the same to all ranks of a group. Where it
      does not fill the last batch of every group, samples of its start do, as in Trainer on as many processes.
    - A model of PEFT trains too (peft_config of SFTTrainer, or get_peft_model before): what it wraps is enabled.
    - The loss is the model's own, in TRL's SFTTrainer too: TRL makes its own from whole sequences, and with it the
      token accuracy and entropy that it logs; they are not logged here, and loss_type is "nll".

    Tested on the CPU with gloo: under DDP, which Trainer takes there, with LoRA of PEFT on text and vision-language
    models, and through accelerate's FSDP2, which accelerate has on accelerators alone, switched on by hand. None of it
    was run on a GPU.

    Raises ValueError for a mesh over other ranks than Trainer's, a model that is not one of Transformers, a parent
    class with a loss of its own, and for arguments that go past the model's loss or do not fit split sequences.
    """

    def __init__(
        self, *args: Any, mesh: Mesh, layout: str = "balanced", route: Route = "direct", **kwargs: Any
    ) -> None:
        self.mesh = mesh
        super().__init__(*args, **kwargs)
        self._check()
        enable(_base_model(self.model), mesh, layout=layout, route=route, gradients="mean")

    def _check(self) -> None:
        args, accelerator = self.args, self.accelerator
        if args.world_size != self.mesh.world_size:
            raise ValueError(
                f"the mesh has {self.mesh.world_size} ranks, Trainer {args.world_size}: start it with torchrun, "
                "and on the CPU with use_cpu=True"
            )
        refused = {
            "model_init": self.model_init is not None,
            "compute_loss_func": self.compute_loss_func is not None,
            "label_smoothing_factor": args.label_smoothing_factor != 0,
            "loss_type": getattr(args, "loss_type", "nll") != "nll",
            "use_liger_kernel": args.use_liger_kernel,
            "neftune_noise_alpha": self.neftune_noise_alpha is not None,  # scaled by the length that it sees
            "torch_compile": args.torch_compile,  # every batch has a plan of its own
            "predict_with_generate": getattr(args, "predict_with_generate", False),
            "deepspeed": self.is_deepspeed_enabled,
            "parallelism_config": accelerator.parallelism_config is not None,
            "split_batches": accelerator.split_batches,
            "dispatch_batches": accelerator.dispatch_batches,
            "eval_use_gather_object": args.eval_use_gather_object,
            "train_sampling_strategy": getattr(args, "train_sampling_strategy", "random") == "batch_rebalance",
        }
        for name, is_set in refused.items():
            if is_set:
                raise ValueError(f"{name} does not go with a mesh: leave it at its default")
        order = type(self).__mro__
        parents = order[order.index(SequenceParallelTrainer) + 1 : order.index(Trainer)]
        own_losses = {parent.__name__ for parent in parents if "compute_loss" in vars(parent)} - {"SFTTrainer"}
        if own_losses:
            raise ValueError(
                f"{', '.join(sorted(own_losses))} has a loss of its own, which would be of one rank's tokens: train "
                "with the model's own, as Trainer and SFTTrainer do"
            )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        cast(Any, self.model)._is_accelerate_prepared = False  # by evaluate(), without DDP: it would never come
        return super().train(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.mesh.sp_size > 1:
            gather: Callable[[Any], Any] = self.accelerator.gather
            self.accelerator.gather = lambda tensor: recursively_apply(self._once_per_group, gather(tensor))
            self.accelerator.prepare_data_loader = self._prepare_data_loader

    def _once_per_group(self, gathered: Tensor) -> Tensor:
        """Of rows [world * n, ...] of all ranks, those of the first rank of each group: [data * n, ...]."""
        return gathered.unflatten(0, (self.mesh.data, self.mesh.sp_size, -1))[:, 0].flatten(0, 1)

    def _prepare_data_loader(
        self,
        data_loader: DataLoader[Any],
        device_placement: bool | None = None,
        slice_fn_for_dispatch: Callable[..., Any] | None = None,
    ) -> DataLoader[Any]:
        """In place of the accelerator's: batches for groups, in an order that no rank's own random numbers change."""
        accelerator, mesh = self.accelerator, self.mesh
        if hasattr(data_loader.dataset, "n_shards"):  # accelerate would deal out its files, which end unevenly
            vars(data_loader)["dataset"] = _Stream(data_loader.dataset)
        seed_worker = data_loader.worker_init_fn
        if isinstance(seed_worker, partial) and "rank" in seed_worker.keywords:  # Trainer's: workers of a group alike
            data_loader.worker_init_fn = partial(seed_worker, rank=mesh.data_rank)
        prepared = prepare_data_loader(
            data_loader,
            accelerator.device,
            num_processes=mesh.data,
            process_index=mesh.data_rank,
            put_on_device=accelerator.device_placement if device_placement is None else device_placement,
            rng_types=["generator", "torch"],
            dispatch_batches=False,
            even_batches=accelerator.even_batches,
            use_seedable_sampler=True,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )
        accelerator._dataloaders.append(prepared)
        return prepared

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return super().get_total_train_batch_size(args) // self.mesh.sp_size

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss: a loss that a subclass of Trainer makes from hidden states would be of one rank's."""
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss / self.mesh.sp_size  # Trainer takes it times all ranks, for their mean to be a sum over groups
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss, logits and labels. With labels, logits are of this rank's tokens: whole ones take a pass without."""
        if prediction_loss_only or inputs.get("labels") is None:
            return Trainer.prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)
        loss, _, _ = Trainer.prediction_step(self, model, inputs, True, ignore_keys)
        unlabelled = self._prepare_inputs(inputs)
        labels = unlabelled.pop("labels")
        _, logits, _ = Trainer.prediction_step(self, model, unlabelled, False, ignore_keys)
        return loss, logits, labels


class _Stream(IterableDataset[Any]):
    """A streamed dataset of `datasets`, as any other iterable one: dealt out batch by batch."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)


def _base_model(model: Any) -> PreTrainedModel:
    """The model of Transformers: this one, or what PEFT wrapped."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"a {type(base).__name__} is no model of Transformers: pass a PreTrainedModel, or PEFT's of one"
        )
    return base
