"""What a run's `data` may be, and how it is opened: files, folders of shards, mixtures of both."""

from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..model.config import ModelConfig
from .config import TrainConfig
from .conversations import ConversationDataset
from .mixture import Dataset, Mixture, open_mixture
from .packed import PackedDataset
from .rows import JsonRows, Rows
from .sample import Sample
from .shards import ShardRows, is_sharded


def open_rows(path: Path, media: Path | None = None) -> Rows:
    """Rows of a .tar shard or a folder of them, else of a JSON list or JSONL. media: where their files start from.

    Raises SampleError for what is not there, or has no rows, ValueError for a folder of media beside shards.
    """
    if not is_sharded(path):
        return JsonRows(path, media=media)
    if media is not None:
        raise ValueError(f"{path}: shards hold their media, leave media = {str(media)!r} out")
    return ShardRows(path)


def open_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> Mixture[Sample]:
    """The samples of a run. Raises SampleError and ValueError as `open_rows` and `open_mixture`."""

    def open_source(path: Path, media: Path | None) -> Dataset[Sample]:
        if config.plan.data == "packed":
            return _open_packed(path, media, context=config.context)
        return ConversationDataset(
            open_rows(path, media),
            tokenizer=tokenizer,
            tokens_per_frame=model.tokens_per_frame,
            newline_token_id=model.newline_token_id,
            num_frames=config.num_frames,
            max_fps=config.max_fps,
            context=config.context,
        )

    return open_mixture(config.data, open_source)


def count_samples(config: TrainConfig) -> int:
    """Samples in an epoch of the run's data, none of which is read."""
    if config.plan.data == "packed":
        return len(open_mixture(config.data, partial(_open_packed, context=config.context)))
    return len(open_mixture(config.data, open_rows))


def _open_packed(path: Path, media: Path | None, *, context: int) -> PackedDataset:
    if media is not None:
        raise ValueError(f"{path}: packed text has no media, leave media = {str(media)!r} out")
    return PackedDataset(path, context=context)
