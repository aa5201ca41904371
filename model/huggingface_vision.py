"""Vision encoders of Transformers over ranks: each encodes whole images or frames, by cost, and sends features on.

Features go straight to the ranks that own their tokens where the feature rows are the image tokens, one for one, and
those tokens' owners are known; else to all ranks. Backward, the gradients of a row come home from all who had it.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..comm.mesh import Mesh
from ..kernels.device import to_device
from .features import FrameRoute, to_owners

# Families whose feature rows, in order, are their image tokens, and whose frames do not see each other in the encoder.
# Others cut, pool or pack features after the projector.
ROW_FOR_TOKEN = {"llava", "internvl", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}

# The attention of encoders that call it once for each frame or window, unless "flash" is in its name.
ALL_WINDOWS = "longtake_flash"


class Batch(Protocol):
    """The batch that the model was called with."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What the model was called with, by name; empty where its encoder was called by itself"""
        ...

    def owners(self, token: int | None) -> Tensor | None:
        """int64 [n]: the rank that owns each such token of the batch, in order; None: not known"""
        ...


@dataclass(frozen=True)
class ImageShare:
    """Which images a rank encodes: [first, last) of all. rows: feature rows of each image; bounds: [ranks + 1]."""

    mesh: Mesh
    rows: tuple[int, ...]
    bounds: tuple[int, ...]

    @classmethod
    def by_cost(cls, mesh: Mesh, costs: Tensor, rows: tuple[int, ...]) -> "ImageShare":
        """costs: float [images]. Each image goes to the rank in whose even share of the cost its middle lies."""
        middle = costs.double().cumsum(0) - costs.double() / 2
        rank = (middle * mesh.sp_size / costs.double().sum()).long()
        bounds = torch.searchsorted(rank, torch.arange(mesh.sp_size + 1))
        return cls(mesh, rows, tuple(bounds.tolist()))

    @property
    def first(self) -> int:
        return self.bounds[self.mesh.sp_rank]

    @property
    def last(self) -> int:
        return self.bounds[self.mesh.sp_rank + 1]

    @property
    def encoded(self) -> slice:
        """The images that go through the encoder here. A rank without any runs one and sends nothing of it, so that
        its parameters are used, and their gradients zeros, on every rank."""
        return slice(self.first, self.last) if self.first < self.last else slice(0, 1)

    @property
    def rows_of_ranks(self) -> list[int]:
        return [sum(self.rows[a:b]) for a, b in zip(self.bounds, self.bounds[1:], strict=False)]

    def deliver(self, features: Tensor, owner: Tensor | None) -> Tensor:
        """Rows of all images [N, C] from those of the encoded ones.

        owner: int64 [N], the rank that needs each row; zeros where that is another. None: every rank needs all.
        Raises ValueError where there are more or fewer rows than tokens to put them in.
        """
        counts = self.rows_of_ranks
        mine = features[: counts[self.mesh.sp_rank]]
        if owner is not None and len(owner) != sum(counts):
            raise ValueError(
                f"the images have {sum(counts)} features, the batch has {len(owner)} image tokens for them"
            )
        if owner is None:
            return _ToAll.apply(mine, self.mesh, counts)
        parts, me = owner.split(counts), self.mesh.sp_rank
        slots = to_device((owner == me).nonzero().squeeze(1), features.device)
        route = FrameRoute(
            self.mesh,
            self.first,
            self.last,
            order=to_device(parts[me].argsort(stable=True), features.device),
            send_counts=parts[me].bincount(minlength=self.mesh.sp_size).tolist(),
            recv_counts=[int((part == me).sum()) for part in parts],
            slots=slots,
        )
        received = to_owners(mine[:, None], route)
        return received.new_zeros(len(owner), received.shape[1]).index_copy(0, slots, received)


class VisionShare:
    """The hooks on the vision encoder of one enabled model; none where it has no encoder."""

    def __init__(self, model: PreTrainedModel, mesh: Mesh, batch: Batch) -> None:
        self.model, self.mesh, self.batch = model, mesh, batch
        self.share: ImageShare | None = None
        self.token: int | None = None
        self.handles: list[Any] = []
        inner = model.base_model
        tower, projector, visual = (
            getattr(inner, name, None) for name in ("vision_tower", "multi_modal_projector", "visual")
        )
        if visual is not None and "grid_thw" in inspect.signature(visual.forward).parameters:
            self._hook(visual, self.take_patches, visual, self.deliver_output)
            visual.config._attn_implementation = ALL_WINDOWS
        elif tower is not None and projector is not None:
            self._hook(tower, self.take_images, projector, self.deliver_images)
        elif tower is not None or visual is not None or hasattr(inner, "vision_model"):
            name = type(model).__name__
            warnings.warn(f"{name}: its vision encoder is not known here and runs whole on every rank", stacklevel=3)

    def _hook(self, entry: nn.Module, before: Callable[..., Any], exit_: nn.Module, after: Callable[..., Any]) -> None:
        self.handles = [
            entry.register_forward_pre_hook(before, with_kwargs=True),
            exit_.register_forward_hook(after),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _owner(self) -> Tensor | None:
        return self.batch.owners(self.token) if self.model.config.model_type in ROW_FOR_TOKEN else None

    def take_images(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before an encoder of pixel_values [images, 3, H, W]: this rank's."""
        named = inspect.signature(tower.forward).bind_partial(*args).arguments | kwargs
        others = [name for name, x in named.items() if isinstance(x, Tensor) and name != "pixel_values"]
        if others:
            warnings.warn(
                f"{type(tower).__name__} takes {', '.join(others)}: it runs whole on every rank", stacklevel=2
            )
            self.share = None
            return args, kwargs
        num_images = len(named["pixel_values"])
        self.share = ImageShare.by_cost(self.mesh, torch.ones(num_images), (1,) * num_images)
        self.token = _token(self.model, "image")
        return (), named | {"pixel_values": named["pixel_values"][self.share.encoded]}

    def deliver_images(self, projector: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """After the projector: features [images, tokens, C] of all images."""
        if self.share is None:
            return output
        tokens, share = output.shape[1], self.share
        share = ImageShare(share.mesh, tuple(tokens * n for n in share.rows), share.bounds)
        return share.deliver(output.flatten(0, 1), self._owner()).unflatten(0, (-1, tokens))

    def take_patches(self, visual: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before an encoder of patches [n, values] of images or videos of grid_thw [images, 3]: this rank's."""
        parameters = inspect.signature(visual.forward)
        named, patches = parameters.bind_partial(*args).arguments | kwargs, next(iter(parameters.parameters))
        grid = named["grid_thw"]
        self.token = _token(self.model, "video" if grid is self.batch.arguments.get("video_grid_thw") else "image")
        if self.model.config.model_type in ROW_FOR_TOKEN:  # they encode each frame for itself
            grid = grid.repeat_interleave(grid[:, 0], 0)
            grid[:, 0] = 1
        frames, height, width = grid.cpu().unbind(1)
        per_frame = height * width
        sizes = frames * per_frame
        self.share = ImageShare.by_cost(
            self.mesh,
            sizes * (per_frame + _linear_cost(visual)),
            tuple((sizes // visual.spatial_merge_size**2).tolist()),
        )
        encoded = self.share.encoded
        first, length = int(sizes[: encoded.start].sum()), int(sizes[encoded].sum())
        return (), named | {patches: named[patches][first : first + length], "grid_thw": grid[encoded]}

    def deliver_output(self, visual: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the encoder: merged features [rows, C] of all images, and those of its inner layers (deepstack)."""
        assert self.share is not None
        share, owner = self.share, self._owner()
        output.pooler_output = share.deliver(output.pooler_output, owner)
        if getattr(output, "deepstack_features", None) is not None:
            output.deepstack_features = [share.deliver(x, owner) for x in output.deepstack_features]
        return output


class _ToAll(torch.autograd.Function):
    """Every rank's rows on every rank; backward, the sum of all ranks' gradients of a rank's rows, in rank order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, mesh: Mesh, counts: list[int]) -> Tensor:
        ctx.mesh, ctx.counts = mesh, counts
        whole = rows.new_empty(sum(counts), rows.shape[1])
        mesh.transport.all_to_all("sp", [[rows]] * mesh.sp_size, [[part] for part in whole.split(counts)])
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mesh, counts = ctx.mesh, ctx.counts
        mine = grads[0].new_empty(mesh.sp_size, counts[mesh.sp_rank], grads[0].shape[1])
        send = [[part] for part in grads[0].contiguous().split(counts)]
        mesh.transport.all_to_all("sp", send, [[part] for part in mine])
        return mine.sum(0), None, None


def _token(model: PreTrainedModel, kind: str) -> int | None:
    """The id of the placeholder of "image" or "video"."""
    names = (f"{kind}_token_id", f"{kind}_token_index")
    return next((getattr(model.config, name) for name in names if hasattr(model.config, name)), None)


def _linear_cost(visual: Any) -> float:
    """The patches whose attention costs a patch as much as its linear layers."""
    width = getattr(visual.config, "embed_dim", visual.config.hidden_size)
    return 2 * width + 1.5 * getattr(visual.config, "intermediate_size", 4 * width)
