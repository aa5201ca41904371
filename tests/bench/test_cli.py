"""The `longtake` command: what it lists, and how it ends."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from longtake.bench.cli import BENCHMARKS, COMMANDS, main


def ends_with(code: int, *argv: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == code


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([flag])
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[2:]] == list(COMMANDS)


def test_every_command_and_benchmark_has_its_module() -> None:
    modules = [module for module, _ in COMMANDS.values() if module] + [f"longtake.bench.{name}" for name in BENCHMARKS]
    assert not [module for module in modules if find_spec(module) is None]


@pytest.mark.parametrize("command", ["demo", "train", "generate", "needle"])
def test_each_command_has_a_help_of_its_own(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    ends_with(0, command, "--help")
    printed = capsys.readouterr().out
    assert f"longtake {command}" in printed and "--ring" in printed


def test_the_help_of_bench_names_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in BENCHMARKS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no command"),
        (["frobnicate"], "unknown command 'frobnicate'"),
        (["bench"], "no benchmark"),
        (["bench", "nothing"], "unknown benchmark 'nothing'"),
        (["generate", "--prompt", "what ?"], "--checkpoint"),
    ],
)
def test_bad_usage_ends_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    ends_with(2, *argv)
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""


@pytest.mark.parametrize("error", [ValueError("row 3: no such thing"), FileNotFoundError("row 3: no such thing")])
def test_a_users_mistake_ends_with_one_line_and_1(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with patch("importlib.import_module", return_value=SimpleNamespace(main=raising(error))):
        ends_with(1, "train")
    assert capsys.readouterr().err == "longtake train: row 3: no such thing\n"


def test_a_mistake_of_ours_is_not_hidden() -> None:
    with (
        patch("importlib.import_module", return_value=SimpleNamespace(main=raising(RuntimeError("a bug")))),
        pytest.raises(RuntimeError, match="a bug"),
    ):
        main(["train"])


def test_ctrl_c_ends_with_130_and_no_word(capsys: pytest.CaptureFixture[str]) -> None:
    with patch("importlib.import_module", return_value=SimpleNamespace(main=raising(KeyboardInterrupt()))):
        ends_with(130, "train")
    assert capsys.readouterr().err == ""


def raising(error: BaseException):
    def body(argv: list[str]) -> None:
        raise error

    return body


@pytest.mark.parametrize("command", [["generate", "--prompt", "what ?"], ["needle"]])
def test_a_grid_of_another_size_than_torchruns_world_is_refused_before_any_collective(
    start: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)  # there is no one at this port: a collective would wait
    ends_with(1, *command, "--checkpoint", str(start), "--ring", "3", "--ulysses", "2")
    name, error = command[0], capsys.readouterr().err
    assert error == f"longtake {name}: torchrun started 4 ranks, but the grid has 6\n"
