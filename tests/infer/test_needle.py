"""The needle evaluation: what it asks, what it counts as a hit, and what the command writes."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from longtake.bench.cli import main
from longtake.comm.mesh import Mesh
from longtake.infer.haystack import Photographs
from longtake.infer.needle import Trials, evaluate, write_trials
from longtake.infer.needle_command import Request, run
from longtake.infer.needle_images import CHANCE
from longtake.model.batch import Document
from longtake.model.chat import load_tokenizer
from longtake.model.config import ModelConfig
from longtake.model.vision import normalise
from torch import Tensor
from transformers import PreTrainedTokenizerBase

SOURCE = Photographs(names=("chelsea.png",), size=16)
FRAMES, DEPTHS = [2, 3], [0.0, 0.5, 1.0]


@dataclass(eq=False)
class ScriptedEngine:
    """Says script[i] to the i-th question, as far as it may, and remembers what it was asked and shown."""

    config: ModelConfig
    script: Sequence[list[int]]
    mesh: Mesh = field(default_factory=lambda: Mesh(alone=True))
    batches: list[list[Document]] = field(default_factory=list)
    shown: list[Tensor] = field(default_factory=list)

    @property
    def model(self) -> Any:
        return SimpleNamespace(config=self.config)

    def generate(
        self, prompts: Sequence[Document], read: Callable[[int, int], Tensor], *, max_new_tokens: int, stop: int
    ) -> Iterator[list[int | None]]:
        first = sum(map(len, self.batches))
        script = self.script[first : first + len(prompts)]
        self.batches.append(list(prompts))
        num_frames = sum(len(prompt.frame_starts) for prompt in prompts)
        whole = read(0, num_frames)
        assert torch.equal(whole, torch.cat([read(a, min(a + 2, num_frames)) for a in range(0, num_frames, 2)]))
        self.shown += normalise(whole).split([len(prompt.frame_starts) for prompt in prompts])
        lengths = [min(says.index(stop) + 1 if stop in says else max_new_tokens, max_new_tokens) for says in script]
        for step in range(max(lengths)):
            yield [says[step] if step < length else None for says, length in zip(script, lengths, strict=True)]


@pytest.fixture(scope="module")
def tokenizer(start: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(start)


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    folder = tmp_path_factory.mktemp("trials")
    return write_trials(folder, SOURCE, Mesh(alone=True), frames=FRAMES, depths=DEPTHS, needles=2, seed=0)


def questions(trials: Trials) -> list[tuple[str, str]]:
    return [pair for clip in trials.clips if clip.needle for pair in clip.needle.questions]


def scripted(
    start: Path, tokenizer: PreTrainedTokenizerBase, trials: Trials, says: Callable[[int, list[int]], list[int]]
) -> ScriptedEngine:
    """says(i, tokens of the right answer) -> tokens that the engine says to question i."""
    answers = [tokenizer.encode(answer) for _, answer in questions(trials)]
    return ScriptedEngine(ModelConfig.load(start), [says(i, answer) for i, answer in enumerate(answers)])


def test_a_hit_is_the_answer_and_the_end_token_and_no_more(
    start: Path, tokenizer: PreTrainedTokenizerBase, trials: Trials
) -> None:
    stop, [other] = tokenizer.eos_token_id, tokenizer.encode("?")
    assert isinstance(stop, int)
    ways: list[Callable[[list[int]], list[int]]] = [
        lambda answer: [*answer, stop],  # the hit
        lambda answer: [*answer, *[other] * 40],  # no end
        lambda answer: [*answer, other, stop],
        lambda answer: [other, *answer, stop],
        lambda answer: [*answer[:-1], stop],
        lambda answer: [stop],
    ]
    for number, way in enumerate(ways):
        engine: Any = scripted(start, tokenizer, trials, lambda i, answer, way=way: way(answer))
        hits = evaluate(engine, tokenizer, trials)
        assert hits == [[float(number == 0)] * 3] * 2, number


def test_hits_are_counted_in_their_cells(start: Path, tokenizer: PreTrainedTokenizerBase, trials: Trials) -> None:
    stop, per_cell = tokenizer.eos_token_id, 4  # two clips of two questions
    right = [0, 1, 2, 3, 4, 13, 14, 23]
    engine: Any = scripted(
        start,
        tokenizer,
        trials,
        lambda i, answer: [*answer, stop] if i in right else [stop],  # type: ignore[list-item]
    )
    assert evaluate(engine, tokenizer, trials) == [[1.0, 0.25, 0.0], [0.5, 0.0, 0.25]]
    assert len(engine.script) == per_cell * len(FRAMES) * len(DEPTHS)


@pytest.mark.parametrize("tokens_at_once", [1, 150, 100_000])
def test_batches_keep_to_the_token_budget(
    start: Path, tokenizer: PreTrainedTokenizerBase, trials: Trials, tokens_at_once: int
) -> None:
    engine: Any = scripted(start, tokenizer, trials, lambda i, answer: [*answer, tokenizer.eos_token_id])  # type: ignore[list-item]
    assert evaluate(engine, tokenizer, trials, tokens_at_once=tokens_at_once) == [[1.0] * 3] * 2
    lengths = [[len(prompt.input_ids) for prompt in batch] for batch in engine.batches]
    assert sum(map(len, lengths)) == 24
    assert all(sum(batch) <= tokens_at_once or len(batch) == 1 for batch in lengths)
    for batch, following in pairwise(lengths):
        assert sum(batch) + following[0] > tokens_at_once  # no batch is smaller than it must be
    assert {1: 24, 100_000: 1}.get(tokens_at_once, len(lengths)) == len(lengths)


def test_each_question_is_put_about_its_own_clip(
    start: Path, tokenizer: PreTrainedTokenizerBase, trials: Trials
) -> None:
    engine: Any = scripted(start, tokenizer, trials, lambda i, answer: [tokenizer.eos_token_id])  # type: ignore[list-item]
    evaluate(engine, tokenizer, trials, tokens_at_once=200)
    prompts = [prompt for batch in engine.batches for prompt in batch]
    clips = [clip for clip in trials.clips for _ in range(2)]
    for prompt, clip, shown, (question, _) in zip(prompts, clips, engine.shown, questions(trials), strict=True):
        assert question in tokenizer.decode(prompt.input_ids)
        pixels = torch.from_numpy(clip.pixels(SOURCE)).permute(0, 3, 1, 2) / 127.5 - 1
        assert shown.shape == pixels.shape and (shown - pixels).abs().mean() < 0.1  # the coder's loss


def test_the_control_differs_in_the_needles_frame_alone(
    start: Path, tokenizer: PreTrainedTokenizerBase, trials: Trials
) -> None:
    engine: Any = scripted(start, tokenizer, trials, lambda i, answer: [tokenizer.eos_token_id])  # type: ignore[list-item]
    engine.script = engine.script * 2
    request = Request(start, None, FRAMES, DEPTHS, 2, 0, None, True, None, None, 1, 1)
    with patch("longtake.infer.needle_command.load_engine", return_value=(engine, tokenizer)):
        run(request)
    asked = len(engine.shown) // 2
    clips = [clip for clip in trials.clips for _ in range(2)]
    for clip, needle, control in zip(clips, engine.shown[:asked], engine.shown[asked:], strict=True):
        gap = (needle - control).abs().mean((1, 2, 3))
        assert gap.argmax() == clip.position and gap[clip.position] > 0.2
        assert gap.sum() - gap[clip.position] < 0.1 * clip.num_frames  # what the coder makes of a changed neighbour


def command(start: Path, out: Path, *flags: str) -> dict[str, Any]:
    grid = ["--frames", "2,5", "--depths", "0,0.5,1", "--needles", "1", "--seed", "3", "--json", str(out)]
    main(["needle", "--checkpoint", str(start), *grid, *flags])
    return json.loads(out.read_text())


def test_the_command_writes_the_grid_and_the_picture(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "pictures" / "grid.png"
    grid = command(start, tmp_path / "new" / "grid.json", "--control", "--plot", str(picture))
    assert list(grid) == ["frames", "depths", "accuracy", "control", "chance"]
    assert (grid["frames"], grid["depths"], grid["chance"]) == ([2, 5], [0.0, 0.5, 1.0], CHANCE)
    for name in ("accuracy", "control"):
        assert [len(row) for row in grid[name]] == [3, 3]
        assert all(0 <= cell <= 1 for row in grid[name] for cell in row)
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "right answers" in printed and "control" in printed and "0.5" in printed


def test_two_ranks_find_what_one_finds(start: Path, tmp_path: Path) -> None:
    alone = command(start, tmp_path / "one.json")
    assert command(start, tmp_path / "two.json", "--ulysses", "2") == alone
    assert alone["control"] is None


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--frames", "8,x"], 2, "'8,x' is not a list of int"),
        (["--depths", "0,1.5"], 1, "depth 1.5 is not between 0 and 1"),
        (["--frames", "0"], 1, "must be at least 1, not 0"),
        (["--needles", "0"], 1, "must be at least 1, not 0"),
    ],
)
def test_impossible_grids_are_refused(
    start: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["needle", "--checkpoint", str(start), *flags])
    assert ended.value.code == code
    assert message in capsys.readouterr().err
