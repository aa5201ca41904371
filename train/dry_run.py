"""What `longtake train --dry-run` prints: a run in numbers, without its ranks, its data or its checkpoint."""

from collections.abc import Iterator
from dataclasses import fields, replace

from ..model.config import ModelConfig
from ..model.precision import usual_dtype
from ..model.traffic import AttentionShape, causal_traffic
from .budget import GPU_BYTES, Activations, count, element_size, estimate, shaped_model, share_out
from .config import TrainConfig

RELATIVE = ("epochs", "global_batch", "warmup_ratio")  # printed as they were said, beside what they make
UNKNOWN = "by the size of the data"


def report(config: TrainConfig, model: ModelConfig, *, name: str, world_size: int, num_samples: int | None) -> str:
    """The page. name: of the model; num_samples: of the data, None where it is not known.

    Raises ValueError for what cannot run on `world_size` ranks.
    """
    config = replace(config, dtype=config.dtype or usual_dtype("cuda"))
    data = share_out(config, model, world_size).data
    resolved = config.resolve(data=data, num_samples=num_samples)
    return "\n".join(
        [
            f"stage {config.stage}, {config.plan.name}, on {world_size} GPUs",
            "\nconfig",
            *_settings(config, resolved),
            "\nrun",
            *_run(resolved, model, name, world_size),
            "\nGB on a rank, estimated",
            *_memory(resolved, model, world_size),
        ]
    )


def _line(name: str, *cells: str) -> str:
    return f"  {name:<22}" + "".join(f"{cell:>14}" for cell in cells)


def _settings(config: TrainConfig, resolved: TrainConfig) -> Iterator[str]:
    """Every field, as the run will have it."""
    for name in (f.name for f in fields(config)):
        value = getattr(config if name in RELATIVE else resolved, name)
        open_ended = (name == "steps" and not value) or (name == "warmup" and resolved.warmup_ratio)
        yield f"  {name:<22}{UNKNOWN if open_ended else value}"


def _run(config: TrainConfig, model: ModelConfig, name: str, world_size: int) -> Iterator[str]:
    """Who does how much: `config` is resolved."""
    shares = share_out(config, model, world_size)
    parameters = list(shaped_model(config, model).parameters())
    read_ahead = 2 * Activations(config, model, shares).pixels_of_a_step()
    facts = {
        "shape": f"{name}: {count(parameters):,} parameters, {count(parameters, trained=True):,} of them train",
        "grid": f"data {shares.data} x ring {config.ring} x ulysses {config.ulysses}",
        "step": f"{shares.samples} samples = batch_size {config.batch_size} x data {shares.data} "
        f"x accumulation {config.accumulation}",
        "sequence, at most": f"{sum(shares.tokens):,} tokens, {sum(shares.frames):,} frames "
        f"of {model.tokens_per_frame} tokens",
        "rank, at most": f"{max(shares.tokens):,} tokens, {max(shares.frames):,} frames",
        "frames on the host": f"{read_ahead / 1e9:.1f} GB a rank, a step's and the next one's",
        "sent a layer": _sent(config, model),
    }
    for key, fact in facts.items():
        yield f"  {key:<22}{fact}"


def _sent(config: TrainConfig, model: ModelConfig) -> str:
    """By attention, for one sample as long as the context, by the rank that sends most along each axis."""
    language, ranks = model.language, config.ring * config.ulysses
    shape = AttentionShape(
        language.num_attention_heads, language.num_key_value_heads, language.head_dim, element_size(config)
    )
    try:
        traffic = causal_traffic(
            shape,
            ring=config.ring,
            ulysses=config.ulysses,
            tokens_per_rank=config.context // ranks,
            layout="contiguous" if config.layout == "contiguous" else "zigzag",
            route=config.route,
        )
    except ValueError:
        return "no closed form where heads or tokens are spread unevenly"
    forwards = 1 + config.recompute
    sums = {axis: max(forwards * t.forward[axis] + t.backward[axis] for t in traffic) for axis in ("ring", "ulysses")}
    return ", ".join(f"{num_bytes / 1e6:,.1f} MB on {axis}" for axis, num_bytes in sums.items()) + " for a sample"


def _memory(config: TrainConfig, model: ModelConfig, world_size: int) -> Iterator[str]:
    """With layers recomputed and with all kept, the config's own way marked."""
    ways = [estimate(replace(config, recompute=recompute), model, world_size) for recompute in (True, False)]
    sums = [sum(way.values()) for way in ways]
    yield _line("", *(("recompute *", "keep all") if config.recompute else ("recompute", "keep all *")))
    for purpose in ways[0]:
        yield _line(purpose, *(f"{way[purpose] / 1e9:.2f}" for way in ways))
    yield _line("sum", *(f"{total / 1e9:.2f}" for total in sums))
    yield _line(f"in {GPU_BYTES / 1e9:.0f}", *("fits" if total <= GPU_BYTES else "DOES NOT FIT" for total in sums))
