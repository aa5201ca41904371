"""The published shapes have the published sizes."""

import pytest
import torch
from longtake.model.language import LanguageModel
from longtake.model.shapes import ShapeName, published_shape


@pytest.mark.parametrize(("name", "num_parameters"), [("qwen2-1.5b", 1_543_714_304), ("qwen2-7b", 7_615_616_512)])
def test_a_language_model_has_as_many_parameters_as_its_model_card_says(name: ShapeName, num_parameters: int) -> None:
    with torch.device("meta"):
        model = LanguageModel(published_shape(name).language)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


@pytest.mark.parametrize(("image_size", "tokens_per_frame"), [(384, 196), (448, 256)])
def test_a_frame_has_as_many_tokens_as_published(image_size: int, tokens_per_frame: int) -> None:
    assert published_shape("qwen2-7b", image_size).tokens_per_frame == tokens_per_frame


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"shape 'qwen3' is unknown, expected one of qwen2-1\.5b, qwen2-7b"):
        published_shape("qwen3")
