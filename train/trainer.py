"""One stage of training: FSDP2 over all ranks, sequences split over each group of ring x ulysses ranks."""

import logging
import resource
import time
from collections import deque
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..comm.mesh import Mesh
from ..kernels.device import to_device
from ..model.checkpoint import Progress, complete_steps, load_model, open_checkpoint, read_progress, resume, save
from ..model.config import ModelConfig
from ..model.low_rank import init_low_rank, low_rank_names, merge_low_rank
from ..model.precision import DTYPES, usual_dtype
from ..model.vlm import VisionLanguageModel
from .budget import shaped_model
from .config import TrainConfig
from .data import open_data
from .loader import StepData, StepLoader
from .optimizer import build_optimizer, clip_gradients, set_learning_rate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepLog:
    """What a step prints. loss: mean over the weighted tokens, 0 without any; memory_gib: this rank's peak.

    max_frames, max_tokens: of the longest sample in the step. waited: seconds for which the slowest rank waited for
    its data; where that is more than a few per cent of a step, `longtake bench loader` says which `workers` it takes.
    """

    step: int
    loss: float
    grad_norm: float
    tokens_per_second: float
    frames_per_second: float
    memory_gib: float
    skipped: int
    max_frames: int
    max_tokens: int
    waited: float


def train(config: TrainConfig, *, continue_run: bool = False) -> list[StepLog]:
    """Train one stage, on every rank of the process group. Returns the steps' logs.

    Raises ValueError for a grid that does not divide the world, a folder that is no checkpoint, one in `out` that
    the run would not continue, or a bad sample.
    """
    mesh = training_mesh(config)
    if complete_steps(config.out) and not continue_run:
        raise ValueError(f"{config.out} has a checkpoint already: continue it with --resume, or take another folder")
    mesh.barrier()  # everyone has looked, before the first writes
    trainer = Trainer(config, mesh, continue_run=continue_run)
    return trainer.run()


def training_mesh(config: TrainConfig) -> Mesh:
    """The mesh of a run: as many data-parallel groups as the world holds."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    deadline = timedelta(seconds=config.deadline)
    return Mesh(data=config.num_groups(world), ring=config.ring, ulysses=config.ulysses, deadline=deadline)


def shard_parameters(model: VisionLanguageModel, mesh: Mesh, config: TrainConfig) -> None:
    """FSDP2 over all ranks. Gradients are summed: the loss is divided by the global token count already.

    Forward asks for a unit's parameters before the transfers of the one before it: NCCL keeps this order on the GPU,
    and they come while that one computes.
    """
    dtype = DTYPES[config.dtype or usual_dtype(mesh.device.type)]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    shard = partial(fully_shard, mesh=mesh.device_mesh, mp_policy=policy)
    units = [shard(unit) for unit in (model.units if config.shard == "layer" else [])]
    for module in [*units, shard(model)]:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    for unit, following in pairwise(units):
        unit.set_modules_to_forward_prefetch([following])


def compute_gradients(model: nn.Module, data: StepData, mesh: Mesh) -> Tensor:
    """Forward and backward of one step's sequences. Returns the global loss: sum / global token count.

    The loss is float64 [] on the mesh's device; the host does not wait for it, nor for anything before it.
    A step without a weighted token leaves no gradient behind, and so the optimizer where it is.
    """
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    if not data.total_weight:
        return total
    for batch, pixels in data.batches:  # each is reduced by itself: whole float32 gradients would have to wait else
        loss = model(batch, to_device(pixels, mesh.device)) / data.total_weight
        loss.backward()
        total += loss.detach()
    if mesh.world_size > 1:
        torch.distributed.all_reduce(total)
    return total


class StepInFlight:
    """A step that the device may still be working on; loss and gradient norm are on their way to pinned memory.

    facts: the fields of its StepLog that are known without waiting.
    """

    def __init__(self, loss: Tensor, norm: Tensor, *, num_tokens: int, num_frames: int, **facts: Any) -> None:
        self.num_tokens, self.num_frames, self.facts = num_tokens, num_frames, facts
        norm = norm.to(loss, non_blocking=True)
        self.numbers = torch.stack([loss, norm]).to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if loss.is_cuda else None
        if self.arrived is not None:
            self.arrived.record(torch.cuda.current_stream(loss.device))

    def log(self, began: float) -> StepLog:
        """Waits for the step. began: when the device was done with what was before it, by time.perf_counter."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm = self.numbers.tolist()
        seconds = time.perf_counter() - began
        return StepLog(
            loss=loss,
            grad_norm=norm,
            tokens_per_second=self.num_tokens / seconds,
            frames_per_second=self.num_frames / seconds,
            **self.facts,
        )


class Trainer:
    """A run's state: model, optimizer, data position, and how many steps are left."""

    def __init__(self, config: TrainConfig, mesh: Mesh, *, continue_run: bool = False) -> None:
        self.config, self.mesh = config, mesh
        self.ahead = int(mesh.device.type == "cuda")  # steps given to the device before one is waited for
        model_config, self.tokenizer = open_checkpoint(config.model)
        self.model_config = _with_context(model_config, config)
        dataset = open_data(config, self.tokenizer, self.model_config)
        continues = continue_run and bool(complete_steps(config.out))
        begin = Progress(seed=config.seed, sizes=dataset.sizes, counts=dataset.counts)
        self.progress = read_progress(config.out, begin, mesh) if continues else begin
        data, num_samples, step, consumed = mesh.data, len(dataset), self.progress.step, self.progress.consumed
        self.left = config.steps_left(data=data, num_samples=num_samples, step=step, consumed=consumed)
        self.config = config = config.resolve(data=data, num_samples=num_samples)
        self.model = self._build_model()
        self.optimizer = build_optimizer(self.model, config)
        if continues:
            resume(config.out, model=self.model, optimizer=self.optimizer, mesh=mesh)
        self.loader = StepLoader(
            dataset,
            config,
            mesh,
            tokens_per_frame=self.model_config.tokens_per_frame,
            image_size=self.model_config.vision.image_size,
            end=consumed + self.left * config.samples_per_step(data),
        )

    def _build_model(self) -> VisionLanguageModel:
        """Sharded before it has memory: this rank never holds the whole model, on the device or on the host."""
        config, mesh = self.config, self.mesh
        model = shaped_model(config, self.model_config)
        shard_parameters(model, mesh, config)
        model.to_empty(device=mesh.device)
        load_model(config.model, model, mesh, new=low_rank_names(model))
        init_low_rank(model, config.seed)
        model.llm.recompute = model.vision_tower.recompute = config.recompute
        return model

    def run(self) -> list[StepLog]:
        """Train to the last step, save, and return the logs of the steps done here."""
        logs, begin, first = [], self.progress.step, self.mesh.rank == 0
        stage = f"stage {self.config.stage}"
        bar = tqdm(total=begin + self.left, initial=begin, desc=stage, disable=not first, unit="step")
        board = SummaryWriter(str(self.config.out), purge_step=begin + 1) if first else nullcontext()
        in_flight: deque[StepInFlight] = deque()
        with closing(self.loader), bar, logging_redirect_tqdm(), board as writer:
            began = time.perf_counter()
            while self.left > 0:
                in_flight.append(self.step())
                last = not self.left
                due = last or (self.config.save_every and self.progress.step % self.config.save_every == 0)
                while len(in_flight) > (0 if due else self.ahead):
                    logs.append(in_flight.popleft().log(began))
                    began = time.perf_counter()
                    bar.update()
                    bar.set_postfix_str(f"loss {logs[-1].loss:.3f} norm {logs[-1].grad_norm:.2f}")
                    _write(logs[-1], writer)
                if due and not last:
                    self.save()
                    began = time.perf_counter()
        self._finish()
        return logs

    def step(self) -> StepInFlight:
        """Give one optimizer step to the device; nothing in it waits for the device. Collective."""
        data = self.loader.load(self.progress.consumed)
        self.optimizer.zero_grad()
        loss = compute_gradients(self.model, data, self.mesh)
        norm = clip_gradients(self.model, self.config.clip)
        set_learning_rate(self.optimizer, self.config.steps - self.left, self.config)
        self.optimizer.step()
        self.left -= 1
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            consumed=self.progress.consumed + self.loader.samples_per_step,
            skipped=self.progress.skipped + data.num_skipped,
        )
        return StepInFlight(
            loss,
            norm,
            num_tokens=data.num_tokens,
            num_frames=data.num_frames,
            step=self.progress.step,
            memory_gib=peak_memory_gib(self.mesh.device),
            skipped=self.progress.skipped,
            max_frames=data.max_frames,
            max_tokens=data.max_tokens,
            waited=data.waited,
        )

    def save(self, *, optimizer: bool = True) -> None:
        """Write a checkpoint of the present step, with all that the next stage needs. Collective."""
        if self.mesh.rank == 0:
            self.config.out.mkdir(parents=True, exist_ok=True)
            self.model_config.save(self.config.out)
            self.tokenizer.save_pretrained(self.config.out)
        kept = self.optimizer if optimizer else None
        save(self.config.out, model=self.model, optimizer=kept, progress=self.progress, mesh=self.mesh)

    def _finish(self) -> None:
        if self.config.rank_of_update:
            merge_low_rank(self.model.llm)
        self.save(optimizer=not self.config.rank_of_update)


def _with_context(model: ModelConfig, config: TrainConfig) -> ModelConfig:
    language = replace(
        model.language,
        rope_theta=config.rope_theta or model.language.rope_theta,
        max_position_embeddings=max(config.context, model.language.max_position_embeddings),
    )
    return replace(model, language=language)


def _write(entry: StepLog, board: SummaryWriter | None) -> None:
    if board is None:
        return
    for key, value in vars(entry).items():
        board.add_scalar(key, value, entry.step)
    board.flush()  # a run that is killed and resumed does not write this step again
    log.info(
        "step %d  loss %.4f  grad norm %.3f  %.0f tokens/s  %.0f frames/s  %.2f GiB",
        *list(vars(entry).values())[:6],
    )


def peak_memory_gib(device: torch.device) -> float:
    """Peak of this rank: of the GPU's memory where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
