"""What a model is made of: frozen dataclasses with Hugging Face field names, kept as one config.json."""

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

PROJECTOR_SIDES = {
    "mlp_downsample": 2,
    "mlp_downsample_fix": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
    "mlp_downsample_columns": 2,
}


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A SigLIP vision tower; the defaults are so400m-patch14-384.

    `select_layer` counts hidden states from the end, as transformers does: -1 is the last layer's output.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    select_layer: int = -2

    def __post_init__(self) -> None:
        _check_positive(self, exclude=("select_layer",))
        _check_divides(self, "num_attention_heads", "hidden_size")
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")
        if not -self.num_hidden_layers - 1 <= self.select_layer <= -1:
            raise ValueError(
                f"select_layer {self.select_layer} must lie in -1 .. {-self.num_hidden_layers - 1}"
                f" for num_hidden_layers {self.num_hidden_layers}"
            )

    @property
    def patch_grid(self) -> int:
        """Patches along one side of a frame; pixels beyond the last whole patch are dropped."""
        return self.image_size // self.patch_size

    @property
    def num_selected_layers(self) -> int:
        """Encoder layers that run before the selected hidden state."""
        return self.num_hidden_layers + 1 + self.select_layer


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """How patches become visual tokens: squares of patches are joined, then go through an MLP.

    kind: a name of the official code. Its `mlp_downsample` is `mlp_downsample_2x2_fix` since 2025, and
    `mlp_downsample_fix` in LongVILA's scripts: tokens come row by row. Until then, in the code of VILA 1.5, they came
    column by column under that same name; here that is `mlp_downsample_columns`. The tensors do not tell.
    """

    kind: str = "mlp_downsample"

    def __post_init__(self) -> None:
        if self.kind not in PROJECTOR_SIDES:
            raise ValueError(f"projector kind {self.kind!r} is unknown, there are {', '.join(PROJECTOR_SIDES)}")

    @property
    def side(self) -> int:
        """Patches along a side of the square that becomes one token."""
        return PROJECTOR_SIDES[self.kind]

    @property
    def by_columns(self) -> bool:
        """Whether tokens come column by column."""
        return self.kind == "mlp_downsample_columns"


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """A Qwen2 language model; the defaults are Qwen2-1.5B. `head_dim` 0 stands for hidden_size / heads.

    rope_factor: positions are divided by it before they turn anything (linear scaling).
    """

    vocab_size: int = 151936
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    head_dim: int = 0
    rope_theta: float = 1e6
    rope_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        _check_positive(self, exclude=("head_dim",))
        _check_divides(self, "num_key_value_heads", "num_attention_heads")
        if not self.head_dim:
            _check_divides(self, "num_attention_heads", "hidden_size")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim < 0 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even and positive, got {self.head_dim}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole vision-language model and the ids of its two media tokens.

    newline_token_id: the token that follows each frame's visual tokens, None for none. The official code has "\\n"
    there, after images too, in inference and in training, but nothing wherever sequence parallelism is on. Here it is
    the model's own, so that the number of ranks changes no result.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    image_token_id: int
    video_token_id: int
    newline_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("image_token_id", "video_token_id", "newline_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.language.vocab_size:
                raise ValueError(f"{name} {token} is outside the vocabulary of {self.language.vocab_size}")

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens of a frame: the patch grid, padded to whole squares, which are merged (27 -> 28 -> 196)."""
        return math.ceil(self.vision.patch_grid / self.projector.side) ** 2

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises ValueError for an unknown, missing or invalid field."""
        return _build(cls, values)

    def save(self, directory: str | Path) -> None:
        """Writes `config.json` into the directory, which is made if missing."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Reads `config.json` of the directory. Raises ValueError, naming the file, where it is not valid."""
        path = Path(directory) / "config.json"
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _build(kind: type, values: Any) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{kind.__name__} must be an object, got {values!r}")
    if unknown := sorted(values.keys() - {f.name for f in fields(kind)}):
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}")
    required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - values.keys()):
        raise ValueError(f"{kind.__name__} lacks {', '.join(missing)}")
    parts = {"vision": VisionConfig, "projector": ProjectorConfig, "language": LanguageConfig}
    return kind(**{name: _build(parts[name], v) if name in parts else v for name, v in values.items()})


def _check_positive(config: Any, *, exclude: tuple[str, ...] = ()) -> None:
    kinds: dict[Any, Any] = {int: int, float: int | float}
    for f in fields(config):
        value = getattr(config, f.name)
        if f.type in kinds and f.name not in exclude and not (isinstance(value, kinds[f.type]) and value > 0):
            kind = "integer" if f.type is int else "number"
            raise ValueError(f"{f.name} must be a positive {kind}, got {value!r}")


def _check_divides(config: Any, divisor: str, number: str) -> None:
    a, b = getattr(config, divisor), getattr(config, number)
    if b % a:
        raise ValueError(f"{number} {b} is no multiple of {divisor} {a}")
