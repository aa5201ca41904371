"""What a rank sends and holds before the decoder of a vision-language model of Transformers: its own part."""

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import pytest
from longtake.comm.mesh import Mesh
from longtake.model.huggingface import enable
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from tests.model.test_huggingface_vision import CLIP, SMALL, batch, blocks
from tests.model.tiny_transformers import IMAGE, SIZES, VIDEO, VISION, gemma3, llava
from tests.ranks import run_ranks

FAMILIES = (*VISION, "gemma3")
GENERATE = ("llava", "llava_onevision", "qwen3_vl")
RANKS = 4


class Largest(TorchDispatchMode):
    """Elements of the largest floating-point tensor that comes up, while `on`, but views of `given`."""

    def __init__(self, given: Iterable[Any]) -> None:
        super().__init__()
        self.on, self.elements = True, 0
        self.given = {x.untyped_storage().data_ptr() for x in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.on:
            tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
            new = [x.numel() for x in tensors if x.untyped_storage().data_ptr() not in self.given]
            self.elements = max([self.elements, *new])
        return output


def images(family: str) -> dict[str, Any]:
    rows = [[SMALL] * 12] if family in ("llava", "internvl", "gemma3") else [[CLIP, SMALL, CLIP, SMALL, CLIP]]
    return blocks(rows) if family == "gemma3" else batch(rows, family=family)


def before_decoder(model: PreTrainedModel, mesh: Mesh, run: partial[Any]) -> tuple[int, int]:
    """Bytes that this rank sends until the decoder first runs, and the largest tensor's elements till then, but inside
    the encoder, which has more patches than tokens."""
    given = [x for x in (*model.parameters(), *run.keywords.values()) if isinstance(x, Tensor)]
    largest, start, sent = Largest(given), mesh.transport.bytes_sent["sp"], []
    base = cast(Any, model.base_model)
    encoder, decoder = base.visual if hasattr(base, "visual") else base.vision_tower, cast(Any, model.get_decoder())

    def turn(on: bool, *_: Any) -> None:
        largest.on = on and not sent

    def stop(*_: Any) -> None:
        largest.on = False
        sent.append(mesh.transport.bytes_sent["sp"] - start)

    handles = [
        encoder.register_forward_pre_hook(partial(turn, False)),
        encoder.register_forward_hook(partial(turn, True)),
        decoder.register_forward_pre_hook(stop),
    ]
    with largest:
        run()
    for handle in handles:
        handle.remove()
    return sent[0], largest.elements


def costs_on_ranks(rank: int) -> dict[str, tuple[int, int]]:
    mesh, costs = Mesh(ring=2, ulysses=2), {}
    for family in FAMILIES:
        model, inputs = VISION.get(family, gemma3)(), images(family)
        enable(model, mesh)
        costs[f"{family}, training"] = before_decoder(model, mesh, partial(model, **inputs))
        if family in GENERATE:
            prompt = {name: x for name, x in inputs.items() if name != "labels"}
            prefill = partial(cast(Any, model).generate, **prompt, max_new_tokens=1, pad_token_id=0)
            costs[f"{family}, generate"] = before_decoder(model, mesh, prefill)
    return costs


def test_no_rank_sends_or_holds_more_than_its_part() -> None:
    """Features are sent once, where a gather sends them to three; none is as long as all features, or the batch."""
    ranks = run_ranks(costs_on_ranks, RANKS)
    assert len(ranks[0]) == len(FAMILIES) + len(GENERATE)
    for case in ranks[0]:
        family, ids = case.split(",")[0], images(case.split(",")[0])["input_ids"]
        elements = int(((ids == IMAGE) | (ids == VIDEO)).sum()) * SIZES["hidden_size"]
        layers = 2 if family.startswith("qwen3") else 1  # deepstack
        sent, largest = zip(*(costs[case] for costs in ranks), strict=True)
        gathered = (RANKS - 1) * 4 * elements * layers
        assert 0 < sum(sent) < gathered / 2.9, case
        assert max(largest) < elements < ids.numel() * SIZES["hidden_size"], case


def test_whole_embeddings_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: an encoder that is not known, and embeddings as long as the batch."""
    monkeypatch.setattr("longtake.model.huggingface_vision.FAMILIES", {})
    model, mesh, inputs = llava(), Mesh(alone=True), images("llava")
    with pytest.warns(UserWarning, match="its vision encoder is not known here and runs whole on every rank"):
        enable(model, mesh)
    sent, largest = before_decoder(model, mesh, partial(model, **inputs))
    assert (sent, largest) == (0, inputs["input_ids"].numel() * SIZES["hidden_size"])
