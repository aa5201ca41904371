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
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..comm.agreement import AgreedTransport
from ..comm.layout import Layout
from ..comm.mesh import Mesh
from ..kernels.device import to_device
from .attention_plan import Route
from .batch import LAYOUTS
from .huggingface_attention import longtake_attention, longtake_mask
from .huggingface_cache import EvenCache
from .huggingface_call import Call, padding_of, text_positions
from .huggingface_check import check_batch, check_model
from .huggingface_families import PIXELS
from .huggingface_loss import LabelledTokens, sum_gradients, sum_over_ranks
from .huggingface_share import SharedTokens, Tokens, TokenShare
from .huggingface_vision import ALL_WINDOWS, VisionShare, share_vision

__all__ = ["disable", "enable", "sum_gradients"]

NAME = "longtake"  # "flash" in it would make Transformers leave out masks
for name in (NAME, ALL_WINDOWS):
    AttentionInterface.register(name, longtake_attention)
    AttentionMaskInterface.register(name, longtake_mask)

CACHE_NAMES = ("cache", "past_key_values")  # the argument's newer name and its older one
# The method of newer models with which generate() encodes images before its prefill.
ENCODES_FIRST = "_maybe_prepare_encoder_kwargs_for_generation"
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
    attention_mask, position_ids [B, S], pixels; at the first call (with LONGTAKE_DEBUG=1 at each) the ranks compare it.
    Any length, padding on either side, rows of packed documents (position_ids that restart, no attention_mask), image
    tokens that see each other both ways (Gemma 3). An image is encoded by one rank, and its features go to the owners
    of their tokens; a rank embeds no others (`FAMILIES` in huggingface_families.py). Other vision-language models, and
    callers with embeddings or features of their own, have embeddings [B, S, C] whole on each rank up to the decoder,
    and other encoders run whole there.

    - With labels, the loss is that of the whole batch, the same on every rank: the mean over its labels, or
      their sum over num_items_in_batch. Labels of padding do not count. Only this rank's tokens that bear a loss reach
      the head: `logits` are theirs, [1, n, vocab].
    - Gradients of a rank are those of its own tokens. gradients="sum": their sum over the ranks of a group is the
      gradient; call `sum_gradients(model, mesh)` before each step, or have FSDP2 sum (set_gradient_divide_factor).
      gradients="mean": their mean over all ranks of the mesh is the gradient (averaged over the data axis); for
      DistributedDataParallel and FSDP, which average by themselves. Groups may have images, or not, as it comes: each
      encodes a blank for what its batch lacks, on a mesh with several of them.
    - Without labels, logits are whole, on every rank, and have no gradient.
    - generate() prefills on all ranks, keeps an even cache (each rank its heads of its tokens) and gives every rank the
      same tokens; seed all ranks alike before sampling. Images of a prompt that is prefilled in chunks, or copied
      (num_return_sequences), are encoded before, whole, on every rank.

    Enable first, wrap then (DDP, FSDP). A deep copy, such as AveragedModel's, is enabled as well, on the same mesh.
    layout, route: as in `longtake.model.batch.shard_documents`.
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


def _decoder(model: PreTrainedModel) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_decoder())


class _SequenceParallel:
    """The hooks of one enabled model.

    A vision-language model that is known gets this rank's tokens embedded (`take_ahead`): nothing on a rank is as long
    as the batch. Any other embeds by itself, before its decoder or in it, and the decoder gets this rank's (`shard`).
    """

    def __init__(self, model: PreTrainedModel, mesh: Mesh, layout: str, route: Route, gradients: Gradients) -> None:
        self.model, self.mesh, self.layout = model, mesh, layout
        self.route: Route = route
        self.gradient = {"sum": 1.0, "mean": float(mesh.sp_size)}[gradients]
        self.call = Call()  # the one that is going on
        self.agreed = False  # the ranks compare their first batch alone: the host waits for it
        self.implementations = _implementations(model)
        model.set_attn_implementation(NAME)
        vision = share_vision(model, mesh)
        self.replaced: dict[str, Any] = {}  # attributes of the model itself, None where it had its class's
        self._replace("forward", self._run)
        decoder = _decoder(model)
        self.handles = [
            decoder.register_forward_pre_hook(self.shard, with_kwargs=True),
            decoder.register_forward_hook(self.collect, with_kwargs=True),
        ]
        if vision is not None:
            take_ahead = functools.partial(self.take_ahead, vision)
            self.handles.append(model.base_model.register_forward_pre_hook(take_ahead, with_kwargs=True))
            if hasattr(model, ENCODES_FIRST):
                self._replace(ENCODES_FIRST, _leave_to_prefill)

    def _replace(self, name: str, run: Callable[..., Any]) -> None:
        """run(original, ...) in place of original(...): a partial, which a deep copy of the model has its own of."""
        original = getattr(self.model, name)
        self.replaced[name] = self.model.__dict__.get(name)
        setattr(self.model, name, functools.update_wrapper(functools.partial(run, original), original))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for config, implementation in self.implementations:
            config._attn_implementation = implementation
        for name, before in self.replaced.items():
            delattr(self.model, name)
            if before is not None:
                setattr(self.model, name, before)

    def _run(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """The model's forward() and its loss, by no hooks: what wraps a model (PEFT) may go past them."""
        self.call = Call.of(inspect.signature(forward), args, kwargs)
        try:
            if self.call.shifted_labels is not None and self.model.get_output_embeddings() is None:
                raise ValueError(f"{type(self.model).__name__} has no head that predicts tokens: leave out labels")
            if not self.agreed or isinstance(self.mesh.transport, AgreedTransport):
                check_batch(self.call, self.mesh)
                self.agreed = True
            return self._add_loss(forward(**self.call.arguments))
        finally:
            self.call = Call()

    def take_ahead(
        self, vision: VisionShare, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a model embeds whose images are known here: this rank's tokens, embedded, in place of the batch."""
        signature = inspect.signature(base.forward)
        named = signature.bind_partial(*args).arguments | kwargs
        if not vision.knows(named):
            return None
        cached = self._cache(signature, named)
        cache: EvenCache | None = next(iter(cached.values()))
        named |= cached
        mask, positions, shape = named.get("attention_mask"), named.get("position_ids"), named["input_ids"].shape
        if _is_step(shape, cache):
            return None
        masks = self._batch_masks(named, cached)
        if positions is None:
            positions = vision.positions(named)
        tokens = _tokens(shape, mask, positions, cache)
        layout = self._deal(tokens, cache)
        if layout is None:
            return None
        share = self._share(tokens, layout, cache, batch_masks=masks is not None)
        assert isinstance(share, TokenShare)
        embedded = vision.embed(named, share)
        if self.mesh.data > 1:
            self.call.blanks = vision.blanks(named)
        mine = {
            "input_ids": None,
            "inputs_embeds": embedded,
            "attention_mask": masks,
            "position_ids": share.take_positions(positions),
            "use_cache": cache is not None,
            "token_share": share,
        }
        return (), {name: x for name, x in named.items() if name not in PIXELS.values()} | mine

    def _batch_masks(self, named: dict[str, Any], cached: dict[str, Any]) -> dict[str, Any] | None:
        """The whole batch's masks by type of layer, of a model that makes them before its decoder (Gemma 3)."""
        mask, make_masks = named.get("attention_mask"), getattr(self.model, "create_masks_for_generate", None)
        if make_masks is None or isinstance(mask, dict):
            return mask if isinstance(mask, dict) else None
        ids = named["input_ids"]
        return make_masks(
            self.model.config,
            inputs_embeds=torch.empty(*ids.shape, 0, dtype=self.model.dtype, device=ids.device),
            attention_mask=mask,
            position_ids=named.get("position_ids"),
            token_type_ids=named.get("token_type_ids"),
            is_first_iteration=None,
            is_training=self.model.training,
            **cached,
        )

    def shard(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the decoder: this rank's tokens in place of the batch, if they are not there yet."""
        signature = inspect.signature(decoder.forward)
        named = signature.bind_partial(*args).arguments | kwargs
        if named.get("token_share") is not None:
            return (), named | named["token_share"].for_decoder
        cached = self._cache(signature, named)
        cache = next(iter(cached.values()))
        x_name = "input_ids" if named.get("input_ids") is not None else "inputs_embeds"
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        batch_masks = isinstance(mask, dict)  # by type of layer: made before the decoder, as Gemma 3 does
        padding = self.call.arguments.get("attention_mask", mask) if batch_masks else mask
        tokens = _tokens(named[x_name].shape[:2], padding, positions, cache)
        share = self._share(tokens, self._deal(tokens, cache), cache, batch_masks=batch_masks)
        if named.get("visual_pos_masks") is not None:
            named |= share.take_visual(named["visual_pos_masks"], named["deepstack_visual_embeds"])
        named |= {
            x_name: share.take(named[x_name]),
            "position_ids": share.take_positions(positions),
            "attention_mask": mask if batch_masks else None,
            "use_cache": cache is not None,
            "token_share": share,
        }
        return (), named | cached

    def _cache(self, signature: inspect.Signature, named: dict[str, Any]) -> dict[str, EvenCache | None]:
        """The cache argument of a forward(), by name: an even cache, or None."""
        name = next(name for name in CACHE_NAMES if name in named or name in signature.parameters)
        given = next((named[name] for name in CACHE_NAMES if named.get(name) is not None), None)
        if isinstance(given, EvenCache):
            return {name: given}
        if isinstance(given, Cache) and given.get_seq_length() > 0:
            raise ValueError(f"got a {type(given).__name__} that holds tokens already: start with an empty one")
        wanted = named.get("use_cache")
        wanted = _decoder(self.model).config.use_cache if wanted is None else wanted
        training = torch.is_grad_enabled() or self.call.shifted_labels is not None
        return {name: EvenCache(self.mesh) if given is not None or (wanted and not training) else None}

    def _deal(self, tokens: Tokens, cache: EvenCache | None) -> Layout | None:
        """The layout of a pass; None: so few tokens that every rank runs them all."""
        if _is_step((tokens.batch, tokens.seq), cache):
            return None
        layout = LAYOUTS[self.layout](tokens.lengths, self.mesh)
        return layout if min(layout.counts) > 0 else None

    def _share(
        self, tokens: Tokens, layout: Layout | None, cache: EvenCache | None, *, batch_masks: bool
    ) -> TokenShare | SharedTokens:
        if layout is not None:
            return TokenShare(tokens, layout, self.mesh, batch_masks=batch_masks, route=self.route, cache=cache)
        if cache is None:
            raise ValueError(
                f"{len(tokens.flat)} tokens leave one of {self.mesh.sp_size} ranks without any: pass longer ones"
            )
        return SharedTokens(tokens, self.mesh, cache, batch_masks=batch_masks)

    def collect(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After the decoder: the hidden states that bear a loss, or the last columns of all of them."""
        share, call = kwargs["token_share"], self.call
        if not share.has_attended:
            raise ValueError(f"{type(decoder).__name__} attends by itself: longtake cannot run it across ranks")
        hidden = output.last_hidden_state
        if call.shifted_labels is None:
            columns = call.num_columns or share.tokens.seq
            output.last_hidden_state = _Gather.apply(hidden, share, min(columns, share.tokens.seq))
            return output
        flat = to_device(share.tokens.flat, hidden.device)
        call.labelled = LabelledTokens(call.shifted_labels.to(hidden.device), flat, share.mine)
        output.last_hidden_state = hidden[:, call.labelled.rows]
        return output

    def _add_loss(self, output: Any) -> Any:
        """The model's output with the loss of the whole batch, of the logits of the tokens that `collect` left."""
        if self.call.labelled is None:
            return output
        logits = output[0] if isinstance(output, tuple) else output.logits
        part = self.call.labelled.loss(logits, self.call.num_items)
        loss = sum_over_ranks(part, self.mesh, gradient=self.gradient) + self.call.blanks
        return (loss, *output) if isinstance(output, tuple) else type(output)(**{"loss": loss, **output})


def _leave_to_prefill(
    encode: Callable[..., Any], inputs: Tensor, arguments: dict[str, Any], name: str | None, config: GenerationConfig
) -> dict[str, Any]:
    """Where generate() encodes images before its prefill: a prefill in one chunk, without copies, does it by itself."""
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    whole = config.prefill_chunk_size is None and copies == 1
    return arguments if whole else encode(inputs, arguments, name, config)


def _tokens(shape: tuple[int, ...], mask: Any, position_ids: Tensor | None, cache: EvenCache | None) -> Tokens:
    """Those of a batch of shape [batch, seq], of what was passed as attention_mask and position_ids."""
    (batch, seq), num_seen = shape, 0 if cache is None else cache.num_columns
    padding = padding_of(mask, num_seen + seq)
    return Tokens.of(batch, seq, padding=padding, position_ids=text_positions(position_ids), num_seen=num_seen)


def _is_step(shape: tuple[int, ...], cache: EvenCache | None) -> bool:
    """Whether a batch of shape [batch, seq] is a step of decoding."""
    return cache is not None and cache.num_columns > 0 and shape[1] == 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, share: TokenShare | SharedTokens, columns: int) -> Tensor:
        return share.gather(hidden, columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise ValueError("whole logits have no way back to all ranks: pass labels, and take the model's loss")


def _implementations(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str | None]]:
    """Each config of the model, outer ones first, and its attention."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    return [(config, config._attn_implementation) for config in configs.values()]
