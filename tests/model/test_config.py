import json
from dataclasses import replace

import pytest
from longtake.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig


def tiny(**changes: object) -> ModelConfig:
    return ModelConfig.from_dict({"image_token_id": 5, "video_token_id": 6, **changes})


def test_a_saved_config_loads_as_it_was(tmp_path):
    config = tiny(
        vision={"hidden_size": 64, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        language={
            "vocab_size": 512,
            "rope_theta": 3580165449.0,
            "tie_word_embeddings": False,
            "head_dim": 64,
        },
    )
    config.save(tmp_path / "made")
    assert ModelConfig.load(tmp_path / "made") == config
    assert config.language.head_dim == 64


def test_defaults_are_so400m_and_qwen2_1_5b():
    config = tiny()
    assert config.vision.num_selected_layers == 26
    assert config.language.head_dim == 128
    assert config.tokens_per_frame == 196


@pytest.mark.parametrize(
    ("image_size", "patch_size", "tokens", "tokens_3x3"),
    [(448, 14, 256, 121), (384, 14, 196, 81), (32, 8, 4, 4), (8, 8, 1, 1), (31, 8, 4, 1)],
)
def test_tokens_per_frame(image_size, patch_size, tokens, tokens_3x3):
    config = tiny(vision={"image_size": image_size, "patch_size": patch_size})
    assert config.tokens_per_frame == tokens
    wide = replace(config, projector=ProjectorConfig(kind="mlp_downsample_3x3_fix"))
    assert wide.tokens_per_frame == tokens_3x3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: VisionConfig(num_attention_heads=7),
            "hidden_size 1152 is no multiple of num_attention_heads 7",
        ),
        (lambda: VisionConfig(patch_size=385), "patch_size 385"),
        (lambda: VisionConfig(select_layer=0), "select_layer 0"),
        (lambda: VisionConfig(select_layer=-29), "select_layer -29"),
        (lambda: VisionConfig(hidden_size=-1), "hidden_size must be a positive integer, got -1"),
        (lambda: ProjectorConfig(kind="mlp9"), "'mlp9'"),
        (lambda: LanguageConfig(num_key_value_heads=5), "num_attention_heads 12 is no multiple"),
        (lambda: LanguageConfig(head_dim=3), "head_dim must be even and positive, got 3"),
        (lambda: LanguageConfig(rope_theta=0), "rope_theta must be a positive number, got 0"),
        (lambda: LanguageConfig(vocab_size=1.5), "vocab_size must be a positive integer, got 1.5"),  # pyright: ignore
        (lambda: LanguageConfig(rope_factor=0.0), "rope_factor must be a positive number, got 0.0"),
        (lambda: replace(tiny(), video_token_id=151936), "video_token_id 151936"),
        (lambda: replace(tiny(), newline_token_id=-1), "newline_token_id -1"),
    ],
)
def test_a_wrong_value_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image_token_id": 1}', "lacks video_token_id"),
        ('{"image_token_id": 1, "video_token_id": 2, "depth": 3}', "ModelConfig has no field depth"),
        (
            '{"image_token_id": 1, "video_token_id": 2, "vision": {"depth": 3}}',
            "VisionConfig has no field depth",
        ),
        ('{"image_token_id": 1, "video_token_id": 2, "vision": {"hidden_size": "64"}}', "got '64'"),
        ("[1]", r"must be an object, got \[1\]"),
        ("{", "Expecting"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        ModelConfig.load(tmp_path)


def test_config_json_keeps_hugging_face_field_names(tmp_path):
    tiny().save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["language"]["num_key_value_heads"] == 2
    assert values["vision"]["layer_norm_eps"] == 1e-6
