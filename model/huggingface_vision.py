"""Vision encoders of Transformers over ranks: each encodes whole images or frames, by cost, and sends features on.

Features go straight to the ranks that own their tokens. Backward, a row's gradient comes home from its owner.
"""

import inspect
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..comm.mesh import Mesh
from ..kernels.device import to_device
from .features import FrameRoute, to_owners
from .huggingface_families import FAMILIES, PIXELS, feature_rows
from .huggingface_share import TokenShare

# The attention of encoders that call it once for each frame or window, unless "flash" is in its name.
ALL_WINDOWS = "longtake_flash"


@dataclass(frozen=True)
class ImageShare:
    """Which images a rank encodes: [bounds[rank], bounds[rank + 1]) of all; bounds: [ranks + 1]."""

    mesh: Mesh
    bounds: tuple[int, ...]

    @classmethod
    def by_cost(cls, mesh: Mesh, costs: Tensor) -> "ImageShare":
        """costs: [images]. Each image goes to the rank in whose even share of the cost its middle lies."""
        middle = costs.double().cumsum(0) - costs.double() / 2
        rank = (middle * mesh.sp_size / costs.double().sum()).long()
        bounds = torch.searchsorted(rank, torch.arange(mesh.sp_size + 1))
        return cls(mesh, tuple(bounds.tolist()))

    @property
    def mine(self) -> slice:
        return slice(*self.bounds[self.mesh.sp_rank : self.mesh.sp_rank + 2])

    @property
    def encoded(self) -> slice:
        """The images that go through the encoder here. A rank without any runs one and sends nothing of it, so that
        its parameters are used, and their gradients zeros, on every rank."""
        return self.mine if self.mine.start < self.mine.stop else slice(0, 1)

    def deliver(self, features: Tensor, rows: tuple[int, ...], owner: Tensor) -> Tensor:
        """The rows [n, C] of this rank's own tokens, in order, from those of the encoded images; rows: of each image.

        owner: int64 [sum(rows)], the rank whose token each row is; -1 for padding's. Raises ValueError where there are
        more or fewer rows than tokens.
        """
        counts, me = [sum(rows[a:b]) for a, b in pairwise(self.bounds)], self.mesh.sp_rank
        if len(owner) != sum(counts):
            raise ValueError(
                f"the images have {sum(counts)} features, the batch has {len(owner)} image tokens for them"
            )
        goes_to = owner.clamp(min=0)  # padding's go to the first rank, which drops them
        parts = goes_to.split(counts)
        here = goes_to == me
        route = FrameRoute(
            self.mesh,
            self.mine.start,
            self.mine.stop,
            order=to_device(parts[me].argsort(stable=True), features.device),
            send_counts=parts[me].bincount(minlength=self.mesh.sp_size).tolist(),
            recv_counts=[int((part == me).sum()) for part in parts],
            slots=to_device(here.nonzero().squeeze(1), features.device),
        )
        received = to_owners(features[: counts[me], None], route)
        is_token = owner[here] >= 0
        return received if is_token.all() else received[to_device(is_token, received.device)]


def share_vision(model: PreTrainedModel, mesh: Mesh) -> "VisionShare | None":
    """What shares out the model's vision encoder; None where it has none, or one that is not known here."""
    base: Any = model.base_model
    visual = getattr(base, "visual", None)
    if visual is not None and "grid_thw" in inspect.signature(visual.forward).parameters:
        visual.config._attn_implementation = ALL_WINDOWS
    if model.can_generate() and model.config.model_type in FAMILIES:
        return VisionShare(model, mesh)
    if any(hasattr(base, name) for name in ("vision_tower", "visual", "vision_model")):
        name = type(model).__name__
        warnings.warn(f"{name}: its vision encoder is not known here and runs whole on every rank", stacklevel=4)
    return None


class VisionShare:
    """The vision encoder of one enabled model of FAMILIES."""

    def __init__(self, model: PreTrainedModel, mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh
        self.base: Any = model.base_model
        self.family = FAMILIES[model.config.model_type]

    def knows(self, arguments: dict[str, Any]) -> bool:
        """Whether this rank's tokens can be embedded here, with the features of its own images alone."""
        if arguments.get("input_ids") is None or arguments.get("mm_encoder_outputs"):
            return False
        if self.model.config.model_type == "llava" and arguments.get("image_sizes") is not None:
            warnings.warn("Llava takes image_sizes: its encoder runs whole on every rank", stacklevel=5)
            return False
        return True

    def positions(self, arguments: dict[str, Any]) -> Tensor | None:
        """position_ids [3, batch, seq] of the whole batch, where the model makes them of its images (M-RoPE)."""
        compute = getattr(self.base, "compute_3d_position_ids", None)
        if compute is None:
            return None
        ids = arguments["input_ids"]
        known = arguments | {"inputs_embeds": torch.empty(*ids.shape, 0, device=ids.device)}
        return compute(**{name: known.get(name) for name in inspect.signature(compute).parameters})

    def embed(self, arguments: dict[str, Any], share: TokenShare) -> Tensor:
        """This rank's tokens [1, n, C], embedded, features in their places. What inner layers of the decoder add to
        those (deepstack) goes with the share."""
        ids, owners = arguments["input_ids"], share.owners()
        mine, places, parts = share.take(ids), [], []
        is_visual = torch.zeros_like(mine, dtype=torch.bool)
        for kind in self._kinds(arguments):
            token = _token(self.model, kind)
            is_visual |= mine == token
            places.append((mine[0] == token).nonzero().squeeze(1))
            parts.append(self._deliver(kind, arguments, owners[(ids == token).flatten().cpu()]))
        x = self.model.get_input_embeddings()(mine.masked_fill(is_visual, 0))
        if not parts:
            return x
        rows = torch.cat(parts)[torch.cat(places).argsort()] if len(parts) > 1 else parts[0]
        features, *deep = rows.split(x.shape[-1], 1)
        if deep:
            share.for_decoder = {"visual_pos_masks": is_visual, "deepstack_visual_embeds": deep}
        return x.masked_scatter(is_visual[..., None], features.to(x.dtype))

    def blanks(self, arguments: dict[str, Any]) -> Tensor | float:
        """0, of encoding a blank for each kind that a batch might have had.

        So its encoder is called as often, forward and backward, in every group: FSDP's collectives wait for that.
        """
        total: Tensor | float = 0.0
        for _ in range(len(self.family.kinds) - len(self._kinds(arguments))):
            pixels, more = self.family.blank(self.base)
            more = {name: x.to(self.mesh.device) if isinstance(x, Tensor) else x for name, x in more.items()}
            rows = self._encode("image", pixels.to(self.mesh.device, self.base.dtype), arguments | more)
            total = total + rows[:0].sum()
        return total

    def _kinds(self, arguments: dict[str, Any]) -> list[str]:
        """Those that a batch has."""
        return [kind for kind in self.family.kinds if arguments.get(PIXELS[kind]) is not None]

    def _deliver(self, kind: str, arguments: dict[str, Any], owner: Tensor) -> Tensor:
        """Rows [n, (1 + layers) * C] of this rank's own tokens of a kind; owner: of each token of the batch."""
        pieces = self.family.pieces(self.base, kind, arguments)
        share = ImageShare.by_cost(self.mesh, pieces.costs)
        encoded = share.encoded
        pixels, more = pieces.take(encoded)
        rows = pieces.trim(self._encode(kind, pixels, arguments | more), encoded)
        rows_of_each = pieces.rows or (len(rows) // (encoded.stop - encoded.start),) * len(pieces.costs)
        assert len(rows) == sum(rows_of_each[encoded])
        return share.deliver(rows, rows_of_each, owner)

    def _encode(self, kind: str, pixels: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Feature rows [n, (1 + layers) * C]: the encoder's last ones, and beside them those of its inner layers."""
        encoder = getattr(self.base, f"get_{kind}_features")
        names = list(inspect.signature(encoder).parameters)[1:]
        options = {name: arguments[name] for name in names if arguments.get(name) is not None}
        output = encoder(pixels, **options, return_dict=True)
        layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
        return torch.cat([feature_rows(x) for x in layers], 1)


def _token(model: PreTrainedModel, kind: str) -> int | None:
    """The id of the placeholder of "image" or "video"."""
    names = (f"{kind}_token_id", f"{kind}_token_index")
    return next((getattr(model.config, name) for name in names if hasattr(model.config, name)), None)
