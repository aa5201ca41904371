"""Official checkpoints, made and run with transformers' own modules, are the same model here."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.comm.mesh import Mesh
from longtake.infer.engine import Engine
from longtake.model import official_tensors
from longtake.model.batch import shard_documents
from longtake.model.chat import Encoded, Kind, encode, encode_prompt
from longtake.model.official import load_official, official_tokenizer, save_official
from longtake.model.sequence_parallel import planned_attention
from longtake.model.vlm import VisionLanguageModel
from longtake.train.trainer import shard_parameters
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM, SiglipVisionModel

from tests.model.official_files import Theirs, change_json, write_official
from tests.ranks import run_ranks
from tests.training_files import run_config

TOLERANCE = 1e-5  # float32 sums in another order
KINDS = ["mlp_downsample", "mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix", "mlp_downsample_columns"]
MEDIA: list[tuple[Kind, int]] = [("video", 2), ("image", 1)]
QUESTION = [{"from": "human", "value": "<video>\nwhat is red ? <image> what is blue ?"}]
ANSWERED = [*QUESTION, {"from": "gpt", "value": "red and blue"}]


def relative_error(ours: Tensor, theirs: Tensor, scale: Tensor | None = None) -> float:
    return float(((ours - theirs).norm() / (theirs if scale is None else scale).norm()).detach())


def in_their_words(encoded_with_one_token_a_frame: Encoded, pixels: Tensor) -> list[int | Tensor]:
    """The prompt for `Theirs.embeds`: ids, and a frame in the place of each media token."""
    items: list[int | Tensor] = encoded_with_one_token_a_frame.input_ids.tolist()
    for frame, place in zip(pixels, encoded_with_one_token_a_frame.frame_starts.tolist(), strict=True):
        items[place] = frame
    return items


def our_logits(model: VisionLanguageModel, document: Encoded, pixels: Tensor) -> Tensor:
    batch = shard_documents([document], mesh=Mesh(alone=True), tokens_per_frame=model.config.tokens_per_frame)
    embedded = model.embed(batch.input_ids, pixels, batch.frames)
    attend = lambda layer, q, k, v: planned_attention(q, k, v, batch.attention)  # noqa: E731
    return model.llm.logits(model.llm(embedded, batch.positions, attend))


def compare(model: VisionLanguageModel, tokenizer: PreTrainedTokenizerBase, theirs: Theirs) -> None:
    """Logits and every gradient."""
    pixels = torch.randn(3, 3, 21, 21)
    config = model.config
    layout = {"tokens_per_frame": config.tokens_per_frame, "newline_token_id": config.newline_token_id}
    logits = our_logits(model, encode(tokenizer, ANSWERED, MEDIA, **layout), pixels)
    prompt = in_their_words(encode(tokenizer, ANSWERED, MEDIA, tokens_per_frame=1), pixels)
    expected = theirs.llm(inputs_embeds=theirs.embeds(prompt, config.newline_token_id)).logits[0]
    assert logits.shape == expected.shape and relative_error(logits, expected) < TOLERANCE
    weight = torch.randn_like(expected)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = theirs.gradients()
    for name, parameter in model.named_parameters():
        # a constant added to all keys moves no softmax: without rotary, that gradient is zero but for rounding
        near = name.replace("k_proj.bias", "q_proj.bias") if name.startswith("vision") else name
        grad, right, scale = parameter.grad, gradients[name], gradients[near]
        assert grad is not None and right is not None and relative_error(grad, right, scale) < TOLERANCE, name


@pytest.mark.parametrize("newline", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_transformers(tmp_path: Path, kind: str, newline: bool) -> None:
    torch.manual_seed(KINDS.index(kind))
    theirs = write_official(tmp_path, kind=kind, tied=newline)
    model, tokenizer = load_official(tmp_path, newline=newline)
    assert model.config.newline_token_id == (tokenizer.encode("\n")[0] if newline else None)
    assert model.config.tokens_per_frame == (4 if "3x3" in kind else 9)
    compare(model, tokenizer, theirs)


ROPE = [
    {"rope_theta": 5e4, "rope_scaling": None},
    {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4.0}},  # as transformers 4 writes it
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}},
]


@pytest.mark.parametrize("rope", ROPE)
def test_rope_base_and_linear_scaling_are_those_of_the_file(tmp_path: Path, rope: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs = write_official(tmp_path)
    path = tmp_path / "llm" / "config.json"
    written = json.loads(path.read_text())
    del written["rope_parameters"]
    path.write_text(json.dumps(written | rope))
    theirs = Theirs(
        theirs.vision,
        theirs.projector,
        Qwen2ForCausalLM.from_pretrained(tmp_path / "llm"),
        theirs.kind,
    )
    model, tokenizer = load_official(tmp_path)
    assert model.config.language.rope_theta == 5e4
    compare(model, tokenizer, theirs)


@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = write_official(tmp_path, media_tokens=False)
    model, tokenizer = load_official(tmp_path)
    config, pixels, count = model.config, torch.randn(3, 3, 21, 21), 8
    layout = {"tokens_per_frame": config.tokens_per_frame, "newline_token_id": config.newline_token_id}
    prompt = encode_prompt(tokenizer, QUESTION, MEDIA, **layout)
    engine = Engine(model, Mesh(alone=True), chunk=16)
    steps = engine.generate([prompt], lambda a, b: pixels[a:b], max_new_tokens=count, stop=-1)
    items = in_their_words(encode_prompt(tokenizer, QUESTION, MEDIA, tokens_per_frame=1), pixels)
    for (token,) in steps:
        logits = theirs.llm(inputs_embeds=theirs.embeds(items, config.newline_token_id)).logits[0, -1]
        assert token == int(logits.argmax())
        items.append(token)
        count -= 1
    assert count == 0


def test_prompts_are_those_of_the_official_qwen2_template(tmp_path: Path) -> None:
    """A tokenizer without media tokens and template gets both, and the ids in the official order."""
    write_official(tmp_path, media_tokens=False)
    tokenizer = official_tokenizer(tmp_path)
    tokens = ["<vila/sentinel>", "<image>", "<vila/video>"]
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(len(tokenizer) - 3, len(tokenizer)))
    encoded = encode_prompt(tokenizer, [*ANSWERED, *QUESTION], [*MEDIA, *MEDIA], tokens_per_frame=1)
    question = "<|im_start|>user\n<vila/video><vila/video>\nwhat is red ? <image> what is blue ?<|im_end|>\n"
    answer = "<|im_start|>assistant\n"
    assert tokenizer.decode(encoded.input_ids) == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        f"{question}{answer}red and blue<|im_end|>\n{question}{answer}"
    )


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.mark.parametrize("prefix", [True, False])
def test_a_tower_is_read_with_and_without_prefix(tmp_path: Path, prefix: bool) -> None:
    write_official(tmp_path, prefix=prefix)
    model, _ = load_official(tmp_path)
    stored = {k.removeprefix("vision_model."): t for k, t in tensors_in(tmp_path / "vision_tower").items()}
    for name, parameter in model.vision_tower.vision_model.named_parameters():
        assert torch.equal(parameter, stored[name]), name


def sharded_load_and_save(rank: int, folder: Path, out: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Numbers read of each tensor's elements, and the whole parameters."""
    mesh, read = Mesh(ring=2), {}
    copy = official_tensors.TensorFolder._copy

    def counting(self: Any, name: str, target: Tensor, offsets: Any) -> None:
        assert not isinstance(target, DTensor)
        read[f"{self.folder.name}.{name}"] = target.numel()
        copy(self, name, target, offsets)

    def shard(model: VisionLanguageModel) -> None:
        assert all(parameter.is_meta for parameter in model.parameters())
        shard_parameters(model, mesh, run_config(Path(), Path(), Path(), shard="layer"))
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())

    official_tensors.TensorFolder._copy = counting  # type: ignore[method-assign]
    model, tokenizer = load_official(folder, shard=shard)
    save_official(out, model, tokenizer, mesh, max_file_bytes=20_000)
    whole = {}
    for name, parameter in model.named_parameters():
        sharded: Any = parameter.detach()
        whole[name] = sharded.full_tensor()
    return read, whole


def test_two_ranks_read_a_half_each_and_write_the_same_again(tmp_path: Path) -> None:
    torch.manual_seed(2)
    source, out = tmp_path / "source", tmp_path / "out"
    write_official(source, kind="mlp_downsample_3x3_fix", max_shard_size="10KB")
    assert len(list((source / "llm").glob("*.safetensors"))) > 2
    results = run_ranks(sharded_load_and_save, 2, source, out)
    alone, _ = load_official(source)
    for _, whole in results:
        assert whole.keys() == dict(alone.named_parameters()).keys()
        assert not [name for name, p in alone.named_parameters() if not torch.equal(p, whole[name])]
    for name, parameter in alone.named_parameters():
        halves = [read[name] for read, _ in results]
        assert sum(halves) == parameter.numel()
        assert max(halves) - min(halves) <= parameter.numel() // parameter.shape[0]  # a row, where they are odd
    for part in ("llm", "vision_tower", "mm_projector"):
        expected, written = tensors_in(source / part), tensors_in(out / part)
        used = {name for name in written if written[name].any()}
        assert not [name for name in used if not torch.equal(written[name], expected[name])]
        missing = {name for name in expected.keys() - used if ".layers.2." not in name and "post_layer" not in name}
        assert not [name for name in missing if not name.startswith("vision_model.head.")]
    assert len(list((out / "llm").glob("*.safetensors"))) > 2
    again, _ = load_official(out)
    assert again.config == alone.config
    assert not [n for (n, p), q in zip(alone.named_parameters(), again.parameters(), strict=True) if not p.equal(q)]


def test_what_is_written_transformers_reads_without_a_word(tmp_path: Path) -> None:
    write_official(tmp_path / "source", tied=True)
    model, tokenizer = load_official(tmp_path / "source")
    save_official(tmp_path / "out", model, tokenizer)
    parts: dict[str, Any] = {"llm": Qwen2ForCausalLM, "vision_tower": SiglipVisionModel}
    for part, kind in parts.items():
        _, info = kind.from_pretrained(tmp_path / "out" / part, output_loading_info=True)
        assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


def test_parameters_keep_their_dtype_where_none_is_asked_for(tmp_path: Path) -> None:
    write_official(tmp_path / "source", dtype=torch.bfloat16)
    model, tokenizer = load_official(tmp_path / "source", dtype=None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    save_official(tmp_path / "out", model, tokenizer)
    written, expected = (tensors_in(tmp_path / folder / "llm") for folder in ("out", "source"))
    assert written.keys() == expected.keys()
    assert all(written[name].dtype == torch.bfloat16 and written[name].equal(expected[name]) for name in written)


def test_a_tied_head_that_was_written_out_is_left_aside(tmp_path: Path) -> None:
    write_official(tmp_path, tied=True)
    path = tmp_path / "llm" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    model, _ = load_official(tmp_path)
    assert "llm.lm_head.weight" not in dict(model.named_parameters())


def change_tensors(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("llm", lambda t: t.pop(NORM), rf"/llm: {NORM} is missing"),
        ("llm", lambda t: t.update(odd=torch.ones(1)), r"llm/model\.safetensors: odd is no part of the model"),
        ("llm", lambda t: t.update({NORM: torch.ones(7)}), rf"{NORM} is \[7\], the config makes it \[32\]"),
        (
            "vision_tower",
            lambda t: t.update({"vision_model.encoder.layers.3.mlp.fc1.bias": torch.ones(24)}),
            r"layers\.3\.mlp\.fc1\.bias is no part",
        ),
        ("mm_projector", lambda t: t.pop("layers.4.bias"), r"/mm_projector: layers\.4\.bias is missing"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, part: str, change: Any, message: str) -> None:
    write_official(tmp_path)
    change_tensors(tmp_path / part / "model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        load_official(tmp_path)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"model_type": "llava"}, "model_type is 'llava', expected 'llava_llama'"),
        ("config.json", {"dynamic_s2": True}, "dynamic_s2 is True, supported is False"),
        ("config.json", {"mm_vision_select_feature": "patch"}, "'patch', supported is 'cls_patch'"),
        ("config.json", {"video_encoder": {"_target_": "a.TSPVideoEncoder"}}, r"video_encoder is a\.TSPVideoEncoder"),
        ("config.json", {"image_encoder": {"end_tokens": None}}, "end_tokens are None and"),
        ("llm/config.json", {"model_type": "llama"}, "'llama', supported is 'qwen2'"),
        ("llm/config.json", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("llm/config.json", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ("vision_tower/config.json", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("vision_tower/preprocessor_config.json", {"image_mean": [0.4, 0.4, 0.4]}, r"image_mean is \[0\.4"),
        ("mm_projector/config.json", {"mm_projector_type": "linear"}, "'linear' is unknown, there are mlp_downsample,"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, file: str, values: dict[str, Any], message: str) -> None:
    write_official(tmp_path)
    change_json(tmp_path / file, **values)
    with pytest.raises(ValueError, match=rf"{tmp_path / file}: .*{message}"):
        load_official(tmp_path)


def test_encoders_that_end_frames_with_nothing_have_no_newline(tmp_path: Path) -> None:
    encoders = {f"{kind}_encoder": json.dumps({"end_tokens": None}) for kind in ("image", "video")}
    write_official(tmp_path, root=encoders)
    model, _ = load_official(tmp_path)
    assert model.config.newline_token_id is None


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    write_official(tmp_path)
    path = tmp_path / "mm_projector" / "model.safetensors"
    tensors = load_file(path)
    torch.save(tensors, path.with_name("pytorch_model.bin"))
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.parent}: has only \*\.bin files, pickles") as refused:
        load_official(tmp_path)
    code = str(refused.value).split('python -c "')[1].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], check=True)
    load_official(tmp_path)
    converted = load_file(path)
    assert converted.keys() == tensors.keys() and all(torch.equal(converted[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "not a safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (
            lambda folder: change_index(folder, {"layers.1.weight": "gone.safetensors"}),
            r"gone\.safetensors: .* missing",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
            r"index\.json: not JSON with a weight_map",
        ),
        (lambda folder: change_index(folder, {"layers.9": "model.safetensors"}), r"has no layers\.9, which model"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    write_official(tmp_path)
    damage(tmp_path / "mm_projector")
    files = partial(official_tensors.TensorFolder, tmp_path / "mm_projector")
    with pytest.raises(ValueError, match=message):
        [files().shape(name) for name in files().file_of]


def change_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
