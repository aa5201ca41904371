"""`longtake generate`: text as it comes, on any number of ranks, and one line for what cannot be read."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from longtake.bench.cli import main
from longtake.comm.mesh import Mesh
from longtake.infer.engine import Engine, KeyValueCache
from longtake.infer.generate import Request, decode_pieces, load_engine, stream
from longtake.model.media import read_frames, sample_frames
from longtake.model.official import load_official
from longtake.model.precision import DTYPES, usual_dtype
from transformers import PreTrainedTokenizerBase

from tests.media_files import moving_square, truncate, write_audio, write_video
from tests.model.official_files import write_official

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def loaded(start: Path) -> tuple[Engine, PreTrainedTokenizerBase]:
    return load_engine(start, Mesh(alone=True))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "square.mp4", moving_square(12))


def request(start: Path, video: Path | None) -> Request:
    how: dict[str, int] = {"frames": 5, "max_new_tokens": 24, "temperature": 0, "seed": 0, "ring": 1, "ulysses": 1}
    return Request(start, None, video, "what is red ?", **how)


@pytest.mark.parametrize("text", ["what is red ?", "été: 中文 🎬 blue", " two  spaces\n.", "🎬", ""])
def test_pieces_are_whole_characters_that_join_to_the_text(
    loaded: tuple[Engine, PreTrainedTokenizerBase], text: str
) -> None:
    tokenizer = loaded[1]
    ids = tokenizer.encode(text)
    pieces = list(decode_pieces(tokenizer, ids))
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece or piece == "" for piece in pieces)


def test_a_piece_comes_with_the_token_that_completes_it(loaded: tuple[Engine, PreTrainedTokenizerBase]) -> None:
    tokenizer, taken = loaded[1], []
    ids = tokenizer.encode("a中b")  # three bytes, of which no two are one token here
    pieces = decode_pieces(tokenizer, (taken.append(token) or token for token in ids))
    assert [(piece, len(taken)) for piece in pieces] == [("a", 1), ("中", 4), ("b", 5)]


def test_a_character_that_stays_incomplete_is_shown_at_the_end(loaded: tuple[Engine, PreTrainedTokenizerBase]) -> None:
    tokenizer = loaded[1]
    ids = tokenizer.encode("a中")[:-1]
    assert "".join(decode_pieces(tokenizer, ids)) == tokenizer.decode(ids) == "a\ufffd"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_answer_depends_on_the_video_and_the_frames_taken(
    loaded: tuple[Engine, PreTrainedTokenizerBase], start: Path, video: Path, temperature: float
) -> None:
    asked = replace(request(start, video), temperature=temperature)
    answers = [
        "".join(stream(*loaded, each)) for each in (asked, asked, replace(asked, video=None), replace(asked, frames=2))
    ]
    assert answers[0] == answers[1]
    assert len(set(answers)) == 3


def test_frames_are_taken_from_the_whole_video(
    loaded: tuple[Engine, PreTrainedTokenizerBase], start: Path, video: Path
) -> None:
    with patch("longtake.infer.generate.read_frames", wraps=read_frames) as read:
        list(stream(*loaded, request(start, video)))
    read.assert_called_once_with(video, sample_frames(12, 5), size=16)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("stored", list(DTYPES))
def test_parameters_and_cache_have_the_dtype_that_is_asked_for(tmp_path: Path, stored: str, dtype: str) -> None:
    write_official(tmp_path / "in", dtype=DTYPES[stored])
    main(["convert", str(tmp_path / "in"), str(tmp_path / "ours")])
    expected, tokenizer = load_official(tmp_path / "in", dtype=None)
    for checkpoint in (tmp_path / "in", tmp_path / "ours"):
        engine, _ = load_engine(checkpoint, Mesh(alone=True), dtype=dtype)
        parameters = dict(engine.model.named_parameters())
        assert all(torch.equal(parameters[name], p.to(DTYPES[dtype])) for name, p in expected.named_parameters())
        assert {p.dtype for p in parameters.values()} == {DTYPES[dtype]}
        with patch("longtake.infer.engine.KeyValueCache", wraps=KeyValueCache) as made:
            assert "".join(stream(engine, tokenizer, request(checkpoint, None)))
        made.assert_called_once()
        assert KeyValueCache(*made.call_args[0]).keys.dtype == DTYPES[dtype]


def test_without_a_dtype_the_device_says_it(start: Path) -> None:
    assert (usual_dtype("cuda"), usual_dtype("cpu")) == ("bfloat16", "float32")
    for dtype in ("bfloat16", "float32"):
        with patch("longtake.infer.generate.usual_dtype", side_effect={"cpu": dtype}.__getitem__):
            engine, _ = load_engine(start, Mesh(alone=True))
        assert {p.dtype for p in engine.model.parameters()} == {DTYPES[dtype]}


@pytest.mark.parametrize("command", ["generate", "needle"])
def test_the_commands_take_a_dtype(start: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    module = {"generate": "generate", "needle": "needle_command"}[command]
    prompt = ["--prompt", "what ?"] if command == "generate" else []
    with (
        patch(f"longtake.infer.{module}.load_engine", side_effect=ValueError("far enough")) as load,
        pytest.raises(SystemExit),
    ):
        main([command, "--checkpoint", str(start), *prompt, "--dtype", "float16"])
    assert load.call_args.kwargs == {"dtype": "float16"}
    with pytest.raises(SystemExit) as ended:
        main([command, "--checkpoint", str(start), *prompt, "--dtype", "int8"])
    assert ended.value.code == 2
    assert "--dtype: invalid choice: 'int8' (choose from" in capsys.readouterr().err


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longtake.bench.cli", "generate", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("grid", [(), ("--ring", "2")])
def test_the_command_prints_the_answer(
    loaded: tuple[Engine, PreTrainedTokenizerBase], start: Path, video: Path, grid: tuple[str, ...]
) -> None:
    asked = request(start, video)
    done = run(
        *("--checkpoint", start, "--video", video, "--prompt", asked.prompt),
        *("--frames", "5", "--max-new-tokens", "24", *grid),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(stream(*loaded, asked)) + "\n"
    assert len(done.stdout) > 10


def bad_files(folder: Path, start: Path) -> dict[str, tuple[Path, Path, str]]:
    """Checkpoint, video, and what the message must say."""
    good = write_video(folder / "good.mp4", moving_square(12))
    cut = truncate(write_video(folder / "cut.mp4", moving_square(12)), keep=0.6)
    sound, missing = write_audio(folder / "sound.mp4"), folder / "missing"
    return {
        "missing checkpoint": (missing, good, f"{missing} is not a checkpoint"),
        "not a checkpoint": (folder, good, f"{folder} is not a checkpoint"),
        "missing video": (start, missing, f"{missing}: no such file"),
        "truncated video": (start, cut, f"{cut}: "),
        "audio alone": (start, sound, f"{sound}: no video in it, only audio"),
    }


@pytest.mark.parametrize("grid", [[], ["--ring", "2"]], ids=["1 rank", "2 ranks"])
@pytest.mark.parametrize("command", [["generate", "--prompt", "what ?"], ["needle"]], ids=["generate", "needle"])
def test_bad_files_are_named_in_one_line(
    tmp_path: Path, start: Path, capsys: pytest.CaptureFixture[str], command: list[str], grid: list[str]
) -> None:
    for case, (checkpoint, video, message) in bad_files(tmp_path, start).items():
        with pytest.raises(SystemExit) as ended:
            main([*command, "--checkpoint", str(checkpoint), "--video", str(video), *grid])
        printed = capsys.readouterr()
        assert ended.value.code == 1 and printed.out == "", case
        assert printed.err.startswith(f"longtake {command[0]}: {message}") and printed.err.count("\n") == 1, case


def test_a_video_that_one_rank_cannot_decode_ends_all_ranks(tmp_path: Path, start: Path) -> None:
    path = write_video(tmp_path / "damaged.mp4", moving_square(40, size=64), options={"crf": "1", "g": "1"})
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : -4000] = bytes(len(content) // 2 - 4000)  # the second half of the pictures
    path.write_bytes(content)
    done = run("--checkpoint", start, "--video", path, "--prompt", "what ?", "--ring", "2")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"longtake generate: {path}: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frames", "0"], "cannot take 0 frames of 12"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--temperature", "-1"], "temperature must be at least 0, got -1"),
        (["--ring", "0"], "world_size 0"),
        (["--prompt", "<video> and this ?"], "2 placeholders for 1 media"),
    ],
)
def test_impossible_numbers_are_named(
    start: Path, video: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--checkpoint", str(start), "--video", str(video), "--prompt", "what ?", *flags])
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("seed", [-1, 2**63])
@pytest.mark.parametrize("command", [["generate", "--prompt", "what ?"], ["needle"]], ids=["generate", "needle"])
def test_a_seed_that_cannot_be_is_refused_by_its_flag(
    start: Path, capsys: pytest.CaptureFixture[str], command: list[str], seed: int
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--checkpoint", str(start), "--seed", str(seed)])
    assert ended.value.code == 2
    assert f"--seed: must be at least 0 and less than 2**63, got {seed}" in capsys.readouterr().err


def test_an_unknown_flag_is_bad_usage(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--checkpoint", str(start), "--prompt", "what ?", "--colour", "red"])
    assert ended.value.code == 2
    assert "--colour" in capsys.readouterr().err
