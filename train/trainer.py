"""One stage of training: FSDP2 over all ranks, sequences split over each group of ring x ulysses ranks."""

import logging
import resource
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..comm.mesh import Mesh
from ..model.chat import load_tokenizer
from ..model.checkpoint import Progress, complete_steps, latest, load_model, resume, save
from ..model.config import ModelConfig
from ..model.low_rank import add_low_rank, merge_low_rank
from ..model.vlm import VisionLanguageModel
from .config import TrainConfig
from .data import ConversationDataset, PackedDataset
from .loader import Dataset, StepData, StepLoader
from .optimizer import build_optimizer, clip_gradients, set_learning_rate
from .stages import freeze_for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepLog:
    """What a step prints. loss: mean over the weighted tokens, 0 without any; memory_gib: this rank's peak.

    max_frames, max_tokens: of the longest sample in the step.
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
    if world % (config.ring * config.ulysses):
        raise ValueError(
            f"ring {config.ring} x ulysses {config.ulysses} = {config.ring * config.ulysses} ranks "
            f"do not divide a world of {world}"
        )
    return Mesh(data=world // (config.ring * config.ulysses), ring=config.ring, ulysses=config.ulysses)


def shard_parameters(model: VisionLanguageModel, mesh: Mesh, config: TrainConfig) -> None:
    """FSDP2 over all ranks. Gradients are summed: the loss is divided by the global token count already."""
    dtype = getattr(torch, config.dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers: list[nn.Module] = [*model.llm.model.layers, *model.vision_tower.vision_model.encoder.layers]
    for module in [*(layers if config.shard == "layer" else []), model]:
        fully_shard(module, mesh=mesh.device_mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def compute_gradients(model: nn.Module, data: StepData, mesh: Mesh) -> float:
    """Forward and backward of one step's sequences. Returns the global loss: sum / global token count.

    A step without a weighted token leaves no gradient behind, and so the optimizer where it is.
    """
    if not data.total_weight:
        return 0.0
    total = torch.zeros((), dtype=torch.float64)
    for i, (batch, pixels) in enumerate(data.batches):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(i == len(data.batches) - 1)
        loss = model(batch, pixels) / data.total_weight
        loss.backward()
        total += loss.detach().double().cpu()
    return sum(mesh.gather_objects(float(total)))


class Trainer:
    """A run's state: model, optimizer, data position."""

    def __init__(self, config: TrainConfig, mesh: Mesh, *, continue_run: bool = False) -> None:
        self.config, self.mesh = config, mesh
        latest(config.model)  # before anything looks for its own files in a folder that is no checkpoint
        self.tokenizer = load_tokenizer(config.model)
        self.model_config = _with_context(ModelConfig.load(config.model), config)
        dataset = self._dataset()
        self.model = self._build_model()
        self.optimizer = build_optimizer(self.model, config)
        self.progress = Progress()
        if continue_run and complete_steps(config.out):
            self.progress = resume(config.out, model=self.model, optimizer=self.optimizer, mesh=mesh)
        self.loader = StepLoader(
            dataset,
            config,
            mesh,
            tokens_per_frame=self.model_config.tokens_per_frame,
            image_size=self.model_config.vision.image_size,
        )

    def _build_model(self) -> VisionLanguageModel:
        model = VisionLanguageModel(self.model_config)
        load_model(self.config.model, model)
        freeze_for(self.config.plan, model)
        if self.config.rank_of_update:
            rank = self.config.rank_of_update
            add_low_rank(model.llm, rank=rank, alpha=2 * rank, seed=self.config.seed)
        model.llm.recompute = model.vision_tower.recompute = self.config.recompute
        model.to(self.mesh.device)
        shard_parameters(model, self.mesh, self.config)
        return model

    def _dataset(self) -> Dataset:
        if self.config.plan.data == "packed":
            return PackedDataset(self.config.data, context=self.config.context)
        return ConversationDataset(
            self.config.data,
            tokenizer=self.tokenizer,
            tokens_per_frame=self.model_config.tokens_per_frame,
            num_frames=self.config.num_frames,
            max_fps=self.config.max_fps,
            context=self.config.context,
        )

    def run(self) -> list[StepLog]:
        """Train to the last step, save, and return the logs of the steps done here."""
        logs, begin, steps, first = [], self.progress.step, self.config.steps, self.mesh.rank == 0
        bar = tqdm(total=steps, initial=begin, desc=f"stage {self.config.stage}", disable=not first, unit="step")
        board = SummaryWriter(str(self.config.out), purge_step=begin + 1) if first else nullcontext()
        with closing(self.loader), bar, logging_redirect_tqdm(), board as writer:
            while self.progress.step < steps:
                logs.append(self.step())
                bar.update()
                bar.set_postfix_str(f"loss {logs[-1].loss:.3f} norm {logs[-1].grad_norm:.2f}")
                _write(logs[-1], writer)
                due = self.config.save_every and self.progress.step % self.config.save_every == 0
                if due and self.progress.step < steps:
                    self.save()
        self._finish()
        return logs

    def step(self) -> StepLog:
        """One optimizer step. Collective."""
        begin = time.perf_counter()
        data = self.loader.load(self.progress.consumed)
        self.optimizer.zero_grad()
        loss = compute_gradients(self.model, data, self.mesh)
        norm = clip_gradients(self.model, self.config.clip)
        set_learning_rate(self.optimizer, self.progress.step, self.config)
        self.optimizer.step()
        self.progress = Progress(
            step=self.progress.step + 1,
            consumed=self.progress.consumed + self.loader.samples_per_step,
            skipped=self.progress.skipped + data.num_skipped,
        )
        seconds = time.perf_counter() - begin
        return StepLog(
            step=self.progress.step,
            loss=loss,
            grad_norm=norm,
            tokens_per_second=data.num_tokens / seconds,
            frames_per_second=data.num_frames / seconds,
            memory_gib=peak_memory_gib(self.mesh.device),
            skipped=self.progress.skipped,
            max_frames=data.max_frames,
            max_tokens=data.max_tokens,
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
