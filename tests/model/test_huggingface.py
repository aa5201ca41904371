"""Transformers models on ranks equal Transformers on one: loss, every gradient, greedy tokens."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from longtake.comm.mesh import Mesh
from longtake.model.huggingface import disable, enable, sum_gradients
from longtake.model.huggingface_attention import longtake_mask
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
)

from tests.model.tiny_transformers import SIZES, TEXT, llava, lora, mistral, qwen2, settled
from tests.ranks import run_ranks

TOLERANCE = 1e-5  # float32 sums in another order
GRIDS = [(2, 1), (1, 2), (2, 2)]


def batches(vocab_size: int = SIZES["vocab_size"]) -> dict[str, dict[str, Any]]:
    """What a user passes, by what is odd about it. Only tokens that have one before them are labelled."""
    generator = torch.Generator().manual_seed(5)

    def batch(rows: int, length: int, **more: Any) -> dict[str, Any]:
        ids = torch.randint(0, vocab_size, (rows, length), generator=generator)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
        if (mask := more.get("attention_mask")) is not None:
            before = torch.nn.functional.pad(mask[:, :-1], (1, 0))
            labels = labels.masked_fill((mask & before) == 0, -100)
        return {"input_ids": ids, "labels": labels, **more}

    restarts = torch.cat([torch.arange(n) for n in (17, 1, 29, 6)])[None]
    padding = torch.ones(3, 23, dtype=torch.int64)
    padding[0, :5], padding[2, :11] = 0, 0
    holes = padding.clone()
    holes[1, 7:9] = 0
    return {
        "one row": batch(1, 37),
        "rows": batch(2, 21),
        "packed": batch(1, 53, position_ids=restarts, use_cache=False),
        "packed rows": batch(2, 53, position_ids=restarts, use_cache=False),
        "left": batch(3, 23, attention_mask=padding),
        "right": batch(3, 23, attention_mask=padding.flip(1)),
        "holes": batch(3, 23, attention_mask=holes),
    }


def loss_and_gradients(model: nn.Module, batch: dict[str, Any], mesh: Mesh | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    if mesh is not None:
        sum_gradients(model, mesh)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return {"loss": loss.detach()} | {n: grad.clone() for n, grad in gradients.items() if grad is not None}


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to each tensor's largest value, or to 1 % of the largest of all."""
    assert found.keys() == expected.keys()
    floor = 0.01 * max(float(x.abs().max()) for x in expected.values())
    return max(float((found[n] - e).abs().max()) / max(float(e.abs().max()), floor) for n, e in expected.items())


def generate(model: PreTrainedModel, batch: dict[str, Any], **more: Any) -> Tensor:
    inputs = {name: x for name, x in batch.items() if name not in ("labels", "position_ids", "use_cache")}
    return model.generate(**inputs, max_new_tokens=7, do_sample=False, pad_token_id=0, **more)  # type: ignore[operator]


@pytest.mark.parametrize("family", TEXT)
def test_the_kernels_alone_equal_eager(family: str) -> None:
    model = TEXT[family]()
    for name, batch in batches().items():
        model.set_attn_implementation("eager")
        expected = loss_and_gradients(model, batch)
        model.set_attn_implementation("longtake")
        assert worst_error(loss_and_gradients(model, batch), expected) < TOLERANCE, name
    for name in ("one row", "left", "holes"):
        model.set_attn_implementation("eager")
        expected = generate(model, batches()[name])
        model.set_attn_implementation("longtake")
        assert torch.equal(generate(model, batches()[name]), expected), name


def train_on_ranks(rank: int, ring: int, ulysses: int, layout: str) -> dict[str, float]:
    mesh, errors = Mesh(ring=ring, ulysses=ulysses), {}
    for family, build in TEXT.items():
        model = build()
        model.set_attn_implementation("eager")
        expected = {name: loss_and_gradients(model, batch) for name, batch in batches().items()}
        enable(model, mesh, layout=layout)
        for name, batch in batches().items():
            found = loss_and_gradients(model, batch, mesh)
            errors[f"{family}, {name}"] = worst_error(found, expected[name])
    return errors


@pytest.mark.parametrize(("ring", "ulysses"), GRIDS)
def test_training_equals_one_rank(ring: int, ulysses: int) -> None:
    layout = "zigzag" if ring == 2 and ulysses == 1 else "balanced"
    for errors in run_ranks(train_on_ranks, ring * ulysses, ring, ulysses, layout):
        assert not {case: error for case, error in errors.items() if not error < TOLERANCE}
        assert len(errors) == 6 * 7


def generate_on_ranks(rank: int, ring: int, ulysses: int) -> dict[str, bool]:
    mesh, same = Mesh(ring=ring, ulysses=ulysses), {}
    prompts = {name: batches()[name] for name in ("one row", "rows", "left", "holes")}
    prompts["a token"] = {"input_ids": torch.tensor([[3]])}
    for family, build in TEXT.items():
        model = build()
        model.set_attn_implementation("eager")
        expected = {name: generate(model, prompt) for name, prompt in prompts.items()}
        enable(model, mesh)
        for name, prompt in prompts.items():
            same[f"{family}, {name}"] = torch.equal(generate(model, prompt), expected[name])
        for name in ("one row", "left"):
            chunked = generate(model, prompts[name], prefill_chunk_size=8)
            same[f"{family}, {name}, in chunks"] = torch.equal(chunked, expected[name])
    return same


@pytest.mark.parametrize(("ring", "ulysses"), GRIDS)
def test_greedy_tokens_equal_one_rank(ring: int, ulysses: int) -> None:
    for same in run_ranks(generate_on_ranks, ring * ulysses, ring, ulysses):
        assert [case for case, equal in same.items() if not equal] == []
        assert len(same) == 6 * 7


def other_ways_to_train(rank: int) -> dict[str, float]:
    """Errors against one rank, in ways that the cases above leave out."""
    mesh, model = Mesh(ring=2), qwen2()
    batch, found = batches()["right"] | {"num_items_in_batch": 17}, {}
    expected = loss_and_gradients(model, batch)
    enable(model, mesh, route="relay")
    found["num_items_in_batch, relay"] = worst_error(loss_and_gradients(model, batch, mesh), expected)
    model.gradient_checkpointing_enable()
    model.train()
    found["checkpointing"] = worst_error(loss_and_gradients(model, batch, mesh), expected)
    model.gradient_checkpointing_disable()
    disable(model)

    enable(model, mesh, gradients="mean")
    averaged = loss_and_gradients(DistributedDataParallel(model), batch)
    found["DDP"] = worst_error({name.removeprefix("module."): x for name, x in averaged.items()}, expected)
    disable(model)
    tuned = lora(qwen2())
    frozen = loss_and_gradients(tuned, batch)
    enable(tuned.get_base_model(), mesh)
    found["PEFT, wrapped before"] = worst_error(loss_and_gradients(tuned, batch, mesh), frozen)
    enable(model, mesh)
    found["PEFT, wrapped after"] = worst_error(loss_and_gradients(lora(model), batch, mesh), frozen)
    sharded = qwen2()
    enable(sharded, mesh, gradients="mean")
    for module in (*sharded.model.layers, sharded):
        fully_shard(module, mesh=mesh.device_mesh)
    averaged = loss_and_gradients(sharded, batch)
    found["FSDP2"] = worst_error({n: getattr(x, "full_tensor", lambda x=x: x)() for n, x in averaged.items()}, expected)

    replica, parts = qwen2(), [batches()["left"], batches()["one row"]]
    both = [loss_and_gradients(replica, part) for part in parts]
    enable(replica, Mesh(data=2))  # a batch of its own for each rank
    mine = loss_and_gradients(replica, parts[rank], Mesh(data=2))
    mean = {n: (both[0][n] + both[1][n]) / 2 for n in both[0]}
    found["data"] = worst_error(mine | {"loss": both[rank]["loss"]}, mean | {"loss": both[rank]["loss"]})
    with pytest.raises(ValueError, match="2 ranks without any"):
        model(torch.tensor([[3]]), labels=torch.tensor([[3]]))
    return found


def test_other_ways_to_train() -> None:
    for found in run_ranks(other_ways_to_train, 2):
        assert not {case: error for case, error in found.items() if not error < TOLERANCE}
        assert len(found) == 7


def two_models_without_labels(rank: int) -> tuple[float, list[torch.Size], int, list[int]]:
    """Error of whole logits, shapes of logits, tokens in the cache of a prompt of 50, and sampled tokens."""
    first, second = qwen2(), mistral()
    inputs = {name: x for name, x in batches()["left"].items() if name != "labels"}
    expected = second(**inputs).logits
    enable(first, Mesh(ring=2))
    enable(second, Mesh(ulysses=2), layout="contiguous")
    whole = second(**inputs).logits
    error = (whole - expected)[inputs["attention_mask"].bool()].detach().abs().max()
    with pytest.raises(ValueError, match="whole logits have no way back"):
        whole.sum().backward()
    ids = inputs["input_ids"][:1]
    shapes = [second(ids, logits_to_keep=keep).logits.shape for keep in (3, torch.tensor([4, 1]))]

    prompt = torch.arange(50)[None]
    with torch.no_grad():
        output = first(prompt, use_cache=True)
    cache = next(output[name] for name in ("cache", "past_key_values") if name in output)
    num_held = len(cache.append(0, *torch.empty(2, 0, 2, 8))[0])
    torch.manual_seed(2)
    sampled = first.generate(prompt, max_new_tokens=9, do_sample=True, pad_token_id=0)  # type: ignore[operator]
    return float(error), shapes, num_held, sampled[0].tolist()


def test_two_models_without_labels() -> None:
    errors, shapes, held, sampled = zip(*run_ranks(two_models_without_labels, 2), strict=True)
    assert max(errors) < 1e-4
    assert shapes == ([(1, 3, SIZES["vocab_size"]), (1, 2, SIZES["vocab_size"])],) * 2
    assert sum(held) == 50 and max(held) <= 26  # dealt out in blocks of 2
    assert sampled[0] == sampled[1]


@pytest.mark.parametrize("build", [qwen2, llava])
def test_disable_takes_everything_back(build: Callable[[], PreTrainedModel]) -> None:
    model, batch = build(), batches()["left"]
    before = model(**batch).logits
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    attributes, implementation = set(vars(model)), model.config._attn_implementation
    enable(model, Mesh(alone=True))
    assert model(**batch).logits.shape[:2] == (1, int((batch["labels"] != -100).sum()))  # tokens that bear a loss
    with pytest.raises(ValueError, match=f"{type(model).__name__} is enabled already"):
        enable(model, Mesh(alone=True))
    disable(model)
    assert torch.equal(model(**batch).logits, before)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert (set(vars(model)), model.config._attn_implementation) == (attributes, implementation)
    with pytest.raises(ValueError, match=f"{type(model).__name__} is not enabled"):
        disable(model)


@torch.no_grad()
def scaled(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        parameter.mul_(factor)


@pytest.mark.parametrize("build", [qwen2, llava])
def test_a_deep_copy_runs_and_trains_itself(build: Callable[[], PreTrainedModel]) -> None:
    model, plain, batch = build(), build(), batches()["left"]
    enable(model, Mesh(alone=True))
    before = model(**batch)
    copied = copy.deepcopy(model)
    for changed in (copied, plain):
        scaled(changed, 1.1)
    assert worst_error(loss_and_gradients(copied, batch), loss_and_gradients(plain, batch)) < TOLERANCE
    assert torch.equal(generate(copied, batch), generate(plain, batch))
    assert all(parameter.grad is None for parameter in model.parameters())
    disable(copied)
    assert torch.equal(copied(**batch).logits, plain(**batch).logits)
    assert torch.equal(model(**batch).logits, before.logits)  # and still enabled
    with pytest.raises(ValueError, match=r"a mesh cannot be pickled.*\(model\) before"):
        pickle.dumps(model)


def average_on_ranks(rank: int) -> tuple[float, float]:
    """Errors of an average's loss and of its model's, whose weights have moved since."""
    model, moved, batch = qwen2(), qwen2(), batches()["left"]
    scaled(moved, 1.1)
    expected = [float(plain(**batch).loss.detach()) for plain in (model, moved)]
    enable(model, Mesh(ring=2))
    average = AveragedModel(model)
    scaled(model, 1.1)
    found = [float(each(**batch).loss.detach()) for each in (average, model)]
    return abs(found[0] - expected[0]), abs(found[1] - expected[1])


def test_an_average_of_the_model_is_one_of_its_own() -> None:
    for errors in run_ranks(average_on_ranks, 2):
        assert max(errors) < TOLERANCE


def test_the_loss_goes_first_and_takes_a_head() -> None:
    model, batch = qwen2(), batches()["left"]
    enable(model, Mesh(alone=True))
    output = model(**batch)
    assert list(output)[:2] == ["loss", "logits"]
    as_tuple = model(**batch, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)
    headless = qwen2().base_model
    enable(headless, Mesh(alone=True))
    with pytest.raises(ValueError, match="Qwen2Model has no head that predicts tokens: leave out labels"):
        headless(**batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "diagonal"}, "layout must be one of contiguous, zigzag, balanced, got 'diagonal'"),
        ({"gradients": "max"}, "gradients must be 'sum' or 'mean', got 'max'"),
    ],
)
def test_wrong_options_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        enable(qwen2(), Mesh(alone=True), **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, r"its RoPE \(dynamic\)"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "has layers of linear_attention"),
        ({"is_causal": False}, "looks both ways"),
    ],
)
def test_models_that_need_more_than_their_tokens_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"Qwen2ForCausalLM .*{reason}.* does not do across ranks"):
        enable(qwen2(**changes), Mesh(alone=True))


def test_attention_that_is_not_done_is_refused_by_name() -> None:
    capped = settled(Gemma2ForCausalLM(Gemma2Config(**SIZES)))
    sinks = settled(GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)))
    reasons = {
        capped: ("soft caps", "Gemma2Attention has soft caps"),
        sinks: ("sinks", "GptOssAttention has attention"),
    }
    for model, (reason, message) in reasons.items():
        with pytest.raises(ValueError, match=rf"{type(model).__name__} .*{reason}"):
            enable(model, Mesh(alone=True))
        model.set_attn_implementation("longtake")
        with pytest.raises(ValueError, match=message):
            model(torch.tensor([[1, 2, 3]]))
    model = qwen2(attention_dropout=0.1).train()
    model.set_attn_implementation("longtake")
    with pytest.raises(ValueError, match=r"with probability 0\.1: set attention_dropout to 0"):
        model(torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match=r"dense mask \[1, 1, 3, 3\]"):
        model.eval()(torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 1, 3, 3))
    enable(model, Mesh(alone=True))
    with pytest.raises(ValueError, match="no padding mask"):
        model(torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 1, 3, 3))
    with pytest.raises(ValueError, match="leave out logits_to_keep"):
        model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]]), logits_to_keep=1)
    with pytest.raises(ValueError, match="num_beams=1"):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, num_beams=2, pad_token_id=0)  # type: ignore[operator]


def test_attn_implementation_is_a_name_that_transformers_knows(tmp_path: Path) -> None:
    qwen2().save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="longtake")
    assert model.config._attn_implementation == "longtake"
    assert worst_error(*(loss_and_gradients(m, batches()["rows"]) for m in (model, expected))) < TOLERANCE


def test_encoders_and_a_static_cache() -> None:
    model = settled(BertModel(BertConfig(**SIZES, hidden_dropout_prob=0, attention_probs_dropout_prob=0)))
    ids, mask = torch.arange(22).view(2, 11), torch.ones(2, 11)
    mask[0, 7:] = 0
    hidden, tokens = [], []
    for implementation in ("eager", "longtake"):
        model.set_attn_implementation(implementation)
        hidden.append(model(ids, attention_mask=mask).last_hidden_state[mask.bool()])
        decoder = qwen2()
        decoder.set_attn_implementation(implementation)
        tokens.append(
            generate(decoder, {"input_ids": ids[:1]}, cache_implementation="static", disable_compile=True).tolist()
        )
    assert tokens[0] == tokens[1]
    assert float((hidden[0] - hidden[1]).detach().abs().max()) < 1e-4


def test_a_mask_that_is_no_run_of_keys_is_refused() -> None:
    def strided(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((query - key) % 3 == 0)

    mask = longtake_mask(1, 40, 40, mask_function=strided, allow_is_causal_skip=False, use_vmap=True)
    assert mask is not None
    with pytest.raises(ValueError, match="other keys than one run around its place"):
        _ = mask.plan
