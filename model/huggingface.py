"""Any decoder of Transformers on our kernels, and on a mesh of ranks in one line: the front door.

    from longtake.model.huggingface import enable
    model = AutoModelForCausalLM.from_pretrained(path)
    enable(model, Mesh(ring=2, ulysses=4))

Importing this module registers attn_implementation="longtake" with Transformers, for one device: its one effect.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig, PreTrainedModel

from ..comm.layout import Layout
from ..comm.mesh import Mesh
from ..kernels.device import to_device
from .attention_plan import Route
from .batch import LAYOUTS
from .huggingface_attention import KeyIntervals, longtake_attention, longtake_mask
from .huggingface_cache import EvenCache
from .huggingface_loss import LabelledTokens, shift, sum_gradients, sum_over_ranks
from .huggingface_share import SharedTokens, Tokens, TokenShare
from .huggingface_vision import ALL_WINDOWS, VisionShare

__all__ = ["disable", "enable", "sum_gradients"]

NAME = "longtake"  # "flash" in it would make Transformers leave out masks
for name in (NAME, ALL_WINDOWS):
    AttentionInterface.register(name, longtake_attention)
    AttentionMaskInterface.register(name, longtake_mask)

LAYER_TYPES = {"full_attention", "sliding_attention"}
CACHE_NAMES = ("cache", "past_key_values")  # the argument's newer name and its older one
KEPT = "_longtake_sequence_parallel"  # attribute of an enabled model

Gradients = Literal["sum", "mean"]


def enable(
    model: PreTrainedModel,
    mesh: Mesh,
    *,
    layout: str = "balanced",
    route: Route = "direct",
    gradients: Gradients = "sum",
) -> None:
    """Give a Transformers decoder, text or vision-language, 2D sequence parallelism over `mesh`, until `disable`.

    Every rank of a sequence-parallel group calls the model with the same whole batch: input_ids, labels,
    attention_mask, position_ids [B, S], pixels. Any length, padding on either side, rows of packed documents
    (position_ids that restart, no attention_mask), image tokens that see each other both ways (Gemma 3). An image is
    encoded by one rank, and its features go to the owners of their tokens. Up to the decoder, embeddings [B, S, C] are
    whole on each rank: there Transformers puts features among them.

    - With labels, the loss is that of the whole batch, the same on every rank: the mean over its labels, or
      their sum over num_items_in_batch. Labels of padding do not count. Only this rank's tokens that bear a loss reach
      the head: `logits` are theirs, [1, n, vocab].
    - Gradients of a rank are those of its own tokens. gradients="sum": their sum over the ranks of a group is the
      gradient; call `sum_gradients(model, mesh)` before each step, or have FSDP2 sum (set_gradient_divide_factor).
      gradients="mean": their mean over all ranks of the mesh is the gradient (averaged over the data axis); for
      DistributedDataParallel and FSDP, which average by themselves.
    - Without labels, logits are whole, on every rank, and have no gradient.
    - generate() prefills on all ranks, keeps an even cache (each rank its heads of its tokens) and gives every rank the
      same tokens; seed all ranks alike before sampling.

    Enable first, wrap then (DDP, FSDP). layout, route: as in `longtake.model.batch.shard_documents`.
    Raises ValueError for a model whose attention we do not do, an unknown layout, and a model enabled before.
    """
    if hasattr(model, KEPT):
        raise ValueError(f"{type(model).__name__} is enabled already: call disable(model) first")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if gradients not in ("sum", "mean"):
        raise ValueError(f"gradients must be 'sum' or 'mean', got {gradients!r}")
    check_model(model)
    setattr(model, KEPT, _SequenceParallel(model, mesh, layout, route, gradients))


def disable(model: PreTrainedModel) -> None:
    """Take back what `enable` did. Raises ValueError for a model that is not enabled."""
    if not hasattr(model, KEPT):
        raise ValueError(f"{type(model).__name__} is not enabled: call enable(model, mesh) first")
    getattr(model, KEPT).remove()
    delattr(model, KEPT)


def check_model(model: PreTrainedModel) -> None:
    """Raises ValueError, with the reason, for a model whose attention we do not do across ranks."""
    config = model.config.get_text_config(decoder=True)
    layer_types = set(getattr(config, "layer_types", None) or []) - LAYER_TYPES
    rope_types = _rope_types(config) & {"dynamic", "longrope"}
    reasons = {
        "has an encoder beside its decoder": config.is_encoder_decoder,
        "puts soft caps on its scores": getattr(config, "attn_logit_softcapping", None) is not None,
        "has attention sinks": any(name.endswith("sinks") for name, _ in model.named_parameters()),
        f"has layers of {', '.join(sorted(layer_types))}": layer_types,
        f"scales its RoPE ({', '.join(rope_types)}) by the longest position that a rank sees": rope_types,
        "looks both ways": not getattr(config, "is_causal", True)
        or getattr(config, "use_bidirectional_attention", None),
        "attends in chunks": getattr(config, "attention_chunk_size", None) is not None,
        "adds a loss of its router": getattr(config, "output_router_logits", False),
        "shares keys between layers": getattr(config, "num_kv_shared_layers", 0),
        "does not take its attention from AttentionInterface": not _decoder(model)._can_set_attn_implementation(),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"{type(model).__name__} {reason}, which longtake does not do across ranks")


def _rope_types(config: PreTrainedConfig) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [x for x in parameters.values() if isinstance(x, dict)]
    return {str(x.get("rope_type")) for x in by_layer_type or [parameters]}


def _decoder(model: PreTrainedModel) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_decoder())


class _SequenceParallel:
    """The hooks of one enabled model. What a pass needs travels with it, in `token_share`; labels wait here."""

    def __init__(self, model: PreTrainedModel, mesh: Mesh, layout: str, route: Route, gradients: Gradients) -> None:
        self.model, self.mesh, self.layout = model, mesh, layout
        self.route: Route = route
        self.gradient = {"sum": 1.0, "mean": float(mesh.sp_size)}[gradients]
        self.arguments: dict[str, Any] = {}  # of the call that is going on
        self.labelled: LabelledTokens | None = None  # its tokens that bear a loss, until the loss is taken
        self.promised: Tensor | None = None  # the owner of each place of its batch, to whom features went
        self.implementations = _implementations(model)
        model.set_attn_implementation(NAME)
        self.loss_function = model.__dict__.get("_loss_function")
        model.loss_function = self.loss
        decoder = _decoder(model)
        self.forward = model.__dict__.get("forward")
        model.forward = self._around(model.forward)
        self.handles = [
            decoder.register_forward_pre_hook(self.shard, with_kwargs=True),
            decoder.register_forward_hook(self.collect, with_kwargs=True),
        ]
        self.vision = VisionShare(model, mesh, self)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.vision.remove()
        for config, implementation in self.implementations:
            config._attn_implementation = implementation
        del self.model._loss_function, self.model.forward
        if self.forward is not None:
            self.model.forward = self.forward
        if self.loss_function is not None:
            self.model.loss_function = self.loss_function

    def _around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The model's forward() between the two below, by no hooks: what wraps a model (PEFT) may go past them."""

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.read_arguments(inspect.signature(forward).bind_partial(*args, **kwargs).arguments)
            output = forward(*args, **kwargs)
            self.finish()
            return output

        return run

    def read_arguments(self, named: dict[str, Any]) -> None:
        """Labels, and how many columns of logits are wanted."""
        self.arguments, self.labelled, self.promised = named | named.get("kwargs", {}), None, None
        if self.arguments.get("labels") is not None and _columns(self.arguments) is not None:
            raise ValueError("labels and logits_to_keep do not go together: leave out logits_to_keep")

    def finish(self) -> None:
        """After the model: a loss that it took by itself would be of wrong logits."""
        if self.labelled is not None:
            raise ValueError(
                f"{type(self.model).__name__} does not use its loss_function: longtake cannot share its loss"
            )
        self.arguments, self.promised = {}, None

    def shard(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the decoder: this rank's tokens in place of the batch."""
        named = inspect.signature(decoder.forward).bind_partial(*args).arguments | kwargs
        cache_name, cache = self._cache(decoder, named)
        num_seen = 0 if cache is None else cache.num_columns
        x_name = "input_ids" if named.get("input_ids") is not None else "inputs_embeds"
        (batch, seq), device = named[x_name].shape[:2], named[x_name].device
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        batch_masks = isinstance(mask, dict)  # by type of layer: made before the decoder, as Gemma 3 does
        padding = _padding(self.arguments.get("attention_mask", mask) if batch_masks else mask, num_seen + seq)
        tokens = Tokens.of(batch, seq, padding=padding, position_ids=_text_positions(positions), num_seen=num_seen)
        if positions is None:
            positions = torch.arange(num_seen, num_seen + seq, device=device)[None]
        share = self._share(tokens, cache, batch_masks)
        self._check_promise(share)
        if named.get("visual_pos_masks") is not None:
            named |= share.take_visual(named["visual_pos_masks"], named["deepstack_visual_embeds"])
        named |= {
            x_name: share.take(named[x_name]),
            "position_ids": share.take_positions(positions),
            "attention_mask": mask if batch_masks else None,
            "use_cache": cache is not None,
            cache_name: cache,
            "token_share": share,
        }
        return (), named

    def _check_promise(self, share: TokenShare | SharedTokens) -> None:
        """Features went to the owners of their tokens before the decoder said which tokens there are."""
        if self.promised is None:
            return
        mine = self.promised.to(share.mine.device)[share.mine]
        if isinstance(share, SharedTokens) or bool((mine != self.mesh.sp_rank).any()):
            raise ValueError(
                f"{type(self.model).__name__} gave its decoder other documents than it was called with: pass "
                "position_ids and attention_mask to the model"
            )

    def _cache(self, decoder: Any, named: dict[str, Any]) -> tuple[str, EvenCache | None]:
        """The name of the decoder's cache argument, and the even cache to go there."""
        parameters = inspect.signature(decoder.forward).parameters
        name = next(name for name in CACHE_NAMES if name in named or name in parameters)
        given = named.get(name)
        if isinstance(given, EvenCache):
            return name, given
        if isinstance(given, Cache) and given.get_seq_length() > 0:
            raise ValueError(f"got a {type(given).__name__} that holds tokens already: start with an empty one")
        wanted = named.get("use_cache")
        wanted = decoder.config.use_cache if wanted is None else wanted
        training = torch.is_grad_enabled() or self.arguments.get("labels") is not None
        return name, EvenCache(self.mesh) if given is not None or (wanted and not training) else None

    def _share(self, tokens: Tokens, cache: EvenCache | None, batch_masks: bool) -> TokenShare | SharedTokens:
        layout = self._deal(tokens, cache)
        if layout is not None:
            return TokenShare(tokens, layout, self.mesh, batch_masks=batch_masks, route=self.route, cache=cache)
        if cache is None:
            raise ValueError(
                f"{len(tokens.flat)} tokens leave one of {self.mesh.sp_size} ranks without any: pass longer ones"
            )
        return SharedTokens(tokens, self.mesh, cache, batch_masks=batch_masks)

    def _deal(self, tokens: Tokens, cache: EvenCache | None) -> Layout | None:
        """The layout of a pass; None: so few tokens that every rank runs them all."""
        if cache is not None and cache.num_columns > 0 and tokens.seq == 1:
            return None
        layout = LAYOUTS[self.layout](tokens.lengths, self.mesh)
        return layout if min(layout.counts) > 0 else None

    def owners(self, token: int | None) -> Tensor | None:
        """int64 [n]: the rank that will own each such token of the batch, in order; None: not known, or all."""
        input_ids = self.arguments.get("input_ids")
        if input_ids is None or token is None:
            return None
        cache = next((self.arguments[name] for name in CACHE_NAMES if name in self.arguments), None)
        num_seen = 0 if cache is None else cache.get_seq_length()
        tokens = Tokens.of(
            *input_ids.shape,
            padding=_padding(self.arguments.get("attention_mask"), num_seen + input_ids.shape[1]),
            position_ids=_text_positions(self.arguments.get("position_ids")),
            num_seen=num_seen,
        )
        layout = self._deal(tokens, cache if isinstance(cache, EvenCache) else None)
        if layout is None:
            return None
        self.promised = torch.zeros(input_ids.numel(), dtype=torch.int64).index_copy(0, tokens.flat, layout.owner)
        return self.promised[(input_ids == token).flatten().cpu()]

    def collect(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After the decoder: the hidden states that bear a loss, or the last columns of all of them."""
        share = kwargs["token_share"]
        if not share.has_attended:
            raise ValueError(f"{type(decoder).__name__} attends by itself: longtake cannot run it across ranks")
        labels, shifted = (self.arguments.get(name) for name in ("labels", "shift_labels"))
        hidden = output.last_hidden_state
        if labels is None:
            columns = _columns(self.arguments) or share.tokens.seq
            output.last_hidden_state = _Gather.apply(hidden, share, min(columns, share.tokens.seq))
            return output
        shifted = (shift(labels) if shifted is None else shifted).to(hidden.device)
        self.labelled = LabelledTokens(shifted, to_device(share.tokens.flat, hidden.device), share.mine)
        output.last_hidden_state = hidden[:, self.labelled.rows]
        return output

    def loss(
        self, logits: Tensor, labels: Tensor, *, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
    ) -> Tensor:
        """In place of the model's loss function. labels are the whole batch's, logits those that `collect` left."""
        labelled, self.labelled = self.labelled, None
        assert labelled is not None
        part = labelled.loss(logits, num_items_in_batch)
        return sum_over_ranks(part, self.mesh, gradient=self.gradient)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, share: TokenShare | SharedTokens, columns: int) -> Tensor:
        return share.gather(hidden, columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise ValueError("whole logits have no way back to all ranks: pass labels, and take the model's loss")


def _columns(arguments: dict[str, Any]) -> int | None:
    """How many of the last columns have logits; None: all."""
    keep = arguments.get("logits_to_keep", 0)
    return keep if isinstance(keep, int) and keep > 0 else None


def _padding(mask: Any, num_columns: int) -> Tensor | None:
    """The padding mask [batch, num_columns] in what was passed as attention_mask: that one, or the whole batch's masks
    by type of layer. None: no padding. Raises ValueError for a mask of another kind."""
    if isinstance(mask, dict) and all(x is None or isinstance(x, KeyIntervals) for x in mask.values()):
        mask = next((x.padding for x in mask.values() if x is not None and x.padding is not None), None)
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, :num_columns]
    raise ValueError(
        f"attention_mask is no padding mask [batch, seq], but a {type(mask).__name__}: masks of one's own do not go "
        "over ranks"
    )


def _text_positions(position_ids: Tensor | None) -> Tensor | None:
    """Of position_ids [B, S], [3, B, S] (M-RoPE) or [4, B, S] (text's first): those that restart at documents."""
    if position_ids is None or position_ids.dim() == 2:
        return position_ids
    return position_ids[0] if len(position_ids) == 4 else None


def _implementations(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str | None]]:
    """Each config of the model, outer ones first, and its attention."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    return [(config, config._attn_implementation) for config in configs.values()]
