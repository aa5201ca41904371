"""The same batch on one rank and on many: loss, gradient norm, and their difference."""

from dataclasses import replace

from ..comm.mesh import Mesh
from ..model.checkpoint import load_model
from ..model.vlm import VisionLanguageModel
from ..train.config import TrainConfig
from ..train.loader import StepLoader
from ..train.optimizer import clip_gradients
from ..train.stages import freeze_for
from ..train.trainer import Trainer, compute_gradients


def parity(config: TrainConfig, mesh: Mesh) -> dict[str, dict[str, float]]:
    """`loss` and `grad_norm` of the config's first batch, keyed "1" and by the size of the mesh. Collective.

    One rank is plain PyTorch: the whole model and the whole sequence, without FSDP2 and without a transport.
    """
    trainer = Trainer(config, mesh)
    many = _measure(trainer.model, trainer.loader, mesh)
    alone = Mesh(device=mesh.device, alone=True)
    model = VisionLanguageModel(trainer.model_config)
    load_model(config.model, model)
    freeze_for(config.plan, model)
    one_rank = replace(config, ring=1, ulysses=1, batch_size=config.batch_size * mesh.data)
    loader = StepLoader(
        trainer.loader.dataset,
        one_rank,
        alone,
        tokens_per_frame=trainer.loader.tokens_per_frame,
        image_size=trainer.loader.reader.size,
    )
    one = _measure(model, loader, alone)
    return {"1": one, str(mesh.world_size): many}


def _measure(model: VisionLanguageModel, loader: StepLoader, mesh: Mesh) -> dict[str, float]:
    loss = compute_gradients(model, loader.load(0), mesh)
    loader.close()
    return {"loss": float(loss), "grad_norm": float(clip_gradients(model, float("inf")))}
