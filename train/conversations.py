"""Conversations about images and videos, one a row.

What is in a row is checked when the sample is read, before any frame is decoded; pixels are read later, by each rank
for its own frames only.
"""

import torch
from transformers import PreTrainedTokenizerBase

from ..model.chat import Kind, encode
from ..model.media import Medium, probe, probe_image, sample_frames
from .rows import Row, Rows
from .sample import MediaItem, Sample, SampleError
from .styles import conversation


class ConversationDataset:
    """Rows in any of the styles of styles.py, tokenised.

    num_frames: most frames taken of a video. max_fps: most of a second of it. context: most tokens.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_frame: int,
        num_frames: int,
        context: int,
        max_fps: float | None = None,
        newline_token_id: int | None = None,
    ) -> None:
        self.rows = rows
        self.tokenizer, self.tokens_per_frame = tokenizer, tokens_per_frame
        self.newline_token_id = newline_token_id
        self.num_frames, self.context, self.max_fps = num_frames, context, max_fps

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Raises SampleError for a row that is not as it should be, or whose media are not."""
        source = self.rows.source(index)
        try:
            return self._sample(self.rows[index], source)
        except ValueError as error:
            raise SampleError(f"{source}: {error}", source=source) from error

    def _sample(self, row: Row, source: str) -> Sample:
        turns, files = conversation(row.fields)
        media = tuple(self._media_item(kind, row.locate(name)) for kind, name in files)
        encoded = encode(
            self.tokenizer,
            turns,
            [(item.kind, len(item.indices)) for item in media],
            tokens_per_frame=self.tokens_per_frame,
            newline_token_id=self.newline_token_id,
        )
        num_tokens = len(encoded.input_ids)
        if num_tokens > self.context:
            raise ValueError(f"{num_tokens} tokens are more than the context of {self.context}")
        return Sample(
            encoded.input_ids,
            encoded.loss_weight,
            encoded.frame_starts,
            cu_seqlens=torch.tensor([0, num_tokens]),
            source=source,
            media=media,
        )

    def _media_item(self, kind: Kind, path: Medium) -> MediaItem:
        if kind == "image":
            probe_image(path)
            return MediaItem(path, kind, (0,))
        video = probe(path)
        indices = sample_frames(video.num_frames, self.num_frames, fps=video.fps, max_fps=self.max_fps)
        return MediaItem(path, kind, tuple(indices))
